"""ArcFace: classify by angle, with the own class's angle made wider by a margin.

Paper: Deng, Guo, Xue, Zafeiriou, "ArcFace: Additive Angular Margin Loss for Deep Face
Recognition", CVPR 2019, arXiv:1801.07698.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from embedkit.losses._base import MetricLoss, check_number, unit_rows
from embedkit.losses._proxies import check_classes, class_stats, new_proxies

__all__ = ["ArcFaceLoss"]


class ArcFaceLoss(MetricLoss):
    """Mean cross-entropy of ``scale cos(theta_c)``; the own class has ``cos(theta_y + margin)``.

    Past ``theta_y = pi - margin``, where that would rise again, it is
    ``cos(theta_y) - margin sin(margin)``.

    Args:
        num_classes: Classes of the training set.
        embedding_dim: Width D of the embeddings.
        margin: In radians, 0 to pi.
        scale: Multiplies the cosines, above 0.

    Shape: ``(B, D)`` rows, scaled to length 1 here, and ``(B,)`` labels in
    ``0 .. num_classes - 1`` -> scalar. A row exactly on its class's direction has a finite
    gradient. Cost: O(B C D) time, O(B C + C D) memory.
    """

    needs_classes = True

    def __init__(
        self, *, num_classes: int, embedding_dim: int, margin: float = 0.5, scale: float = 64.0
    ) -> None:
        super().__init__()
        self.proxies = new_proxies(num_classes, embedding_dim)
        self.margin = check_number("margin", margin, least=0, most=math.pi)
        self.scale = check_number("scale", scale, above=0)

    def compute(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        labels = check_classes(rows, labels, self.proxies)
        logits = (rows @ unit_rows(self.proxies.to(rows.dtype)).T).mul_(self.scale)
        with torch.no_grad():
            stats = class_stats(logits, labels, scale=1 / self.scale)
        # By index, not by gather, which would keep the logits and forbid to overwrite them below.
        own = logits[torch.arange(len(rows), device=rows.device), labels] / self.scale
        # sin(theta), of slope 0 where it is rounding: the true slope there is infinite.
        square = 1 - own.square()
        some = square > 4 * torch.finfo(rows.dtype).eps
        sine = torch.where(some, square, 1).sqrt() * some
        wider = own * math.cos(self.margin) - sine * math.sin(self.margin)
        past = own - self.margin * math.sin(self.margin)
        own = torch.where(own > -math.cos(self.margin), wider, past)
        logits = logits.scatter_(1, labels[:, None], own[:, None] * self.scale)
        return F.cross_entropy(logits, labels), stats
