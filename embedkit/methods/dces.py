"""DCES: clusters of photos, each learned by its own slice of the embedding; then all by the whole.

Paper: Sanakoyeu, Tschernezki, Buechler, Ommer, "Divide and Conquer the Embedding Space for Metric
Learning", CVPR 2019. The authors' code was read; unlike there, clusters keep their learner by
matching in the forward direction, and slices stay apart until the final phase. Ours are: the final
phase learns the concatenation of unit slices, which is what is exported; a learner whose cluster
cannot be learned from has all photos; no photo is twice in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from embedkit import losses
from embedkit.data import PKSampler
from embedkit.losses import MetricLoss
from embedkit.losses._base import check_choice, check_number, check_whole
from embedkit.losses._pairs import pair_distances, pair_stats, same_and_other, share
from embedkit.methods._base import Batch, Method, Outcome, Sampler, Setting, View
from embedkit.methods._clusters import k_means, match_clusters
from embedkit.models import EmbeddingNet
from embedkit.models.divided import DividedNet

if TYPE_CHECKING:
    from embedkit.train.recipe import Recipe

__all__ = ["DivideAndConquer"]

_NEAREST = 0.5


class DivideAndConquer(Method):
    """Every few epochs the photos are clustered by their pooled features; learners take turns.

    A batch is of one cluster, and only the slice of its learner is compared in it, by the margin
    loss. In the last epochs batches are of all photos and compare the whole embedding. The backbone
    learns from all. With early stopping (--patience) a training may end before that.

    Args:
        clusters: As many as slices, by which --dim must be divisible. The paper has 8 for large
            sets and 4 for CUB and Cars.
        every: Epochs from one clustering to the next.
        finetune: Share of the epochs, the last ones, that train the whole; at least one epoch
            unless 0, and never the first. The authors have the last 10 of 200.
        margin: Of the margin loss.
        beta: The boundary of the margin loss, a constant as in the authors' code.
        mining: ``"distance-weighted"``, as in the paper, or ``"nearest"``, as in the authors' code:
            of each anchor as many negatives as it has positives on average, the nearest that are
            at least 0.5 away.

    Cost: a pass over the training photos per clustering, and k-means O(N clusters F) some hundred
    times.
    """

    certainty = "code read"

    clusters: Tensor

    def __init__(
        self,
        *,
        clusters: int = 4,
        every: int = 2,
        finetune: float = 0.05,
        margin: float = 0.2,
        beta: float = 1.2,
        mining: Literal["distance-weighted", "nearest"] = "distance-weighted",
    ) -> None:
        super().__init__()
        self.learners = check_whole("clusters", clusters, least=2)
        self.own_clusters = 0
        self.every = check_whole("every", every, least=1)
        self.finetune = check_number("finetune", finetune, least=0, most=1)
        if check_choice("mining", mining, ["distance-weighted", "nearest"]) == "nearest":
            self.loss = _NearestMargin(margin=margin, beta=beta)
        else:
            self.loss = losses.create("margin", margin=margin, beta=beta)

    def network_class(self, recipe: Recipe) -> Callable[..., EmbeddingNet]:
        return partial(DividedNet, slices=self.learners)

    def prepare(self, setting: Setting, network: EmbeddingNet) -> None:
        self._labels, self._epoch_steps = setting.labels, setting.epoch_steps
        last = round(self.finetune * setting.epochs)
        self._whole_from = max(1, setting.epochs - max(last, 1 if self.finetune else 0))
        self.register_buffer("clusters", torch.zeros(len(setting.labels), dtype=torch.int64))

    def sampler(self, setting: Setting, steps: int | None) -> Sampler:
        return _InTurns(self, setting, steps)

    def learner(self, epoch: int, step: int) -> int | None:
        """Whose turn it is; None: the whole embedding's."""
        if epoch >= self._whole_from:
            return None
        return (epoch * self._epoch_steps + step) % self.learners

    def members(self, learner: int) -> npt.NDArray[np.int64] | None:
        """Places of the photos of its cluster; None when they have not two classes of two."""
        rows = np.flatnonzero(self.clusters.cpu().numpy() == learner)
        sizes = np.unique(self._labels[rows], return_counts=True)[1]
        return rows if (sizes > 1).sum() > 1 else None

    def begin_epoch(self, epoch: int, view: View) -> None:
        if epoch >= self._whole_from or epoch % self.every:
            return
        found = k_means(functional.normalize(view.features()), self.learners)
        if epoch:
            found = match_clusters(self.clusters.cpu().numpy(), found.numpy())
        self.clusters.copy_(found)

    def step(self, network: EmbeddingNet, batch: Batch) -> Outcome:
        embeddings = network(batch.pixels)
        learner = self.learner(batch.epoch, batch.step)
        compared = embeddings
        if learner is not None:
            compared = embeddings.unflatten(1, (self.learners, -1))[:, learner]
        return Outcome(self.loss(compared.float(), batch.labels), embeddings)

    @property
    def stats(self) -> dict[str, float]:
        """Those of the margin loss, and how many clusters the epoch's batches are of."""
        return {**self.loss.stats, "own_clusters": float(self.own_clusters)}


class _InTurns:
    """PK batches of one cluster after the other, or of all photos in the final phase."""

    def __init__(self, method: DivideAndConquer, setting: Setting, steps: int | None) -> None:
        self._method, self._setting = method, setting
        self.steps = self._of(None, 0, steps).steps

    def batches(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        turns = [self._method.learner(epoch, step) for step in range(self.steps)]
        plans: dict[int | None, list[npt.NDArray[np.int64]]] = {}
        self._method.own_clusters = 0
        for learner in {*turns}:
            rows = None if learner is None else self._method.members(learner)
            sampler = self._of(rows, learner or 0, turns.count(learner))
            plans[learner] = sampler.batches(epoch)
            if rows is not None:
                plans[learner] = [rows[batch] for batch in plans[learner]]
                self._method.own_clusters += 1
        return [plans[learner].pop(0) for learner in turns]

    def _of(self, rows: npt.NDArray[np.int64] | None, number: int, steps: int | None) -> PKSampler:
        recipe, labels = self._setting.recipe, self._setting.labels
        return PKSampler(
            labels if rows is None else labels[rows],
            classes_per_batch=recipe.classes_per_batch,
            images_per_class=recipe.images_per_class,
            seed=recipe.seed + number,
            steps=steps,
        )


class _NearestMargin(MetricLoss):
    """Margin loss of all positives and of as many of the nearest negatives of each anchor.

    ``[d_ap - beta + margin]+`` and ``[beta - d_an + margin]+``, summed, over the number of those
    above 0. Nearer than 0.5 are none taken.
    """

    def __init__(self, *, margin: float, beta: float) -> None:
        super().__init__()
        self.margin = check_number("margin", margin, least=0)
        self.beta = check_number("beta", beta, above=0)

    def compute(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        distances = pair_distances(rows)
        with torch.no_grad():
            same, other = same_and_other(labels)
            count = min(round(float(same.sum()) / len(rows)), len(rows))
            far = distances.masked_fill(~other | (distances < _NEAREST), torch.inf)
            nearest, places = far.topk(count, largest=False)
            taken = torch.zeros_like(other).scatter_(1, places, nearest.isfinite())
        pull = (distances - self.beta + self.margin).clamp(min=0) * same
        push = (self.beta + self.margin - distances).clamp(min=0) * taken
        active = pull.count_nonzero() + push.count_nonzero()
        with torch.no_grad():
            stats = pair_stats(distances, same, other)
            stats["active_positives"] = share(pull, same)
            stats["active_negatives"] = share(push, taken)
        return (pull.sum() + push.sum()) / active.clamp(min=1), stats
