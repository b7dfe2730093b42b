"""RepMet: several representatives per class, the nearest of which speaks for it.

Paper: Karlinsky, Shtok, Harary, Schwartz et al., "RepMet: Representative-based Metric Learning
for Classification and Few-shot Object Detection", CVPR 2019, arXiv:1806.04728.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embedkit.losses._base import MetricLoss, check_number, check_whole, unit_rows
from embedkit.losses._proxies import check_classes, new_proxies

__all__ = ["RepMetLoss"]

# The authors' detector multiplies its scores by this before the softmax.
_SOFTMAX_SCALE = 15.0


class RepMetLoss(MetricLoss):
    """With ``d_cj = 2 - 2 cos`` of a row to representative j of class c, the mean over rows of

        [ min_j d_yj - min over c != y, j of d_cj + alpha ]+
        + cross-entropy of 15 (1 - max_c s_c, s_1, ... s_C),   s_c = max_j exp(-d_cj / (2 sigma^2))

    The first score is the background's, which is nobody's answer here. With one class the first
    part is 0.

    Args:
        num_classes: Classes of the training set.
        embedding_dim: Width D of the embeddings.
        modes: Representatives per class, at least 1; the paper uses 3 for fine-grained classes.
        sigma: Width of a mode, above 0.
        alpha: Margin in squared distance, at least 0.

    Shape: ``(B, D)`` rows, scaled to length 1 here, and ``(B,)`` labels in
    ``0 .. num_classes - 1`` -> scalar; ``proxies`` is ``(num_classes, modes, D)``. Cost: O(B C
    modes D) time, O((B + D) C modes) memory.
    """

    needs_classes = True

    def __init__(
        self,
        *,
        num_classes: int,
        embedding_dim: int,
        modes: int = 3,
        sigma: float = 0.5,
        alpha: float = 0.5,
    ) -> None:
        super().__init__()
        check_whole("modes", modes, least=1)
        check_whole("num_classes", num_classes, least=1)
        proxies = new_proxies(num_classes * modes, embedding_dim).detach()
        self.proxies = nn.Parameter(proxies.reshape(num_classes, modes, embedding_dim))
        self.sigma = check_number("sigma", sigma, above=0)
        self.alpha = check_number("alpha", alpha, least=0)

    def compute(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        labels = check_classes(rows, labels, self.proxies[:, 0])
        representatives = unit_rows(self.proxies.flatten(0, 1).to(rows.dtype))
        distances = 2 - 2 * rows @ representatives.T
        nearest = distances.reshape(len(rows), *self.proxies.shape[:2]).amin(2)
        own = nearest.gather(1, labels[:, None]).squeeze(1)
        others = nearest.scatter(1, labels[:, None], torch.inf).amin(1)
        hinge = (own - others + self.alpha).clamp(min=0)
        scores = (nearest / (-2 * self.sigma**2)).exp()
        scores = torch.cat([1 - scores.amax(1, keepdim=True), scores], dim=1)
        value = hinge.mean() + F.cross_entropy(_SOFTMAX_SCALE * scores, labels + 1)
        with torch.no_grad():
            apart = nearest.clamp(min=0).sqrt()
            near = apart.gather(1, labels[:, None]).sum()
            stats = {
                "positive_distance": near / len(rows),
                "negative_distance": (apart.sum() - near) / max(apart.numel() - len(rows), 1),
                "active_rows": (hinge > 0).to(rows.dtype).mean(),
            }
        return value, stats
