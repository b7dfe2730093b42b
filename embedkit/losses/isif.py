"""ISIF: without labels, two views of an image are alike and all other images different.

Paper: Ye, Zhang, Yuen, Chang, "Unsupervised Embedding Learning via Invariant and Spreading
Instance Feature", CVPR 2019, arXiv:1904.03436.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from embedkit.errors import UsageError
from embedkit.losses._base import MetricLoss, check_number
from embedkit.losses._pairs import distances_of_cosines

__all__ = ["InvariantSpreadingLoss"]


class InvariantSpreadingLoss(MetricLoss):
    """Rows i and ``i + B/2`` are two views of one image; ``q_ij = exp(z_i . z_j / temperature)``.

        L = -1/B sum_i ( log P_i + negative_weight sum over other images j of log(1 - R_ij) )
        P_i = q_i,pair / Z_i,  R_ij = q_ij / Z_i,  Z_i = q_i,pair + negative_weight sum_j q_ij

    The second operand z_j of every product is a constant in backward, as in the authors' code.

    Args:
        temperature: Above 0.
        negative_weight: Above 0; the authors' ``batch-m``.

    Shape: ``(B, D)`` rows, B even, scaled to length 1 here; ``(B,)`` labels are ignored ->
    scalar. Cost: O(B^2 D) time, O(B^2) memory.
    """

    special_batch = "two views of each image"

    def __init__(self, *, temperature: float = 0.1, negative_weight: float = 1.0) -> None:
        super().__init__()
        self.temperature = check_number("temperature", temperature, above=0)
        self.negative_weight = check_number("negative_weight", negative_weight, above=0)

    def compute(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        half, odd = divmod(len(rows), 2)
        if odd:
            raise UsageError(
                "isif pairs row i with row i + B/2 and needs an even batch",
                facts=f"got {len(rows)} rows",
            )
        pair = torch.arange(len(rows), device=rows.device).roll(-half)[:, None]
        logits = rows @ rows.detach().T / self.temperature
        logits = logits.diagonal_scatter(logits.new_full((len(rows),), -torch.inf))
        weights = torch.full_like(logits, math.log(self.negative_weight)).scatter_(1, pair, 0)
        log_share = logits - (logits + weights).logsumexp(1, keepdim=True)
        own = log_share.gather(1, pair)
        # The share of a negative reaches 1 in float32 when two images coincide.
        spread = torch.log1p(-log_share.exp().clamp(max=1 - 1e-6)).scatter(1, pair, 0)
        value = -(own.sum() + self.negative_weight * spread.sum()) / len(rows)
        with torch.no_grad():
            distances = distances_of_cosines(logits, scale=self.temperature)
            near = distances.gather(1, pair).sum()
            distances.fill_diagonal_(0)
            others = max(len(rows) * (len(rows) - 2), 1)
            stats = {
                "positive_distance": near / len(rows),
                "negative_distance": (distances.sum() - near) / others,
                "pair_probability": own.exp().mean(),
            }
        return value, stats
