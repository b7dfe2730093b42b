"""What a checkpoint says, read without PyTorch: its header by hand, its tensors as bytes."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from embedkit.errors import MismatchError, UsageError

__all__ = ["CheckpointFile", "read_checkpoint_file"]

_KEY, _SCHEMA = "embedkit.checkpoint", "embedkit.checkpoint/1"
_LARGEST_HEADER = 100_000_000  # as the safetensors library has it
_CHUNK = 1 << 20
# Bytes of a number, and what PyTorch, whose words the digest is over, calls its kind.
_KINDS = {
    "F64": (8, "torch.float64"),
    "F32": (4, "torch.float32"),
    "F16": (2, "torch.float16"),
    "BF16": (2, "torch.bfloat16"),
    "I64": (8, "torch.int64"),
    "I32": (4, "torch.int32"),
    "I16": (2, "torch.int16"),
    "I8": (1, "torch.int8"),
    "U8": (1, "torch.uint8"),
    "BOOL": (1, "torch.bool"),
}


@dataclass(frozen=True)
class CheckpointFile:
    """A checkpoint whose tensors are those that were written.

    Attributes:
        state: The JSON document that the trainer put in.
        numbers: How many numbers the parts hold: ``network``, ``loss``, ``optimizer``.
    """

    state: dict[str, Any]
    numbers: dict[str, int]


def read_checkpoint_file(path: Path) -> CheckpointFile:
    """Read and check a ``.safetensors`` file that a training wrote.

    Raises:
        UsageError: It cannot be read.
        MismatchError: No safetensors file, no checkpoint of embedkit, cut short, or damaged.

    Cost: one pass over the file.
    """
    try:
        with path.open("rb") as file:
            return _read(file, path)
    except OSError as error:
        raise UsageError(f"{path} cannot be read", facts=error.strerror) from error


def _read(file: BinaryIO, path: Path) -> CheckpointFile:
    size = path.stat().st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _LARGEST_HEADER):
        raise _damaged(path, f"a header of {length:,} bytes in a file of {size:,}")
    try:
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        if _KEY not in metadata:
            raise MismatchError(
                f"{path} is a safetensors file, but no checkpoint of embedkit",
                facts=f"its metadata has no {_KEY!r}",
            )
        document = json.loads(metadata[_KEY])
        schema, digest, state = document["schema"], document["digest"], document["state"]
        tensors = {name: _tensor(entry, size - 8 - length) for name, entry in header.items()}
        if not isinstance(state, dict):
            raise TypeError("its state is no object")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if schema != _SCHEMA:
        raise MismatchError(
            f"the checkpoint {path} was written by another embedkit",
            facts=f"it is {schema!r}, this embedkit reads {_SCHEMA!r}",
        )
    hasher = hashlib.blake2b(digest_size=16)
    numbers: dict[str, int] = {}
    for name in sorted(tensors):
        kind, shape, start, end = tensors[name]
        hasher.update(f"{name} {kind} {shape}\n".encode())
        file.seek(8 + length + start)
        for at in range(start, end, _CHUNK):
            hasher.update(file.read(min(_CHUNK, end - at)))
        part = name.partition("/")[0]
        numbers[part] = numbers.get(part, 0) + math.prod(shape)
    if hasher.hexdigest() != digest:
        raise _damaged(path, "its tensors are not those that were written")
    return CheckpointFile(state, numbers)


def _tensor(entry: Any, room: int) -> tuple[str, tuple[int, ...], int, int]:
    """Kind, shape, first and last byte of one tensor.

    Raises:
        ValueError: They do not fit each other or the file.
    """
    width, kind = _KINDS[entry["dtype"]]
    shape = tuple(int(side) for side in entry["shape"])
    start, end = (int(place) for place in entry["data_offsets"])
    if min(shape, default=0) < 0 or not 0 <= start <= end <= room:
        raise ValueError("a tensor lies outside the file")
    if end - start != width * math.prod(shape):
        raise ValueError("a tensor's shape does not fit its bytes")
    return kind, shape, start, end


def _damaged(path: Path, facts: str) -> MismatchError:
    return MismatchError(f"the checkpoint {path} is damaged", facts=facts)
