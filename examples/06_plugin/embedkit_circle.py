"""Circle loss: each similarity is pulled at its own pace, the faster the further from its aim.

Paper: Sun, Cheng, Zhang, Zhang, Zheng, Wang, Wei, "Circle Loss: A Unified Perspective of Pair
Similarity Optimization", CVPR 2020, arXiv:2002.10857, equation 6.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from embedkit.losses import MetricLoss

__all__ = ["CircleLoss"]


class CircleLoss(MetricLoss):
    """``log(1 + sum_n exp(g a_n (s_n - m)) sum_p exp(-g a_p (s_p - 1 + m)))``, mean over anchors.

    s are cosines with the anchor, ``a_p = [1 + m - s_p]+`` and ``a_n = [s_n + m]+`` are the paces,
    through which no gradient flows. Anchors without a positive or without a negative do not count.

    Args:
        margin: m, from 0 to 1. 0.4 is the paper's for retrieval.
        scale: g, above 0. 80 is the paper's for retrieval.

    Shape: ``(B, D)`` rows, scaled to length 1 before `compute`, and ``(B,)`` labels -> scalar. No
    anchor: 0. Cost: O(B^2 D) time, O(B^2) memory.
    """

    def __init__(self, *, margin: float = 0.4, scale: float = 80.0) -> None:
        super().__init__()
        if not 0 <= margin <= 1:
            raise ValueError(f"margin must be a number from 0 to 1, got {margin!r}")
        if not scale > 0:
            raise ValueError(f"scale must be a number greater than 0, got {scale!r}")
        self.margin, self.scale = margin, scale

    def compute(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        cosines = rows @ rows.T  # (B, B)
        other = labels[:, None] != labels[None, :]
        same = ~other & ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        pace_of_same = (1 + self.margin - cosines.detach()).clamp(min=0)
        pace_of_other = (cosines.detach() + self.margin).clamp(min=0)
        pull = -self.scale * pace_of_same * (cosines - 1 + self.margin)
        push = self.scale * pace_of_other * (cosines - self.margin)
        counts = same.any(1) & other.any(1)
        # Rows without a pair are left out before the exponentials, whose gradient they would spoil.
        pull = pull[counts].masked_fill(~same[counts], -torch.inf).logsumexp(1)
        push = push[counts].masked_fill(~other[counts], -torch.inf).logsumexp(1)
        value = F.softplus(pull + push).sum() / counts.sum().clamp(min=1)
        distances = (2 - 2 * cosines.detach()).clamp(min=0).sqrt()
        told = {  # shown for every epoch; `spread` is added for every loss
            "positive_distance": _mean(distances, same),
            "negative_distance": _mean(distances, other),
        }
        return value + 0 * rows.sum(), told


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Of the values under the mask; 0 where there are none."""
    return (values * mask).sum() / mask.sum().clamp(min=1)
