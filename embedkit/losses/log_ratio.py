"""Log-ratio loss: distances between embeddings proportional to distances between continuous labels.

Paper: Kim, Seo, Laptev, Cho, Kwak, "Deep Metric Learning Beyond Binary Supervision", CVPR 2019,
arXiv:1904.09626.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from embedkit.losses._base import MetricLoss, check_choice
from embedkit.losses._label_distances import check_positions, label_distances
from embedkit.losses._pairs import pair_distances

__all__ = ["LogRatioLoss"]


class LogRatioLoss(MetricLoss):
    """Mean over pairs of partners (i, j) of an anchor a of

        ( log(D_ai / D_aj) - log(g_ai / g_aj) )^2

    D the distance of embeddings, g that of labels, both Euclidean. It is computed as twice the
    variance of ``log D - log g`` over the partners, which is the same number. As in the authors'
    code, ``1e-4 / D`` (D the width) is added under the root of the embeddings' distance. Partners
    whose label equals the anchor's are left out, and so are anchors with fewer than two partners.

    Args:
        squared: Use D^2; the label distance stays as it is.
        anchors: ``"first"``: row 0 is the anchor, as the paper's batches are made. ``"all"``:
            every row is.

    Shape: ``(B, D)`` rows as they are, ``(B,)`` or ``(B, d)`` numbers as labels -> scalar. Cost:
    O(B (D + d)) time for the first anchor; O(B^2 (D + d)) time and O(B^2) memory for all.
    """

    normalizes = False
    special_batch = "images labelled with numbers that are near or far"

    def __init__(
        self, *, squared: bool = False, anchors: Literal["first", "all"] = "first"
    ) -> None:
        super().__init__()
        self.squared: bool = check_choice("squared", squared, [True, False])
        self.anchors: str = check_choice("anchors", anchors, ["first", "all"])

    def compute(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        if self.anchors == "first":
            squares = (rows - rows[:1]).square().sum(1)[None]
        else:
            squares = pair_distances(rows).square()
        apart = label_distances(labels, len(squares), rows.dtype)
        # Itself is at label distance 0, so it is left out with the ties.
        partner = apart > 0
        power = 1.0 if self.squared else 0.5
        log_ratio = power * (squares + 1e-4 / rows.shape[1]).log()
        log_ratio = log_ratio - torch.where(partner, apart, 1).log()
        count = partner.sum(1)
        used = count >= 2
        mean = (log_ratio * partner).sum(1) / count.clamp(min=1)
        scatter = ((log_ratio - mean[:, None]).square() * partner).sum(1)
        value = (2 * scatter / (count - 1).clamp(min=1) * used).sum() / used.sum().clamp(min=1)
        with torch.no_grad():
            pairs = count.sum().clamp(min=1)
            stats = {
                "distance": (squares.detach().sqrt() * partner).sum() / pairs,
                "label_distance": apart.sum() / pairs,
                "used_anchors": used.sum() / len(used),
            }
        return value, stats

    def _check_labels(self, embeddings: Tensor, labels: Tensor) -> None:
        check_positions(embeddings, labels)
