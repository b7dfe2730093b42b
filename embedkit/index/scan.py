"""The nearest among chosen rows: every one of them is looked at, in blocks of bounded memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from embedkit.index.several import likeness

__all__ = ["scan"]

Vectors = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]

_ROWS = 4096
_SCORES_AT_ONCE = 1 << 22


def scan(
    read: Callable[[Indices], Vectors],
    among: Indices,
    queries: Vectors,
    k: int,
    metric: str,
    *,
    parts: int = 1,
) -> tuple[Doubles, Indices]:
    """The `k` nearest of each query among some rows, as FAISS gives them: nearest first.

    Args:
        read: Vectors ``(M, D)`` of row numbers ``(M,)``.
        among: Row numbers, at least `k` of them.
        queries: ``(Q, D)``.
        k: At least 1.
        metric: ``cosine``: inner products, largest first. ``l2``: squared distances, smallest
            first.
        parts: How many vectors of a picture stand side by side in a row; of several, the greatest
            of their cosines counts.

    Returns:
        Scores and row numbers, each ``(Q, k)``.

    Cost: O(Q M D) in float64, of K parts K times that; each row is read once for as many queries as
    4 million scores hold, which is the memory it takes, beside 4096 rows (or k of them).
    """
    scores, rows = np.empty((len(queries), k)), np.empty((len(queries), k), np.int64)
    at_once = max(1, _SCORES_AT_ONCE // (k + max(_ROWS, k)))
    for start in range(0, len(queries), at_once):
        part = slice(start, start + at_once)
        asking = queries[part].astype(np.float64)
        with np.errstate(invalid="ignore"):  # damaged rows: the catalog looks at what is found
            near, rows[part] = _scan(read, among, asking, k, metric, parts)
        scores[part] = near if metric == "cosine" else np.maximum(-near, 0)
    return scores, rows


def _scan(
    read: Callable[[Indices], Vectors],
    among: Indices,
    queries: Doubles,
    k: int,
    metric: str,
    parts: int,
) -> tuple[Doubles, Indices]:
    best, found = np.empty((len(queries), 0)), np.empty((len(queries), 0), np.int64)
    step = max(_ROWS, k)
    for start in range(0, len(among), step):
        block = among[start : start + step]
        vectors = read(block).astype(np.float64)
        near = likeness(queries, vectors, parts) if parts > 1 else queries @ vectors.T
        if metric == "l2":
            near = 2 * near - (vectors**2).sum(axis=1) - (queries**2).sum(axis=1)[:, None]
        best = np.hstack([best, near])
        found = np.hstack([found, np.broadcast_to(block, near.shape)])
        if best.shape[1] > k:
            keep = np.argpartition(-best, k - 1, axis=1)[:, :k]
            best = np.take_along_axis(best, keep, axis=1)
            found = np.take_along_axis(found, keep, axis=1)
    order = np.lexsort((found, -best), axis=1)
    return np.take_along_axis(best, order, axis=1), np.take_along_axis(found, order, axis=1)
