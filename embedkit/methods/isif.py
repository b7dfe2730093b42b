"""ISIF: no labels; two views of every image, and all other images of the batch are different.

Paper: Ye, Zhang, Yuen, Chang, "Unsupervised Embedding Learning via Invariant and Spreading
Instance Feature", CVPR 2019, arXiv:1904.03436. The loss, the two views and the nearest neighbour
as a view are as in the authors' code; the noise is this trainer's crop and mirror.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedkit import losses
from embedkit.errors import DataError
from embedkit.losses._base import check_number
from embedkit.methods._base import Method, Sampler, Setting, View
from embedkit.models import EmbeddingNet

__all__ = ["InvariantSpreading"]

_BLOCK = 1024


class InvariantSpreading(Method):
    """Batches of ``classes_per_batch x images_per_class / 2`` images, each in two views.

    A folder of photos without classes will do. Where there are labels they are not learned from;
    they hold classes out and measure as for any loss.

    Args:
        temperature: Of the loss, above 0.
        negative_weight: Of the loss, above 0.
        neighbour_views: Share of second views that are of the image's nearest neighbour by pooled
            features, found anew every epoch, 0 to 1; the authors have 0.5 for CUB and 0 elsewhere.

    Cost: with `neighbour_views` a pass over the training photos and O(N^2 F) per epoch.
    """

    learns_from = "images"
    certainty = "code read"
    nests = True

    neighbours: Tensor

    def __init__(
        self,
        *,
        temperature: float = 0.1,
        negative_weight: float = 1.0,
        neighbour_views: float = 0.0,
    ) -> None:
        super().__init__()
        self.neighbour_views = check_number("neighbour_views", neighbour_views, least=0, most=1)
        self.loss = losses.create("isif", temperature=temperature, negative_weight=negative_weight)

    def prepare(self, setting: Setting, network: EmbeddingNet) -> None:
        self.register_buffer("neighbours", torch.arange(len(setting.photos)))

    def sampler(self, setting: Setting, steps: int | None) -> Sampler:
        return _TwoViews(self, setting, steps)

    def begin_epoch(self, epoch: int, view: View) -> None:
        if self.neighbour_views:
            self.neighbours.copy_(_nearest(view.features()))


class _TwoViews:
    """Images without repeats in a batch, then the second view of each, in the same order."""

    def __init__(self, method: InvariantSpreading, setting: Setting, steps: int | None) -> None:
        self._method, self._count = method, len(setting.photos)
        if self._count < 2:
            raise DataError("isif needs two photos to tell apart", facts=f"found {self._count}")
        self._images = min(max(2, setting.recipe.batch_size // 2), self._count)
        self._seed = setting.recipe.seed
        self.steps = steps or self._count // self._images

    def batches(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        rng = np.random.default_rng([self._seed, epoch])
        share = self._method.neighbour_views
        neighbours = self._method.neighbours.cpu().numpy() if share else np.arange(self._count)
        # What is left of a deck is less than a batch, and another image's turn the next time.
        per_deck = self._count // self._images
        decks = [rng.permutation(self._count) for _ in range(-(-self.steps // per_deck))]
        plan = []
        for step in range(self.steps):
            deck, place = divmod(step, per_deck)
            images = decks[deck][place * self._images : (place + 1) * self._images]
            other = rng.random(self._images) < share
            plan.append(np.concatenate([images, np.where(other, neighbours[images], images)]))
        return cast("list[npt.NDArray[np.int64]]", plan)


def _nearest(features: Tensor) -> Tensor:
    """``(N,)`` of each row the nearest other one; of ties the first."""
    found = []
    for start in range(0, len(features), _BLOCK):
        apart = torch.cdist(features[start : start + _BLOCK], features)
        own = torch.arange(len(apart))
        apart[own, start + own] = torch.inf
        found.append(apart.argmin(1))
    return torch.cat(found)
