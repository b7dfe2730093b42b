"""A network that standardises its pooled features before the linear head."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from embedkit.models.backbone import Backbone
from embedkit.models.network import EmbeddingNet
from embedkit.models.pooling import AveragePooling, GemPooling, SecondOrderPooling

__all__ = ["StandardizedNet"]


class StandardizedNet(EmbeddingNet):
    """Embedding = head(BatchNorm(pooled features)).

    This BatchNorm is new and has no statistics worth keeping: it learns them also where those of
    the backbone are frozen.
    """

    def __init__(
        self,
        backbone: Backbone,
        pooling: AveragePooling | GemPooling | SecondOrderPooling,
        dim: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__(backbone, pooling, dim, mean=mean, std=std)
        self.norm = nn.BatchNorm1d(pooling.num_features)

    def forward(self, pixels: Tensor) -> Tensor:
        """``(B, H, W, 3)`` uint8 -> raw embedding ``(B, D)``."""
        return self.embed(self.features(pixels))

    def embed(self, features: Tensor) -> Tensor:
        """Pooled features ``(B, F)`` -> ``(B, D)``; in training the running statistics follow."""
        embedding: Tensor = self.head(self.norm(features))
        return embedding

    def embed_made_up(self, features: Tensor) -> Tensor:
        """The same weights for ``(B, F)``, B at least 2, that come from no picture.

        They are standardised among themselves, and the running statistics do not see them.
        """
        norm = self.norm
        standard = functional.batch_norm(
            features, None, None, norm.weight, norm.bias, training=True, eps=norm.eps
        )
        embedding: Tensor = self.head(standard)
        return embedding

    def train(self, mode: bool = True) -> StandardizedNet:
        super().train(mode)
        self.norm.train(mode)
        return self
