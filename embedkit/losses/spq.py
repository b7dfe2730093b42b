"""Supervised product quantisation: every part of the embedding chooses a word of its codebook.

Paper: Klein, Wolf, "End-to-End Supervised Product Quantization for Image Search and Retrieval",
CVPR 2019, arXiv:1711.08589, there called DPQ. From secondary sources, a reader's note and two
re-implementations, which differ in how a word is chosen; both ways are here. This is the loss
alone; `embedkit.methods.spq` trains a network that has the codebooks, and is exported with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embedkit.losses._base import MetricLoss, check_choice, check_number, check_whole
from embedkit.losses._proxies import check_classes, new_proxies
from embedkit.models.quantized import ProductQuantizer

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
        even: Weight that keeps all words in use; a re-implementation has 0.001. Look at
            ``words_in_use``: in 60 steps on photos of groceries 0.001 left 8 words of 256, and 1
            left 58, with MAP@R .24 for .19.
        sharp: Weight that makes a row choose one word; likewise.

    Shape: ``(B, D)`` rows, not normalised, and ``(B,)`` labels in ``0 .. num_classes - 1`` ->
    scalar; ``proxies`` is W, ``(num_classes, D)``, and ``quantizer`` has the words. Cost:
    O(B D (K + C)) time, O(B (M K + C) + D (K + C)) memory.
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
        self.quantizer = ProductQuantizer(
            embedding_dim,
            subspaces=subspaces,
            words=words,
            temperature=self.temperature if self.assign == "distance" else None,
        )
        self._lent: tuple[ProductQuantizer, ...] = ()

    def borrow(self, quantizer: ProductQuantizer) -> None:
        """From now on teach a network's codebooks, which stay its parameters, in place of these."""
        del self.quantizer
        # In a tuple, so that it does not become a part of this module.
        self._lent = (quantizer,)

    def compute(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        labels = check_classes(rows, labels, self.proxies)
        quantizer = self._lent[0] if self._lent else self.quantizer
        share = quantizer.shares(rows)
        soft, hard = quantizer.read(share), quantizer.hard(share)
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
        return self.quantizer.codes(self.quantizer.shares(embeddings))
