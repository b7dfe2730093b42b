"""Multibatch: every ordered pair of the batch, against one learned same-or-not threshold.

Paper: Tadmor, Rosenwein, Shalev-Shwartz, Wexler, Shashua, "Learning a Metric Embedding for Face
Recognition using the Multibatch Method", NIPS 2016, arXiv:1605.07270.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from embedkit.losses._base import MetricLoss, check_choice, check_number
from embedkit.losses._pairs import (
    Memory,
    distances_of_cosines,
    pair_cosines,
    pair_stats,
    same_and_other,
    share,
    with_slope,
)

__all__ = ["MultibatchLoss"]


class MultibatchLoss(MetricLoss):
    """Mean over ordered pairs of ``[1 - s (theta - d)]+``, s = 1 for the same class and -1 for two.

    d is the squared distance of unit rows, ``2 - 2 cos``.

    Args:
        theta: Where the learned parameter ``theta`` starts, a squared distance, at least 0. After
            training `threshold` tells same from not same.
        balance_pairs: Half the mean over positive pairs plus half that over negative pairs,
            instead of the mean over all.

    Shape: ``(B, D)`` rows, scaled to length 1 here, and ``(B,)`` labels -> scalar. Cost: O(B^2 D)
    time, O(B^2) memory.
    """

    takes_memory = True

    def __init__(self, *, theta: float = 1.0, balance_pairs: bool = False) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(check_number("theta", theta, least=0)))
        self.balance_pairs: bool = check_choice("balance_pairs", balance_pairs, [True, False])

    @property
    def threshold(self) -> float:
        """The squared distance of unit vectors below which two images are of the same class."""
        return float(self.theta.detach())

    def compute(
        self, rows: Tensor, labels: Tensor, memory: Memory | None = None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        cosines = pair_cosines(rows, memory)
        theta = self.theta.to(rows.dtype)
        with torch.no_grad():
            same, other = same_and_other(labels, memory)
            stats = pair_stats(distances_of_cosines(cosines), same, other)
            beyond = 2 - 2 * cosines - theta
            pull = (1 + beyond).clamp_(min=0).mul_(same)
            push = (1 - beyond).clamp_(min=0).mul_(other)
            stats["active_positives"] = share(pull, same)
            stats["active_negatives"] = share(push, other)
            stats["theta"] = theta.detach()
            if self.balance_pairs:
                far = 2 * same.count_nonzero().clamp(min=1)
                near = 2 * other.count_nonzero().clamp(min=1)
            else:
                far = near = (same.count_nonzero() + other.count_nonzero()).clamp(min=1)
            value = pull.sum() / far + push.sum() / near
            by_distance = pull.sign_().div_(far).sub_(push.sign_().div_(near))
            by_theta = -by_distance.sum()
        value = with_slope(cosines, value, by_distance.mul_(-2))
        return value + (theta - theta.detach()) * by_theta, stats
