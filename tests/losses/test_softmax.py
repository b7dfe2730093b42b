"""Normalised softmax against its sums, written as loops."""

from __future__ import annotations

import cmath
from typing import Any

import pytest
import torch

from embedkit.errors import UsageError
from embedkit.losses import create


def softmax(
    loops: Any, moving: Any, labels: list[int], proxies: Any, temperature: float
) -> complex:
    directions = [loops.unit(row) for row in proxies]
    terms = []
    for row, y in zip(moving, labels, strict=True):
        unit = loops.unit(row)
        logits = [loops.dot(unit, direction) / temperature for direction in directions]
        terms.append(cmath.log(sum(cmath.exp(logit) for logit in logits)) - logits[y])
    return loops.mean(terms)


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_matches_the_cross_entropy_written_as_loops(
    temperature: float, batch: Any, agrees: Any, loops: Any
) -> None:
    torch.manual_seed(0)
    loss = create("softmax", num_classes=4, embedding_dim=4, temperature=temperature).double()
    agrees(
        loss,
        lambda moving, still, labels, proxies: softmax(loops, moving, labels, proxies, temperature),
        batch,
    )


def test_equals_pytorch_metric_learnings() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    torch.manual_seed(0)
    x, labels = torch.randn(24, 16, dtype=torch.float64), torch.arange(24) // 4
    ours = create("softmax", num_classes=10, embedding_dim=16)
    theirs = losses.NormalizedSoftmaxLoss(10, 16)
    theirs.W.data.copy_(ours.proxies.data.T)
    assert ours(x, labels).item() == pytest.approx(theirs(x, labels).item(), abs=1e-12)


def test_tell_tales_are_the_mean_distances_to_own_and_other_directions() -> None:
    loss = create("softmax", num_classes=2, embedding_dim=2)
    loss.proxies.data = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    loss(torch.tensor([[5.0, 0.0], [-1.0, 0.0]]), torch.tensor([0, 0]))
    assert loss.stats["positive_distance"] == pytest.approx((0 + 2) / 2)
    assert loss.stats["negative_distance"] == pytest.approx(2**0.5)


def test_impossible_options_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="temperature must be"):
        create("softmax", num_classes=3, embedding_dim=4, temperature=0)
