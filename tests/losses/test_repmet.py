"""RepMet against its nearest representatives, written as loops."""

from __future__ import annotations

import cmath
from typing import Any

import pytest
import torch

from embedkit.errors import UsageError
from embedkit.losses import create

SETTINGS: list[dict[str, Any]] = [{}, {"modes": 1}, {"sigma": 0.2, "alpha": 1.5}]


def repmet(loops: Any, moving: Any, labels: list[int], proxies: Any, **options: Any) -> complex:
    modes = options.get("modes", 3)
    sigma, alpha = options.get("sigma", 0.5), options.get("alpha", 0.5)
    points = [loops.unit(row) for row in proxies]
    terms = []
    for row, y in zip(moving, labels, strict=True):
        x = loops.unit(row)
        squares = [2 - 2 * loops.dot(x, point) for point in points]
        nearest = [
            min(squares[c * modes : (c + 1) * modes], key=lambda value: value.real)
            for c in range(len(points) // modes)
        ]
        others = nearest[:y] + nearest[y + 1 :]
        hinge = loops.positive(nearest[y] - min(others, key=lambda v: v.real) + alpha)
        scores = [cmath.exp(-square / (2 * sigma**2)) for square in nearest]
        background = 1 - max(scores, key=lambda value: value.real)
        logits = [15 * score for score in [background, *scores]]
        terms.append(hinge + cmath.log(sum(cmath.exp(v) for v in logits)) - logits[y + 1])
    return loops.mean(terms)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_matches_the_paper_written_as_loops(
    options: dict[str, Any], batch: Any, agrees: Any, loops: Any, request: Any
) -> None:
    if "zero row" in request.node.name:
        pytest.skip("every representative is equally near: the minimum has no slope")
    torch.manual_seed(0)
    agrees(
        create("repmet", num_classes=4, embedding_dim=4, **options).double(),
        lambda moving, still, labels, proxies: repmet(loops, moving, labels, proxies, **options),
        batch,
    )


def test_one_class_has_no_hinge() -> None:
    loss = create("repmet", num_classes=1, embedding_dim=4)
    value = loss(torch.randn(3, 4), torch.zeros(3, dtype=torch.long))
    value.backward()
    assert torch.isfinite(value)
    assert loss.stats["active_rows"] == 0


@pytest.mark.parametrize("options", [{"modes": 0}, {"sigma": 0}, {"alpha": -1}], ids=str)
def test_impossible_options_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"{next(iter(options))} must be"):
        create("repmet", num_classes=3, embedding_dim=4, **options)
