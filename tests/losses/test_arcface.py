"""ArcFace against angles, written as loops."""

from __future__ import annotations

import cmath
import math
from typing import Any

import pytest
import torch

from embedkit.errors import UsageError
from embedkit.losses import create

SETTINGS: list[dict[str, Any]] = [{}, {"margin": 1.5, "scale": 8.0}, {"margin": 0.0}]


def arcface(loops: Any, moving: Any, labels: list[int], proxies: Any, **options: Any) -> complex:
    margin, scale = options.get("margin", 0.5), options.get("scale", 64.0)
    directions = [loops.unit(row) for row in proxies]
    terms = []
    for row, y in zip(moving, labels, strict=True):
        cosines = [loops.dot(loops.unit(row), direction) for direction in directions]
        angle = cmath.acos(cosines[y])
        if angle.real < math.pi - margin:
            own = cmath.cos(angle + margin)
        else:
            own = cosines[y] - margin * math.sin(margin)
        logits = [scale * (own if c == y else cosine) for c, cosine in enumerate(cosines)]
        top = max(logit.real for logit in logits)
        terms.append(cmath.log(sum(cmath.exp(v - top) for v in logits)) + top - logits[y])
    return loops.mean(terms)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_matches_the_paper_written_as_loops(
    options: dict[str, Any], batch: Any, agrees: Any, loops: Any
) -> None:
    torch.manual_seed(0)
    agrees(
        create("arcface", num_classes=4, embedding_dim=4, **options).double(),
        lambda moving, still, labels, proxies: arcface(loops, moving, labels, proxies, **options),
        batch,
    )


def test_equals_pytorch_metric_learnings_in_radians() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    torch.manual_seed(0)
    x, labels = torch.randn(24, 16, dtype=torch.float64), torch.arange(24) // 4
    ours = create("arcface", num_classes=10, embedding_dim=16)
    theirs = losses.ArcFaceLoss(10, 16, margin=math.degrees(0.5))
    theirs.W.data.copy_(ours.proxies.data.T)
    assert ours(x, labels).item() == pytest.approx(theirs(x, labels).item(), abs=1e-9)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_row_on_its_direction_or_opposite_has_a_finite_gradient(sign: int) -> None:
    loss = create("arcface", num_classes=3, embedding_dim=8)
    x = (sign * loss.proxies.detach()[:1]).clone().requires_grad_()
    loss(x, torch.tensor([0])).backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(loss.proxies.grad).all()


@pytest.mark.parametrize("options", [{"margin": 28.6}, {"scale": 0}], ids=str)
def test_impossible_options_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"{next(iter(options))} must be"):
        create("arcface", num_classes=3, embedding_dim=4, **options)
