"""Ranked List Loss against the paper's sums, written as loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from embedkit.errors import UsageError
from embedkit.losses import create

SETTINGS = [
    {},
    {"temperature": 0.0},
    {"alpha": 1.4, "margin": 0.2, "balance": 0.3},
    {"combine": "convex", "balance": 0.5},
    {"gradient": "both"},
]


def ranked_list(loops: Any, moving: Any, still: Any, labels: list[int], **options: Any) -> complex:
    """The paper's loss; with the query rule, the gallery and the weights are held still."""
    settings = {"alpha": 1.2, "margin": 0.4, "temperature": 10.0, "balance": 1.0, **options}
    alpha, ball = settings["alpha"], settings["alpha"] - settings["margin"]
    queries = [loops.unit(row) for row in moving]
    held = moving if settings.get("gradient") == "both" else still
    gallery = [loops.unit(row) for row in held]
    total = 0j
    for i, query in enumerate(queries):
        far = [loops.distance(query, gallery[j]) for j in loops.positives(labels, i)]
        pull = loops.mean([d - ball for d in far if d.real > ball])
        near = [loops.distance(query, gallery[j]) for j in loops.negatives(labels, i)]
        near = [d for d in near if d.real < alpha]
        weights = [math.exp(settings["temperature"] * (alpha - d.real)) for d in near]
        push = sum((w * (alpha - d) for w, d in zip(weights, near, strict=True)), 0j)
        push = push / sum(weights) if near else 0j
        if settings.get("combine") == "convex":
            pull *= 1 - settings["balance"]
        total += pull + settings["balance"] * push
    return total / len(queries)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_matches_the_paper_written_as_loops(
    options: dict[str, Any], batch: Any, agrees: Any, loops: Any
) -> None:
    agrees(
        create("rll", **options),
        lambda moving, still, labels: ranked_list(loops, moving, still, labels, **options),
        batch,
    )


@pytest.mark.parametrize(
    ("options", "expected"), [({}, 1.2), ({"combine": "convex", "balance": 0.5}, 0.6)]
)
def test_a_collapsed_batch_has_the_formulas_value(options: dict[str, Any], expected: float) -> None:
    for value in (1.0, 0.0):
        x = torch.full((8, 16), value, requires_grad=True)
        loss = create("rll", **options)(x, torch.arange(8) // 2)
        loss.backward()
        assert loss.item() == pytest.approx(expected, abs=1e-6)
        assert x.grad is not None
        assert not x.grad.any()


def test_a_nearly_collapsed_float32_batch_still_has_an_exact_gradient() -> None:
    torch.manual_seed(0)
    x = torch.ones(12, 64) + 1e-4 * torch.randn(12, 64)
    labels = torch.arange(12) // 3
    slopes = []
    for rows in (x, x.double()):
        rows = rows.clone().requires_grad_()
        create("rll")(rows, labels).backward()
        assert rows.grad is not None
        slopes.append(rows.grad.double())
    assert slopes[1].norm() > 0.01
    assert (slopes[0] - slopes[1]).norm() < 0.01 * slopes[1].norm()


def test_a_solved_batch_is_zero_and_still_differentiable() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    loss = create("rll")(x, torch.tensor([0, 0, 1, 1]))
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None
    assert not x.grad.any()


def test_the_query_rule_moves_each_row_by_its_own_list_only() -> None:
    # Rows 2 and 3 are far from each other; rows 0 and 1 are solved and must not move.
    x = torch.tensor([[1.0, 0.0], [1.0, 0.01], [-1.0, 1.2], [-1.0, -1.2]], requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1])
    create("rll", alpha=1.2, margin=0.4)(x, labels).backward()
    assert x.grad is not None
    assert not x.grad[:2].any()
    assert x.grad[2:].abs().sum(1).gt(0).all()


def test_tell_tales_count_the_kept_pairs() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
    loss = create("rll")
    loss(x, torch.tensor([0, 0, 1, 1]))
    root = math.sqrt(2)
    stats = loss.stats
    assert stats["positive_distance"] == pytest.approx((root + 2) / 2)
    assert stats["negative_distance"] == pytest.approx((0 + 2 + root + root) / 4)
    assert stats["active_positives"] == 1
    assert stats["active_negatives"] == pytest.approx(1 / 4)


def test_agrees_with_pytorch_metric_learning_up_to_its_guard() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    torch.manual_seed(0)
    x, labels = torch.randn(24, 16, dtype=torch.float64), torch.arange(24) // 4
    ours = create("rll", alpha=1.4, temperature=4, combine="convex", balance=0.5)(x, labels)
    theirs = losses.RankedListLoss(margin=0.4, Tn=4, imbalance=0.5, alpha=1.4)(x, labels)
    # Theirs adds 1e-5 per pair to the divisors.
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [{"alpha": 0}, {"alpha": 2.5}, {"margin": 1.3}, {"margin": -0.1}, {"temperature": math.inf},
     {"balance": 1.5, "combine": "convex"}, {"combine": "mean"}, {"gradient": True}],
    ids=str,
)  # fmt: skip
def test_impossible_options_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"{next(iter(options))} must be"):
        create("rll", **options)
