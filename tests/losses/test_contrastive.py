"""Contrastive loss against two loops over pairs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from embedkit.errors import UsageError
from embedkit.losses import create

SETTINGS: list[dict[str, Any]] = [
    {},
    {"reduction": "mean"},
    {"squared": True, "positive_margin": 0.3, "negative_margin": 1.3},
    {"squared": True, "reduction": "mean"},
]


def contrastive(loops: Any, moving: Any, labels: list[int], **options: Any) -> complex:
    settings = {"positive_margin": 0.0, "negative_margin": 1.0, "reduction": "nonzero", **options}
    rows = [loops.unit(row) for row in moving]
    pull, push = [], []
    for i, j in itertools.permutations(range(len(rows)), 2):
        d = loops.distance(rows[i], rows[j])
        if labels[i] == labels[j]:
            pull.append(loops.positive(d - settings["positive_margin"]))
        else:
            push.append(loops.positive(settings["negative_margin"] - d))
    total = 0j
    for terms in (pull, push):
        if settings["reduction"] == "nonzero":
            terms = [term for term in terms if term.real > 0]
        total += loops.mean([term**2 if settings.get("squared") else term for term in terms])
    return total


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_matches_loops_over_pairs(
    options: dict[str, Any], batch: Any, agrees: Any, loops: Any, request: Any
) -> None:
    if "zero row" in request.node.name and "negative_margin" not in options:
        pytest.skip("a zero row is at distance 1 from all others: on the margin's kink")
    agrees(
        create("contrastive", **options),
        lambda moving, still, labels: contrastive(loops, moving, labels, **options),
        batch,
    )


def test_equals_pytorch_metric_learnings() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    torch.manual_seed(0)
    x, labels = torch.randn(24, 16, dtype=torch.float64), torch.arange(24) // 4
    theirs = losses.ContrastiveLoss(pos_margin=0.2, neg_margin=1.5)(x, labels)
    ours = create("contrastive", positive_margin=0.2, negative_margin=1.5)(x, labels)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)


@pytest.mark.parametrize(
    "options", [{"positive_margin": -1}, {"negative_margin": None}, {"reduction": "sum"}], ids=str
)
def test_impossible_options_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"{next(iter(options))} must be"):
        create("contrastive", **options)
