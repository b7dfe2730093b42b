"""FastAP against its histogram, written as loops over knots."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from embedkit.errors import UsageError
from embedkit.losses import create


def pulse(v: complex, knot: float, width: float) -> complex:
    """[1 - |v - knot| / width]+, with the left slope on a knot."""
    gap = v - knot
    rising = gap.real <= 1e-12
    height = 1 + (gap if rising else -gap) / width
    return height if height.real > (1e-12 if rising else -1e-12) else 0j


def fastap(loops: Any, moving: Any, labels: list[int], bins: int) -> complex:
    rows = [loops.unit(row) for row in moving]
    width = 4 / bins
    terms = []
    for i, anchor in enumerate(rows):
        same, other = loops.positives(labels, i), loops.negatives(labels, i)
        if not same:
            continue
        squares = {j: 2 - 2 * loops.dot(anchor, rows[j]) for j in same + other}
        sums = all_sums = precision = 0j
        for knot in range(bins + 1):
            h_positive = sum((pulse(squares[j], knot * width, width) for j in same), 0j)
            h_negative = sum((pulse(squares[j], knot * width, width) for j in other), 0j)
            sums += h_positive
            all_sums += h_positive + h_negative
            if all_sums.real > 0:
                precision += h_positive * sums / all_sums
        terms.append(1 - precision / len(same))
    return loops.mean(terms)


@pytest.mark.parametrize("bins", [10, 3])
def test_matches_the_histogram_written_as_loops(
    bins: int, batch: Any, agrees: Any, loops: Any, request: Any
) -> None:
    if "zero row" in request.node.name and bins == 10:
        pytest.skip("a zero row is at squared distance 2 from all others: all of them on one knot")
    agrees(
        create("fastap", bins=bins),
        lambda moving, still, labels: fastap(loops, moving, labels, bins),
        batch,
    )


def test_value_and_gradient_equal_pytorch_metric_learnings() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    torch.manual_seed(0)
    start, labels = torch.randn(24, 16, dtype=torch.float64), torch.arange(24) // 4
    found = []
    for loss in (create("fastap"), losses.FastAPLoss(10)):
        x = start.clone().requires_grad_()
        value = loss(x, labels)
        value.backward()
        found.append((value.detach(), x.grad))
    torch.testing.assert_close(found[0], found[1])


def test_a_perfect_ranking_is_zero_and_a_reversed_one_is_high() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    assert create("fastap")(x, torch.tensor([0, 0, 1, 1])).item() == pytest.approx(0, abs=1e-6)
    assert create("fastap")(x, torch.tensor([0, 1, 0, 1])).item() > 0.5


def test_no_bins_are_refused() -> None:
    with pytest.raises(UsageError, match="bins must be"):
        create("fastap", bins=0)
