"""Plain cross-entropy: a linear classifier on the embedding, the baseline under every other loss.

Paper: Zhai, Wu, "Classification is a Strong Baseline for Deep Metric Learning", BMVC 2019,
arXiv:1811.12649, measures it beside the normalised form (`softmax`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embedkit.losses._base import MetricLoss
from embedkit.losses._proxies import check_classes, new_proxies

__all__ = ["CrossEntropyLoss"]


class CrossEntropyLoss(MetricLoss):
    """Mean cross-entropy of the logits ``W x + b``; W is ``proxies``, b is ``bias``.

    Tell-tales: ``correct``, the share of rows whose own logit is the largest, and
    ``own_probability``.

    Args:
        num_classes: Classes of the training set.
        embedding_dim: Width D of the embeddings.

    Shape: ``(B, D)`` rows as they are, and ``(B,)`` labels in ``0 .. num_classes - 1`` -> scalar.
    Cost: O(B C D) time, O(B C + C D) memory.
    """

    normalizes = False
    needs_classes = True

    def __init__(self, *, num_classes: int, embedding_dim: int) -> None:
        super().__init__()
        self.proxies = new_proxies(num_classes, embedding_dim)
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def compute(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        labels = check_classes(rows, labels, self.proxies)
        logits = F.linear(rows, self.proxies.to(rows.dtype), self.bias.to(rows.dtype))
        terms = F.cross_entropy(logits, labels, reduction="none")
        with torch.no_grad():
            stats = {
                "correct": (logits.argmax(1) == labels).to(rows.dtype).mean(),
                "own_probability": (-terms).exp().mean(),
            }
        return terms.mean(), stats
