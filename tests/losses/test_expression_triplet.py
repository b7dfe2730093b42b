"""Odd-one-out triplets against a loop over threes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from embedkit.errors import UsageError
from embedkit.losses import create


def odd_one_out(loops: Any, moving: Any, margins: list[float]) -> complex:
    rows = [loops.unit(row) for row in moving]
    terms = []
    for t in range(0, len(rows), 3):
        a, b, c = rows[t : t + 3]
        alike = loops.squared(a, b)
        terms += [loops.positive(alike - loops.squared(a, c) + margins[t])]
        terms += [loops.positive(alike - loops.squared(b, c) + margins[t])]
    return 2 * loops.mean(terms)


@pytest.mark.parametrize("margin", [0.2, 1.0])
def test_matches_the_paper_written_as_loops(
    margin: float, batch: Any, agrees: Any, loops: Any
) -> None:
    rows, labels = batch
    whole = len(rows) // 3 * 3
    if not whole:
        return
    agrees(
        create("expression-triplet", margin=margin),
        lambda moving, still, labels: odd_one_out(loops, moving, [margin] * len(moving)),
        (rows[:whole], labels[:whole]),
    )


def test_float_labels_are_each_triplets_own_margin(agrees: Any, loops: Any) -> None:
    torch.manual_seed(0)
    margins = [0.1] * 3 + [0.2] * 3 + [1.5] * 3
    agrees(
        create("expression-triplet"),
        lambda moving, still, labels: odd_one_out(loops, moving, margins),
        (torch.randn(9, 4, dtype=torch.float64).tolist(), torch.tensor(margins).double().tolist()),
    )


def test_the_two_alike_may_change_places() -> None:
    x = torch.randn(6, 4)
    loss = create("expression-triplet")
    labels = torch.zeros(6, dtype=torch.long)
    torch.testing.assert_close(loss(x[[1, 0, 2, 4, 3, 5]], labels), loss(x, labels))


def test_wrong_inputs_and_options_are_named() -> None:
    with pytest.raises(UsageError, match="in threes"):
        create("expression-triplet")(torch.randn(4, 2), torch.zeros(4))
    with pytest.raises(UsageError, match="margin must be"):
        create("expression-triplet", margin=-0.1)
