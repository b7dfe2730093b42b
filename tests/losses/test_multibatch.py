"""Multibatch loss against a loop over ordered pairs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from embedkit.errors import UsageError
from embedkit.losses import create

SETTINGS: list[dict[str, Any]] = [{}, {"balance_pairs": True}, {"theta": 1.875}]


def multibatch(loops: Any, moving: Any, labels: list[int], **options: Any) -> complex:
    theta = options.get("theta", 1.0)
    rows = [loops.unit(row) for row in moving]
    terms: dict[bool, list[complex]] = {True: [], False: []}
    for i, j in itertools.permutations(range(len(rows)), 2):
        sign = 1 if labels[i] == labels[j] else -1
        square = 2 - 2 * loops.dot(rows[i], rows[j])
        terms[sign == 1].append(loops.positive(1 - sign * (theta - square)))
    if options.get("balance_pairs"):
        return (loops.mean(terms[True]) + loops.mean(terms[False])) / 2
    return loops.mean(terms[True] + terms[False])


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_matches_the_loop_over_ordered_pairs(
    options: dict[str, Any], batch: Any, agrees: Any, loops: Any
) -> None:
    agrees(
        create("multibatch", **options).double(),
        lambda moving, still, labels: multibatch(loops, moving, labels, **options),
        batch,
    )


@pytest.mark.parametrize("balance", [False, True])
def test_theta_learns_what_moving_it_shows_and_is_the_threshold(balance: bool) -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(12, 4, dtype=torch.float64), torch.arange(12) // 3
    loss = create("multibatch", balance_pairs=balance).double()
    loss(x, labels).backward()
    slope = loss.theta.grad.item()
    with torch.no_grad():
        loss.theta.add_(1e-6)
        high = loss(x, labels).item()
        loss.theta.sub_(2e-6)
        low = loss(x, labels).item()
    assert slope == pytest.approx((high - low) / 2e-6, abs=1e-6)
    assert loss.threshold == pytest.approx(1 - 1e-6)


@pytest.mark.parametrize("options", [{"theta": -1}, {"balance_pairs": "yes"}], ids=str)
def test_impossible_options_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"{next(iter(options))} must be"):
        create("multibatch", **options)
