"""EDMS: similarity as a random walk over the batch and the class vectors sees it.

Paper: Aziere, Todorovic, "Ensemble Deep Manifold Similarity Learning using Hard Proxies", CVPR
2019. Ours where its text could not be had: one proxy per class, one head, and no update that
makes proxies hard.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from embedkit.losses._base import MetricLoss, check_number, unit_rows
from embedkit.losses._proxies import check_classes, class_stats, new_proxies

__all__ = ["ManifoldSimilarityLoss"]


class ManifoldSimilarityLoss(MetricLoss):
    """Tell classes apart by where a random walk over rows and proxies ends, not by distance.

    Of the B rows and C proxies together, with ``S = exp([cos]+ / temperature)`` off the diagonal
    and each side divided by the root of the row sums,

        F = (1 - alpha) (I - alpha S)^-1

    is where a random walk with restart ends. Per row i of class y the loss is the sum of two terms

        log(1 + sum over c != y with F_ic >= F_iy - margin of exp(F_ic - F_iy + margin))

    one as it stands, one with ``cos(row i of F, row of proxy c of F)`` in place of F_ic; mean
    over rows.

    Args:
        num_classes: Classes of the training set.
        embedding_dim: Width D of the embeddings.
        alpha: Chance that the walk goes on, 0 to below 1.
        margin: At least 0.
        temperature: Of the similarities, above 0.

    Shape: ``(B, D)`` rows, scaled to length 1 here, and ``(B,)`` labels in
    ``0 .. num_classes - 1`` -> scalar. Cost: O((B + C)^3 + (B + C)^2 D) time, O((B + C)^2)
    memory: for some hundreds of classes.
    """

    needs_classes = True
    certainty = "reconstruction"

    def __init__(
        self,
        *,
        num_classes: int,
        embedding_dim: int,
        alpha: float = 0.8,
        margin: float = 0.0005,
        temperature: float = 0.5,
    ) -> None:
        super().__init__()
        self.proxies = new_proxies(num_classes, embedding_dim)
        self.alpha = check_number("alpha", alpha, least=0, most=1)
        if self.alpha == 1:
            raise ValueError("alpha must be below 1: the walk has to end")
        self.margin = check_number("margin", margin, least=0)
        self.temperature = check_number("temperature", temperature, above=0)

    def compute(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        labels = check_classes(rows, labels, self.proxies)
        proxies = unit_rows(self.proxies.to(rows.dtype))
        nodes = torch.cat([rows, proxies])
        cosines = nodes @ nodes.T
        similarity = (cosines.clamp(min=0) / self.temperature).exp()
        one = torch.eye(len(nodes), dtype=rows.dtype, device=rows.device)
        similarity = similarity * (1 - one)
        root = similarity.sum(1).rsqrt()
        similarity = root[:, None] * similarity * root
        walk = (1 - self.alpha) * torch.linalg.inv(one - self.alpha * similarity)
        from_rows, from_proxies = walk[: len(rows)], walk[len(rows) :]
        context = unit_rows(from_rows) @ unit_rows(from_proxies).T
        value = self._term(from_rows[:, len(rows) :], labels) + self._term(context, labels)
        with torch.no_grad():
            stats = class_stats(cosines[: len(rows), len(rows) :], labels)
        return value, stats

    def _term(self, similarity: Tensor, labels: Tensor) -> Tensor:
        gap = similarity - similarity.gather(1, labels[:, None]) + self.margin
        rivals = (gap >= 0).scatter(1, labels[:, None], False)
        return torch.log1p((gap.exp() * rivals).sum(1)).mean()
