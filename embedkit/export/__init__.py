"""From a trained network to files that run without it, each checked before it is published.

The public names are resolved on first use: building an engine from an ONNX file needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedkit.export.calibration import (
        Calibration,
        calibrate,
    )
    from embedkit.export.gate import (
        BatchParity,
        GateReport,
        HeldOut,
        Thresholds,
        check_export,
        compare,
        export_checked,
        publish_checked,
        read_held_out,
        sample,
    )
    from embedkit.export.ladder import (
        QUANT,
        Ladder,
        Rung,
        only_fp32,
        reduce_precision,
    )
    from embedkit.export.leftovers import (
        remove_leftovers,
    )
    from embedkit.export.onnx import (
        export_onnx,
    )
    from embedkit.export.tensorrt import (
        EngineInfo,
        build_engine,
        try_engine,
    )

__all__ = [
    "BatchParity",
    "Calibration",
    "EngineInfo",
    "GateReport",
    "HeldOut",
    "Ladder",
    "QUANT",
    "Rung",
    "Thresholds",
    "build_engine",
    "calibrate",
    "check_export",
    "compare",
    "export_checked",
    "export_onnx",
    "only_fp32",
    "publish_checked",
    "read_held_out",
    "reduce_precision",
    "remove_leftovers",
    "sample",
    "try_engine",
]

_HOMES = {
    "calibration": (
        "Calibration",
        "calibrate",
    ),
    "gate": (
        "BatchParity",
        "GateReport",
        "HeldOut",
        "Thresholds",
        "check_export",
        "compare",
        "export_checked",
        "publish_checked",
        "read_held_out",
        "sample",
    ),
    "ladder": (
        "QUANT",
        "Ladder",
        "Rung",
        "only_fp32",
        "reduce_precision",
    ),
    "leftovers": ("remove_leftovers",),
    "onnx": ("export_onnx",),
    "tensorrt": (
        "EngineInfo",
        "build_engine",
        "try_engine",
    ),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"embedkit.export.{home}"), name)
    raise AttributeError(f"module 'embedkit.export' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
