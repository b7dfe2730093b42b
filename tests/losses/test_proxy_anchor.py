"""Proxy-Anchor loss against its sums, written as loops."""

from __future__ import annotations

import cmath
from typing import Any

import pytest
import torch

from embedkit.errors import UsageError
from embedkit.losses import create

SETTINGS: list[dict[str, Any]] = [{}, {"alpha": 8.0, "margin": 0.4}]


def proxy_anchor(
    loops: Any, moving: Any, labels: list[int], proxies: Any, **options: Any
) -> complex:
    settings = {"alpha": 32.0, "margin": 0.1, **options}
    alpha, margin = settings["alpha"], settings["margin"]
    rows, anchors = [loops.unit(row) for row in moving], [loops.unit(row) for row in proxies]
    pull, push = [], []
    for c, anchor in enumerate(anchors):
        same = [loops.dot(anchor, row) for row, y in zip(rows, labels, strict=True) if y == c]
        other = [loops.dot(anchor, row) for row, y in zip(rows, labels, strict=True) if y != c]
        if same:
            pull.append(cmath.log(1 + sum(cmath.exp(-alpha * (s - margin)) for s in same)))
        push.append(cmath.log(1 + sum(cmath.exp(alpha * (s + margin)) for s in other)))
    return loops.mean(pull) + loops.mean(push)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_matches_the_paper_written_as_loops(
    options: dict[str, Any], batch: Any, agrees: Any, loops: Any
) -> None:
    torch.manual_seed(0)
    loss = create("proxy-anchor", num_classes=4, embedding_dim=4, **options).double()
    agrees(
        loss,
        lambda moving, still, labels, proxies: proxy_anchor(
            loops, moving, labels, proxies, **options
        ),
        batch,
    )


def test_equals_pytorch_metric_learnings() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    torch.manual_seed(0)
    x, labels = torch.randn(24, 16, dtype=torch.float64), torch.arange(24) // 4
    ours = create("proxy-anchor", num_classes=10, embedding_dim=16)
    theirs = losses.ProxyAnchorLoss(10, 16)
    theirs.proxies.data.copy_(ours.proxies.data)
    assert ours(x, labels).item() == pytest.approx(theirs(x, labels).item(), abs=1e-12)


def test_a_class_absent_from_the_batch_still_pushes() -> None:
    loss = create("proxy-anchor", num_classes=3, embedding_dim=4)
    loss(torch.randn(4, 4), torch.tensor([0, 0, 1, 1])).backward()
    assert loss.proxies.grad is not None
    assert loss.proxies.grad[2].any()


@pytest.mark.parametrize("options", [{"alpha": 0}, {"margin": -0.1}], ids=str)
def test_impossible_options_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"{next(iter(options))} must be"):
        create("proxy-anchor", num_classes=3, embedding_dim=4, **options)
