"""The upper bound against its sums, and as a bound on the triplet loss it is named after."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from embedkit.errors import UsageError
from embedkit.losses import create

POINTS = [[1.0, 0.5, 0.0, 0.0], [0.0, 2.0, 0.0, 0.3], [0.0, 0.0, -1.0, 0.0], [0.1, 0.0, 0.0, 1.0]]


def upper_bound(loops: Any, moving: Any, labels: list[int], points: Any) -> complex:
    terms = []
    for row, y in zip(moving, labels, strict=True):
        x = loops.unit(row)
        others = [loops.distance(x, c) for m, c in enumerate(points) if m != y]
        terms.append(loops.distance(x, points[y]) - sum(others, 0j) / (3 * max(len(points) - 1, 1)))
    return loops.mean(terms)


@pytest.mark.parametrize("given", ["one-hot", "points"])
def test_matches_the_formula_written_as_loops(
    given: str, batch: Any, agrees: Any, loops: Any
) -> None:
    points = [[float(i == j) for j in range(4)] for i in range(4)] if given == "one-hot" else POINTS
    loss = create(
        "upper-bound",
        num_classes=4,
        embedding_dim=4,
        centroids=given if given == "one-hot" else torch.tensor(points, dtype=torch.float64),
    )
    agrees(loss, lambda moving, still, labels: upper_bound(loops, moving, labels, points), batch)


def test_it_bounds_the_sum_over_all_triplets() -> None:
    torch.manual_seed(0)
    classes, per_class = 4, 3
    x = torch.nn.functional.normalize(torch.randn(classes * per_class, 5, dtype=torch.float64))
    labels = torch.arange(len(x)) // per_class
    total = 0.0
    for i, j, k in itertools.permutations(range(len(x)), 3):
        if labels[i] == labels[j] != labels[k]:
            total += float((x[i] - x[j]).norm() - (x[i] - x[k]).norm())
    loss = create("upper-bound", num_classes=classes, embedding_dim=5)
    factor = 3 * (classes - 1) * (per_class - 1) * per_class
    assert total <= factor * len(x) * loss(x, labels).item()


def test_a_row_on_its_centroid_has_a_finite_gradient() -> None:
    x = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]], requires_grad=True)
    value = create("upper-bound", num_classes=3, embedding_dim=3)(x, torch.tensor([0, 1]))
    value.backward()
    assert value.item() == pytest.approx(-(2**0.5) / 3, abs=1e-6)
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_centroids_are_no_parameter_but_are_saved() -> None:
    loss = create("upper-bound", num_classes=3, embedding_dim=3)
    assert list(loss.parameters()) == []
    assert list(loss.state_dict()) == ["centroids"]


@pytest.mark.parametrize("centroids", ["kmeans", [[1.0, 0.0]]], ids=str)
def test_unusable_centroids_are_refused(centroids: Any) -> None:
    with pytest.raises(UsageError, match="centroids must be"):
        create("upper-bound", num_classes=2, embedding_dim=4, centroids=centroids)
    with pytest.raises(UsageError, match="an axis per class"):
        create("upper-bound", num_classes=5, embedding_dim=4)
