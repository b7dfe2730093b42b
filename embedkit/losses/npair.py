"""N-pair loss: of one image per class, tell the anchor's own class from all others at once.

Paper: Sohn, "Improved Deep Metric Learning with Multi-class N-pair Loss Objective", NIPS 2016.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from embedkit.losses._base import MetricLoss, check_number
from embedkit.losses._pairs import first_two

__all__ = ["NPairLoss", "own_column"]


class NPairLoss(MetricLoss):
    """Cross-entropy of each anchor's dot products with the positives of all N classes.

        L = mean over i of log(1 + sum over j != i of exp(f_i . p_j - f_i . p_i)) + l2 mean |row|^2

    The first row of a class in the batch is its anchor f, the second its positive p; further rows
    and classes of one row are left out. Below two usable classes the first part is 0.

    Args:
        l2: Weight of the mean squared length of the 2 N used rows, at least 0. The paper's 0.02
            is for a differently scaled sum, 0.005 here.

    Shape: ``(B, D)`` rows as they are, and ``(B,)`` labels -> scalar. The order of rows within a
    class matters. Cost: O(N^2 D + B log B) time, O(N^2) memory.
    """

    normalizes = False

    def __init__(self, *, l2: float = 0.0) -> None:
        super().__init__()
        self.l2 = check_number("l2", l2, least=0)

    def compute(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        first, second = first_two(labels)
        anchors, positives = rows[first], rows[second]
        scores = anchors @ positives.T
        value, stats = own_column(scores)
        if self.l2:
            lengths = anchors.square().sum() + positives.square().sum()
            value = value + self.l2 * lengths / max(2 * len(first), 1)
        return value, stats


def own_column(scores: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy of ``(N, N)`` scores, the right answers on the diagonal; 0 of none."""
    own = scores.diagonal()
    if len(scores) == 0:
        value = scores.sum()
    else:
        value = F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))
    with torch.no_grad():
        others = scores.sum() - own.sum()
        stats = {
            "positive_score": own.sum() / max(len(own), 1),
            "negative_score": others / max(scores.numel() - len(own), 1),
        }
    return value, stats
