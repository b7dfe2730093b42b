"""A network whose embedding is cut into slices of unit length, one for each learner."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embedkit.errors import UsageError
from embedkit.models.backbone import Backbone
from embedkit.models.network import EmbeddingNet
from embedkit.models.pooling import AveragePooling, GemPooling, SecondOrderPooling

__all__ = ["DividedNet"]


class DividedNet(EmbeddingNet):
    """The embedding is the concatenation of `slices` unit vectors of ``dim / slices`` numbers.

    All slices weigh the same in a comparison, whatever the head made of their lengths. The whole
    has the length ``sqrt(slices)``; a slice without a direction stays 0.

    Args:
        slices: At least 1.

    Raises:
        UsageError: `dim` cannot be cut into so many slices of 2 numbers or more.
    """

    def __init__(
        self,
        backbone: Backbone,
        pooling: AveragePooling | GemPooling | SecondOrderPooling,
        dim: int,
        *,
        slices: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        width, left = divmod(dim, slices)
        if left or width < 2:
            raise UsageError(
                f"an embedding of {dim} numbers cannot be cut into {slices} equal slices",
                facts="a slice is a direction and needs two numbers or more",
                hint=f"--dim {slices * max(2, width + bool(left))}",
            )
        super().__init__(backbone, pooling, dim, mean=mean, std=std)
        self.slices = slices

    def forward(self, pixels: Tensor) -> Tensor:
        """``(B, H, W, 3)`` uint8 -> ``(B, D)``, in float32 or better."""
        raw: Tensor = self.head(self.features(pixels))
        if raw.dtype in (torch.float16, torch.bfloat16):
            raw = raw.float()
        pieces = raw.reshape(-1, self.slices, self.embedding_dim // self.slices)
        length = torch.linalg.vector_norm(pieces, dim=2, keepdim=True)
        unit: Tensor = pieces / length.clamp(min=1e-12)
        return unit.flatten(1)
