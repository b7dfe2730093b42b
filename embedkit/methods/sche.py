"""SCHE: one class in turn against the hardest images of its hardest classes, found by signatures.

Paper: Suh, Han, Kim, Lee, "Stochastic Class-based Hard Example Mining for Deep Metric Learning",
CVPR 2019. From secondary sources: there is no code of the authors, and the paper itself was not
read. From the abstract: a signature of every class is trained online, hard classes are sought by
it, and hard images inside them alone. From a third party's re-implementation: how many of each,
and that signatures are a classifier's weights. Ours are the cosines in that classifier, and that
the search is done for a whole epoch at its beginning, with embeddings and signatures of then; the
paper embeds the candidates anew for every batch, which costs many times the training.

The paper also pools second-order features of the fourth stage of Inception, at 336 pixels. The
pooling and the size are options of every training here (``--pooling second-order --image-size
336``); the stage is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedkit import losses
from embedkit.losses import MetricLoss
from embedkit.losses._base import check_number, check_whole, unit_rows
from embedkit.losses._pairs import pair_distances, with_slope
from embedkit.losses._triplets import hinge_triplets
from embedkit.methods._base import Batch, Method, Outcome, Sampler, Setting, View
from embedkit.models import EmbeddingNet

__all__ = ["ClassHardExamples", "FirstClassTripletLoss", "mine"]


class ClassHardExamples(Method):
    """A batch is `anchors` images of one class, the classes in turn, and hard images of others.

    Per batch of B, with n = B less the anchors: the classes are ranked by the greatest cosine of
    their signature with an anchor, and the first ``breadth (classes - 1)`` kept, breadth a whole
    number drawn from 3 to 5; the images of these are ranked in the same way, the first `depth` n
    kept, and n of them drawn.

    Args:
        anchors: Images of the class in turn, at least 2; at most half of a batch.
        classes: K of the rule above, at least 2.
        depth: Above; at least 1, where the n hardest are taken.
        margin: Of the triplets, at least 0.
        temperature: Of the classifier whose weights are the signatures, above 0.

    Cost: a pass over the training photos per epoch; then a ranking of C signatures and of the
    images of the kept classes per step. The embeddings of all photos are kept, also in the
    checkpoint: 4 N D bytes.
    """

    certainty = "secondary source"

    rows: Tensor
    directions: Tensor

    def __init__(
        self,
        *,
        anchors: int = 10,
        classes: int = 5,
        depth: int = 5,
        margin: float = 0.2,
        temperature: float = 0.05,
    ) -> None:
        super().__init__()
        self.anchors = check_whole("anchors", anchors, least=2)
        self.classes = check_whole("classes", classes, least=2)
        self.depth = check_whole("depth", depth, least=1)
        self.temperature = check_number("temperature", temperature, above=0)
        self.loss = FirstClassTripletLoss(margin=check_number("margin", margin, least=0))

    @property
    def stats(self) -> dict[str, float]:
        told = self.signatures.stats
        return {**self.loss.stats, "signature_distance": told.get("positive_distance", 0.0)}

    def prepare(self, setting: Setting, network: EmbeddingNet) -> None:
        self.signatures = losses.create(
            "softmax",
            num_classes=len(setting.classes),
            embedding_dim=network.embedding_dim,
            temperature=self.temperature,
        )
        count, width = len(setting.labels), network.embedding_dim
        self.register_buffer("rows", torch.zeros(count, width))
        self.register_buffer("directions", torch.zeros(len(setting.classes), width))

    def sampler(self, setting: Setting, steps: int | None) -> Sampler:
        return _HardClasses(self, setting, steps)

    def begin_epoch(self, epoch: int, view: View) -> None:
        self.rows.copy_(unit_rows(view.embeddings()))
        self.directions.copy_(unit_rows(cast(Tensor, self.signatures.proxies).detach()))

    def step(self, network: EmbeddingNet, batch: Batch) -> Outcome:
        embeddings = network(batch.pixels)
        rows = embeddings.float()
        value = self.loss(rows, batch.labels) + self.signatures(rows, batch.labels)
        return Outcome(value, embeddings)


class FirstClassTripletLoss(MetricLoss):
    """``[d_ap - d_an + margin]+`` over all triplets whose anchor is of the first row's class.

    The mean over the terms above 0.

    Shape: ``(B, D)`` rows, scaled to length 1 here, and ``(B,)`` labels -> scalar. Cost: O(B^2 D)
    time, O(B^2) memory.
    """

    def __init__(self, *, margin: float) -> None:
        super().__init__()
        self.margin = margin

    def compute(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        distances = pair_distances(rows)
        with torch.no_grad():
            first = labels == labels[0]
            same = first[:, None] & first[None, :]
            same.fill_diagonal_(False)
            other = first[:, None] & ~first[None, :]
            total, active, picked, slope = hinge_triplets(distances, same, other, self.margin)
            near, far = same.count_nonzero().clamp(min=1), other.count_nonzero().clamp(min=1)
            stats = {
                "positive_distance": (distances * same).sum() / near,
                "negative_distance": (distances * other).sum() / far,
                "active_triplets": active / picked.clamp(min=1),
            }
            count = active.clamp(min=1)
        return with_slope(distances, total / count, slope.div_(count)), stats


def mine(
    rows: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    signatures: npt.NDArray[np.float32],
    number: int,
    *,
    size: int,
    anchors: int,
    classes: int,
    depth: int,
    rng: np.random.Generator,
) -> npt.NDArray[np.int64]:
    """The batch of class `number`: places of its anchors, then of hard negatives; at most `size`.

    Args:
        rows: ``(N, D)`` unit embeddings.
        labels: ``(N,)``, 0 to C - 1.
        signatures: ``(C, D)`` unit rows.
        rng: Draws the anchors, the breadth and the negatives.
    """
    own = np.flatnonzero(labels == number)
    chosen = rng.permutation(own)[: max(2, min(anchors, size // 2))]
    wanted = size - len(chosen)
    score = (rows[chosen] @ signatures.T).max(0)
    score[number] = -np.inf
    breadth = min(int(rng.integers(3, 6)) * (classes - 1), len(signatures) - 1)
    pool = np.argsort(-score, kind="stable")[:breadth]
    images = np.flatnonzero(np.isin(labels, pool))
    score = (rows[chosen] @ rows[images].T).max(0)
    hardest = images[np.argsort(-score, kind="stable")[: depth * wanted]]
    return np.concatenate([chosen, rng.permutation(hardest)[:wanted]])


class _HardClasses:
    """`mine` for one class after the other, in a new order each time all have had their turn."""

    def __init__(self, method: ClassHardExamples, setting: Setting, steps: int | None) -> None:
        self._method, self._setting = method, setting
        # As many as show about as many images as there are, and give every class its turn.
        enough = math.ceil(len(setting.labels) / setting.recipe.batch_size)
        self.steps = steps or max(enough, len(setting.classes))

    def batches(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        method, setting, recipe = self._method, self._setting, self._setting.recipe
        rows, signatures = method.rows.cpu().numpy(), method.directions.cpu().numpy()
        plan = []
        for step in range(self.steps):
            turn, place = divmod(epoch * self.steps + step, len(setting.classes))
            order = np.random.default_rng([recipe.seed, 0, turn]).permutation(len(setting.classes))
            batch = mine(
                rows,
                setting.labels,
                signatures,
                int(order[place]),
                size=recipe.batch_size,
                anchors=method.anchors,
                classes=method.classes,
                depth=method.depth,
                rng=np.random.default_rng([recipe.seed, 1, epoch, step]),
            )
            plan.append(batch)
        return plan
