"""Upper bound on the triplet loss: distances to fixed class centroids, linear in the batch.

Paper: Do, Tran, Reid, Kumar, Hoang, Carneiro, "A Theoretically Sound Upper Bound on the Triplet
Loss for Improving the Efficiency of Deep Distance Metric Learning", CVPR 2019, arXiv:1904.08720.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from embedkit.losses._base import MetricLoss, check_whole
from embedkit.losses._proxies import check_classes

__all__ = ["UpperBoundLoss"]


class UpperBoundLoss(MetricLoss):
    """Mean over rows of ``|x - c_y| - 1 / (3 (C - 1)) sum over the other classes m of |x - c_m|``.

    Summed over all triplets of balanced classes and times ``3 (C - 1) (N/C - 1) (N/C)`` this
    bounds the margin-free triplet loss from above. Centroids are fixed and get no gradient.

    Args:
        num_classes: Classes C of the training set.
        embedding_dim: Width D of the embeddings.
        centroids: ``"one-hot"``: class c sits on axis c, which needs
            ``embedding_dim >= num_classes``; or ``(C, D)`` numbers, such as K-means centres.

    Shape: ``(B, D)`` rows, scaled to length 1 here (unbounded below otherwise), and ``(B,)``
    labels in ``0 .. num_classes - 1`` -> scalar, negative when solved. Cost: O(B C D) time, O(B
    C) memory.
    """

    needs_classes = True
    certainty = "secondary source"

    def __init__(
        self,
        *,
        num_classes: int,
        embedding_dim: int,
        centroids: str | Sequence[Sequence[float]] | Tensor = "one-hot",
    ) -> None:
        super().__init__()
        check_whole("num_classes", num_classes, least=1)
        check_whole("embedding_dim", embedding_dim, least=1)
        self.centroids: Tensor
        self.register_buffer("centroids", _centroids(centroids, num_classes, embedding_dim))

    def compute(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        labels = check_classes(rows, labels, self.centroids)
        distances: Tensor = _Distances.apply(rows, self.centroids.to(rows.dtype))
        own = distances.gather(1, labels[:, None]).sum()
        others = distances.sum() - own
        classes = len(self.centroids)
        value = (own - others / (3 * max(classes - 1, 1))) / len(rows)
        return value, {
            "positive_distance": own.detach() / len(rows),
            "negative_distance": others.detach() / (len(rows) * max(classes - 1, 1)),
        }


class _Distances(torch.autograd.Function):
    """``(B, C)`` distances of rows to fixed points, of slope 0 where a row sits on a point."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, points: Tensor) -> Tensor:
        size = rows.square().sum(1)[:, None] + points.square().sum(1)
        distances = torch.addmm(size, rows, points.T, alpha=-2)
        distances.mul_(distances > size.mul_(16 * torch.finfo(rows.dtype).eps)).sqrt_()
        ctx.save_for_backward(rows, points, distances)
        return distances

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        rows, points, distances = ctx.saved_tensors
        pull = (slope / distances).masked_fill_(distances == 0, 0)
        return torch.addmm(pull.sum(1, keepdim=True) * rows, pull, points, alpha=-1), None


def _centroids(given: Any, num_classes: int, embedding_dim: int) -> Tensor:
    if isinstance(given, str):
        if given != "one-hot":
            raise ValueError(f"centroids must be 'one-hot' or (C, D) numbers, got {given!r}")
        if embedding_dim < num_classes:
            raise ValueError(
                "centroids 'one-hot' must have an axis per class: embedding_dim at least "
                f"{num_classes}, got {embedding_dim}"
            )
        return torch.eye(num_classes, embedding_dim)
    points = torch.as_tensor(given).detach().clone()
    if points.shape != (num_classes, embedding_dim):
        raise ValueError(
            f"centroids must be of shape {(num_classes, embedding_dim)}, got {tuple(points.shape)}"
        )
    return points if points.dtype == torch.float64 else points.float()
