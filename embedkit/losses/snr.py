"""Signal-to-noise ratio: measure how far a row is by the noise it adds to the anchor.

Paper: Yuan, Deng, Tang, Tang, Chen, "Signal-to-Noise Ratio: A Robust Distance Metric for Deep
Metric Learning", CVPR 2019, arXiv:1904.02616.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from embedkit.losses._base import MetricLoss, check_choice, check_number
from embedkit.losses._pairs import (
    first_two,
    mean_weights,
    pair_cosines,
    pair_stats,
    same_and_other,
    with_slope,
)
from embedkit.losses._triplets import hinge_triplets
from embedkit.losses.contrastive import contrast
from embedkit.losses.npair import own_column

__all__ = ["SignalToNoiseLoss"]

_MARGINS = {"contrastive": 1.0, "triplet": 0.2, "lifted": 1.0, "npair": 0.0}


class SignalToNoiseLoss(MetricLoss):
    """One of four objectives on ``d(i, j) = Var(h_j - h_i) / Var(h_i)``, over the D components.

    - ``contrastive``: d over positive pairs, plus ``[margin - d]+`` over negative pairs.
    - ``triplet``: ``[d(a, p) - d(a, n) + margin]+`` over all triplets.
    - ``lifted``: half of ``[max(r_i, r_j) + beta d(i, j)]+`` over positive pairs, where ``r_i`` is
      the largest ``margin - beta d(i, k)`` over the negatives k of i; a hard maximum, not squared.
    - ``npair``: as the N-pair loss, with the scores ``1 / d^2``, at most 100 (ours: a duplicate's
      is infinite).

    plus ``zero_mean`` times the mean over rows of ``|sum of the row|``. d is not symmetric. An
    anchor whose variance is below a millionth of the batch's mean counts as that large (ours: its
    d is infinite).

    Args:
        objective: One of the four names above.
        margin: At least 0; None: 1 for contrastive and lifted, 0.2 for triplet. Not used by npair.
        beta: Scale of distances in ``lifted``, above 0.
        zero_mean: Weight of the regulariser, at least 0. The paper's is not known; others use
            0.005.
        reduction: ``"mean"`` over all terms, ``"nonzero"`` over those above 0, ``"sum"`` as the
            paper writes contrastive and triplet. npair is always a mean.

    Shape: ``(B, D)`` rows as they are, and ``(B,)`` labels -> scalar. Cost: O(B^2 D) time, O(B^2)
    memory.
    """

    normalizes = False
    certainty = "secondary source"

    def __init__(
        self,
        *,
        objective: Literal["contrastive", "triplet", "lifted", "npair"] = "contrastive",
        margin: float | None = None,
        beta: float = 1.0,
        zero_mean: float = 0.0,
        reduction: Literal["mean", "nonzero", "sum"] = "mean",
    ) -> None:
        super().__init__()
        self.objective: str = check_choice("objective", objective, list(_MARGINS))
        given = _MARGINS[self.objective] if margin is None else margin
        self.margin = check_number("margin", given, least=0)
        self.beta = check_number("beta", beta, above=0)
        self.zero_mean = check_number("zero_mean", zero_mean, least=0)
        self.reduction: str = check_choice("reduction", reduction, ["mean", "nonzero", "sum"])

    def compute(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        distances = _signal_to_noise(rows)
        stats: dict[str, Tensor]
        if self.objective == "npair":
            first, second = first_two(labels)
            value, stats = own_column(distances[first][:, second].clamp(min=0.1) ** -2)
        else:
            with torch.no_grad():
                if self.objective == "contrastive":
                    value, slope, stats = contrast(
                        distances,
                        *same_and_other(labels),
                        positive_margin=0,
                        negative_margin=self.margin,
                        squared=False,
                        reduction=self.reduction,
                    )
                else:
                    value, slope, stats = self._by_anchor(distances, labels)
            value = with_slope(distances, value, slope)
        if self.zero_mean:
            value = value + self.zero_mean * rows.sum(1).abs().mean()
        return value, stats

    def _by_anchor(
        self, distances: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        same, other = same_and_other(labels)
        stats = pair_stats(distances, same, other)
        if self.objective == "triplet":
            total, active, terms, slope = hinge_triplets(distances, same, other, self.margin)
            stats["active_triplets"] = active / terms.clamp(min=1)
        else:
            total, active, terms, slope = self._lifted(distances, same, other)
            stats["active_positives"] = active / terms.clamp(min=1)
        count = {"mean": terms, "nonzero": active, "sum": torch.ones_like(terms)}[self.reduction]
        count = count.clamp(min=1)
        return total / count, slope.div_(count), stats

    def _lifted(
        self, distances: Tensor, same: Tensor, other: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tie = 16 * torch.finfo(distances.dtype).eps
        nearest = distances.masked_fill(~other, torch.inf)
        least = nearest.amin(1, keepdim=True)
        reach = self.margin - self.beta * least
        hinge = (torch.maximum(reach, reach.T) + self.beta * distances).clamp_(min=0).mul_(same)
        active = hinge > 0
        # A pair's maximum comes from row i, from row j, or by halves when they are equal.
        lead = (reach - reach.T).nan_to_num_(0)
        from_i = ((lead > tie) + 0.5 * (lead.abs() <= tie)) * active
        from_i = from_i.to(distances.dtype)
        through = from_i.sum(1, keepdim=True) + active.sum(0)[:, None] - from_i.sum(0)[:, None]
        nearest = mean_weights(other & (nearest <= least + tie), distances.dtype)
        slope = (through * nearest).neg_().add_(active).mul_(self.beta / 2)
        return hinge.sum() / 2, active.count_nonzero(), same.count_nonzero(), slope


def _signal_to_noise(rows: Tensor) -> Tensor:
    centred = rows - rows.mean(1, keepdim=True)
    power = centred.square().sum(1)
    with torch.no_grad():
        # A row's variance is known to the rounding of the row's own size.
        rounding = (8 * torch.finfo(rows.dtype).eps) ** 2 * rows.square().sum(1).amax()
        least = torch.maximum(1e-6 * power.mean(), rounding).clamp(min=1e-30)
    noise = power[:, None] + power[None, :] - 2 * pair_cosines(centred)
    return noise / power.clamp(min=least)[:, None]
