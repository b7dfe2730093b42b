"""A network that gives a picture several vectors, each looking at other places of it.

As in Song, Soleymani, "Polysemous Visual-Semantic Embedding for Cross-Modal Retrieval", CVPR 2019,
arXiv:1906.04402, whose image tower this is, but for its dropout and its fixed map of 7 x 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from embedkit.errors import UsageError
from embedkit.models.backbone import Backbone
from embedkit.models.network import EmbeddingNet
from embedkit.models.pooling import AveragePooling, GemPooling, SecondOrderPooling

__all__ = ["PolysemousNet"]

_LEAST_WIDTH = 3


class PolysemousNet(EmbeddingNet):
    """K unit vectors of ``dim / K`` numbers side by side.

    With x the map's places ``(B, h w, C)`` and g ``(B, D)`` the usual pooling and head::

        A   = softmax over the places of  tanh(x W1) W2       (B, h w, K), W1 C -> C/2, no biases
        r_k = sigmoid(fc(sum over the places of A_k x))       (B, D), one fc for all k
        v_k = LayerNorm(g + r_k), scaled to length 1

    The map may be of any size.

    Args:
        dim: Width of the K vectors together.
        vectors: K, at least 1.

    Attributes:
        attention: W1, tanh, W2.
        residual: fc.
        norm: LayerNorm over the D numbers of a vector.

    Raises:
        UsageError: `dim` cannot be cut into so many vectors of 3 numbers or more.
    """

    looks: ClassVar[tuple[str, ...]] = (*EmbeddingNet.looks, "vectors_and_residuals")

    def __init__(
        self,
        backbone: Backbone,
        pooling: AveragePooling | GemPooling | SecondOrderPooling,
        dim: int,
        *,
        vectors: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        width, left = divmod(dim, vectors)
        if left or width < _LEAST_WIDTH:
            raise UsageError(
                f"an embedding of {dim} numbers cannot be cut into {vectors} vectors of one width",
                facts=f"a vector needs {_LEAST_WIDTH} numbers or more",
                hint=f"--dim {vectors * max(_LEAST_WIDTH, width + bool(left))}",
            )
        super().__init__(backbone, pooling, dim, mean=mean, std=std)
        self.vectors = vectors
        self.head = nn.Linear(pooling.num_features, width)
        nn.init.orthogonal_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        channels = backbone.num_features
        hidden = max(1, channels // 2)
        self.attention = nn.Sequential(
            nn.Linear(channels, hidden, bias=False),
            nn.Tanh(),
            nn.Linear(hidden, vectors, bias=False),
        )
        self.residual = nn.Linear(channels, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, pixels: Tensor) -> Tensor:
        """``(B, H, W, 3)`` uint8 -> ``(B, dim)``, in float32 or better."""
        return self.vectors_and_residuals(pixels)[:, : self.embedding_dim]

    def vectors_and_residuals(self, pixels: Tensor) -> Tensor:
        """``(B, H, W, 3)`` uint8 -> ``(B, 2 dim)``: the K vectors, then the K residuals r_k."""
        feature_map = self.feature_map(pixels)
        shared = self.head(self.pooling(feature_map))
        places = feature_map.flatten(2).transpose(1, 2)
        weights = self.attention(places).softmax(1)
        residuals = self.residual(weights.transpose(1, 2) @ places).sigmoid()
        vectors = _at_least_float32(self.norm(shared[:, None] + residuals))
        length = torch.linalg.vector_norm(vectors, dim=2, keepdim=True)
        unit = vectors / length.clamp(min=1e-12)
        return torch.cat([unit.flatten(1), _at_least_float32(residuals).flatten(1)], 1)


def _at_least_float32(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
