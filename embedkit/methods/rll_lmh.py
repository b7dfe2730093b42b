"""RLL at three depths: low, middle and high branches learn apart and are compared together.

Paper: Wang, Hua, Kodirov, Hu, Garnier, Robertson, "Ranked List Loss for Deep Metric Learning",
CVPR 2019, arXiv:1903.03238, RLL-(L,M,H). Branches, losses and concatenation are as in the authors'
network files; where other backbones than GoogLeNet are cut is ours (`embedkit.models.branched`),
and so is that --dim is the width of all three together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from embedkit import losses
from embedkit.methods._base import Batch, Method, Outcome
from embedkit.models import EmbeddingNet
from embedkit.models.branched import BranchedNet, branch_widths

if TYPE_CHECKING:
    from embedkit.train.recipe import Recipe

__all__ = ["RankedListAtThreeDepths"]

_DEPTHS = ("high", "low", "middle")


class RankedListAtThreeDepths(Method):
    """One Ranked List Loss for each branch, each on its own unit sphere, summed.

    What is exported is the three raw embeddings in one row (high, low, middle), scaled to length 1
    together. So the longest weighs most; `stats` tell each one's share. The paper's 512 numbers per
    branch are ``--dim 1536``.

    Args:
        alpha: Of each loss; see `embedkit.losses.rll`.
        margin: Likewise.
        temperature: Likewise.
        balance: Likewise.
    """

    certainty = "code read"

    def __init__(
        self,
        *,
        alpha: float = 1.2,
        margin: float = 0.4,
        temperature: float = 10.0,
        balance: float = 1.0,
    ) -> None:
        super().__init__()
        self.loss = losses.create(
            "rll", alpha=alpha, margin=margin, temperature=temperature, balance=balance
        )
        self._told: dict[str, float] = {}

    def network_class(self, recipe: Recipe) -> Callable[..., EmbeddingNet]:
        preprocess = recipe.preprocess()
        size = preprocess.height, preprocess.width
        return partial(BranchedNet, image_size=size)

    def step(self, network: EmbeddingNet, batch: Batch) -> Outcome:
        embeddings = network(batch.pixels)
        branches = embeddings.float().split(branch_widths(network.embedding_dim), 1)
        values, told = [], []
        for branch in branches:
            values.append(self.loss(branch, batch.labels))
            told.append(self.loss.stats)
        self._told = _summary(told, branches)
        return Outcome(torch.stack(values).sum(), embeddings)

    @property
    def stats(self) -> dict[str, float]:
        """Means over the branches, the least ``spread``, and each one's share of the length²."""
        return self._told


def _summary(told: list[dict[str, float]], branches: tuple[Tensor, ...]) -> dict[str, float]:
    means = {name: sum(one[name] for one in told) / len(told) for name in told[0]}
    means["spread"] = min(one["spread"] for one in told)
    with torch.no_grad():
        sizes = torch.stack([branch.square().sum() for branch in branches])
        shares = (sizes / sizes.sum().clamp(min=1e-30)).tolist()
    return means | {f"share_{depth}": part for depth, part in zip(_DEPTHS, shares, strict=True)}
