"""PVSE: several vectors per picture, compared by the most alike pair of them.

Paper: Song, Soleymani, "Polysemous Visual-Semantic Embedding for Cross-Modal Retrieval", CVPR 2019,
arXiv:1906.04402; the authors' code was read. The image tower, the greatest of the K x K cosines as
the score, the ranking hinge in both directions, its two forms and their divisors, and the diversity
term are the paper's. Ours is that both sides are pictures: where the paper ranks a picture and its
sentence, here two pictures of a class rank each other, each before the pictures of other classes.
The text tower and the term that brings the two modalities together (MMD) have no counterpart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor

from embedkit.losses import MetricLoss
from embedkit.losses._base import check_choice, check_number, check_whole, unit_rows
from embedkit.losses._pairs import distances_of_cosines, pair_stats, same_and_other, with_slope
from embedkit.losses._triplets import hinge_triplets
from embedkit.methods._base import Batch, Method, Outcome
from embedkit.models import EmbeddingNet
from embedkit.models.polysemous import PolysemousNet

if TYPE_CHECKING:
    from embedkit.train.recipe import Recipe

__all__ = ["SeveralVectors", "diversity_of", "greatest_cosines"]


class SeveralVectors(Method):
    """K vectors per picture; two pictures are as alike as their most alike vectors.

    For pictures that show several things, or one thing in several ways. ``--dim`` is the width of
    all K together, so that K costs no memory; the paper has 1024 numbers for each. An index of such
    a model is flat, and a search looks at every picture.

    Args:
        vectors: K; the paper has 2 for COCO, 3 and 5 for videos.
        margin: Of the hinge.
        mining: ``"sum"``: against all pictures of other classes; ``"hardest"``: against the most
            alike one. Both are the paper's.
        diversity: Weight of the term that keeps the K apart. Without it most of them get no
            gradient, because only the most alike pair learns: see ``least_used`` among the stats.
    """

    certainty = "code read"

    def __init__(
        self,
        *,
        vectors: int = 2,
        margin: float = 0.1,
        mining: Literal["sum", "hardest"] = "sum",
        diversity: float = 0.1,
    ) -> None:
        super().__init__()
        self._vectors = check_whole("vectors", vectors, least=1)
        self._diversity = check_number("diversity", diversity, least=0)
        self._told = 0.0
        self.loss = _MutualRanking(vectors=vectors, margin=margin, mining=mining)

    def network_class(self, recipe: Recipe) -> Callable[..., EmbeddingNet]:
        return partial(PolysemousNet, vectors=self._vectors)

    def step(self, network: EmbeddingNet, batch: Batch) -> Outcome:
        both = cast(PolysemousNet, network).vectors_and_residuals(batch.pixels).float()
        vectors, residuals = both.chunk(2, 1)
        apart = diversity_of(residuals.reshape(len(residuals), self._vectors, -1))
        self._told = float(apart.detach())
        value = self.loss(vectors, batch.labels) + self._diversity * apart
        return Outcome(value, vectors)

    @property
    def stats(self) -> dict[str, float]:
        """Those of the ranking; ``least_used``, the share of all pictures' best pairs that the
        least chosen of the K takes part in, of which 1/K is its fair one; and the diversity term.
        """
        return {**self.loss.stats, "diversity": self._told}


class _MutualRanking(MetricLoss):
    """``[margin + s_an - s_ap]+`` over pairs (a, p) of a class and pictures n of other classes.

    s is the greatest of the K x K cosines. Each of the U unordered pairs counts in both directions,
    a before p and p before a. ``"sum"``: over all n, divided by U B; ``"hardest"``: the n of the
    greatest s_an, divided by U. With B pairs that is the paper's division by B^2 and by B.

    Shape: ``(B, K D)``, K vectors side by side, each scaled to length 1 here, and ``(B,)`` labels
    -> scalar. Equal cosines share the gradient. Cost: O((B K)^2 D) time and O((B K)^2) memory.
    """

    def __init__(self, *, vectors: int, margin: float, mining: str) -> None:
        super().__init__()
        self.vectors = vectors
        self.margin = check_number("margin", margin, least=0)
        self.mining: str = check_choice("mining", mining, ["sum", "hardest"])

    def compute(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        parts = unit_rows(rows.reshape(len(rows) * self.vectors, -1))
        cosines, used = greatest_cosines(parts.reshape(len(rows), self.vectors, -1))
        same, other = same_and_other(labels)
        pairs = (same.sum() / 2).clamp(min=1)
        with torch.no_grad():
            stats = pair_stats(distances_of_cosines(cosines), same, other)
            stats["least_used"] = used
        if self.mining == "hardest":
            worst = cosines.masked_fill(~other, -torch.inf).amax(1, keepdim=True)
            terms = (self.margin + worst - cosines).clamp(min=0).where(same, 0)
            stats["active_pairs"] = terms.detach().count_nonzero() / same.sum().clamp(min=1)
            return terms.sum() / pairs, stats
        with torch.no_grad():
            # The more alike, the less apart.
            total, active, picked, slope = hinge_triplets(-cosines, same, other, self.margin)
            count = pairs * len(rows)
            stats["active_triplets"] = active / picked.clamp(min=1)
        return with_slope(cosines, total / count, slope.neg_().div_(count)), stats


def greatest_cosines(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The likeness of every two pictures, ``(B, B)``, of unit vectors ``(B, K, D)``.

    Beside it, of the K the smallest share of the others' best pairs it is in: 1/K where all are
    used alike, 0 where one never is.
    """
    count, several, _ = vectors.shape
    flat = vectors.flatten(0, 1)
    every = (flat @ flat.T).reshape(count, several, count, several)
    every = every.transpose(1, 2).reshape(count, count, several * several)
    with torch.no_grad():
        best = every.argmax(2) // several
        best = best[~torch.eye(count, dtype=torch.bool, device=best.device)]
        chosen = torch.bincount(best, minlength=several)
        least = chosen.min() / chosen.sum().clamp(min=1)
    return every.amax(2), least


def diversity_of(residuals: Tensor) -> Tensor:
    """How much K residuals ``(B, K, D)`` point the same way; 0 for K = 1, mean over the pictures.

    The Frobenius norm of the off-diagonal part of their K x K cosines, over K^2: at most
    ``sqrt(K (K - 1)) / K^2``.
    """
    several = residuals.shape[1]
    unit = unit_rows(residuals.flatten(0, 1)).reshape(residuals.shape)
    gram = unit @ unit.transpose(1, 2)
    own = torch.eye(several, dtype=torch.bool, device=gram.device)
    norms: Tensor = torch.linalg.matrix_norm(gram.masked_fill(own, 0))
    return norms.mean() / several**2
