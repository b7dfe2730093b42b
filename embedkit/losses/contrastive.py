"""Contrastive loss: pull positive pairs together, push negative pairs apart up to a margin.

Paper: Hadsell, Chopra, LeCun, "Dimensionality Reduction by Learning an Invariant Mapping", CVPR
2006.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from embedkit.losses._base import MetricLoss, check_choice, check_number
from embedkit.losses._pairs import (
    Memory,
    pair_distances,
    pair_stats,
    same_and_other,
    share,
    with_slope,
)

__all__ = ["ContrastiveLoss", "contrast"]


class ContrastiveLoss(MetricLoss):
    """A mean over positive pairs plus a mean over negative pairs, of how far they miss a margin.

    The terms are ``[d - positive_margin]+`` and ``[negative_margin - d]+``. The paper has both
    squared and halved; ``squared`` squares them.

    Args:
        positive_margin: Distance inside which a positive pair is left alone, at least 0.
        negative_margin: Distance beyond which a negative pair is left alone, at least 0.
        squared: Square the terms.
        reduction: ``"nonzero"``: each mean is over the terms above 0. ``"mean"``: over all.

    Shape: ``(B, D)`` rows, scaled to length 1 here, and ``(B,)`` labels -> scalar. Cost: O(B^2 D)
    time, O(B^2) memory.
    """

    takes_memory = True

    def __init__(
        self,
        *,
        positive_margin: float = 0.0,
        negative_margin: float = 1.0,
        squared: bool = False,
        reduction: Literal["nonzero", "mean"] = "nonzero",
    ) -> None:
        super().__init__()
        self.positive_margin = check_number("positive_margin", positive_margin, least=0)
        self.negative_margin = check_number("negative_margin", negative_margin, least=0)
        self.squared: bool = check_choice("squared", squared, [True, False])
        self.reduction: str = check_choice("reduction", reduction, ["nonzero", "mean"])

    def compute(
        self, rows: Tensor, labels: Tensor, memory: Memory | None = None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        distances = pair_distances(rows, memory=memory)
        with torch.no_grad():
            value, slope, stats = contrast(
                distances,
                *same_and_other(labels, memory),
                positive_margin=self.positive_margin,
                negative_margin=self.negative_margin,
                squared=self.squared,
                reduction=self.reduction,
            )
        return with_slope(distances, value, slope), stats


def contrast(
    distances: Tensor,
    same: Tensor,
    other: Tensor,
    *,
    positive_margin: float,
    negative_margin: float,
    squared: bool,
    reduction: str,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Value, its slope in each of the distances, and tell-tales.

    ``reduction`` may also be ``"sum"``.
    """
    stats = pair_stats(distances, same, other)
    pull = (distances - positive_margin).clamp_(min=0).mul_(same)
    push = (negative_margin - distances).clamp_(min=0).mul_(other)
    stats["active_positives"] = share(pull, same)
    stats["active_negatives"] = share(push, other)
    far, near = _divisor(pull, same, reduction), _divisor(push, other, reduction)
    if squared:
        value = pull.square().sum() / far + push.square().sum() / near
        return value, pull.div_(far).sub_(push.div_(near)).mul_(2), stats
    value = pull.sum() / far + push.sum() / near
    return value, pull.sign_().div_(far).sub_(push.sign_().div_(near)), stats


def _divisor(terms: Tensor, pairs: Tensor, reduction: str) -> Tensor:
    counted = {"nonzero": terms, "mean": pairs, "sum": pairs.new_ones(1)}[reduction]
    return counted.count_nonzero().clamp(min=1)
