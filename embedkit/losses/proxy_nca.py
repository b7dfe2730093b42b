"""Proxy-NCA: nearer to the own class's vector than to all others, by a softmax over distances.

Paper: Movshovitz-Attias, Toshev, Leung, Ioffe, Singh, "No Fuss Distance Metric Learning using
Proxies", ICCV 2017, arXiv:1703.07464.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from embedkit.losses._base import MetricLoss, check_choice, check_number, unit_rows
from embedkit.losses._proxies import check_classes, class_stats, new_proxies

__all__ = ["ProxyNCALoss"]


class ProxyNCALoss(MetricLoss):
    """Mean over rows of ``-log( exp(-d_y) / sum over classes c of exp(-d_c) )``.

    ``d_c = |scale x - scale p_c|^2`` for unit x and proxies p. The paper leaves the own class out
    of the sum; the loss can then be negative.

    Args:
        num_classes: Classes of the training set; one class alone is 0.
        embedding_dim: Width D of the embeddings.
        scale: Length that rows and proxies are given, above 0; 3 is from a re-implementation that
            reaches the paper's numbers, plain unit length hardly trains.
        include_positive: Keep the own class in the sum.

    Shape: ``(B, D)`` rows, scaled here, and ``(B,)`` labels in ``0 .. num_classes - 1`` ->
    scalar. Cost: O(B C D) time, O(B C + C D) memory.
    """

    needs_classes = True

    def __init__(
        self,
        *,
        num_classes: int,
        embedding_dim: int,
        scale: float = 3.0,
        include_positive: bool = False,
    ) -> None:
        super().__init__()
        self.proxies = new_proxies(num_classes, embedding_dim)
        self.scale = check_number("scale", scale, above=0)
        self.include_positive: bool = check_choice(
            "include_positive", include_positive, [True, False]
        )

    def compute(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        labels = check_classes(rows, labels, self.proxies)
        # -d_c is 2 scale^2 cos less what is the same for every class.
        factor = 2 * self.scale**2
        logits = (rows @ unit_rows(self.proxies.to(rows.dtype)).T).mul_(factor)
        with torch.no_grad():
            stats = class_stats(logits, labels, scale=1 / factor)
        if self.include_positive:
            return F.cross_entropy(logits, labels), stats
        if len(self.proxies) == 1:
            return logits.sum() * 0, stats
        own = logits.gather(1, labels[:, None])
        others = logits.scatter(1, labels[:, None], -torch.inf)
        return (others.logsumexp(1, keepdim=True) - own).mean(), stats
