"""The GPU benchmark runs at a toy size, on the CPU too, and names what it leaves out."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu

PARTS = ("training", "trainer", "compiled", "chunks", "engines", "pipeline", "loss_steps")
CPU = torch.device("cpu")


def test_every_part_runs_and_is_kept() -> None:
    kept: list[set[str]] = []
    found = gpu.measure(gpu.TOY, CPU, seconds=500, keep=lambda found: kept.append(set(found)))
    assert all(found[part] for part in PARTS)
    assert not [part for part in PARTS if part in found["skipped"]]
    assert all(reason for reason in found["skipped"].values())
    assert [len(parts) for parts in kept] == [2, 3, 4, 5, 6, 7, 8]
    assert found["training"][0]["of bound"] > 0
    assert found["compiled"][0]["of plain"] > 0
    cases = [row["case"].partition(" ")[2] for row in found["trainer"]]
    assert cases == ["epoch 1", "epoch 2", "epoch 3", "plain loop"]
    assert all(row["images/s"] > 0 and 0 <= row["device busy"] <= 1 for row in found["trainer"])
    for row in found["chunks"]:
        assert 0 <= row["difference"] < 0.2
        assert row["of bf16 from float32"] > 0
    told = {row["case"]: row for row in found["engines"]}
    assert told["onnxruntime fp32"]["least cosine"] > 0.9999
    assert told["onnxruntime fp16"]["least cosine"] > 0.99


def test_a_part_without_time_is_named() -> None:
    found = gpu.measure(gpu.TOY, CPU, seconds=0)
    assert found["skipped"] == dict.fromkeys(PARTS, "all of it: no time was left")
    assert not any(found[part] for part in PARTS)


def test_a_part_that_fails_or_takes_long_is_named_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(sizes: gpu.Sizes, device: torch.device) -> Iterator[dict[str, Any]]:
        yield {"case": "first"}
        raise ValueError("there is no such thing\nand much more")

    def long(sizes: gpu.Sizes, device: torch.device) -> Iterator[dict[str, Any]]:
        for number in range(9):
            time.sleep(0.2)
            yield {"case": str(number)}

    monkeypatch.setattr(gpu, "_SHARES", {missing: 0.1, long: 0.3, gpu.loss_steps: 0.6})
    found = gpu.measure(gpu.TOY, CPU, seconds=1.5)
    assert found["missing"] == [{"case": "first"}]
    assert found["skipped"]["missing"] == "failed: ValueError: there is no such thing"
    assert found["skipped"]["long"] == "the rest: no time was left"
    assert 0 < len(found["long"]) < 9
    assert found["loss_steps"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="here there is a CUDA device")
def test_without_cuda_it_says_so_and_ends_with_6() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 6
    assert "there is no CUDA device here" in done.stderr
