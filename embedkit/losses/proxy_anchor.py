"""Proxy-Anchor loss: one learned vector per class is the anchor, the batch its pairs.

Paper: Kim, Kim, Cho, Kwak, "Proxy Anchor Loss for Deep Metric Learning", CVPR 2020,
arXiv:2003.13911.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from embedkit.losses._base import MetricLoss, check_number, unit_rows
from embedkit.losses._pairs import soft_maximum, with_slope
from embedkit.losses._proxies import check_classes, class_stats, new_proxies

__all__ = ["ProxyAnchorLoss"]


class ProxyAnchorLoss(MetricLoss):
    """Soft maxima over the batch, one pair per class vector, of cosines s to unit proxies.

        L = mean over classes in the batch of log(1 + sum_own exp(-alpha (s - margin)))
          + mean over all classes         of log(1 + sum_others exp(alpha (s + margin)))

    Args:
        num_classes: Classes of the training set.
        embedding_dim: Width D of the embeddings.
        alpha: Sharpness, above 0.
        margin: Cosine margin, at least 0.

    Shape: ``(B, D)`` rows, scaled to length 1 here, and ``(B,)`` labels in
    ``0 .. num_classes - 1`` -> scalar. The paper gives ``proxies`` 100 times the network's
    learning rate. Cost: O(B C D) time, O(B C + C D) memory.
    """

    needs_classes = True

    def __init__(
        self, *, num_classes: int, embedding_dim: int, alpha: float = 32.0, margin: float = 0.1
    ) -> None:
        super().__init__()
        self.proxies = new_proxies(num_classes, embedding_dim)
        nn.init.kaiming_normal_(self.proxies, mode="fan_out")
        self.alpha = check_number("alpha", alpha, above=0)
        self.margin = check_number("margin", margin, least=0)

    def compute(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        labels = check_classes(rows, labels, self.proxies)
        cosines = rows @ unit_rows(self.proxies.to(rows.dtype)).T
        with torch.no_grad():
            own = torch.zeros_like(cosines, dtype=torch.bool).scatter_(1, labels[:, None], True)
            present = own.any(0).sum()
            near = (cosines - self.margin).mul_(-self.alpha)
            pull, pull_slope = soft_maximum(near, own, dim=0)
            push, slope = soft_maximum((cosines + self.margin).mul_(self.alpha), ~own, dim=0)
            value = pull / present + push / len(self.proxies)
            slope.div_(len(self.proxies)).sub_(pull_slope.div_(present)).mul_(self.alpha)
            stats = class_stats(cosines, labels)
        return with_slope(cosines, value, slope), stats
