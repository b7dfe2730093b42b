"""Normalised softmax: classify by cosine to one learned direction per class.

Papers: Wang, Xiang, Cheng, Yuille, "NormFace", ACM MM 2017, arXiv:1704.06369; Zhai, Wu,
"Classification is a Strong Baseline for Deep Metric Learning", BMVC 2019, arXiv:1811.12649.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from embedkit.losses._base import MetricLoss, check_number, unit_rows
from embedkit.losses._proxies import check_classes, class_stats, new_proxies

__all__ = ["NormalizedSoftmaxLoss"]


class NormalizedSoftmaxLoss(MetricLoss):
    """Mean cross-entropy of the logits ``cos(x, w_c) / temperature``.

    Args:
        num_classes: Classes of the training set.
        embedding_dim: Width D of the embeddings.
        temperature: Divides the cosines, above 0.

    Shape: ``(B, D)`` rows, scaled to length 1 here, and ``(B,)`` labels in
    ``0 .. num_classes - 1`` -> scalar. Cost: O(B C D) time, O(B C + C D) memory.
    """

    needs_classes = True

    def __init__(self, *, num_classes: int, embedding_dim: int, temperature: float = 0.05) -> None:
        super().__init__()
        self.proxies = new_proxies(num_classes, embedding_dim)
        self.temperature = check_number("temperature", temperature, above=0)

    def compute(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        labels = check_classes(rows, labels, self.proxies)
        logits = (rows @ unit_rows(self.proxies.to(rows.dtype)).T).div_(self.temperature)
        with torch.no_grad():
            stats = class_stats(logits, labels, scale=self.temperature)
        return F.cross_entropy(logits, labels), stats
