"""Recall@k, MAP@R and R-precision of embeddings, exact, in bounded memory.

R of a query is the number of gallery items of its class, itself left out. R-precision is the share
of matches in the first R; MAP@R is ``1/R * sum over i <= R of precision@i * [item i matches]``
(Musgrave, Belongie, Lim, "A Metric Learning Reality Check", ECCV 2020, arXiv:2003.08505). Recall@k
is the share of queries with a match among their k nearest.

The ranking is by cosine, the highest first, equal scores by gallery row; a query never finds
itself, because its own row is taken out. Scores are summed in float64 and rounded to float32:
float32 sums differ in the last digit with the shape of the block they are computed in, and would
order duplicates by accident.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import EmbedKitError

__all__ = ["RetrievalMetrics", "nearest", "neighbour_overlap", "retrieval_metrics"]

Mask = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

# Scores held at once: 32 MiB of float32, and twice that of row numbers while they are ordered.
_SCORES_AT_ONCE = 1 << 23
_GALLERY_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class RetrievalMetrics:
    """One evaluation; every share lies in 0..1 and is NaN where it has nothing to average over.

    Attributes:
        recall: recall@k by k, over the queries that have a match.
        recall_all: recall@k by k, a query without any match counted as a miss; published recall@k
            of sets with such queries is this one.
        map_at_r: MAP@R over the queries that have a match.
        r_precision: R-precision over the queries that have a match.
        queries: How many there were.
        lone_queries: How many of them have no match in the gallery.
        tie_share: Share of the queries with two equal scores among the ranks that were looked at
            and one more: there the gallery's order decided. Near 1 when embeddings have collapsed.
    """

    recall: dict[int, float]
    recall_all: dict[int, float]
    map_at_r: float
    r_precision: float
    queries: int
    lone_queries: int
    tie_share: float

    def to_json(self) -> dict[str, Any]:
        """``recall@1``, ..., ``recall_all@1``, ..., ``map@r``, ``r_precision``, ``queries``,
        ``lone_queries``, ``tie_share``; NaN becomes None."""
        shares = {
            **{f"recall@{k}": value for k, value in self.recall.items()},
            **{f"recall_all@{k}": value for k, value in self.recall_all.items()},
            "map@r": self.map_at_r,
            "r_precision": self.r_precision,
            "tie_share": self.tie_share,
        }
        return {
            **{name: None if np.isnan(value) else value for name, value in shares.items()},
            "queries": self.queries,
            "lone_queries": self.lone_queries,
        }


def retrieval_metrics(
    embeddings: npt.ArrayLike,
    labels: Sequence[int] | Sequence[str] | npt.NDArray[Any],
    *,
    ks: Sequence[int] = (1, 2, 4, 8),
    query: npt.ArrayLike | None = None,
    gallery: npt.ArrayLike | None = None,
    block: int = 1024,
) -> RetrievalMetrics:
    """Let every query rank the gallery, and measure what comes first.

    Args:
        embeddings: ``(N, D)``, any length but not all of it zero; scaled to unit rows here.
        labels: ``(N,)`` integers or strings; equal means a match.
        ks: Of recall@k, each at least 1; a k beyond the gallery means the whole gallery.
        query: ``(N,)`` bool, the rows that ask; None is all.
        gallery: ``(N,)`` bool, the rows that can be found; None is all. A row may be both.
        block: Most queries at once; fewer are taken when the gallery is large.

    Raises:
        EmbedKitError: An embedding holds NaN or infinity.
        ValueError: Shapes do not fit, or a k or `block` is below 1.

    No query, or none with a match, gives NaN, not an error.
    Cost: O(Q N D) time; memory O(block x N), at most about 350 MiB, beside a float32 copy of the
    embeddings.
    """
    unit = _unit_rows(embeddings)
    codes = _codes(labels, len(unit))
    if any(k < 1 for k in ks):
        raise ValueError(f"every k of ks must be at least 1, got {tuple(ks)}")
    asks, found = _mask("query", query, len(unit)), _mask("gallery", gallery, len(unit))
    rows, gallery_codes = np.flatnonzero(asks), codes[found]
    class_sizes = np.bincount(gallery_codes, minlength=int(codes.max(initial=-1)) + 1)
    matches = class_sizes[codes[rows]] - found[rows]

    first_hit = np.full(len(rows), np.inf)
    average_precision, r_precision = np.zeros(len(rows)), np.zeros(len(rows))
    ties = 0
    depth = max([*ks, int(matches.max(initial=0))])
    for start, order, costs in _rankings(unit, rows, np.flatnonzero(found), depth + 1, block):
        ties += int((costs[:, 1:] == costs[:, :-1]).any(axis=1).sum())
        part = slice(start, start + len(order))
        here = matches[part]
        hit = gallery_codes[order] == codes[rows[part], None]
        # The query's own row, where it is in the gallery, is last and costs infinity.
        hit &= np.isfinite(costs)
        has_hit = hit.any(axis=1)
        first_hit[part][has_hit] = hit[has_hit].argmax(axis=1) + 1
        hit = hit[:, : int(here.max(initial=0))]
        rank = np.arange(1, hit.shape[1] + 1)
        hit &= rank <= here[:, None]
        precision = hit.cumsum(axis=1) / rank
        divisor = np.maximum(here, 1)
        average_precision[part] = (precision * hit).sum(axis=1) / divisor
        r_precision[part] = hit.sum(axis=1) / divisor

    has_match = matches > 0
    return RetrievalMetrics(
        recall={k: _mean(first_hit[has_match] <= k) for k in ks},
        recall_all={k: _mean(first_hit <= k) for k in ks},
        map_at_r=_mean(average_precision[has_match]),
        r_precision=_mean(r_precision[has_match]),
        queries=len(rows),
        lone_queries=int(len(rows) - has_match.sum()),
        tie_share=ties / len(rows) if len(rows) else float("nan"),
    )


def nearest(
    embeddings: npt.ArrayLike,
    k: int,
    *,
    queries: npt.ArrayLike | None = None,
    block: int = 1024,
) -> Indices:
    """The rows most like each query, best first, without itself: ``(Q, min(k, N - 1))``.

    Args:
        embeddings: ``(N, D)``, scaled to unit rows here.
        k: Neighbours, at least 1.
        queries: ``(N,)`` bool, the rows that ask; None is all. Every row can be found.
        block: Most queries at once; fewer are taken when N is large.

    Raises:
        EmbedKitError: An embedding holds NaN or infinity.
        ValueError: Shapes do not fit, or `k` or `block` is below 1.

    Order and memory are those of `retrieval_metrics`.
    """
    unit = _unit_rows(embeddings)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    rows = np.flatnonzero(_mask("queries", queries, len(unit)))
    depth = min(k, max(len(unit) - 1, 0))
    answer = np.empty((len(rows), depth), dtype=np.int64)
    for start, order, _ in _rankings(unit, rows, np.arange(len(unit)), depth, block):
        answer[start : start + len(order)] = order
    return answer


def neighbour_overlap(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Share of the neighbours that two answers of `nearest` have in common, order aside, 0..1.

    Args:
        a: ``(N, k)``, no index twice in a row.
        b: ``(N, k)``, likewise.

    Nothing to compare (no rows or no columns) is 1. Cost: O(N k^2) time, O(N k) memory.
    """
    left, right = np.asarray(a), np.asarray(b)
    if left.ndim != 2 or left.shape != right.shape:
        raise ValueError(
            f"expected two (N, k) arrays of one shape, got {left.shape}, {right.shape}"
        )
    if not left.size:
        return 1.0
    common = sum(int((right == column[:, None]).any(axis=1).sum()) for column in left.T)
    return common / left.size


def _rankings(
    unit: Floats, rows: Indices, gallery: Indices, depth: int, block: int
) -> Iterator[tuple[int, Indices, Floats]]:
    """Per block of queries: its start, the first `depth` gallery positions, and their costs.

    Both arrays are ``(b, min(depth, len(gallery)))``; an empty gallery gives no block. A cost is
    the negative cosine, and infinity for the query's own row, which therefore comes last.
    """
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    if not len(gallery):
        return
    at_once = max(1, min(block, _SCORES_AT_ONCE // len(gallery)))
    position = np.full(len(unit), -1)
    position[gallery] = np.arange(len(gallery))
    for start in range(0, len(rows), at_once):
        asking = rows[start : start + at_once]
        costs = np.empty((len(asking), len(gallery)), dtype=np.float32)
        vectors = -unit[asking].astype(np.float64)
        for left in range(0, len(gallery), _GALLERY_ROWS_AT_ONCE):
            part = slice(left, left + _GALLERY_ROWS_AT_ONCE)
            costs[:, part] = vectors @ unit[gallery[part]].astype(np.float64).T
        own = position[asking]
        inside = np.flatnonzero(own >= 0)
        costs[inside, own[inside]] = np.inf
        order = _smallest(costs, depth)
        yield start, order, np.take_along_axis(costs, order, axis=1)


def _smallest(costs: Floats, depth: int) -> Indices:
    """Columns of the `depth` smallest of each row, ascending, equal values by column."""
    count = costs.shape[1]
    if depth >= count // 4:
        return np.argsort(costs, axis=1, kind="stable")[:, :depth]
    if depth == 0:
        return np.empty((len(costs), 0), dtype=np.int64)
    chosen = np.argpartition(costs, depth - 1, axis=1)[:, :depth]
    bound = np.take_along_axis(costs, chosen, axis=1).max(axis=1, keepdims=True)
    # Where more columns equal the bound than there are places, the partition took any of them.
    crowded = (costs <= bound).sum(axis=1) > depth
    for row in np.flatnonzero(crowded):
        below = np.flatnonzero(costs[row] < bound[row])
        equal = np.flatnonzero(costs[row] == bound[row])
        chosen[row] = np.concatenate([below, equal[: depth - len(below)]])
    chosen.sort(axis=1)
    order = np.argsort(np.take_along_axis(costs, chosen, axis=1), axis=1, kind="stable")
    return np.take_along_axis(chosen, order, axis=1)


def _unit_rows(embeddings: npt.ArrayLike) -> Floats:
    rows = np.asarray(embeddings)
    if rows.ndim != 2:
        raise ValueError(f"embeddings must be (N, D), got shape {rows.shape}")
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise EmbedKitError(
            "some embeddings are not finite",
            facts=f"NaN or infinity in {int((~finite).sum()):,} of {len(rows):,} rows, "
            f"first in row {int(finite.argmin())}",
            hint="a lower learning rate if this is a training that went astray",
        )
    unit = np.empty(rows.shape, dtype=np.float32)
    for start in range(0, len(rows), _GALLERY_ROWS_AT_ONCE):
        part = rows[start : start + _GALLERY_ROWS_AT_ONCE].astype(np.float64)
        # Dividing by the largest entry first keeps the squares from overflowing or vanishing.
        part /= np.maximum(np.abs(part).max(axis=1, initial=0, keepdims=True), 1e-300)
        length = np.sqrt((part * part).sum(axis=1, keepdims=True))
        unit[start : start + len(part)] = part / np.maximum(length, 1e-300)
    return unit


def _codes(labels: Sequence[int] | Sequence[str] | npt.NDArray[Any], count: int) -> Indices:
    values = np.asarray(labels)
    if values.shape != (count,):
        raise ValueError(f"labels must be ({count},), one per embedding, got shape {values.shape}")
    return np.unique(values, return_inverse=True)[1].astype(np.int64)


def _mask(name: str, mask: npt.ArrayLike | None, count: int) -> Mask:
    if mask is None:
        return np.ones(count, dtype=np.bool_)
    values = np.asarray(mask)
    if values.shape != (count,) or values.dtype != np.bool_:
        raise ValueError(
            f"{name} must be ({count},) bool, one per embedding, "
            f"got {values.dtype} of shape {values.shape}"
        )
    return values


def _mean(values: npt.NDArray[Any]) -> float:
    return float(values.mean(dtype=np.float64)) if len(values) else float("nan")
