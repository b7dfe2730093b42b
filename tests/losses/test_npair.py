"""N-pair loss against its sums, written as loops."""

from __future__ import annotations

import cmath
from typing import Any

import pytest
import torch

from embedkit.errors import UsageError
from embedkit.losses import create


def first_two(labels: list[int]) -> list[tuple[int, int]]:
    found = []
    for y in sorted(set(labels)):
        of_class = [i for i, label in enumerate(labels) if label == y]
        if len(of_class) > 1:
            found.append((of_class[0], of_class[1]))
    return found


def npair(loops: Any, rows: Any, labels: list[int], l2: float) -> complex:
    pairs = first_two(labels)
    terms = []
    for a, p in pairs:
        own = loops.dot(rows[a], rows[p])
        others = [loops.dot(rows[a], rows[q]) for b, q in pairs if b != a]
        terms.append(cmath.log(1 + sum(cmath.exp(score - own) for score in others)))
    lengths = [loops.dot(rows[i], rows[i]) for pair in pairs for i in pair]
    return loops.mean(terms) + l2 * loops.mean(lengths)


@pytest.mark.parametrize("l2", [0.0, 0.01])
def test_matches_the_paper_written_as_loops(l2: float, batch: Any, agrees: Any, loops: Any) -> None:
    agrees(
        create("npair", l2=l2),
        lambda moving, still, labels: npair(loops, moving, labels, l2),
        batch,
    )


def test_equals_pytorch_metric_learnings_on_raw_rows() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    torch.manual_seed(0)
    x, labels = torch.randn(24, 16, dtype=torch.float64), torch.arange(24) // 4
    raw = distances.DotProductSimilarity(normalize_embeddings=False)
    theirs = losses.NPairsLoss(distance=raw)(x, labels)
    assert create("npair")(x, labels).item() == pytest.approx(theirs.item(), abs=1e-12)


def test_it_does_not_normalise() -> None:
    assert not create("npair").normalizes


def test_a_negative_l2_is_refused() -> None:
    with pytest.raises(UsageError, match="l2 must be"):
        create("npair", l2=-1)
