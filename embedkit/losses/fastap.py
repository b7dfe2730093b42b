"""FastAP: average precision of each anchor's ranking, through a histogram of distances.

Paper: Cakir, He, Xia, Kulis, Sclaroff, "Deep Metric Learning to Rank", CVPR 2019.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from embedkit.losses._base import MetricLoss, check_whole
from embedkit.losses._pairs import (
    Memory,
    distances_of_cosines,
    pair_cosines,
    pair_stats,
    per_row,
    same_and_other,
    with_slope,
)

__all__ = ["FastAPLoss"]


class FastAPLoss(MetricLoss):
    """1 minus the mean over anchors of

        FastAP(i) = 1/|P(i)| sum over knots l of h+_l H+_l / H_l

    where h+ and h count the anchor's positives and all its pairs in ``bins + 1`` knots over the
    squared distance 0 to 4, each pair shared linearly by its two neighbouring knots, and H+ and H
    are their running sums. Anchors without a positive are left out. The gradient is the exact
    one; the released code's is a multiple of it. On a knot itself the left slope is taken, as
    there.

    Args:
        bins: At least 1.

    Shape: ``(B, D)`` rows, scaled to length 1 here, and ``(B,)`` labels -> scalar in 0 to 1; one
    class is 0. Cost: O(B^2 D) time, O(B^2 + B bins) memory.
    """

    takes_memory = True

    def __init__(self, *, bins: int = 10) -> None:
        super().__init__()
        self.bins = check_whole("bins", bins, least=1)

    def compute(
        self, rows: Tensor, labels: Tensor, memory: Memory | None = None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        cosines = pair_cosines(rows, memory)
        with torch.no_grad():
            same, other = same_and_other(labels, memory)
            stats = pair_stats(distances_of_cosines(cosines), same, other)
            positives = per_row(same)
            anchors = positives.count_nonzero()
            stats["anchors_with_positives"] = anchors / len(rows)
            # Place on the axis of knots; the pair lies between knots `left` and `left + 1`.
            place = (2 - 2 * cosines).mul_(self.bins / 4).clamp_(0, self.bins)
            left = place.ceil().sub_(1).clamp_(min=0).long()
            beyond = place.sub_(left)
            h_positive = self._histogram(left, beyond, same)
            h = h_positive + self._histogram(left, beyond, other)
            # H = 0 where no pair has come yet: 0 / 1.
            sums, all_sums = h_positive.cumsum(1), h.cumsum(1)
            all_sums.masked_fill_(all_sums == 0, 1)
            precision = sums / all_sums
            scale = positives.clamp(min=1) * anchors.clamp(min=1)
            value = anchors.clamp(max=1) - (h_positive * precision / scale).sum()
            # Slope of the sum in h+ directly and through H+, and in h through H.
            in_positive = precision + _from_here(h_positive / all_sums)
            in_all = -_from_here(h_positive * precision / all_sums)
            # Moving one knot to the right leaves `left` and enters `left + 1`; d(D^2)/dS = -2.
            step = in_all.diff(dim=1) / scale
            slope = step.gather(1, left).mul_(same | other)
            step = in_positive.diff(dim=1) / scale
            slope.add_(step.gather(1, left).mul_(same)).mul_(self.bins / 2)
        return with_slope(cosines, value, slope), stats

    def _histogram(self, left: Tensor, beyond: Tensor, pairs: Tensor) -> Tensor:
        counts = beyond.new_zeros(len(left), self.bins + 1)
        right = beyond * pairs
        counts[:, 1:].scatter_add_(1, left, right)
        counts[:, :-1].scatter_add_(1, left, right.neg_().add_(pairs))
        return counts


def _from_here(values: Tensor) -> Tensor:
    """Per row, the sum of each entry and all after it."""
    return values.flip(1).cumsum(1).flip(1)
