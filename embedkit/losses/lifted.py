"""Lifted structure loss: each positive pair against all negatives of both its rows.

Paper: Oh Song, Xiang, Jegelka, Savarese, "Deep Metric Learning via Lifted Structured Feature
Embedding", CVPR 2016, arXiv:1511.06452.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from embedkit.losses._base import MetricLoss, check_number
from embedkit.losses._pairs import pair_distances, pair_stats, same_and_other, share, with_slope

__all__ = ["LiftedStructureLoss"]


class LiftedStructureLoss(MetricLoss):
    """Half the mean over positive pairs (i, j) of ``[J_ij]+ ^ 2``.

        J_ij = log( sum over negatives k of i of exp(margin - d_ik) + the same for j ) + d_ij

    A pair whose rows have no negative counts 0. The paper does not normalise; here rows have
    length 1.

    Args:
        margin: At least 0.

    Shape: ``(B, D)`` rows, scaled to length 1 here, and ``(B,)`` labels -> scalar. Cost: O(B^2 D)
    time, O(B^2) memory.
    """

    def __init__(self, *, margin: float = 1.0) -> None:
        super().__init__()
        self.margin = check_number("margin", margin, least=0)

    def compute(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        distances = pair_distances(rows)
        with torch.no_grad():
            same, other = same_and_other(labels)
            stats = pair_stats(distances, same, other)
            count = same.count_nonzero().clamp(min=1)
            powers = (self.margin - distances).masked_fill_(~other, -torch.inf)
            reach = powers.logsumexp(1, keepdim=True)
            # Rows without a negative are -inf - -inf = NaN, and are masked.
            weights = powers.sub_(reach).exp_().masked_fill_(~other, 0)
            both = torch.logaddexp(reach, reach.T)
            hinge = (both + distances).clamp_(min=0).mul_(same)
            stats["active_positives"] = share(hinge, same)
            value = hinge.square().sum() / (2 * count)
            slope = hinge.div_(count)
            # Both ends of a pair, (i, j) and (j, i), pass through i's negatives: hence the 2.
            part = (reach - both).exp_().masked_fill_(slope == 0, 0).mul_(slope)
            slope.sub_(weights.mul_(2 * part.sum(1, keepdim=True)))
        return with_slope(distances, value, slope), stats
