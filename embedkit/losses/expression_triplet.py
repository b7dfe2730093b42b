"""Odd-one-out triplets: of three images people called two alike, and the third differs from both.

Paper: Vemulapalli, Agarwala, "A Compact Embedding for Facial Expression Similarity", CVPR 2019,
arXiv:1811.11283.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from embedkit.errors import UsageError
from embedkit.losses._base import MetricLoss, check_number
from embedkit.losses._label_distances import check_positions

__all__ = ["ExpressionTripletLoss"]


class ExpressionTripletLoss(MetricLoss):
    """Mean over triplets of ``[d_ab - d_ac + m]+ + [d_ab - d_bc + m]+``, d squared, of unit rows.

    Rows ``3 i`` and ``3 i + 1`` are a and b, the two alike; row ``3 i + 2`` is c, the odd one.

    Args:
        margin: m, at least 0. The paper has 0.2, and 0.1 where all three images are of one class.

    Shape: ``(B, D)`` rows, B a multiple of 3, scaled to length 1 here. ``(B,)`` labels: floats
    are read at rows ``3 i`` as each triplet's own margin; integers are ignored. -> scalar. Cost:
    O(B D) time and memory.
    """

    special_batch = "triplets whose third image is the odd one out"

    def __init__(self, *, margin: float = 0.2) -> None:
        super().__init__()
        self.margin = check_number("margin", margin, least=0)

    def compute(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        if len(rows) % 3:
            raise UsageError(
                "expression-triplet takes rows in threes", facts=f"got {len(rows)} rows"
            )
        first, second, odd = rows.reshape(-1, 3, rows.shape[1]).unbind(1)
        margin = labels[::3].to(rows.dtype) if labels.is_floating_point() else self.margin
        alike = (first - second).square().sum(1)
        differ = torch.stack([(first - odd).square().sum(1), (second - odd).square().sum(1)])
        hinges = (alike - differ + margin).clamp(min=0)
        with torch.no_grad():
            stats = {
                "positive_distance": alike.sqrt().mean(),
                "negative_distance": differ.sqrt().mean(),
                "active_hinges": (hinges > 0).to(rows.dtype).mean(),
                "triplets_right": (alike < differ).all(0).to(rows.dtype).mean(),
            }
        return hinges.sum() / hinges.shape[1], stats

    def _check_labels(self, embeddings: Tensor, labels: Tensor) -> None:
        check_positions(embeddings, labels)
