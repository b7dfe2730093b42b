"""Dense triplets: whatever has the nearer label must have the nearer embedding.

Paper: Kim, Seo, Laptev, Cho, Kwak, "Deep Metric Learning Beyond Binary Supervision", CVPR 2019,
arXiv:1904.09626, where it is the baseline beside the log-ratio loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from embedkit.losses._base import MetricLoss, check_choice, check_number
from embedkit.losses._label_distances import check_positions, label_distances
from embedkit.losses._pairs import distances_of_cosines, pair_cosines, per_row, with_slope

__all__ = ["DenseTripletLoss"]


class DenseTripletLoss(MetricLoss):
    """Mean of ``[d_ai - d_aj + margin]+`` over anchors a and partners with ``g_ai < g_aj``.

    g is the Euclidean distance of labels, d the squared distance of unit rows, ``2 - 2 cos``. The
    mean is over all such triplets of the batch.

    Args:
        margin: At least 0, a squared distance.
        anchors: ``"first"``: row 0 is the anchor, as the paper's batches are made. ``"all"``:
            every row is.

    Shape: ``(B, D)`` rows, scaled to length 1 here, ``(B,)`` or ``(B, d)`` numbers as labels ->
    scalar. Cost: O(B^2 D) time and O(B^2) memory, for all anchors O(B^3 + B^2 D) time.
    """

    special_batch = "images labelled with numbers that are near or far"

    def __init__(self, *, margin: float = 0.03, anchors: Literal["first", "all"] = "first") -> None:
        super().__init__()
        self.margin = check_number("margin", margin, least=0)
        self.anchors: str = check_choice("anchors", anchors, ["first", "all"])

    def compute(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        cosines = pair_cosines(rows)
        with torch.no_grad():
            anchors = 1 if self.anchors == "first" else len(rows)
            apart = label_distances(labels, anchors, rows.dtype)
            slope = torch.zeros_like(cosines)
            total, active, count = cosines.new_zeros(3).unbind()
            for anchor in range(anchors):
                partner = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
                partner[anchor] = False
                nearer = (apart[anchor, :, None] < apart[anchor]) & partner & partner[:, None]
                # d_i - d_j is 2 (S_j - S_i).
                hinge = 2 * (cosines[anchor] - cosines[anchor, :, None]) + self.margin
                hinge = hinge.clamp_(min=0).mul_(nearer)
                violated = hinge > 0
                total = total + hinge.sum()
                active = active + violated.count_nonzero()
                count = count + nearer.count_nonzero()
                slope[anchor] = 2 * (per_row(violated.T) - per_row(violated))[:, 0]
            stats = {
                "active_triplets": active / count.clamp(min=1),
                "distance": distances_of_cosines(cosines[:anchors]).mean(),
            }
            count = count.clamp(min=1)
        return with_slope(cosines, total / count, slope.div_(count)), stats

    def _check_labels(self, embeddings: Tensor, labels: Tensor) -> None:
        check_positions(embeddings, labels)
