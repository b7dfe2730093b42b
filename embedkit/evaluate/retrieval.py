"""Recall@k, MAP@R, R-precision and MRR of embeddings, exact, in bounded memory.

R of a query is the number of gallery items of its class, itself left out. R-precision is the share
of matches in the first R; MAP@R is ``1/R * sum over i <= R of precision@i * [item i matches]``
(Musgrave, Belongie, Lim, "A Metric Learning Reality Check", ECCV 2020, arXiv:2003.08505). Recall@k
is the share of queries with a match among their k nearest, and P@1 another name of recall@1. MRR is
the mean of 1 / (rank of the first match), over the whole ranking.

The ranking is by cosine or distance, the best first, equal scores by gallery row; a query never
finds itself, because its own row is taken out. See `embedkit.evaluate.ranking` for what makes it
exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.evaluate.ranking import Floats, Indices, Ranked, Space, rankings

__all__ = [
    "QueryResults",
    "RetrievalMetrics",
    "nearest",
    "neighbour_overlap",
    "query_results",
    "retrieval_metrics",
]

Labels = Sequence[int] | Sequence[str] | npt.NDArray[Any]
Doubles = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class RetrievalMetrics:
    """One evaluation; every share lies in 0..1 and is NaN where it has nothing to average over.

    Attributes:
        recall: recall@k by k, over the queries that have a match.
        recall_all: recall@k by k, a query without any match counted as a miss; published recall@k
            of sets with such queries is this one.
        map_at_r: MAP@R over the queries that have a match.
        r_precision: R-precision over the queries that have a match.
        mrr: Mean reciprocal rank of the first match, over the queries that have one.
        queries: How many there were.
        lone_queries: How many of them have no match in the gallery.
        tie_share: Share of the queries with two equal scores among the ranks that were looked at
            and one more: there the gallery's order decided. Near 1 when embeddings have collapsed.
    """

    recall: dict[int, float]
    recall_all: dict[int, float]
    map_at_r: float
    r_precision: float
    mrr: float
    queries: int
    lone_queries: int
    tie_share: float

    def to_json(self) -> dict[str, Any]:
        """``recall@1``, ..., ``recall_all@1``, ..., ``map@r``, ``r_precision``, ``mrr``,
        ``queries``, ``lone_queries``, ``tie_share``; NaN becomes None."""
        shares = {
            **{f"recall@{k}": value for k, value in self.recall.items()},
            **{f"recall_all@{k}": value for k, value in self.recall_all.items()},
            "map@r": self.map_at_r,
            "r_precision": self.r_precision,
            "mrr": self.mrr,
            "tie_share": self.tie_share,
        }
        return {
            **{name: None if np.isnan(value) else value for name, value in shares.items()},
            "queries": self.queries,
            "lone_queries": self.lone_queries,
        }


@dataclass(frozen=True)
class QueryResults:
    """What each query found; every column has one entry per query, in the order of the rows.

    Attributes:
        rows: ``(Q,)`` row numbers of the queries.
        codes: ``(Q,)`` number of each query's class: its place among the sorted labels.
        matches: ``(Q,)`` R: gallery items of its class, without itself; 0 for a lone query.
        first: ``(Q,)`` rank of the first match, from 1, over the whole gallery; infinity if lone.
        average_precision: ``(Q,)`` at R; 0 if lone.
        r_precision: ``(Q,)``; 0 if lone.
        tied: ``(Q,)`` bool, two equal scores among the ranks that were looked at and one more.
    """

    rows: Indices
    codes: Indices
    matches: Indices
    first: Doubles
    average_precision: Doubles
    r_precision: Doubles
    tied: Mask

    def metrics(self, ks: Sequence[int] = (1, 2, 4, 8)) -> RetrievalMetrics:
        """The means; any k will do."""
        has_match = self.matches > 0
        return RetrievalMetrics(
            recall={k: _mean(self.first[has_match] <= k) for k in ks},
            recall_all={k: _mean(self.first <= k) for k in ks},
            map_at_r=_mean(self.average_precision[has_match]),
            r_precision=_mean(self.r_precision[has_match]),
            mrr=_mean(1 / self.first[has_match]),
            queries=len(self.rows),
            lone_queries=int(len(self.rows) - has_match.sum()),
            tie_share=_mean(self.tied),
        )

    def take(self, places: Sequence[int]) -> QueryResults:
        """These queries, in this order."""
        at = np.array(places, dtype=np.int64)
        return QueryResults(
            self.rows[at],
            self.codes[at],
            self.matches[at],
            self.first[at],
            self.average_precision[at],
            self.r_precision[at],
            self.tied[at],
        )


def retrieval_metrics(
    embeddings: npt.ArrayLike,
    labels: Labels,
    *,
    ks: Sequence[int] = (1, 2, 4, 8),
    query: npt.ArrayLike | None = None,
    gallery: npt.ArrayLike | None = None,
    metric: str = "cosine",
    block: int = 1024,
) -> RetrievalMetrics:
    """Let every query rank the gallery, and measure what comes first.

    Arguments, errors and cost are those of `query_results`. No query, or none with a match, gives
    NaN, not an error.
    """
    results = query_results(
        embeddings, labels, ks=ks, query=query, gallery=gallery, metric=metric, block=block
    )
    return results.metrics(ks)


def query_results(
    embeddings: npt.ArrayLike,
    labels: Labels,
    *,
    ks: Sequence[int] = (1, 2, 4, 8),
    query: npt.ArrayLike | None = None,
    gallery: npt.ArrayLike | None = None,
    metric: str = "cosine",
    block: int = 1024,
) -> QueryResults:
    """What every query finds first.

    Args:
        embeddings: ``(N, D)``; for ``cosine`` any length but not all of it zero. Or ``(N, K, D)``,
            K vectors per picture: two pictures are as alike as their most alike vectors, which
            takes K^2 times the time.
        labels: ``(N,)`` integers or strings; equal means a match.
        ks: Ranks that `QueryResults.tied` must look at, beside the first R; each at least 1.
        query: ``(N,)`` bool, the rows that ask; None is all.
        gallery: ``(N,)`` bool, the rows that can be found; None is all. A row may be both.
        metric: ``cosine``, or ``l2`` for embeddings whose length means something.
        block: Most queries at once; fewer are taken when the gallery is large.

    Raises:
        EmbedKitError: An embedding holds NaN or infinity.
        UnknownNameError: No such metric.
        ValueError: Shapes do not fit, or a k or `block` is below 1.

    Cost: O(Q N D) time. Memory beside `embeddings`: a float32 copy of them, another of the gallery
    where that is a part, and at most about 250 MiB.
    """
    if any(k < 1 for k in ks):
        raise ValueError(f"every k of ks must be at least 1, got {tuple(ks)}")
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    count = _count(embeddings)
    codes = class_codes(labels, count)
    space = Space(embeddings, row_mask("gallery", gallery, count), metric)
    rows = np.flatnonzero(row_mask("query", query, count))

    def ask(places: Indices, depth: int) -> Iterator[Ranked]:
        return rankings(space, rows[places], depth, block, codes)

    return judged(codes, ask, ks=ks, query=query, gallery=gallery)


def judged(
    codes: Indices,
    ask: Callable[[Indices, int], Iterator[Ranked]],
    *,
    ks: Sequence[int],
    query: npt.ArrayLike | None,
    gallery: npt.ArrayLike | None,
) -> QueryResults:
    """What some rankings of the gallery are worth.

    Args:
        codes: ``(N,)`` classes (`class_codes`).
        ask: ``ask(places, depth)`` lets the queries at these places among the queries rank the
            gallery to that depth at least.
        ks: As for `query_results`.
        query: ``(N,)`` bool, the rows that ask; None is all.
        gallery: ``(N,)`` bool, the rows that can be found; None is all.
    """
    asks, found = row_mask("query", query, len(codes)), row_mask("gallery", gallery, len(codes))
    rows, gallery_codes = np.flatnonzero(asks), codes[found]
    class_sizes = np.bincount(gallery_codes, minlength=int(codes.max(initial=-1)) + 1)
    matches = class_sizes[codes[rows]] - found[rows]

    first = np.full(len(rows), np.inf)
    average_precision, r_precision = np.zeros(len(rows)), np.zeros(len(rows))
    tied = np.zeros(len(rows), dtype=np.bool_)
    depth = max([*ks, int(matches.max(initial=0))])
    # Queries of one class side by side, so that a block meets few classes.
    places = np.argsort(codes[rows], kind="stable")
    for ranked in ask(places, depth + 1):
        part = places[ranked.start : ranked.start + len(ranked.order)]
        here = matches[part]
        first[part], tied[part] = ranked.first, ranked.tied
        hit = gallery_codes[ranked.order[:, : int(here.max(initial=0))]] == codes[rows[part], None]
        rank = np.arange(1, hit.shape[1] + 1)
        hit &= rank <= here[:, None]
        precision = hit.cumsum(axis=1) / rank
        divisor = np.maximum(here, 1)
        average_precision[part] = (precision * hit).sum(axis=1) / divisor
        r_precision[part] = hit.sum(axis=1) / divisor
    return QueryResults(rows, codes[rows], matches, first, average_precision, r_precision, tied)


def nearest(
    embeddings: npt.ArrayLike,
    k: int,
    *,
    queries: npt.ArrayLike | None = None,
    metric: str = "cosine",
    block: int = 1024,
) -> Indices:
    """The rows most like each query, best first, without itself: ``(Q, min(k, N - 1))``.

    Args:
        embeddings: ``(N, D)``, or ``(N, K, D)`` as for `query_results`.
        k: Neighbours, at least 1.
        queries: ``(N,)`` bool, the rows that ask; None is all. Every row can be found.
        metric: ``cosine`` or ``l2``.
        block: Most queries at once; fewer are taken when N is large.

    Raises:
        EmbedKitError: An embedding holds NaN or infinity.
        UnknownNameError: No such metric.
        ValueError: Shapes do not fit, or `k` or `block` is below 1.

    Order and memory are those of `query_results`.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    count = _count(embeddings)
    rows = np.flatnonzero(row_mask("queries", queries, count))
    depth = min(k, max(count - 1, 0))
    answer = np.empty((len(rows), depth), dtype=np.int64)
    for ranked in rankings(Space(embeddings, None, metric), rows, depth, block):
        answer[ranked.start : ranked.start + len(ranked.order)] = ranked.order
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


def class_codes(labels: Labels, count: int) -> Indices:
    """``(N,)`` the place of each label among the sorted labels; `count` is the N it must have."""
    values = np.asarray(labels)
    if values.shape != (count,):
        raise ValueError(f"labels must be ({count},), one per embedding, got shape {values.shape}")
    return np.unique(values, return_inverse=True)[1].astype(np.int64)


def row_mask(name: str, mask: npt.ArrayLike | None, count: int) -> Mask:
    """``(count,)`` bool; None is all."""
    if mask is None:
        return np.ones(count, dtype=np.bool_)
    values = np.asarray(mask)
    if values.shape != (count,) or values.dtype != np.bool_:
        raise ValueError(
            f"{name} must be ({count},) bool, one per embedding, "
            f"got {values.dtype} of shape {values.shape}"
        )
    return values


def _count(embeddings: npt.ArrayLike) -> int:
    rows = np.asarray(embeddings)
    if rows.ndim not in (2, 3):
        raise ValueError(f"embeddings must be (N, D) or (N, K, D), got shape {rows.shape}")
    return len(rows)


def _mean(values: npt.NDArray[Any] | Floats) -> float:
    return float(values.mean(dtype=np.float64)) if len(values) else float("nan")
