"""Margin loss: one boundary for all distances, negatives sampled evenly over distance.

Paper: Wu, Manmatha, Smola, Krahenbuhl, "Sampling Matters in Deep Embedding Learning", ICCV 2017,
arXiv:1706.07567.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from embedkit.losses._base import MetricLoss, check_choice, check_number
from embedkit.losses._pairs import (
    Memory,
    pair_distances,
    pair_stats,
    per_row,
    same_and_other,
    share,
    with_slope,
)

__all__ = ["MarginLoss"]

# Nearer negatives are drawn as if they were this far: the paper's guard against noise.
_NEAREST = 0.5


class MarginLoss(MetricLoss):
    """``[d_ap - beta + margin]+ + [beta - d_an + margin]+`` over triplets, per active term.

    The sum is divided by the number of positive terms above 0 plus that of negative terms above 0.

    - ``distance-weighted``: every positive pair gets one random negative of its anchor, drawn
      with a chance inverse to how common its distance is on the sphere,
      ``d^(D-2) (1 - d^2/4)^((D-3)/2)``, with d at least 0.5. Negatives beyond ``beta + margin``
      have no term and are not drawn.
    - ``all``: every triplet.

    Args:
        margin: At least 0.
        beta: The boundary, a distance on the unit sphere, above 0.
        mining: One of the two names above.
        learn_beta: Make ``beta`` a parameter; the paper's rate for it is 0.0005.

    Shape: ``(B, D)`` rows, scaled to length 1 here, and ``(B,)`` labels -> scalar. Cost: O(B^2 D)
    time, O(B^2) memory. Draws come from torch's generator.
    """

    takes_memory = True

    def __init__(
        self,
        *,
        margin: float = 0.2,
        beta: float = 1.2,
        mining: Literal["distance-weighted", "all"] = "distance-weighted",
        learn_beta: bool = False,
    ) -> None:
        super().__init__()
        self.margin = check_number("margin", margin, least=0)
        self.mining: str = check_choice("mining", mining, ["distance-weighted", "all"])
        start = check_number("beta", beta, above=0)
        learned = check_choice("learn_beta", learn_beta, [True, False])
        self.beta: nn.Parameter | float = nn.Parameter(torch.tensor(start)) if learned else start

    def compute(
        self, rows: Tensor, labels: Tensor, memory: Memory | None = None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        distances = pair_distances(rows, memory=memory)
        beta = torch.as_tensor(self.beta, dtype=rows.dtype, device=rows.device)
        with torch.no_grad():
            same, other = same_and_other(labels, memory)
            stats = pair_stats(distances, same, other)
            far = (distances - (beta - self.margin)).clamp_(min=0).mul_(same)
            near = (beta + self.margin - distances).clamp_(min=0).mul_(other)
            stats["active_positives"] = share(far, same)
            stats["active_negatives"] = share(near, other)
            # How many triplets each positive and each negative term stands in.
            positives = per_row(same)
            if self.mining == "all":
                times_far, times_near = per_row(other), positives
            else:
                times_far = other.any(1, keepdim=True)
                times_near = _draw(distances, near > 0, positives, rows.shape[1])
            pull = (far > 0).to(rows.dtype).mul_(times_far)
            push = (near > 0).to(rows.dtype).mul_(times_near)
            count = (pull.sum() + push.sum()).clamp(min=1)
            value = ((far * times_far).sum() + (near * times_near).sum()) / count
            by_beta = (push.sum() - pull.sum()) / count
            slope = pull.sub_(push).div_(count)
        value = with_slope(distances, value, slope)
        if beta.requires_grad:
            value = value + (beta - beta.detach()) * by_beta
        return value, stats


def _draw(distances: Tensor, drawable: Tensor, positives: Tensor, width: int) -> Tensor:
    """How often each negative is drawn, ``(B, B)``: as many per row as ``positives`` says."""
    d = distances.clamp(_NEAREST, 1.999)
    log_weights = (2 - width) * d.log() - (width - 3) / 2 * (1 - d.square() / 4).log()
    log_weights.masked_fill_(~drawable, -math.inf)
    some = drawable.any(1, keepdim=True)
    # Each row is scaled by its own largest weight: with wide embeddings a common scale underflows.
    weights = (log_weights - log_weights.amax(1, keepdim=True)).exp_().masked_fill_(~some, 1)
    draws = int(positives.max())
    counts = torch.zeros_like(distances)
    if draws:
        drawn = weights.multinomial(draws, replacement=True)
        wanted = torch.arange(draws, device=distances.device) < positives * some
        counts.scatter_add_(1, drawn, wanted.to(distances.dtype))
    return counts
