"""A network whose embedding is made of words: every part of it chooses from a learned codebook.

Paper: Klein, Wolf, "End-to-End Supervised Product Quantization for Image Search and Retrieval",
CVPR 2019, arXiv:1711.08589. `embedkit.losses.spq` has the loss and says what is known from where.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embedkit.errors import UsageError
from embedkit.models.backbone import Backbone
from embedkit.models.network import EmbeddingNet
from embedkit.models.pooling import AveragePooling, GemPooling, SecondOrderPooling
from embedkit.runtime.codebooks import Codebooks

__all__ = ["ProductQuantizer", "QuantizedNet"]


class ProductQuantizer(nn.Module):
    """Codebooks, and how each part of a row chooses from its own.

    Args:
        dim: Width D of a row.
        subspaces: Parts M, which divide D.
        words: Words K of each codebook.
        temperature: Words are chosen by a learned layer per part where this is None, else by
            ``-distance^2 / temperature``; only then is the chosen word the nearest.

    Attributes:
        words: ``(M, K, D / M)``.

    Cost: O(B D K) time, O(B M K) memory.
    """

    def __init__(self, dim: int, *, subspaces: int, words: int, temperature: float | None) -> None:
        super().__init__()
        width = dim // subspaces
        self.temperature = temperature
        # A row of words has length about 1, as the class vectors of the loss have.
        self.words = nn.Parameter(torch.randn(subspaces, words, width) / dim**0.5)
        if temperature is None:
            self.layer = nn.Parameter(torch.randn(subspaces, words, width) / width**0.5)
            self.layer_bias = nn.Parameter(torch.zeros(subspaces, words))

    def forward(self, rows: Tensor) -> Tensor:
        """``(B, D)`` raw rows -> soft rows ``(B, D)``: the words, as far as each was chosen."""
        return self.read(self.shares(rows))

    def shares(self, rows: Tensor) -> Tensor:
        """``(B, M, K)``: how far each word is chosen, summing to 1 in each part."""
        words = self.words.to(rows.dtype)
        parts = rows.reshape(-1, words.shape[0], words.shape[2]).transpose(0, 1)
        if self.temperature is None:
            layer = self.layer.to(rows.dtype).transpose(1, 2)
            scores = (parts @ layer).transpose(0, 1) + self.layer_bias.to(rows.dtype)
            return scores.softmax(2)
        # |x_m|^2 is the same for all words and cancels.
        near = 2 * (parts @ words.transpose(1, 2)).transpose(0, 1) - words.square().sum(2)
        return (near / self.temperature).softmax(2)

    def read(self, shares: Tensor) -> Tensor:
        """``(B, D)``: the mean words under shares ``(B, M, K)``."""
        words = self.words.to(shares.dtype)
        return (shares.transpose(0, 1) @ words).transpose(0, 1).flatten(1)

    def codes(self, shares: Tensor) -> Tensor:
        """``(B, M)`` int64: the word chosen most; of equals the first."""
        return shares.argmax(2)

    def hard(self, shares: Tensor) -> Tensor:
        """``(B, D)``: the chosen words; in backward the choice counts as the shares."""
        chosen = F.one_hot(self.codes(shares), self.words.shape[1]).to(shares.dtype)
        return self.read(chosen + shares - shares.detach())


class QuantizedNet(EmbeddingNet):
    """The embedding is the soft row; `with_codes` tells the chosen words too.

    Args:
        subspaces: Parts M of the embedding.
        words: Words K of each codebook, at most 256, so that a code is a byte.
        temperature: See `ProductQuantizer`.

    Raises:
        UsageError: M does not divide `dim`.
    """

    def __init__(
        self,
        backbone: Backbone,
        pooling: AveragePooling | GemPooling | SecondOrderPooling,
        dim: int,
        *,
        subspaces: int,
        words: int,
        temperature: float | None,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        if dim % subspaces:
            raise UsageError(
                f"an embedding of {dim} numbers cannot be cut into {subspaces} equal parts",
                hint=f"--dim {subspaces * max(1, dim // subspaces)}, or another -s subspaces=M",
            )
        super().__init__(backbone, pooling, dim, mean=mean, std=std)
        self.quantizer = ProductQuantizer(
            dim, subspaces=subspaces, words=words, temperature=temperature
        )

    def codebooks(self) -> Codebooks:
        """The words as they are now, for the contract."""
        return Codebooks.of(self.quantizer.words.detach().cpu().float().numpy())

    def unquantized(self, pixels: Tensor) -> Tensor:
        """``(B, H, W, 3)`` uint8 -> ``(B, D)`` rows that choose words, in float32 or better."""
        rows: Tensor = self.head(self.features(pixels))
        return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows

    def forward(self, pixels: Tensor) -> Tensor:
        """``(B, H, W, 3)`` uint8 -> soft ``(B, D)``."""
        soft: Tensor = self.quantizer(self.unquantized(pixels))
        return soft

    def with_codes(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, H, W, 3)`` uint8 -> soft ``(B, D)`` and the codes ``(B, M)``, uint8."""
        shares = self.quantizer.shares(self.unquantized(pixels))
        # By way of floats: TensorRT makes uint8 from nothing else.
        codes = self.quantizer.codes(shares).float().to(torch.uint8)
        return self.quantizer.read(shares), codes
