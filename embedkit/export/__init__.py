"""From a trained network to files that run without it, each checked before it is published."""

from __future__ import annotations

from embedkit.export.gate import (
    BatchParity,
    GateReport,
    Thresholds,
    check_export,
    export_checked,
    sample,
)
from embedkit.export.onnx import export_onnx
from embedkit.export.tensorrt import EngineInfo, build_engine

__all__ = [
    "BatchParity",
    "EngineInfo",
    "GateReport",
    "Thresholds",
    "build_engine",
    "check_export",
    "export_checked",
    "export_onnx",
    "sample",
]
