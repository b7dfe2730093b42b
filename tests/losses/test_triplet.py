"""Triplet loss in each mining, against three nested loops."""

from __future__ import annotations

import cmath
import itertools
from typing import Any

import pytest
import torch

from embedkit.errors import UsageError
from embedkit.losses import create

MININGS = ["all", "semi-hard", "batch-hard"]
SETTINGS: list[dict[str, Any]] = [
    *({"mining": m, "reduction": r} for m, r in itertools.product(MININGS, ["nonzero", "mean"])),
    *({"mining": m, "soft": True} for m in MININGS),
    *({"mining": m, "squared": True, "margin": 0.5} for m in MININGS),
    {"mining": "semi-hard", "margin": 0},
]


def triplets(loops: Any, moving: Any, labels: list[int], **options: Any) -> complex:
    """Every triplet is looked at; the mining says which of them count."""
    settings = {"margin": 0.2, "mining": "all", "reduction": "nonzero", **options}
    margin = settings["margin"]
    rows = [loops.unit(row) for row in moving]
    measure = loops.squared if settings.get("squared") else loops.distance

    def term(gap: complex) -> complex:
        if settings.get("soft"):
            return cmath.log(1 + cmath.exp(gap))
        return loops.positive(gap + margin)

    terms: list[complex] = []
    for i, anchor in enumerate(rows):
        pulled = [measure(anchor, rows[j]) for j in loops.positives(labels, i)]
        pushed = [measure(anchor, rows[j]) for j in loops.negatives(labels, i)]
        if settings["mining"] == "batch-hard":
            if pulled and pushed:
                farthest, nearest = max(d.real for d in pulled), min(d.real for d in pushed)
                top = loops.mean([d for d in pulled if d.real > farthest - 1e-12])
                low = loops.mean([d for d in pushed if d.real < nearest + 1e-12])
                terms.append(term(top - low))
            continue
        for p, n in itertools.product(pulled, pushed):
            if settings["mining"] == "all" or 1e-12 < n.real - p.real <= margin:
                terms.append(term(p - n))
    if settings["reduction"] == "nonzero" and settings["mining"] != "batch-hard":
        terms = [value for value in terms if value.real > 0]
    return loops.mean(terms)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_matches_three_nested_loops(
    options: dict[str, Any], batch: Any, agrees: Any, loops: Any
) -> None:
    agrees(
        create("triplet", **options),
        lambda moving, still, labels: triplets(loops, moving, labels, **options),
        batch,
    )


def test_random_picks_real_triplets_and_is_the_mean_over_them_on_average() -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(10, 6, dtype=torch.float64), torch.arange(10) // 3
    loss = create("triplet", mining="random", reduction="mean")
    drawn = [loss(x, labels).item() for _ in range(600)]
    z = torch.nn.functional.normalize(x)
    d = torch.cdist(z, z)
    per_anchor = []
    for i in range(9):  # the tenth row is alone in its class
        terms = [
            max(float(d[i, p] - d[i, n]) + 0.2, 0.0)
            for p in range(10) if p != i and labels[p] == labels[i]
            for n in range(10) if labels[n] != labels[i]
        ]  # fmt: skip
        per_anchor.append(sum(terms) / len(terms))
    assert sum(drawn) / len(drawn) == pytest.approx(sum(per_anchor) / 9, rel=0.03)


def test_random_is_repeated_by_the_seed() -> None:
    x, labels = torch.randn(10, 6), torch.arange(10) // 2
    loss = create("triplet", mining="random")
    values = []
    for _ in range(2):
        torch.manual_seed(3)
        values.append(loss(x, labels).item())
    assert values[0] == values[1]


@pytest.mark.parametrize("mining", [*MININGS, "random"])
def test_many_equal_classes_sizes_up_to_one_class(mining: str) -> None:
    for labels in (torch.zeros(6, dtype=torch.long), torch.arange(6)):
        x = torch.randn(6, 3, requires_grad=True)
        value = create("triplet", mining=mining)(x, labels)
        value.backward()
        assert value.item() == 0
        assert x.grad is not None
        assert not x.grad.any()


def test_all_triplets_equal_pytorch_metric_learnings() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    torch.manual_seed(0)
    x, labels = torch.randn(24, 16, dtype=torch.float64), torch.arange(24) // 4
    ours = create("triplet", margin=0.3)(x, labels)
    assert ours.item() == pytest.approx(losses.TripletMarginLoss(margin=0.3)(x, labels).item())
    soft = create("triplet", soft=True)(x, labels)
    theirs = losses.TripletMarginLoss(margin=0, smooth_loss=True)(x, labels)
    assert soft.item() == pytest.approx(theirs.item())


def test_semi_hard_and_batch_hard_equal_pytorch_metric_learnings_miners() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    miners = pytest.importorskip("pytorch_metric_learning.miners")
    reducers = pytest.importorskip("pytorch_metric_learning.reducers")
    torch.manual_seed(0)
    x, labels = torch.randn(24, 16, dtype=torch.float64), torch.arange(24) // 4
    picked = miners.TripletMarginMiner(margin=0.2, type_of_triplets="semihard")(x, labels)
    theirs = losses.TripletMarginLoss(margin=0.2)(x, labels, picked)
    ours = create("triplet", mining="semi-hard")(x, labels)
    assert ours.item() == pytest.approx(theirs.item())
    mean = losses.TripletMarginLoss(margin=0.2, reducer=reducers.MeanReducer())
    theirs = mean(x, labels, miners.BatchHardMiner()(x, labels))
    assert create("triplet", mining="batch-hard")(x, labels).item() == pytest.approx(theirs.item())


@pytest.mark.parametrize(
    "options",
    [{"margin": -1}, {"margin": "0.2"}, {"mining": "hard"}, {"soft": 1}, {"squared": None}],
    ids=str,
)
def test_impossible_options_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"{next(iter(options))} must be"):
        create("triplet", **options)
