"""Supervised product quantisation: every part of the embedding chooses a word of its codebook.

Paper: Klein, Wolf, "End-to-End Supervised Product Quantization for Image Search and Retrieval",
CVPR 2019, arXiv:1711.08589, there called DPQ. From secondary sources, a reader's note and two
re-implementations, which differ in how a word is chosen; both ways are here. This is the loss
alone: a model trained with it gives the embedding before quantisation, and no codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embedkit.losses._base import MetricLoss, check_choice, check_number, check_whole
from embedkit.losses._proxies import check_classes, new_proxies

__all__ = ["ProductQuantizationLoss"]


class ProductQuantizationLoss(MetricLoss):
    """A row x is cut into equal parts x_m. Part m has a codebook of words C_m and

        p_m = softmax over words of A_m x_m + b_m                       (assign="logits")
              softmax over words of -|x_m - C_m(k)|^2 / temperature     (assign="distance")
        s_m = sum_k p_m(k) C_m(k),   h_m = C_m(argmax_k p_m(k))

    With s and h the parts in a row again, the loss is the mean over rows of

        CE(W s + b, y) + CE(W h + b, y) + centre / 2 (|s - O_y|^2 + |h - O_y|^2)
        - sharp sum_mk p_m(k)^2

    plus ``even sum_mk (mean over rows of p_m(k))^2``, which is least when all words are used alike.
    In backward the choice in h counts as p (straight through).

    Args:
        num_classes: Classes of the training set.
        embedding_dim: Width D of the embeddings, divisible by `subspaces`.
        subspaces: Parts M.
        words: Words in each codebook, at least 2; 256 make a part one byte.
        assign: ``"logits"``, with a learned layer per part, or ``"distance"``; only with the latter
            is the chosen word the nearest.
        temperature: Of ``"distance"``, above 0; a re-implementation has 0.1.
        centre: Weight of the distance to the class's learned centre O_y; 0.1 in the paper's
            ablation.
        even: Weight that keeps all words in use; a re-implementation has 0.001.
        sharp: Weight that makes a row choose one word; likewise.

    Shape: ``(B, D)`` rows, not normalised, and ``(B,)`` labels in ``0 .. num_classes - 1`` ->
    scalar; ``proxies`` is W, ``(num_classes, D)``. Cost: O(B D (K + C)) time,
    O(B (M K + C) + D (K + C)) memory.
    """

    normalizes = False
    needs_classes = True
    certainty = "secondary source"

    def __init__(
        self,
        *,
        num_classes: int,
        embedding_dim: int,
        subspaces: int = 8,
        words: int = 256,
        assign: Literal["logits", "distance"] = "logits",
        temperature: float = 0.1,
        centre: float = 0.1,
        even: float = 1e-3,
        sharp: float = 1e-3,
    ) -> None:
        super().__init__()
        check_whole("subspaces", subspaces, least=1)
        check_whole("words", words, least=2)
        self.proxies = new_proxies(num_classes, embedding_dim)
        if embedding_dim % subspaces:
            raise ValueError(
                f"subspaces must divide the width of the embedding, {embedding_dim}, "
                f"got {subspaces}"
            )
        self.assign: str = check_choice("assign", assign, ["logits", "distance"])
        self.temperature = check_number("temperature", temperature, above=0)
        self.centre = check_number("centre", centre, least=0)
        self.even = check_number("even", even, least=0)
        self.sharp = check_number("sharp", sharp, least=0)
        self.bias = nn.Parameter(torch.zeros(num_classes))
        self.centres = new_proxies(num_classes, embedding_dim)
        width = embedding_dim // subspaces
        # A row of words has length about 1, as the class vectors have.
        self.words = nn.Parameter(torch.randn(subspaces, words, width) / embedding_dim**0.5)
        if self.assign == "logits":
            self.layer = nn.Parameter(torch.randn(subspaces, words, width) / width**0.5)
            self.layer_bias = nn.Parameter(torch.zeros(subspaces, words))

    def compute(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        labels = check_classes(rows, labels, self.proxies)
        words = self.words.to(rows.dtype)
        share = self._shares(rows)
        chosen = F.one_hot(share.argmax(2), words.shape[1]).to(rows.dtype)
        soft = _read(share, words)
        hard = _read(chosen + share - share.detach(), words)
        value = self.even * share.mean(0).square().sum()
        value = value - self.sharp * share.square().sum() / len(rows)
        centres = self.centres.to(rows.dtype)[labels]
        for vectors in (soft, hard):
            logits = vectors @ self.proxies.to(rows.dtype).T + self.bias.to(rows.dtype)
            apart = (vectors - centres).square().sum() / len(rows)
            value = value + F.cross_entropy(logits, labels) + self.centre / 2 * apart
        with torch.no_grad():
            used = share.mean(0)
            entropy = -(used * used.clamp(min=1e-30).log()).sum(1)
            stats = {
                "words_in_use": entropy.exp().mean(),
                "sharpness": share.amax(2).mean(),
                "soft_to_hard": (soft - hard).square().sum(1).sqrt().mean(),
            }
        return value, stats

    @torch.no_grad()
    def codes(self, embeddings: Tensor) -> Tensor:
        """``(B, M)`` int64: the word that each part of these ``(B, D)`` embeddings chooses."""
        return self._shares(embeddings).argmax(2)

    def _shares(self, rows: Tensor) -> Tensor:
        """``(B, M, K)`` p."""
        words = self.words.to(rows.dtype)
        parts = rows.reshape(len(rows), words.shape[0], words.shape[2])
        if self.assign == "logits":
            scores = torch.einsum("bmd,mkd->bmk", parts, self.layer.to(rows.dtype))
            return (scores + self.layer_bias.to(rows.dtype)).softmax(2)
        # |x_m|^2 is the same for all words and cancels.
        near = 2 * torch.einsum("bmd,mkd->bmk", parts, words) - words.square().sum(2)
        return (near / self.temperature).softmax(2)


def _read(share: Tensor, words: Tensor) -> Tensor:
    """``(B, D)`` from the shares ``(B, M, K)`` of the words ``(M, K, D / M)``."""
    return torch.einsum("bmk,mkd->bmd", share, words).flatten(1)
