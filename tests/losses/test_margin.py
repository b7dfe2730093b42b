"""Margin loss against loops over triplets, and its sampler against the paper's law."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from embedkit.errors import UsageError
from embedkit.losses import create
from embedkit.losses.margin import _draw

SETTINGS: list[dict[str, Any]] = [{}, {"margin": 0.5, "beta": 0.9}]


def margin_loss(loops: Any, moving: Any, labels: list[int], **options: Any) -> complex:
    settings = {"margin": 0.2, "beta": 1.2, **options}
    margin, beta = settings["margin"], settings["beta"]
    rows = [loops.unit(row) for row in moving]
    total, active = 0j, 0
    for i in range(len(rows)):
        pairs = itertools.product(loops.positives(labels, i), loops.negatives(labels, i))
        for p, n in pairs:
            far = loops.positive(loops.distance(rows[i], rows[p]) - beta + margin)
            near = loops.positive(beta - loops.distance(rows[i], rows[n]) + margin)
            total += far + near
            active += (far.real > 0) + (near.real > 0)
    return total / max(active, 1)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_all_matches_loops_over_triplets(
    options: dict[str, Any], batch: Any, agrees: Any, loops: Any, request: Any
) -> None:
    if "zero row" in request.node.name and not options:
        pytest.skip("a zero row is at distance 1 from all others: on the positives' kink")
    agrees(
        create("margin", mining="all", **options),
        lambda moving, still, labels: margin_loss(loops, moving, labels, **options),
        batch,
    )


def test_all_equals_pytorch_metric_learnings() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    torch.manual_seed(0)
    x, labels = torch.randn(24, 16, dtype=torch.float64), torch.arange(24) // 4
    theirs = losses.MarginLoss(margin=0.2, beta=1.2)(x, labels)
    ours = create("margin", mining="all")(x, labels)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)  # theirs rounds beta to float32


def test_a_learned_beta_has_the_slope_that_moving_it_shows() -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(12, 4, dtype=torch.float64), torch.arange(12) // 3
    values = []
    for beta in (1.2 - 1e-6, 1.2 + 1e-6):
        values.append(create("margin", mining="all", beta=beta)(x, labels).item())
    loss = create("margin", mining="all", learn_beta=True)
    assert [name for name, _ in loss.named_parameters()] == ["beta"]
    loss(x, labels).backward()
    slope = next(loss.parameters()).grad
    assert slope is not None
    assert slope.item() == pytest.approx((values[1] - values[0]) / 2e-6, abs=1e-5)


def test_negatives_are_drawn_with_the_papers_odds() -> None:
    width = 6
    d = torch.tensor([[0.0, 0.9, 0.3, 0.7, 1.0, 1.3, 1.6]], dtype=torch.float64)
    drawable = torch.tensor([[False, False, True, True, True, True, False]])
    torch.manual_seed(0)
    counts = sum(_draw(d, drawable, torch.tensor([[1000]]), width) for _ in range(40))
    assert isinstance(counts, torch.Tensor)
    odds = []
    for value in (0.5, 0.7, 1.0, 1.3):  # 0.3 is drawn as if it were 0.5
        density = value ** (width - 2) * (1 - value**2 / 4) ** ((width - 3) / 2)
        odds.append(1 / density)
    expected = torch.tensor(odds, dtype=torch.float64) / sum(odds)
    assert counts[0, [0, 1, 6]].sum() == 0
    torch.testing.assert_close(counts[0, 2:6] / counts.sum(), expected, atol=0.01, rtol=0)


def test_wide_embeddings_do_not_underflow_the_odds() -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(16, 2048), torch.arange(16) // 4
    x[:8] = x[0] + 0.05 * x[:8]
    loss = create("margin")
    assert torch.isfinite(loss(x, labels))
    counts = _draw(
        torch.full((1, 4), 1.39), torch.ones(1, 4, dtype=torch.bool), torch.tensor([[8]]), 2048
    )
    assert counts.sum() == 8


def test_each_positive_pair_gets_one_negative_of_its_anchor() -> None:
    d = torch.full((3, 6), 1.0)
    drawable = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]).bool()
    counts = _draw(d, drawable, torch.tensor([[3], [0], [2]]), 8)
    assert counts.sum(1).tolist() == [3, 0, 0]


def test_distance_weighted_is_the_loss_of_the_drawn_pairs() -> None:
    # With one negative per anchor the draw has no choice: it must equal the loops.
    x = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1])
    d01, d02, d12 = (math.dist(x[i], x[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    far = [max(d01 - 1.0, 0)] * 2
    near = [max(1.4 - d, 0) for d in (d02, d12)]
    active = sum(term > 0 for term in far + near)
    value = create("margin")(x, labels)
    assert value.item() == pytest.approx(sum(far + near) / active)


@pytest.mark.parametrize(
    "options", [{"margin": -1}, {"beta": 0}, {"mining": "hard"}, {"learn_beta": 1}], ids=str
)
def test_impossible_options_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"{next(iter(options))} must be"):
        create("margin", **options)
