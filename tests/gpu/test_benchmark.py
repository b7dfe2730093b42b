"""The GPU benchmark runs at a toy size, on the CPU too, and names what it leaves out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu


def test_every_part_runs_and_says_what_is_skipped() -> None:
    found = gpu.measure(gpu.TOY, torch.device("cpu"))
    parts = ("training", "loss_steps", "chunks", "engines", "pipeline")
    assert all(found[part] for part in parts)
    assert not [part for part in parts if part in found["skipped"]]
    (row,) = found["training"]
    assert row["of bound"] > 0
    assert all(0 <= row["difference"] < 0.2 for row in found["chunks"])
    told = {row["case"]: row for row in found["engines"]}
    assert told["onnxruntime fp32"]["least cosine"] > 0.9999
    assert told["onnxruntime fp16"]["least cosine"] > 0.99
    assert all(reason for reason in found["skipped"].values())


def test_when_the_time_is_over_the_rest_is_named() -> None:
    found = gpu.measure(gpu.TOY, torch.device("cpu"), seconds=0)
    assert len(found["loss_steps"]) == 1
    assert found["skipped"]["loss_steps"] == "the rest: no time was left"


@pytest.mark.skipif(torch.cuda.is_available(), reason="here there is a CUDA device")
def test_without_cuda_it_says_so_and_ends_with_6() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 6
    assert "there is no CUDA device here" in done.stderr
