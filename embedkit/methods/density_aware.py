"""Density-aware: a class is pulled to where it is densest, so that strays pull its centre less.

Paper: Ghosh, Singh, Vatsa, "On Learning Density Aware Embeddings", CVPR 2019, arXiv:1904.03911.
A reconstruction: of the paper we have the abstract alone. Its idea is a class centre that moves
step by step to the densest region of the class, and embeddings that are pulled there. Ours are the
kernel and its width, centres that are found anew at the beginning of every epoch, and the loss.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from embedkit.losses import MetricLoss
from embedkit.losses._base import check_number, check_whole, unit_rows
from embedkit.losses._proxies import check_classes
from embedkit.methods._base import Method, Setting, View
from embedkit.models import EmbeddingNet

__all__ = ["DensityAware", "DenseCentreLoss", "densest"]


class DensityAware(Method):
    """PK batches, each row against its own class's densest region and the nearest other one.

    Args:
        margin: By which the other centre must be farther, in squared distance, at least 0.
        shifts: Steps of mean shift from the class's mean, at least 0; 0 leaves the mean.

    Cost: a pass over the training photos and O(N D shifts) per epoch.
    """

    certainty = "reconstruction"

    loss: DenseCentreLoss

    def __init__(self, *, margin: float = 0.2, shifts: int = 5) -> None:
        super().__init__()
        self.margin = check_number("margin", margin, least=0)
        self.shifts = check_whole("shifts", shifts, least=0)

    def prepare(self, setting: Setting, network: EmbeddingNet) -> None:
        count = len(setting.classes)
        self.loss = DenseCentreLoss(count, network.embedding_dim, margin=self.margin)
        self._members = [np.flatnonzero(setting.labels == number) for number in range(count)]

    def begin_epoch(self, epoch: int, view: View) -> None:
        rows = unit_rows(view.embeddings())
        centres = [densest(rows[members], shifts=self.shifts) for members in self._members]
        self.loss.centres.copy_(torch.stack(centres))


class DenseCentreLoss(MetricLoss):
    """Mean over rows of ``[ |x - c_y|^2 - min over m != y of |x - c_m|^2 + margin ]+``.

    The centres are constants. With one class there is no other centre, and the loss is 0.

    Shape: ``(B, D)`` rows, scaled to length 1 here, and ``(B,)`` labels in
    ``0 .. num_classes - 1`` -> scalar. Cost: O(B C D) time, O(B C) memory.
    """

    centres: Tensor

    def __init__(self, num_classes: int, embedding_dim: int, *, margin: float) -> None:
        super().__init__()
        self.margin = margin
        self.register_buffer("centres", torch.zeros(num_classes, embedding_dim))

    def compute(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        labels = check_classes(rows, labels, self.centres)
        centres = self.centres.to(rows.dtype)
        sizes = rows.square().sum(1, keepdim=True) + centres.square().sum(1)
        squares = torch.addmm(sizes, rows, centres.T, alpha=-2)
        own = squares.gather(1, labels[:, None])[:, 0]
        nearest = squares.scatter(1, labels[:, None], torch.inf).amin(1)
        terms = (own - nearest + self.margin).clamp(min=0)
        with torch.no_grad():
            there = nearest.isfinite()
            stats = {
                "positive_distance": own.clamp(min=0).sqrt().mean(),
                "negative_distance": nearest[there].clamp(min=0).sqrt().sum() / len(rows),
                "active": (terms > 0).float().mean(),
            }
        return terms.mean(), stats


def densest(rows: Tensor, *, shifts: int) -> Tensor:
    """``(D,)``: from the mean of ``(n, D)`` rows, n > 0, towards where most of them are.

    Each shift is to the mean weighted by ``exp(-|x - c|^2 / 2 h^2)``; h is the (lower) median
    distance of the rows to their mean. Where h is 0, of one row or equal rows, it is the mean.
    """
    centre = rows.mean(0)
    width = (rows - centre).norm(dim=1).median()
    # Equal rows are apart by rounding; there is nothing to seek.
    if width <= 1e-6 * rows.norm(dim=1).amax():
        return centre
    for _ in range(shifts):
        apart = (rows - centre).square().sum(1)
        centre = (-apart / (2 * width.square())).softmax(0) @ rows
    return centre
