"""EDMS against a walk matrix inverted by hand."""

from __future__ import annotations

import cmath
from typing import Any

import pytest
import torch

from embedkit.errors import UsageError
from embedkit.losses import create

SETTINGS: list[dict[str, Any]] = [{}, {"alpha": 0.3, "margin": 0.1, "temperature": 1.0}]


def inverse(matrix: list[list[complex]]) -> list[list[complex]]:
    """Gauss and Jordan, without pivoting: the matrix is diagonally dominant enough."""
    size = len(matrix)
    wide = [row[:] + [complex(i == j) for j in range(size)] for i, row in enumerate(matrix)]
    for i in range(size):
        wide[i] = [value / wide[i][i] for value in wide[i]]
        for j in range(size):
            if j != i:
                factor = wide[j][i]
                wide[j] = [p - factor * q for p, q in zip(wide[j], wide[i], strict=True)]
    return [row[size:] for row in wide]


def manifold(loops: Any, moving: Any, labels: list[int], proxies: Any, **options: Any) -> complex:
    alpha, margin = options.get("alpha", 0.8), options.get("margin", 0.0005)
    nodes = [loops.unit(row) for row in [*moving, *proxies]]
    size, rows = len(nodes), len(moving)
    similarity = [
        [
            cmath.exp(loops.positive(loops.dot(a, b)) / options.get("temperature", 0.5))
            if i != j
            else 0j
            for j, b in enumerate(nodes)
        ]
        for i, a in enumerate(nodes)
    ]
    sums = [sum(row) for row in similarity]
    walk = inverse(
        [
            [(i == j) - alpha * similarity[i][j] / (sums[i] * sums[j]) ** 0.5 for j in range(size)]
            for i in range(size)
        ]
    )
    walk = [[(1 - alpha) * value for value in row] for row in walk]
    units = [loops.unit(row) for row in walk]
    total = 0j
    for i, y in enumerate(labels):
        direct = walk[i][rows:]
        context = [loops.dot(units[i], units[rows + c]) for c in range(len(proxies))]
        for scores in (direct, context):
            gaps = [s - scores[y] + margin for c, s in enumerate(scores) if c != y]
            total += cmath.log(1 + sum(cmath.exp(gap) for gap in gaps if gap.real >= 0))
    return total / rows


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_matches_the_walk_written_as_loops(
    options: dict[str, Any], batch: Any, agrees: Any, loops: Any
) -> None:
    torch.manual_seed(0)
    agrees(
        create("edms", num_classes=4, embedding_dim=4, **options).double(),
        lambda moving, still, labels, proxies: manifold(loops, moving, labels, proxies, **options),
        batch,
    )


def test_equals_pytorch_metric_learnings_with_the_label_as_meta_class() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    torch.manual_seed(0)
    x, labels = torch.randn(12, 8), torch.arange(12) % 5
    ours = create("edms", num_classes=5, embedding_dim=8)
    theirs = losses.ManifoldLoss(l=8, K=5)
    theirs.proxies.data.copy_(ours.proxies.data)
    expected = theirs(x, indices_tuple=labels).item()
    assert ours(x, labels).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("options", [{"alpha": 1}, {"margin": -1}, {"temperature": 0}], ids=str)
def test_impossible_options_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"{next(iter(options))} must be"):
        create("edms", num_classes=3, embedding_dim=4, **options)
