"""Groups of alike rows by k-means, and the names they had the last time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedkit.errors import MissingExtraError

try:
    from scipy.optimize import linear_sum_assignment
except ImportError as error:
    raise MissingExtraError("Matching clusters", package="scipy", extra="train") from error

__all__ = ["k_means", "match_clusters"]


def k_means(rows: Tensor, count: int, *, iterations: int = 100, restarts: int = 5) -> Tensor:
    """``(N,)`` int64: the cluster, from 0, of each row of ``(N, F)``; the best of several starts.

    Lloyd's algorithm from `count` different random rows; a cluster that has lost all its rows gets
    the row that is farthest from its own centre. With fewer rows than `count`, as many clusters as
    rows. Draws from torch's generator. Cost: at most O(restarts iterations N count F).
    """
    count = min(count, len(rows))
    best, least = torch.zeros(len(rows), dtype=torch.int64), torch.inf
    for _ in range(restarts):
        clusters, apart = _lloyd(rows, rows[torch.randperm(len(rows))[:count]], iterations)
        if apart < least:
            best, least = clusters, apart
    return best


def _lloyd(rows: Tensor, centres: Tensor, iterations: int) -> tuple[Tensor, float]:
    """Clusters, and the sum of squared distances of rows to their centres."""
    squares = rows.square().sum(1, keepdim=True)
    before = torch.full((len(rows),), -1)
    for _ in range(iterations):
        apart = squares - 2 * rows @ centres.T + centres.square().sum(1)
        nearest, clusters = apart.min(1)
        if torch.equal(clusters, before):
            break
        before = clusters
        members = torch.zeros(len(rows), len(centres)).scatter_(1, clusters[:, None], 1)
        sizes = members.sum(0)
        centres = (members.T @ rows) / sizes.clamp(min=1)[:, None]
        empty = torch.nonzero(sizes == 0).flatten()
        centres[empty] = rows[nearest.topk(len(empty)).indices]
    return before, float(nearest.clamp(min=0).sum())


def match_clusters(before: npt.NDArray[np.int64], after: npt.NDArray[np.int64]) -> Tensor:
    """``after`` ``(N,)`` with its clusters renamed, one to one, so that most rows keep their name.

    Kuhn, "The Hungarian method for the assignment problem", 1955, on the overlaps.
    """
    count = int(max(before.max(), after.max())) + 1
    shared = np.zeros((count, count), np.int64)
    np.add.at(shared, (before, after), 1)
    old, new = linear_sum_assignment(shared, maximize=True)
    name_of = np.empty(count, np.int64)
    name_of[new] = old
    return torch.from_numpy(name_of[after])
