"""Plain cross-entropy against its sums, written as loops."""

from __future__ import annotations

import cmath
from typing import Any

import pytest
import torch

from embedkit.losses import create


def cross_entropy(
    loops: Any, rows: Any, labels: list[int], weights: Any, bias: list[float]
) -> complex:
    terms = []
    for row, y in zip(rows, labels, strict=True):
        logits = [loops.dot(row, w) + b for w, b in zip(weights, bias, strict=True)]
        terms.append(cmath.log(sum(cmath.exp(logit) for logit in logits)) - logits[y])
    return loops.mean(terms)


def test_matches_the_sums_written_as_loops(batch: Any, agrees: Any, loops: Any) -> None:
    torch.manual_seed(0)
    bias = [0.3, -0.2, 0.0, 0.7]
    loss = create("cross-entropy", num_classes=4, embedding_dim=4).double()
    loss.bias.data.copy_(torch.tensor(bias))
    agrees(
        loss,
        lambda moving, still, labels, weights: cross_entropy(
            loops, moving, labels, weights, loss.bias.tolist()
        ),
        batch,
    )


def test_the_bias_learns_what_moving_it_shows() -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    loss = create("cross-entropy", num_classes=3, embedding_dim=4).double()
    loss(x, labels).backward()
    slope = loss.bias.grad.clone()
    with torch.no_grad():
        loss.bias[1] += 1e-6
        high = loss(x, labels).item()
        loss.bias[1] -= 2e-6
        low = loss(x, labels).item()
    assert slope[1].item() == pytest.approx((high - low) / 2e-6, abs=1e-6)


def test_tell_tales_are_the_share_correct_and_the_own_probability() -> None:
    loss = create("cross-entropy", num_classes=2, embedding_dim=1)
    loss.proxies.data = torch.tensor([[1.0], [-1.0]])
    loss(torch.tensor([[50.0], [50.0]]), torch.tensor([0, 1]))
    assert loss.stats["correct"] == 0.5
    assert loss.stats["own_probability"] == pytest.approx(0.5)
    assert not loss.normalizes
