"""What a training step spends in each loss, against pytorch-metric-learning, in one run.

    python -m benchmarks.losses [--device cpu|cuda] [--losses rll triplet] [--batches 128 512 2048]

A step is forward and backward on (B, 512) float32 rows, four rows per class; losses with a vector
per class have 1,000 classes. Time: median over rounds in which the two take turns (CPU seconds of
one thread, or wall time on CUDA). Memory: the peak of one step above what was there before it, each
in a process of its own (resident set on a CPU, allocator on CUDA). Target: no ratio above 1.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pytorch_metric_learning import losses as pml
from pytorch_metric_learning import miners
from pytorch_metric_learning.distances import DotProductSimilarity, SNRDistance
from torch import Tensor, nn

from benchmarks.figures import machine, save
from embedkit.losses import create, needs_classes

__all__ = ["PEERS", "measure"]

WIDTH, CLASSES, PER_CLASS = 512, 1000, 4
SECONDS, ROUNDS = 3.0, (3, 40)
# What a step may take before it counts as not running at all: some peers list every triplet.
LIMIT = 12 << 30

Loss = Callable[[Tensor, Tensor], Tensor]


class Mined(nn.Module):
    """A miner and its loss, as one; the peer's trainer says beside it that it has no pairs."""

    def __init__(self, loss: nn.Module, miner: nn.Module) -> None:
        super().__init__()
        self.loss, self.miner = loss, miner

    def forward(self, rows: Tensor, labels: Tensor, pairs: None = None) -> Any:
        return self.loss(rows, labels, self.miner(rows, labels))


class ByLabel(nn.Module):
    """The peer's manifold loss told that a row's meta-class is its label."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, rows: Tensor, labels: Tensor, pairs: None = None) -> Any:
        return self.loss(rows, indices_tuple=labels)


def _semi_hard() -> nn.Module:
    return Mined(
        pml.TripletMarginLoss(0.2), miners.TripletMarginMiner(0.2, type_of_triplets="semihard")
    )


# Our name (and options after a colon, as shown) to the same computation there.
PEERS: dict[str, tuple[dict[str, Any], Callable[[], nn.Module]]] = {
    "rll": ({}, partial(pml.RankedListLoss, margin=0.4, Tn=10, alpha=1.2)),
    "triplet": ({}, partial(pml.TripletMarginLoss, margin=0.2)),
    "triplet:semi-hard": ({"mining": "semi-hard"}, _semi_hard),
    "triplet:batch-hard": (
        {"mining": "batch-hard"},
        lambda: Mined(pml.TripletMarginLoss(0.2), miners.BatchHardMiner()),
    ),
    "multi-similarity": (
        {},
        lambda: Mined(pml.MultiSimilarityLoss(2, 50, 0.5), miners.MultiSimilarityMiner(0.1)),
    ),
    "multi-similarity:unmined": (
        {"epsilon": None},
        partial(pml.MultiSimilarityLoss, 2, 50, 0.5),
    ),
    "proxy-anchor": ({}, partial(pml.ProxyAnchorLoss, CLASSES, WIDTH)),
    "softmax": ({}, partial(pml.NormalizedSoftmaxLoss, CLASSES, WIDTH)),
    "arcface": ({}, partial(pml.ArcFaceLoss, CLASSES, WIDTH, margin=math.degrees(0.5))),
    "proxy-nca": (
        {"include_positive": True},
        partial(pml.ProxyNCALoss, CLASSES, WIDTH, softmax_scale=9),
    ),
    "contrastive": ({}, pml.ContrastiveLoss),
    "npair": (
        {},
        partial(pml.NPairsLoss, distance=DotProductSimilarity(normalize_embeddings=False)),
    ),
    "lifted": ({}, pml.LiftedStructureLoss),
    "margin": ({}, lambda: Mined(pml.MarginLoss(), miners.DistanceWeightedMiner())),
    "margin:all": ({"mining": "all"}, pml.MarginLoss),
    "fastap": ({}, pml.FastAPLoss),
    "snr": (
        {"reduction": "nonzero"},
        partial(
            pml.SignalToNoiseRatioContrastiveLoss, distance=SNRDistance(normalize_embeddings=False)
        ),
    ),
    "edms": ({}, lambda: ByLabel(pml.ManifoldLoss(l=WIDTH, K=CLASSES))),
}


def measure(case: str, batch: int, device: str) -> dict[str, float | None]:
    """Seconds and peak MB of both sides, None where the peer cannot take the batch."""
    done = {side: _ask(["memory", case, side, str(batch), device]) for side in ("ours", "theirs")}
    runs = {side: found for side, found in done.items() if found is not None}
    times = _ask(["time", case, "+".join(runs), str(batch), device]) or {}
    return {
        **{f"{side}_mb": None if found is None else found["mb"] for side, found in done.items()},
        **{f"{side}_s": times.get(side) for side in done},
    }


def _ask(arguments: list[str]) -> dict[str, float] | None:
    command = [sys.executable, "-m", "benchmarks.losses", "--worker", *arguments]
    # Each tensor its own mapping, given back when freed: what is resident is what is alive.
    exact = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_MMAP_MAX_": "1000000"}
    env = {**os.environ, **(exact if arguments[0] == "memory" else {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        refused = "memory" in done.stderr.lower() or done.returncode < 0
        if not refused or "ours" in arguments:
            raise RuntimeError(f"{' '.join(arguments)}: {done.stderr}")
        return None
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


def _work(kind: str, case: str, sides: str, batch: int, device: str) -> dict[str, float]:
    warnings.simplefilter("ignore")  # the peer warns of its own overflow at this temperature
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device == "cpu":
        torch.set_num_threads(1)
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    torch.manual_seed(0)
    made = {side: _make(case, side).to(device) for side in sides.split("+")}
    rows = torch.randn(batch, WIDTH, device=device, requires_grad=True)
    labels = torch.arange(batch, device=device) // PER_CLASS
    for loss in made.values():
        _step(loss, rows[:16], labels[:16])
    if kind == "memory":
        (loss,) = made.values()
        return {"mb": _peak(partial(_step, loss, rows, labels), device) / 1e6}
    taken: dict[str, list[float]] = {side: [] for side in made}
    start = time.perf_counter()
    for round_ in range(ROUNDS[1]):
        for side, loss in made.items():
            before = clock()
            _step(loss, rows, labels)
            if device == "cuda":
                torch.cuda.synchronize()
            taken[side].append(clock() - before)
        if round_ + 1 >= ROUNDS[0] and time.perf_counter() - start > SECONDS:
            break
    return {side: statistics.median(values) for side, values in taken.items()}


def _make(case: str, side: str) -> nn.Module:
    options, theirs = PEERS[case]
    if side == "theirs":
        return theirs()
    name = case.partition(":")[0]
    sizes = {"num_classes": CLASSES, "embedding_dim": WIDTH} if needs_classes(name) else {}
    return create(name, **sizes, **options)


def _step(loss: Loss, rows: Tensor, labels: Tensor) -> None:
    rows = rows.detach().requires_grad_()
    if isinstance(loss, nn.Module):
        loss.zero_grad(set_to_none=True)
    loss(rows, labels).backward()


def _peak(step: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    # 5: set the high-water mark to what is resident now (Linux, proc(5)).
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmHWM")
    step()
    return _status("VmHWM") - before


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(field))
    return 1024 * float(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--losses", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--batches", nargs="+", type=int, default=[128, 512, 2048])
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        kind, case, sides, batch, device = asked.worker
        print(json.dumps(_work(kind, case, sides, int(batch), device)))
        return
    found: list[dict[str, Any]] = []
    print(f"{'loss':<26}{'B':>6}{'ours ms':>10}{'theirs':>10}{'ratio':>8}", end="")
    print(f"{'ours MB':>10}{'theirs':>10}{'ratio':>8}")
    for case in asked.losses:
        for batch in asked.batches:
            row = measure(case, batch, asked.device)
            time_ratio = _ratio(row["ours_s"], row["theirs_s"])
            memory_ratio = _ratio(row["ours_mb"], row["theirs_mb"])
            found.append({"loss": case, "batch": batch, **row,
                          "time_ratio": time_ratio, "memory_ratio": memory_ratio})  # fmt: skip
            print(f"{case:<26}{batch:>6}", end="")
            print(_columns(row["ours_s"], row["theirs_s"], time_ratio, 1000), end="")
            print(_columns(row["ours_mb"], row["theirs_mb"], memory_ratio, 1), flush=True)
    if asked.losses == list(PEERS):
        save(f"losses-{asked.device}", {"machine": machine(), "width": WIDTH, "cases": found})


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or theirs is None else round(ours / max(theirs, 1e-9), 3)


def _columns(ours: float | None, theirs: float | None, ratio: float | None, unit: float) -> str:
    left = f"{'-' if ours is None else format(ours * unit, '.1f'):>10}"
    right = f"{'too big' if theirs is None else format(theirs * unit, '.1f'):>10}"
    return f"{left}{right}{'-' if ratio is None else format(ratio, '.2f'):>8}"


if __name__ == "__main__":
    main()
