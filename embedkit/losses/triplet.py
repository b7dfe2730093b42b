"""Triplet loss: every positive nearer to the anchor than every negative, by a margin.

Papers: Schroff, Kalenichenko, Philbin, "FaceNet", CVPR 2015, arXiv:1503.03832; Hermans, Beyer,
Leibe, "In Defense of the Triplet Loss for Person Re-Identification", 2017, arXiv:1703.07737.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from embedkit.losses._base import MetricLoss, check_choice, check_number
from embedkit.losses._pairs import (
    Memory,
    mean_weights,
    pair_distances,
    pair_stats,
    same_and_other,
    with_slope,
)
from embedkit.losses._triplets import hinge_triplets, sorted_positives

__all__ = ["TripletLoss"]


class TripletLoss(MetricLoss):
    """``[d_ap - d_an + margin]+`` over the triplets that the mining picks.

    - ``all``: every triplet.
    - ``semi-hard``: every triplet with ``0 < d_an - d_ap <= margin``. FaceNet takes one negative
      per pair.
    - ``batch-hard``: per anchor the farthest positive and the nearest negative (equal ones share
      the gradient); always the mean over the anchors that have both.
    - ``random``: per anchor one random positive and one random negative, from torch's generator.

    Args:
        margin: At least 0. 0.2 is FaceNet's, there with squared distances.
        mining: One of the four names above.
        squared: Squared distances instead of plain ones.
        soft: ``log(1 + exp(d_ap - d_an))`` in place of the hinge; ``margin`` then only bounds the
            semi-hard band.
        reduction: ``"nonzero"``: mean over the picked triplets that are above 0. ``"mean"``: over
            all picked.

    Shape: ``(B, D)`` rows, scaled to length 1 here, and ``(B,)`` labels -> scalar. No triplet: 0.
    Cost, with P the most positives an anchor has: O(B^2 (D + log P)) time and O(B^2) memory, by
    sorting the positives and counting; with ``soft`` and ``all`` or ``semi-hard`` O(B^2 (D + P))
    time.
    """

    takes_memory = True

    def __init__(
        self,
        *,
        margin: float = 0.2,
        mining: Literal["all", "semi-hard", "batch-hard", "random"] = "all",
        squared: bool = False,
        soft: bool = False,
        reduction: Literal["nonzero", "mean"] = "nonzero",
    ) -> None:
        super().__init__()
        self.margin = check_number("margin", margin, least=0)
        self.mining: str = check_choice(
            "mining", mining, ["all", "semi-hard", "batch-hard", "random"]
        )
        self.squared: bool = check_choice("squared", squared, [True, False])
        self.soft: bool = check_choice("soft", soft, [True, False])
        self.reduction: str = check_choice("reduction", reduction, ["nonzero", "mean"])

    def compute(
        self, rows: Tensor, labels: Tensor, memory: Memory | None = None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        distances = pair_distances(rows, memory=memory)
        with torch.no_grad():
            same, other = same_and_other(labels, memory)
            stats = pair_stats(distances, same, other)
            measured = distances.square() if self.squared else distances
            if self.mining in ("batch-hard", "random"):
                total, active, picked, slope = self._one_each(measured, same, other)
            elif self.soft:
                total, active, picked, slope = self._every_soft(measured, same, other)
            else:
                total, active, picked, slope = hinge_triplets(
                    measured, same, other, self.margin, semi_hard=self.mining == "semi-hard"
                )
            only_active = self.reduction == "nonzero" and self.mining != "batch-hard"
            count = (active if only_active else picked).clamp(min=1)
            stats["active_triplets"] = active / picked.clamp(min=1)
            if self.squared:
                slope.mul_(distances).mul_(2)
        return with_slope(distances, total / count, slope.div_(count)), stats

    # Both below answer what `hinge_triplets` answers.

    def _one_each(
        self, distances: Tensor, same: Tensor, other: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.mining == "batch-hard":
            tie = 16 * torch.finfo(distances.dtype).eps
            farthest = distances.masked_fill(~same, -torch.inf)
            farthest = same & (farthest >= farthest.amax(1, keepdim=True) - tie)
            nearest = distances.masked_fill(~other, torch.inf)
            nearest = other & (nearest <= nearest.amin(1, keepdim=True) + tie)
        else:
            farthest, nearest = _one_of(same), _one_of(other)
        to_positive = mean_weights(farthest, distances.dtype)
        to_negative = mean_weights(nearest, distances.dtype)
        both = same.any(1) & other.any(1)
        gap = (to_positive * distances).sum(1) - (to_negative * distances).sum(1)
        terms = (F.softplus(gap) if self.soft else (gap + self.margin).clamp(min=0)) * both
        weight = (gap.sigmoid() if self.soft else (gap + self.margin > 0)) * both
        slope = to_positive.sub_(to_negative).mul_(weight[:, None])
        return terms.sum(), (terms > 0).sum(), both.sum(), slope

    def _every_soft(
        self, distances: Tensor, same: Tensor, other: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        near, column = sorted_positives(distances, same)
        slope = torch.zeros_like(distances)
        total, picked = distances.new_zeros(()), same.new_zeros((), dtype=torch.long)
        for place in range(near.shape[1]):
            gap = near[:, place, None] - distances
            used = other & (gap < torch.inf)
            if self.mining == "semi-hard":
                used &= (gap < -4 * torch.finfo(gap.dtype).eps) & (gap >= -self.margin)
            total += F.softplus(gap).masked_fill_(~used, 0).sum()
            picked += used.count_nonzero()
            weight = gap.sigmoid_().masked_fill_(~used, 0)
            slope.sub_(weight)
            slope.scatter_add_(1, column[:, place, None], weight.sum(1, keepdim=True))
        return total, picked, picked, slope


def _one_of(mask: Tensor) -> Tensor:
    """One random entry of each row's set ones; a row without any stays empty."""
    chosen = (
        torch.rand(mask.shape, device=mask.device).masked_fill_(~mask, -1).argmax(1, keepdim=True)
    )
    return torch.zeros_like(mask).scatter_(1, chosen, True) & mask
