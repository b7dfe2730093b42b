"""For losses whose labels are positions, not classes: their check and their distances."""

from __future__ import annotations

import torch
from torch import Tensor

from embedkit.errors import UsageError

__all__ = ["check_positions", "label_distances"]


def check_positions(embeddings: Tensor, labels: Tensor) -> None:
    """Labels must be ``(B,)`` or ``(B, d)`` real numbers on the embeddings' device.

    Raises:
        UsageError: They are not.
    """
    real = not labels.is_complex() and labels.dtype != torch.bool
    if labels.dim() not in (1, 2) or len(labels) != len(embeddings) or not real:
        raise UsageError(
            "the labels of this loss must be numbers, (B,) or (B, d), a row per embedding",
            facts=f"got {labels.dtype} of shape {tuple(labels.shape)} "
            f"for {len(embeddings)} embeddings",
        )
    if labels.device != embeddings.device:
        raise UsageError(
            "the labels must be on the device of the embeddings",
            facts=f"labels on {labels.device}, embeddings on {embeddings.device}",
        )


def label_distances(labels: Tensor, anchors: int, dtype: torch.dtype) -> Tensor:
    """Euclidean distances ``(anchors, B)`` of the first labels to all; of equal ones exactly 0."""
    points = labels.to(dtype).reshape(len(labels), -1)
    return torch.cdist(points[:anchors], points, compute_mode="donot_use_mm_for_euclid_dist")
