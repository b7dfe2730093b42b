"""Sums over all triplets of a batch without listing them."""

from __future__ import annotations

import torch
from torch import Tensor

from embedkit.losses._pairs import per_row

__all__ = ["hinge_triplets", "sorted_positives"]


def hinge_triplets(
    distances: Tensor, same: Tensor, other: Tensor, margin: float, *, semi_hard: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``[d_ap - d_an + margin]+`` over every triplet, or those with ``0 < d_an - d_ap <= margin``.

    Returns:
        The sum, how many terms are above 0, how many triplets there are, and the slope of the sum
        in each of the ``(B, B)`` distances. Cost: O(B^2 log P) time, O(B^2) memory, P the most
        positives an anchor has; the triplets are counted, not listed.
    """
    near, column = sorted_positives(distances, same)
    bound = near + margin
    negative = distances.masked_fill(~other, torch.inf)
    # rank of a negative: how many of the anchor's sorted positives do not reach it, even with
    # the margin. A positive and a negative form an active triplet when the positive's place
    # is at or past that rank.
    rank = torch.searchsorted(bound, negative, right=True)
    per_positive = _at_most(rank, bound.shape[1])
    per_negative = per_row(same) - rank
    picked = (per_row(same) * per_row(other)).sum()
    if semi_hard:
        # Leave out the pairs whose negative is not farther than the positive, by more than
        # rounding.
        inside = torch.minimum(near + 4 * torch.finfo(near.dtype).eps, bound)
        past = torch.searchsorted(inside, negative, right=True)
        per_positive = per_positive - _at_most(past, bound.shape[1])
        per_negative = past - rank
        reached = torch.searchsorted(bound, negative)
        picked = (past - reached).mul_(other).sum()
    per_negative.mul_(other)
    # Places past an anchor's last positive hold +inf and are in nobody's reach.
    filled = near < torch.inf
    per_positive = per_positive * filled
    slope = per_negative.to(distances.dtype).neg_()
    total = (per_positive * bound.masked_fill(~filled, 0)).sum()
    total = total + torch.dot(slope.flatten(), distances.flatten())
    slope.scatter_add_(1, column, per_positive.to(distances.dtype))
    return total, per_positive.sum(), picked, slope


def sorted_positives(distances: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """Each anchor's positive distances, ascending, and their columns: ``(B, P)``, then +inf."""
    most = int(per_row(same).max())
    return distances.masked_fill(~same, torch.inf).topk(most, dim=1, largest=False, sorted=True)


def _at_most(rank: Tensor, places: int) -> Tensor:
    """How many entries of each row are at most 0, 1, ... ``places - 1``: ``(B, places)``."""
    counts = torch.zeros(len(rank), places + 1, dtype=rank.dtype, device=rank.device)
    counts.scatter_add_(1, rank, rank.new_ones(1, 1).expand_as(rank))
    return counts.cumsum(1)[:, :-1]
