"""Vectors on the disk: one ``.npy`` with a list of its rows beside it, or one Parquet file.

Both appear whole or not at all, and are written a block at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from embedkit.atomic import published
from embedkit.errors import ImageError, MissingExtraError
from embedkit.runtime import ModelContract
from embedkit.scale.journal import Line

__all__ = [
    "FORMATS",
    "beside",
    "vectors_shape",
    "write_failures",
    "write_npy",
    "write_parquet",
]

FORMATS = ("npy", "parquet")
_BLOCK = 4096


def beside(output: Path, ending: str) -> Path:
    """The file that belongs to an output: ``vectors.npy`` -> ``vectors.jsonl``."""
    return output.with_name(output.stem + ending)


def vectors_shape(output: Path, count: int, contract: ModelContract) -> tuple[int, ...]:
    """``(count, D)``; of K vectors per picture in ``.npy`` ``(count, K, D / K)``.

    A Parquet file has them side by side.
    """
    dim, each = contract.embedding_dim, contract.vectors
    several = each > 1 and output.suffix.lower() == ".npy"
    return (count, each, dim // each) if several else (count, dim)


def write_npy(output: Path, lines: Iterator[Line], count: int, contract: ModelContract) -> None:
    """float32 of `vectors_shape`, and the list: line i says path, label and model of row i.

    The list is written last and an old one is removed first: where both are, they are of one run.

    Args:
        output: Replaced when there; the list has its name with ``.jsonl``.
        lines: Exactly `count` of them.
        count: Also 0.
        contract: Of the model.

    Raises:
        EmbedKitError: Something cannot be written.
    """
    listing = beside(output, ".jsonl")
    shape = vectors_shape(output, count, contract)
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    with (
        published(listing) as names,
        names.open("w", encoding="ascii") as list_file,
        published(output) as vectors,
        vectors.open("wb") as vector_file,
    ):
        np.lib.format.write_array_header_1_0(vector_file, header)
        written = 0
        while block := list(islice(lines, _BLOCK)):
            for line in block:
                row = {"path": line.path, "label": line.label, "model": contract.fingerprint}
                list_file.write(json.dumps(row) + "\n")
            np.stack([line.vector for line in block]).tofile(vector_file)
            written += len(block)
        assert written == count, f"{count} lines were promised, {written} came"
        listing.unlink(missing_ok=True)


def write_parquet(output: Path, lines: Iterator[Line], contract: ModelContract) -> None:
    """One row a picture: path, label, vector (a list of fixed length), model (its fingerprint).

    The file's metadata says under ``embedkit`` which model it was. Names that are no UTF-8 have
    their odd bytes as ``\\xe9``.

    Raises:
        MissingExtraError: pyarrow is not installed.
        EmbedKitError: It cannot be written.
    """
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ModuleNotFoundError as error:
        raise MissingExtraError("Parquet", package="pyarrow", extra="scale") from error
    said = {
        "fingerprint": contract.fingerprint,
        "name": contract.name,
        "metric": contract.metric,
        "normalizes": contract.normalizes,
        "embedding_dim": contract.embedding_dim,
        **({"vectors": contract.vectors} if contract.vectors > 1 else {}),
    }
    schema = pyarrow.schema(
        [
            ("path", pyarrow.string()),
            ("label", pyarrow.string()),
            ("vector", pyarrow.list_(pyarrow.float32(), contract.embedding_dim)),
            ("model", pyarrow.dictionary(pyarrow.int32(), pyarrow.string())),
        ],
        metadata={"embedkit": json.dumps(said)},
    )
    with (
        published(output) as file,
        parquet.ParquetWriter(file, schema, compression="zstd") as writer,
    ):
        while block := list(islice(lines, _BLOCK)):
            writer.write_table(_table(pyarrow, block, contract, schema))


def write_failures(file: Path, failures: Iterator[tuple[str, ImageError]]) -> None:
    """One JSON line per picture that failed; no file where none did.

    Raises:
        EmbedKitError: It cannot be written.
    """
    first = next(failures, None)
    if first is None:
        file.unlink(missing_ok=True)
        return
    with published(file) as unfinished, unfinished.open("w", encoding="ascii") as out:
        for path, error in (first, *failures):
            row = {"path": path, "code": error.code, "reason": error.reason}
            out.write(json.dumps(row) + "\n")


def _table(pyarrow: Any, block: list[Line], contract: ModelContract, schema: Any) -> Any:
    flat = np.concatenate([line.vector for line in block])
    columns = [
        pyarrow.array([_utf8(line.path) for line in block]),
        pyarrow.array([_utf8(line.label) for line in block]),
        pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(flat), contract.embedding_dim),
        pyarrow.DictionaryArray.from_arrays(
            pyarrow.array(np.zeros(len(block), np.int32)), pyarrow.array([contract.fingerprint])
        ),
    ]
    return pyarrow.Table.from_arrays(columns, schema=schema)


def _utf8(text: str) -> str:
    """`text` as UTF-8 can hold it."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
