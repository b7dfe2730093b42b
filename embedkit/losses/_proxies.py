"""One learned vector per class: creation, the check of labels, tell-tales."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from embedkit.errors import UsageError
from embedkit.losses._base import check_whole
from embedkit.losses._pairs import distances_of_cosines

__all__ = ["check_classes", "class_stats", "new_proxies"]


def new_proxies(num_classes: int, embedding_dim: int) -> nn.Parameter:
    """``(num_classes, embedding_dim)`` random directions of length about 1."""
    check_whole("num_classes", num_classes, least=1)
    check_whole("embedding_dim", embedding_dim, least=1)
    return nn.Parameter(torch.randn(num_classes, embedding_dim) / embedding_dim**0.5)


def check_classes(rows: Tensor, labels: Tensor, proxies: Tensor) -> Tensor:
    """``labels`` as int64.

    Raises:
        UsageError: The width is not the proxies', or a label is outside ``0 .. num_classes - 1``.
    """
    num_classes, embedding_dim = proxies.shape
    if rows.shape[1] != embedding_dim:
        raise UsageError(
            f"this loss was created for embeddings of width {embedding_dim}",
            facts=f"got width {rows.shape[1]}",
        )
    low, high = (int(bound) for bound in torch.stack(labels.aminmax()).tolist())
    if low < 0 or high >= num_classes:
        raise UsageError(
            f"this loss was created for {num_classes} classes, labels 0 to {num_classes - 1}",
            facts=f"got labels from {low} to {high}",
            hint="number the classes of the training set from 0",
        )
    return labels.long()


def class_stats(cosines: Tensor, labels: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
    """Mean distance of unit rows to their own class vector and to the others.

    The cosines are ``scale`` times ``cosines``, ``(B, C)``.
    """
    distances = distances_of_cosines(cosines, scale=scale)
    own = distances.gather(1, labels[:, None]).sum()
    return {
        "positive_distance": own / len(distances),
        "negative_distance": (distances.sum() - own) / max(distances.numel() - len(distances), 1),
    }
