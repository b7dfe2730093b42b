"""DAMLRRM: positives are the edges of a spanning tree of each class, met by a second stream.

Paper: Xu, Yang, Deng, Zheng, "Deep Asymmetric Metric Learning via Rich Relationship Mining", CVPR
2019. A reconstruction: of the paper we have the abstract alone. Its ideas are two streams, of
different structure and unequal length, laced into each other so that new pairs meet over the
iterations; and positives that are not all pairs of a class but a minimum-cost spanning tree, which
keeps it connected and lets it stay spread out. Ours are the cost (distance of embeddings, the tree
found anew every epoch), what each stream holds, the layout of a batch, and the loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedkit.errors import DataError
from embedkit.losses import MetricLoss
from embedkit.losses._base import check_number, unit_rows
from embedkit.losses._pairs import pair_distances, pair_stats, same_and_other, with_slope
from embedkit.losses._triplets import hinge_triplets
from embedkit.methods._base import Method, Sampler, Setting, View
from embedkit.models import EmbeddingNet

__all__ = ["AsymmetricStreams", "TreeTripletLoss", "spanning_tree"]

_ROOT = -1


class AsymmetricStreams(Method):
    """A third of a batch is edges of trees, two photos each; the rest is single photos.

    Photos of a class that no edge of the batch joins are neither positive nor negative to each
    other.

    Args:
        margin: By which a photo of another class must be farther than the other end of the edge,
            at least 0.

    Cost: a pass over the training photos and O(n^2 D) for each class of n photos per epoch.
    """

    certainty = "reconstruction"

    parents: Tensor

    def __init__(self, *, margin: float = 0.2) -> None:
        super().__init__()
        self.margin = check_number("margin", margin, least=0)

    def prepare(self, setting: Setting, network: EmbeddingNet) -> None:
        numbers = np.unique(setting.labels)
        self._members = [np.flatnonzero(setting.labels == number) for number in numbers]
        parents = np.full(len(setting.labels), _ROOT, np.int64)
        for members in self._members:
            parents[members[1:]] = members[0]
        self.register_buffer("parents", torch.from_numpy(parents))
        self.loss = TreeTripletLoss(_Streams(self, setting, None).edges, margin=self.margin)

    def sampler(self, setting: Setting, steps: int | None) -> Sampler:
        return _Streams(self, setting, steps)

    def begin_epoch(self, epoch: int, view: View) -> None:
        rows = unit_rows(view.embeddings()).numpy()
        parents = np.full(len(rows), _ROOT, np.int64)
        for members in self._members:
            tree = spanning_tree(rows[members])
            parents[members[1:]] = members[tree[1:]]
        self.parents.copy_(torch.from_numpy(parents))


class TreeTripletLoss(MetricLoss):
    """``[d_ap - d_an + margin]+`` over both directions of the edges and all other classes' rows.

    The mean over the terms above 0. Rows ``2 i`` and ``2 i + 1`` are the ends of edge i, for the
    first `edges` edges; all other pairs of a class are left alone.

    Shape: ``(B, D)`` rows, scaled to length 1 here, B at least ``2 edges``, and ``(B,)`` labels ->
    scalar. Cost: O(B^2 D) time, O(B^2) memory.
    """

    def __init__(self, edges: int, *, margin: float) -> None:
        super().__init__()
        self.edges, self.margin = edges, margin

    def compute(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        distances = pair_distances(rows)
        with torch.no_grad():
            other = same_and_other(labels)[1]
            joined = torch.zeros_like(other)
            ends = torch.arange(2 * self.edges, device=rows.device)
            joined[ends, ends ^ 1] = True
            stats = pair_stats(distances, joined, other)
            total, active, picked, slope = hinge_triplets(distances, joined, other, self.margin)
            stats["active_triplets"] = active / picked.clamp(min=1)
            count = active.clamp(min=1)
        return with_slope(distances, total / count, slope.div_(count)), stats


def spanning_tree(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Of ``(n, D)`` rows each one's parent in a tree of least total distance; -1 of row 0.

    Prim's algorithm from row 0; of equal distances the first row counts. Equal rows are joined at
    no cost. O(n^2 D) time, O(n D) memory.
    """
    parent = np.full(len(rows), _ROOT, np.int64)
    cost = np.full(len(rows), np.inf)
    waiting = np.ones(len(rows), bool)
    newest = 0
    for _ in range(len(rows) - 1):
        waiting[newest] = False
        apart = np.linalg.norm((rows - rows[newest]).astype(np.float64), axis=1)
        nearer = waiting & (apart < cost)
        cost[nearer], parent[nearer] = apart[nearer], newest
        newest = int(np.where(waiting, cost, np.inf).argmin())
    return parent


class _Streams:
    """Edges, and single photos; each goes round by itself, so that each round meets otherwise.

    Both are in one shuffled order that stays. Their lengths have no common divisor: where they
    would, the second goes on with its first photos until they have none.
    """

    def __init__(self, method: AsymmetricStreams, setting: Setting, steps: int | None) -> None:
        self._method = method
        count, size = len(setting.labels), setting.recipe.batch_size
        self._total = count - len(np.unique(setting.labels))
        if not self._total:
            raise DataError("damlrrm needs a class with two photos", facts="every class has one")
        self._singles = count
        while math.gcd(self._singles, self._total) > 1:
            self._singles += 1
        self.edges = min(max(1, size // 3), self._total)
        self._alone = min(max(1, size - 2 * self.edges), count)
        self._order = np.random.default_rng([setting.recipe.seed, 0]).permutation(count)
        self.steps = steps or math.ceil(self._total / self.edges)

    def batches(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        parents = self._method.parents.cpu().numpy()
        children = self._order[parents[self._order] != _ROOT]
        plan = []
        for step in range(epoch * self.steps, (epoch + 1) * self.steps):
            ends = children[(step * self.edges + np.arange(self.edges)) % self._total]
            edges = np.stack([ends, parents[ends]], axis=1).ravel()
            places = (step * self._alone + np.arange(self._alone)) % self._singles
            plan.append(np.concatenate([edges, self._order[places % len(self._order)]]))
        return plan
