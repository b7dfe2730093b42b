"""Multi-similarity loss: weight each pair by how it compares with the anchor's other pairs.

Paper: Wang, Han, Huang, Dong, Scott, "Multi-Similarity Loss with General Pair Weighting for Deep
Metric Learning", CVPR 2019, arXiv:1904.06627.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from embedkit.losses._base import MetricLoss, check_number
from embedkit.losses._pairs import (
    Memory,
    distances_of_cosines,
    pair_cosines,
    pair_stats,
    same_and_other,
    share,
    soft_maximum,
    with_slope,
)

__all__ = ["MultiSimilarityLoss"]


class MultiSimilarityLoss(MetricLoss):
    """Mean over anchors of two soft maxima over cosines S.

    Kept negatives: ``S_ij + epsilon > min over positives``; kept positives:
    ``S_ij - epsilon < max over negatives``; the choice carries no gradient. Then

        L(i) = log(1 + sum_kept+ exp(-alpha (S_ij - base))) / alpha
             + log(1 + sum_kept- exp(beta (S_ij - base))) / beta

    and the loss is the mean over all B anchors; one without a positive or without a negative
    counts 0.

    Args:
        alpha: Sharpness for positives, above 0.
        beta: Sharpness for negatives, above 0.
        base: Cosine that separates the two, -1 to 1. The paper's text says 1, the authors' code
            0.5.
        epsilon: Mining slack in cosine, at least 0; None keeps every pair of every anchor, also
            of one that has only positives or only negatives.

    Shape: ``(B, D)`` rows, scaled to length 1 here, and ``(B,)`` labels -> scalar. Cost: O(B^2 D)
    time, O(B^2) memory.
    """

    takes_memory = True

    def __init__(
        self,
        *,
        alpha: float = 2.0,
        beta: float = 50.0,
        base: float = 0.5,
        epsilon: float | None = 0.1,
    ) -> None:
        super().__init__()
        self.alpha = check_number("alpha", alpha, above=0)
        self.beta = check_number("beta", beta, above=0)
        self.base = check_number("base", base, least=-1, most=1)
        self.epsilon = None if epsilon is None else check_number("epsilon", epsilon, least=0)

    def compute(
        self, rows: Tensor, labels: Tensor, memory: Memory | None = None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        cosines = pair_cosines(rows, memory)
        with torch.no_grad():
            same, other = same_and_other(labels, memory)
            stats = pair_stats(distances_of_cosines(cosines), same, other)
            positives, negatives = same, other
            if self.epsilon is not None:
                # Without a positive the smallest is +inf and no negative is kept; likewise the
                # other way.
                worst = cosines.masked_fill(~same, torch.inf).amin(1, keepdim=True)
                best = cosines.masked_fill(~other, -torch.inf).amax(1, keepdim=True)
                same = same & (cosines - self.epsilon < best)
                other = other & (cosines + self.epsilon > worst)
            stats["active_positives"] = share(same, positives)
            stats["active_negatives"] = share(other, negatives)
            pull, pull_slope = soft_maximum((cosines - self.base).mul_(-self.alpha), same)
            push, slope = soft_maximum((cosines - self.base).mul_(self.beta), other)
            value = (pull / self.alpha + push / self.beta) / len(rows)
            slope.sub_(pull_slope).div_(len(rows))
        return with_slope(cosines, value, slope), stats
