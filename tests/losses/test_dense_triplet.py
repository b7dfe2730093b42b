"""Dense triplets against loops over all pairs of partners."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from embedkit.errors import UsageError
from embedkit.losses import create

SETTINGS: list[dict[str, Any]] = [{}, {"anchors": "all"}, {"anchors": "all", "margin": 0.5}]


def dense_triplet(loops: Any, moving: Any, places: Any, **options: Any) -> complex:
    rows = [loops.unit(row) for row in moving]
    terms = []
    for a in range(1 if options.get("anchors", "first") == "first" else len(rows)):
        apart = [math.dist(places[a], place) for place in places]
        for i in range(len(rows)):
            for j in range(len(rows)):
                if a not in (i, j) and apart[i] < apart[j]:
                    gap = 2 * (loops.dot(rows[a], rows[j]) - loops.dot(rows[a], rows[i]))
                    terms.append(loops.positive(gap + options.get("margin", 0.03)))
    return loops.mean(terms)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_matches_loops_for_class_labels(
    options: dict[str, Any], batch: Any, agrees: Any, loops: Any
) -> None:
    agrees(
        create("dense-triplet", **options),
        lambda moving, still, labels: dense_triplet(
            loops, moving, [[y] for y in labels], **options
        ),
        batch,
    )


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_matches_loops_for_labels_in_the_plane(
    options: dict[str, Any], agrees: Any, loops: Any
) -> None:
    torch.manual_seed(0)
    rows, places = torch.randn(9, 4, dtype=torch.float64).tolist(), torch.randn(9, 2).tolist()
    agrees(
        create("dense-triplet", **options),
        lambda moving, still, labels: dense_triplet(loops, moving, places, **options),
        (rows, places),
    )


@pytest.mark.parametrize("options", [{"margin": -1}, {"anchors": "last"}], ids=str)
def test_impossible_options_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"{next(iter(options))} must be"):
        create("dense-triplet", **options)
