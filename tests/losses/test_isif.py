"""ISIF against its probabilities, written as loops."""

from __future__ import annotations

import cmath
import math
from typing import Any

import pytest
import torch

from embedkit.errors import UsageError
from embedkit.losses import create

SETTINGS: list[dict[str, Any]] = [{}, {"temperature": 0.5, "negative_weight": 3.0}]


def spreading(loops: Any, moving: Any, still: Any, **options: Any) -> complex:
    settings = {"temperature": 0.1, "negative_weight": 1.0, **options}
    temperature, weight = settings["temperature"], settings["negative_weight"]
    rows, held = [loops.unit(row) for row in moving], [loops.unit(row) for row in still]
    count = len(rows)
    total = 0j
    for i, row in enumerate(rows):
        pair = (i + count // 2) % count
        q = [cmath.exp(loops.dot(row, held[k]) / temperature) for k in range(count)]
        others = [q[k] for k in range(count) if k not in (i, pair)]
        z = q[pair] + weight * sum(others, 0j)
        total += cmath.log(q[pair] / z)
        for value in others:
            share = value / z
            share = share if share.real < 1 - 1e-6 else 1 - 1e-6 + 0j
            total += weight * cmath.log(1 - share)
    return -total / count


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_matches_the_paper_written_as_loops(
    options: dict[str, Any], batch: Any, agrees: Any, loops: Any
) -> None:
    rows, labels = batch
    even = len(rows) // 2 * 2
    agrees(
        create("isif", **options),
        lambda moving, still, labels: spreading(loops, moving, still, **options),
        (rows[:even], labels[:even]),
    )


def test_labels_are_ignored() -> None:
    x = torch.randn(8, 4)
    loss = create("isif")
    assert loss(x, torch.zeros(8, dtype=torch.long)) == loss(x, torch.arange(8))


def test_coinciding_images_stay_finite_in_float32_at_a_low_temperature() -> None:
    x = torch.randn(8, 4)
    x[2] = x[0]
    x.requires_grad_()
    value = create("isif", temperature=0.01)(x, torch.arange(8))
    value.backward()
    assert math.isfinite(value.item())
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_an_odd_batch_is_refused() -> None:
    with pytest.raises(UsageError, match="even batch"):
        create("isif")(torch.randn(3, 4), torch.arange(3))


@pytest.mark.parametrize("options", [{"temperature": 0}, {"negative_weight": 0}], ids=str)
def test_impossible_options_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"{next(iter(options))} must be"):
        create("isif", **options)
