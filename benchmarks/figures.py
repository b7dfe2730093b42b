"""Where a benchmark's figures go: benchmarks/results/<name>.json, and the machine they are from."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from embedkit.atomic import published

__all__ = ["machine", "save"]

_FOLDER = Path(__file__).parent / "results"
_PACKAGES = ("torch", "onnxruntime", "faiss-cpu", "numpy", "pillow", "pytorch-metric-learning")


def machine() -> dict[str, Any]:
    """Processor, cores and package versions: what a figure must be read with."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def save(name: str, figures: dict[str, Any]) -> Path:
    """Write the figures of one run; the former ones are replaced."""
    path = _FOLDER / f"{name}.json"
    with published(path) as temporary:
        temporary.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"-> {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return path


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
