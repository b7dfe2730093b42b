"""Ranked List Loss: pull a class inside a ball, push every other class past a boundary.

Paper: Wang, Hua, Kodirov, Hu, Garnier, Robertson, "Ranked List Loss for Deep Metric Learning",
CVPR 2019, arXiv:1903.03238.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from embedkit.losses._base import MetricLoss, check_choice, check_number
from embedkit.losses._pairs import (
    Memory,
    mean_weights,
    pair_distances,
    pair_stats,
    same_and_other,
    share,
    with_slope,
)

__all__ = ["RankedListLoss", "ranked_list"]


class RankedListLoss(MetricLoss):
    """Each row in turn is a query with a ranked list: the rest of the batch, by distance.

    Per query i, over its positives farther than ``alpha - margin`` and its negatives nearer than
    ``alpha``:

        L_P(i) = mean (d_ij - (alpha - margin))
        L_N(i) = sum w_ij (alpha - d_ij) / sum w_ij,   w_ij = exp(temperature (alpha - d_ij))

    and the loss is the mean over all B queries of ``L_P + balance L_N`` (``combine="sum"``) or of
    ``(1 - balance) L_P + balance L_N`` (``"convex"``). An empty list counts 0. The weights are
    constants in backward. Defaults are the paper's for Stanford Online Products; its CUB setting
    is alpha 1.4, margin 0.2.

    Args:
        alpha: Boundary that negatives are pushed past, a distance on the unit sphere, above 0 and
            at most 2.
        margin: Gap between that boundary and the positive ball of radius ``alpha - margin``, 0 to
            alpha.
        temperature: How sharply near negatives dominate, at least 0; 0 weights them equally.
        balance: Weight of the negative part; at least 0, and at most 1 with ``combine="convex"``,
            where 1 leaves the positives out and 0.5 weights both parts equally.
        combine: ``"sum"`` or ``"convex"``.
        gradient: ``"query"``, the paper's rule: in query i's terms only row i receives a
            gradient. ``"both"``: the two rows of a pair do.

    Shape: ``(B, D)`` rows, scaled to length 1 here, and ``(B,)`` labels -> scalar. A collapsed
    batch has the formula's value (``alpha * balance`` under ``"sum"``, when every query has a
    negative), not 0; exactly equal rows have no direction to part in, so their gradient is 0.
    Cost: O(B^2 D) time, O(B^2) memory.
    """

    takes_memory = True

    def __init__(
        self,
        *,
        alpha: float = 1.2,
        margin: float = 0.4,
        temperature: float = 10.0,
        balance: float = 1.0,
        combine: Literal["sum", "convex"] = "sum",
        gradient: Literal["query", "both"] = "query",
    ) -> None:
        super().__init__()
        self.alpha = check_number("alpha", alpha, above=0, most=2)
        self.margin = check_number("margin", margin, least=0, most=self.alpha)
        self.temperature = check_number("temperature", temperature, least=0)
        self.combine: str = check_choice("combine", combine, ["sum", "convex"])
        most = 1 if self.combine == "convex" else math.inf
        self.balance = check_number("balance", balance, least=0, most=most)
        self.gradient: str = check_choice("gradient", gradient, ["query", "both"])

    def compute(
        self, rows: Tensor, labels: Tensor, memory: Memory | None = None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        return ranked_list(
            rows,
            labels,
            memory,
            alpha=self.alpha,
            margin=self.margin,
            temperature=self.temperature,
            pull=1 - self.balance if self.combine == "convex" else 1.0,
            push=self.balance,
            query_only=self.gradient == "query",
        )


def ranked_list(
    rows: Tensor,
    labels: Tensor,
    memory: Memory | None = None,
    *,
    alpha: float,
    margin: float,
    temperature: float,
    pull: float,
    push: float,
    query_only: bool,
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Mean over queries of ``pull L_P + push L_N`` and its tell-tales, for unit rows ``(B, D)``."""
    distances = pair_distances(rows, query_only=query_only, memory=memory)
    with torch.no_grad():
        same, other = same_and_other(labels, memory)
        ball = alpha - margin
        stats = pair_stats(distances, same, other)
        far = same & (distances > ball)
        near = other & (distances < alpha)
        stats["active_positives"] = share(far, same)
        stats["active_negatives"] = share(near, other)
        # exp(T (alpha - d)) / sum: a softmax, in which alpha cancels. A query without near
        # negatives is all -inf, hence NaN, hence 0 by the second mask.
        weights = torch.mul(distances, -temperature).masked_fill_(~near, -torch.inf)
        weights = weights.softmax(1).masked_fill_(~near, 0)
        share_of_far = mean_weights(far, rows.dtype)
        value = pull * (share_of_far * (distances - ball)).sum()
        value = value + push * (weights * (alpha - distances)).sum()
        slope = share_of_far.mul_(pull).sub_(weights, alpha=push).div_(len(rows))
    return with_slope(distances, value / len(rows), slope), stats
