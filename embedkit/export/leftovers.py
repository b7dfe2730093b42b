"""Files of an earlier export that no longer belong to the model beside them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from embedkit.errors import EmbedKitError
from embedkit.runtime import read_contract

__all__ = ["remove_leftovers"]

_REDUCED = ("model.fp16", "model.int8", "model.int8-trt")


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove what an earlier export of another network left beside ``model.onnx``; what went.

    A reduced precision stays when its fingerprint is that of ``model.onnx``; an engine when it was
    built from the ONNX file of its name as that now is. Only names that `embedkit export` writes
    are looked at.
    """
    fingerprint = read_contract(folder / "model.onnx").fingerprint
    foreign = [folder / f"{stem}.onnx" for stem in _REDUCED]
    removed = [path for path in foreign if path.exists() and _fingerprint(path) != fingerprint]
    for path in removed:
        path.unlink()
    for stem in ("model", *_REDUCED):
        source, engine = folder / f"{stem}.onnx", folder / f"{stem}.engine"
        sidecar = folder / f"{stem}.engine.json"
        if engine.exists() and source.exists() and _built_from(sidecar) == _sha256(source):
            continue
        # The engine goes first: what is left of the two is refused, so no moment lies.
        for path in (engine, sidecar):
            if path.exists():
                path.unlink()
                removed.append(path)
    return removed


def _fingerprint(model: Path) -> str | None:
    try:
        return read_contract(model).fingerprint
    except EmbedKitError:
        return None  # damaged, so it is nobody's


def _built_from(sidecar: Path) -> str | None:
    try:
        return str(json.loads(sidecar.read_text(encoding="utf-8"))["onnx_sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
