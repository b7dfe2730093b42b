"""Ranked List Loss, simpler, is Ranked List Loss with its other options tied to the margin."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from embedkit.errors import UsageError
from embedkit.losses import create


@pytest.mark.parametrize("margin", [0.0, 0.4, 1.0])
def test_equals_rll_with_alpha_from_the_margin_and_halves(margin: float, batch: Any) -> None:
    rows, labels = batch
    found = []
    for loss in (
        create("rll-simpler", margin=margin, temperature=7.0),
        create("rll", alpha=1 + margin / 2, margin=margin, temperature=7.0,
               combine="convex", balance=0.5),
    ):  # fmt: skip
        x = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
        value = loss(x, torch.tensor(labels))
        value.backward()
        found.append((value.detach(), x.grad))
    torch.testing.assert_close(found[0], found[1])


def test_value_by_hand_on_the_axes() -> None:
    # Both pairs: positives sqrt(2) apart, negatives sqrt(2) (adjacent) or 2 apart; the boundaries
    # are 0.8 and 1.2, so only the positives count.
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    value = create("rll-simpler")(x, torch.tensor([0, 0, 1, 1]))
    assert value.item() == pytest.approx(0.5 * (2**0.5 - 0.8), abs=1e-6)


@pytest.mark.parametrize("options", [{"margin": 2.5}, {"temperature": -1}], ids=str)
def test_impossible_options_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"{next(iter(options))} must be"):
        create("rll-simpler", **options)
