"""Binomial deviance against two loops over pairs."""

from __future__ import annotations

import cmath
import itertools
from typing import Any

import pytest
import torch

from embedkit.errors import UsageError
from embedkit.losses import create


def deviance(
    loops: Any, moving: Any, labels: list[int], alpha: float, beta: float, negative_cost: float
) -> complex:
    rows = [loops.unit(row) for row in moving]
    pull, push = [], []
    for i, j in itertools.combinations(range(len(rows)), 2):
        gap = loops.dot(rows[i], rows[j]) - beta
        if labels[i] == labels[j]:
            pull.append(cmath.log(1 + cmath.exp(-alpha * gap)))
        else:
            push.append(cmath.log(1 + cmath.exp(alpha * negative_cost * gap)))
    return complex(loops.mean(pull) + loops.mean(push))


@pytest.mark.parametrize(("alpha", "beta", "negative_cost"), [(2.0, 0.5, 35.0), (3.0, -0.2, 1.0)])
def test_matches_loops_over_unordered_pairs(
    alpha: float, beta: float, negative_cost: float, batch: Any, agrees: Any, loops: Any
) -> None:
    agrees(
        create("binomial-deviance", alpha=alpha, beta=beta, negative_cost=negative_cost),
        lambda moving, still, labels: deviance(loops, moving, labels, alpha, beta, negative_cost),
        batch,
    )


def test_told_as_active_are_the_pairs_on_the_wrong_side() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 0.2]])
    loss = create("binomial-deviance")
    loss(x, torch.tensor([0, 0, 1, 1]))
    assert loss.stats["active_positives"] == pytest.approx(1 / 2)
    assert loss.stats["active_negatives"] == pytest.approx(2 / 4)


def test_a_far_negative_costs_its_distance_and_nothing_overflows() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    value = create("binomial-deviance", negative_cost=1e4)(x, torch.tensor([0, 1]))
    assert value.item() == pytest.approx(2 * 1e4 * 0.5)


@pytest.mark.parametrize("options", [{"alpha": 0}, {"beta": 2}, {"negative_cost": -1}], ids=str)
def test_impossible_options_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"{next(iter(options))} must be"):
        create("binomial-deviance", **options)
