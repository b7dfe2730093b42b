"""Lifted structure loss against loops over positive pairs."""

from __future__ import annotations

import cmath
from typing import Any

import pytest
import torch

from embedkit.errors import UsageError
from embedkit.losses import create


def lifted(loops: Any, moving: Any, labels: list[int], margin: float) -> complex:
    rows = [loops.unit(row) for row in moving]
    terms = []
    for i in range(len(rows)):
        for j in range(i + 1, len(rows)):
            if labels[i] != labels[j]:
                continue
            pushed = [
                cmath.exp(margin - loops.distance(rows[end], rows[k]))
                for end in (i, j)
                for k in loops.negatives(labels, end)
            ]
            d = loops.distance(rows[i], rows[j])
            terms.append(loops.positive(cmath.log(sum(pushed)) + d) ** 2 if pushed else 0j)
    return loops.mean(terms) / 2


@pytest.mark.parametrize("margin", [0.2, 1.0])
def test_matches_loops_over_unordered_positive_pairs(
    margin: float, batch: Any, agrees: Any, loops: Any
) -> None:
    agrees(
        create("lifted", margin=margin),
        lambda moving, still, labels: lifted(loops, moving, labels, margin),
        batch,
    )


def test_equals_pytorch_metric_learnings() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    reducers = pytest.importorskip("pytorch_metric_learning.reducers")
    torch.manual_seed(0)
    x, labels = torch.randn(24, 16, dtype=torch.float64), torch.arange(24) // 4
    theirs = losses.LiftedStructureLoss(reducer=reducers.MeanReducer())(x, labels)
    assert create("lifted")(x, labels).item() == pytest.approx(theirs.item(), abs=1e-12)


def test_a_negative_margin_is_refused() -> None:
    with pytest.raises(UsageError, match="margin must be"):
        create("lifted", margin=-1)
