"""Multi-similarity loss against its sums, written as loops."""

from __future__ import annotations

import cmath
from typing import Any

import pytest
import torch

from embedkit.errors import UsageError
from embedkit.losses import create

SETTINGS: list[dict[str, Any]] = [
    {},
    {"epsilon": None},
    {"alpha": 5.0, "beta": 20.0, "base": 1.0, "epsilon": 0.3},
]


def multi_similarity(loops: Any, moving: Any, labels: list[int], **options: Any) -> complex:
    settings = {"alpha": 2.0, "beta": 50.0, "base": 0.5, "epsilon": 0.1, **options}
    alpha, beta, base = settings["alpha"], settings["beta"], settings["base"]
    slack = settings["epsilon"]
    rows = [loops.unit(row) for row in moving]
    total = 0j
    for i, anchor in enumerate(rows):
        same = [loops.dot(anchor, rows[j]) for j in loops.positives(labels, i)]
        other = [loops.dot(anchor, rows[j]) for j in loops.negatives(labels, i)]
        if slack is not None:
            worst = min((s.real for s in same), default=float("inf"))
            best = max((s.real for s in other), default=-float("inf"))
            same = [s for s in same if s.real - slack < best]
            other = [s for s in other if s.real + slack > worst]
        total += cmath.log(1 + sum(cmath.exp(-alpha * (s - base)) for s in same)) / alpha
        total += cmath.log(1 + sum(cmath.exp(beta * (s - base)) for s in other)) / beta
    return total / len(rows)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_matches_the_paper_written_as_loops(
    options: dict[str, Any], batch: Any, agrees: Any, loops: Any
) -> None:
    agrees(
        create("multi-similarity", **options),
        lambda moving, still, labels: multi_similarity(loops, moving, labels, **options),
        batch,
    )


def test_equals_pytorch_metric_learnings_loss_with_and_without_its_miner() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    miners = pytest.importorskip("pytorch_metric_learning.miners")
    torch.manual_seed(0)
    x, labels = torch.randn(24, 16, dtype=torch.float64), torch.arange(24) // 4
    theirs = losses.MultiSimilarityLoss(2, 50, 0.5)
    mined = theirs(x, labels, miners.MultiSimilarityMiner(0.1)(x, labels))
    assert create("multi-similarity")(x, labels).item() == pytest.approx(mined.item(), abs=1e-12)
    ours = create("multi-similarity", epsilon=None)(x, labels)
    assert ours.item() == pytest.approx(theirs(x, labels).item(), abs=1e-12)


def test_sharpness_far_beyond_float_range_stays_finite() -> None:
    x = torch.randn(12, 4, requires_grad=True)
    value = create("multi-similarity", alpha=1e4, beta=1e4)(x, torch.arange(12) // 3)
    value.backward()
    assert torch.isfinite(value)
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_tell_tales_count_the_mined_pairs() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    loss = create("multi-similarity", epsilon=0.0)
    loss(x, torch.tensor([0, 0, 1, 1]))
    assert loss.stats["active_positives"] == 0
    assert loss.stats["active_negatives"] == 0
    loss = create("multi-similarity", epsilon=None)
    loss(x, torch.tensor([0, 0, 1, 1]))
    assert loss.stats["active_positives"] == 1
    assert loss.stats["active_negatives"] == 1


@pytest.mark.parametrize(
    "options", [{"alpha": 0}, {"beta": -1}, {"base": 2}, {"epsilon": -0.1}], ids=str
)
def test_impossible_options_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"{next(iter(options))} must be"):
        create("multi-similarity", **options)
