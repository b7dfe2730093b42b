"""The GPU checks run from a plain checkout, with little installed but torch and onnxruntime."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]

# What a CUDA image with torch, torchvision, onnx, onnxruntime, typer, rich and timm has not.
_WITHOUT = """
import sys
for name in (
    "faiss", "imagehash", "onnxscript", "optuna", "pyarrow", "pytorch_metric_learning", "scipy",
    "sklearn", "tensorrt", "tensorrt_rtx", "hypothesis", "pytest_timeout", "starlette", "xdist",
):
    sys.modules[name] = None  # as if it were not installed
"""
_COLLECT = """
import pytest
sys.exit(pytest.main(["-m", "gpu", "--collect-only", "-q"]))
"""
_PARTS = """
import json, torch
from benchmarks import gpu
parts = (gpu.trainer, gpu.engines, gpu.pipeline)
print(json.dumps({part.__name__: list(part(gpu.TOY, torch.device("cpu"))) for part in parts}))
"""


def _run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT + code],
        capture_output=True,
        text=True,
        check=False,
        cwd=_ROOT,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_marked_tests_are_found() -> None:
    found = [line for line in _run(_COLLECT).splitlines() if "::" in line]
    assert {line.partition("::")[0] for line in found} == {
        "tests/gpu/test_gpu.py",
        "tests/runtime/test_tensorrt.py",
        "tests/train/test_trainer.py",
    }


def test_every_part_of_the_benchmark_that_would_need_more_finds_another_way() -> None:
    found = json.loads(_run(_PARTS).splitlines()[-1])
    assert all(row["images/s"] > 0 for row in found["trainer"])
    told = {row["case"]: row for row in found["engines"]}
    assert "onnxscript, which is not installed" in told["benchmark"]["skipped"]
    for case in ("onnxruntime fp32", "onnxruntime fp16"):
        assert told[case]["least cosine"] > 0.999
    assert "tensorrt" in told["tensorrt"]["skipped"]
    assert found["pipeline"][-1]["images/s"] > 0
