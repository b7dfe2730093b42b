"""Log-ratio loss against loops over pairs of partners."""

from __future__ import annotations

import cmath
import itertools
import math
from typing import Any

import pytest
import torch

from embedkit.errors import UsageError
from embedkit.losses import create

SETTINGS: list[dict[str, Any]] = [
    {},
    {"squared": True},
    {"anchors": "all"},
    {"anchors": "all", "squared": True},
]
PLACES = [[0.3, -1.0], [2.0, 0.1], [0.3, -1.0], [1.0, 1.0], [-2.0, 0.4], [0.0, 0.0], [3.0, 2.0],
          [0.2, -0.9], [1.5, -2.5]]  # fmt: skip


def log_ratio(loops: Any, rows: Any, places: Any, **options: Any) -> complex:
    width = len(rows[0])
    anchors = range(1 if options.get("anchors", "first") == "first" else len(rows))

    def distance(i: int, j: int) -> complex:
        square = loops.squared(rows[i], rows[j]) + 1e-4 / width
        return square if options.get("squared") else square**0.5

    means = []
    for a in anchors:
        apart = [math.dist(places[a], place) for place in places]
        partners = [i for i in range(len(rows)) if i != a and apart[i] > 0]
        terms = [
            (cmath.log(distance(a, i) / distance(a, j)) - math.log(apart[i] / apart[j])) ** 2
            for i, j in itertools.combinations(partners, 2)
        ]
        if terms:
            means.append(loops.mean(terms))
    return loops.mean(means)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_matches_loops_over_pairs_of_partners_for_class_labels(
    options: dict[str, Any], batch: Any, agrees: Any, loops: Any
) -> None:
    agrees(
        create("log-ratio", **options),
        lambda moving, still, labels: log_ratio(loops, moving, [[y] for y in labels], **options),
        batch,
    )


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_matches_the_loops_for_labels_in_the_plane(
    options: dict[str, Any], agrees: Any, loops: Any
) -> None:
    torch.manual_seed(0)
    agrees(
        create("log-ratio", **options),
        lambda moving, still, labels: log_ratio(loops, moving, PLACES, **options),
        (torch.randn(9, 4, dtype=torch.float64).tolist(), PLACES),
    )


def test_distances_in_proportion_to_the_labels_are_solved() -> None:
    x = torch.tensor([[0.0], [1.0], [2.0], [5.0]], dtype=torch.float64) * 100
    value = create("log-ratio", anchors="all")(x, torch.tensor([0.0, 1.0, 2.0, 5.0]))
    assert value.item() == pytest.approx(0, abs=1e-9)


def test_it_does_not_normalise() -> None:
    assert not create("log-ratio").normalizes


def test_wrong_labels_and_options_are_named() -> None:
    with pytest.raises(UsageError, match=r"\(B,\) or \(B, d\)"):
        create("log-ratio")(torch.randn(3, 2), torch.randn(3, 1, 1))
    for options in ({"squared": 1}, {"anchors": "last"}):
        with pytest.raises(UsageError, match=rf"{next(iter(options))} must be"):
            create("log-ratio", **options)
