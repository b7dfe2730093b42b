"""Proxy-NCA against its distances, written as loops."""

from __future__ import annotations

import cmath
from typing import Any

import pytest
import torch

from embedkit.errors import UsageError
from embedkit.losses import create

SETTINGS: list[dict[str, Any]] = [{}, {"include_positive": True}, {"scale": 1.0}]


def proxy_nca(loops: Any, moving: Any, labels: list[int], proxies: Any, **options: Any) -> complex:
    scale = options.get("scale", 3.0)
    rows = [[scale * value for value in loops.unit(row)] for row in moving]
    points = [[scale * value for value in loops.unit(row)] for row in proxies]
    terms = []
    for row, y in zip(rows, labels, strict=True):
        shares = [cmath.exp(-loops.squared(row, point)) for point in points]
        kept = shares if options.get("include_positive") else shares[:y] + shares[y + 1 :]
        terms.append(-cmath.log(shares[y] / sum(kept)))
    return loops.mean(terms)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_matches_the_paper_written_as_loops(
    options: dict[str, Any], batch: Any, agrees: Any, loops: Any
) -> None:
    torch.manual_seed(0)
    agrees(
        create("proxy-nca", num_classes=4, embedding_dim=4, **options).double(),
        lambda moving, still, labels, proxies: proxy_nca(loops, moving, labels, proxies, **options),
        batch,
    )


def test_equals_pytorch_metric_learnings_with_the_positive_in() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    torch.manual_seed(0)
    x, labels = torch.randn(24, 16, dtype=torch.float64), torch.arange(24) // 4
    ours = create("proxy-nca", num_classes=10, embedding_dim=16, include_positive=True)
    theirs = losses.ProxyNCALoss(10, 16, softmax_scale=9)
    theirs.proxies.data.copy_(ours.proxies.data)
    assert ours(x, labels).item() == pytest.approx(theirs(x, labels).item(), abs=1e-9)


def test_one_class_alone_is_zero() -> None:
    loss = create("proxy-nca", num_classes=1, embedding_dim=4)
    value = loss(torch.randn(3, 4), torch.zeros(3, dtype=torch.long))
    value.backward()
    assert value.item() == 0


@pytest.mark.parametrize("options", [{"scale": 0}, {"include_positive": 1}], ids=str)
def test_impossible_options_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"{next(iter(options))} must be"):
        create("proxy-nca", num_classes=3, embedding_dim=4, **options)
