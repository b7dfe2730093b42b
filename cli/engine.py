"""The engine half of `embedkit export --trt`, for a run that was just exported or an ONNX file."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedkit.cli.display import Display
from embedkit.cli.index import from_here
from embedkit.errors import UsageError

__all__ = ["EngineWish", "build", "export_engine", "wish"]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class EngineWish:
    """The options of `embedkit.export.build_engine`."""

    gpu: str | None
    batch: tuple[int, int, int]
    workspace: int
    version_compatible: bool
    hardware_compatible: bool


def wish(
    trt: bool,
    gpu: str | None,
    batch: str | None,
    workspace: str | None,
    version_compatible: bool,
    hardware_compatible: bool,
) -> EngineWish | None:
    """What was asked for; None without ``--trt``.

    Raises:
        UsageError: An option of an engine without ``--trt``, or one that cannot be read.
    """
    given = {
        "--gpu": gpu,
        "--batch": batch,
        "--workspace": workspace,
        "--version-compatible": version_compatible,
        "--hardware-compatible": hardware_compatible,
    }
    names = [name for name, value in given.items() if value]
    if not trt and names:
        belong = "belongs" if len(names) == 1 else "belong"
        raise UsageError(f"{' and '.join(names)} {belong} to --trt", hint="embedkit export --trt")
    if not trt:
        return None
    return EngineWish(
        gpu,
        _batch(batch or "1:8:32"),
        _size(workspace or "1G"),
        version_compatible,
        hardware_compatible,
    )


def build(onnx: Path, folder: Path, asked: EngineWish, display: Display) -> dict[str, Any]:
    """Build the engine of an ONNX file, try it where its GPU is here, say so; its JSON."""
    from embedkit.export import build_engine, try_engine

    info = build_engine(
        onnx,
        folder / f"{onnx.stem}.engine",
        gpu=asked.gpu,
        batch=asked.batch,
        workspace=asked.workspace,
        version_compatible=asked.version_compatible,
        hardware_compatible=asked.hardware_compatible,
    )
    cosine = try_engine(info)
    display.note(
        "engine",
        f"{from_here(info.path)} ({info.size / 1e6:.1f} MB), {info.flavour} {info.version} for "
        f"compute capability {info.compute_capability}, batch "
        f"{':'.join(map(str, asked.batch))}; "
        + ("built, not run" if cosine is None else f"self-test cosine {cosine:.5f}"),
    )
    return {**info.to_json(), "self_test": cosine}


def export_engine(
    onnx: Path, output: Path | None, asked: EngineWish | None, display: Display
) -> None:
    """The whole command for an ONNX file: only its engine, on the machine that will run it."""
    from embedkit.runtime import read_contract

    if asked is None:
        raise UsageError(
            f"{from_here(onnx)} is exported already",
            hint=f"embedkit export {_typed(onnx)} --trt   (builds its TensorRT engine)",
        )
    contract = read_contract(onnx)
    display.note("model", f"{contract.name}: {from_here(onnx)}, {contract.embedding_dim} numbers")
    engine = build(onnx, output if output is not None else onnx.parent, asked, display)
    there = "" if engine["self_test"] is not None else "   (on a machine with that GPU)"
    display.note("next", f"embedkit eval {_typed(Path(engine['path']))} ./photos{there}")
    display.document(
        "export",
        {
            "run": None,
            "model": str(onnx),
            "size": onnx.stat().st_size,
            "fingerprint": contract.fingerprint,
            "gate": None,
            "engine": engine,
        },
    )


def _typed(path: Path) -> str:
    return shlex.quote(from_here(path))


def _batch(text: str) -> tuple[int, int, int]:
    parts = text.split(":")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise UsageError(f"--batch takes least:usual:largest, got {text!r}", hint="--batch 1:8:32")
    least, usual, largest = map(int, parts)
    return least, usual, largest


def _size(text: str) -> int:
    """``2G`` -> bytes."""
    found = re.fullmatch(r"(\d{1,9})([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE | re.ASCII)
    if found is None or not int(found[1]):
        raise UsageError(f"--workspace takes a size, got {text!r}", hint="--workspace 2G")
    return int(found[1]) * _UNITS[found[2].upper()]
