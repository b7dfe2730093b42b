"""Re-ranking, its arithmetic, and what it changes in the figures; numpy alone.

* Query expansion: Radenovic, Tolias, Chum, "Fine-tuning CNN Image Retrieval with No Human
  Annotation", TPAMI 2018 (alpha-QE).
* k-reciprocal: Zhong, Zheng, Cao, Li, "Re-ranking Person Re-identification with k-reciprocal
  Encoding", CVPR 2017.

Each query is re-ranked alone, as `embedkit search --rerank` does it: an answer never depends on who
else asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import UsageError
from embedkit.evaluate.evaluation import Evaluation
from embedkit.evaluate.intervals import (
    Difference,
    Interval,
    confidence_intervals,
    paired_differences,
)
from embedkit.evaluate.ranking import Floats, Indices, Ranked, Space, rankings
from embedkit.evaluate.retrieval import (
    QueryResults,
    RetrievalMetrics,
    class_codes,
    judged,
    row_mask,
)

__all__ = [
    "Reranking",
    "check_reciprocal",
    "expand_queries",
    "expanded_results",
    "k_reciprocal",
    "reciprocal_results",
    "reranked",
]

Doubles = npt.NDArray[np.float64]
Labels = Sequence[str]

_BLOCK = 1024
# Bytes that the matrices of one query's pool may take.
_MOST = 2 << 30


@dataclass(frozen=True)
class Reranking:
    """The figures of an evaluation once more, its queries re-ranked.

    Attributes:
        name: ``aqe`` or ``kreciprocal``.
        settings: Of it.
        results: Per query; `QueryResults.tied` is that of the plain ranking.
        metrics: The means.
        intervals: By the names of ``metrics.to_json()``.
        differences: From the plain ranking to this one, query by query.
    """

    name: str
    settings: dict[str, float]
    results: QueryResults
    metrics: RetrievalMetrics
    intervals: dict[str, Interval]
    differences: dict[str, Difference]

    def to_json(self) -> dict[str, Any]:
        """What is not a number is None."""

        def ends(one: Interval) -> list[float] | None:
            return None if np.isnan(one.low) else [one.low, one.high]

        return {
            "method": self.name,
            "settings": self.settings,
            "metrics": self.metrics.to_json(),
            "intervals": {name: ends(one) for name, one in self.intervals.items()},
            "differences": {
                name: {
                    "difference": None if np.isnan(one.after) else one.after - one.before,
                    "interval": ends(one.interval),
                    "beyond_noise": one.beyond_noise,
                }
                for name, one in self.differences.items()
            },
        }


def reranked(
    figures: Evaluation,
    embeddings: npt.ArrayLike,
    name: str,
    settings: dict[str, float],
    *,
    query: npt.ArrayLike | None = None,
    gallery: npt.ArrayLike | None = None,
    done: Callable[[int], None] | None = None,
) -> Reranking:
    """What `figures` become when every query is re-ranked.

    Args:
        figures: Of the same embeddings and masks.
        embeddings: ``(N, D)``.
        name: ``aqe`` (settings ``k`` and ``alpha``) or ``kreciprocal`` (``depth``, ``k1``, ``k2``
            and ``lambda``).
        settings: All of them.
        query: ``(N,)`` bool, the rows that ask; None is all.
        gallery: ``(N,)`` bool, the rows that can be found; None is all.
        done: Called with a number of queries that are done.

    Raises:
        UsageError: Several vectors per picture, query expansion by distance, settings out of range,
            or a depth whose matrices would take more than 2 GB.

    Cost: see `expanded_results` and `reciprocal_results`.
    """
    if np.ndim(embeddings) != 2:
        raise UsageError("re-ranking needs one vector per picture")
    common: dict[str, Any] = {"ks": figures.ks, "query": query, "gallery": gallery, "done": done}
    if name == "aqe":
        if figures.metric != "cosine":
            raise UsageError(
                "query expansion needs vectors that are compared by their cosine",
                hint="--rerank kreciprocal",
            )
        results = expanded_results(
            embeddings, figures.labels, int(settings["k"]), settings["alpha"], **common
        )
    else:
        results = reciprocal_results(
            embeddings,
            figures.labels,
            int(settings["depth"]),
            k1=int(settings["k1"]),
            k2=int(settings["k2"]),
            weight=settings["lambda"],
            metric=figures.metric,
            **common,
        )
    results = replace(results, tied=figures.results.tied)
    how: dict[str, Any] = {
        "by_class": figures.by_class,
        "repeats": figures.repeats,
        "level": figures.level,
        "seed": figures.seed,
    }
    return Reranking(
        name,
        settings,
        results,
        results.metrics(figures.ks),
        confidence_intervals(results, figures.ks, **how),
        paired_differences(figures.results, results, figures.ks, **how),
    )


def expanded_results(
    embeddings: npt.ArrayLike,
    labels: Labels,
    neighbours: int,
    alpha: float,
    *,
    ks: Sequence[int] = (1, 2, 4, 8),
    query: npt.ArrayLike | None = None,
    gallery: npt.ArrayLike | None = None,
    done: Callable[[int], None] | None = None,
) -> QueryResults:
    """What every query finds when it asks with its nearest added (`expand_queries`), by cosine.

    Neither among those nearest nor in the answer is the query's own row.

    Args:
        embeddings: ``(N, D)``.
        labels: ``(N,)``.
        neighbours: Nearest that are added, at least 1; more than there are take all.
        alpha: As for `expand_queries`.
        ks: As for `query_results`.
        query: ``(N,)`` bool, the rows that ask; None is all.
        gallery: ``(N,)`` bool, the rows that can be found; None is all.
        done: Called with a number of queries that are done.

    Cost: twice that of `query_results`; memory for the expanded queries beside it.
    """
    if neighbours < 1 or not 0 <= alpha < np.inf:
        raise UsageError(
            "query expansion takes at least 1 neighbour and an alpha from 0 up",
            facts=f"got {neighbours} and {alpha}",
        )
    count = len(np.asarray(embeddings))
    found = row_mask("gallery", gallery, count)
    rows = np.flatnonzero(row_mask("query", query, count))
    space = Space(embeddings, found, "cosine")
    better = space.rows[rows]  # copied
    for ranked in rankings(space, rows, neighbours + 1, _BLOCK):
        for at, places in enumerate(ranked.order, start=ranked.start):
            near = _others(places, space.position[rows[at]])[:neighbours]
            vectors = space.found[near]
            better[at] = expand_queries(better[at][None], vectors[None], alpha=alpha)[0]
        if done:
            done(len(ranked.order))
    asking = Space(
        np.concatenate([space.rows, better]),
        np.concatenate([found, np.zeros(len(rows), np.bool_)]),
        "cosine",
    )
    # An expanded query still is the picture it was made of, which it must not find.
    asking.position[count:] = asking.position[rows]

    codes = class_codes(labels, count)
    every = np.concatenate([codes, codes[rows]])

    def ask(places: Indices, depth: int) -> Iterator[Ranked]:
        return rankings(asking, count + places, depth, _BLOCK, every)

    return judged(codes, ask, ks=ks, query=query, gallery=gallery)


def reciprocal_results(
    embeddings: npt.ArrayLike,
    labels: Labels,
    depth: int = 100,
    *,
    k1: int = 20,
    k2: int = 6,
    weight: float = 0.3,
    ks: Sequence[int] = (1, 2, 4, 8),
    query: npt.ArrayLike | None = None,
    gallery: npt.ArrayLike | None = None,
    metric: str = "cosine",
    done: Callable[[int], None] | None = None,
) -> QueryResults:
    """What every query finds when its nearest are put in the order of `k_reciprocal`.

    Args:
        embeddings: ``(N, D)``.
        labels: ``(N,)``.
        depth: Nearest that are ordered again, at least 1; those behind them stay as they were.
        k1: As for `k_reciprocal`.
        k2: Likewise.
        weight: Likewise.
        ks: As for `query_results`.
        query: ``(N,)`` bool, the rows that ask; None is all.
        gallery: ``(N,)`` bool, the rows that can be found; None is all.
        metric: ``cosine`` or ``l2``.
        done: Called with a number of queries that are done.

    Raises:
        UsageError: A setting out of range, or a depth whose matrices would take more than 2 GB.

    Cost: that of `query_results`, and for each query O(depth^2 (D + k1)): about 10 ms at a depth of
    100; memory 4 matrices of depth x depth in float64.
    """
    check_reciprocal(k1, k2, weight)
    if depth < 1:
        raise UsageError(f"the depth of re-ranking must be at least 1, got {depth}")
    count = len(np.asarray(embeddings))
    found = row_mask("gallery", gallery, count)
    takes = 4 * 8 * (min(depth, int(found.sum())) + 1) ** 2
    if takes > _MOST:
        raise UsageError(
            f"re-ranking {depth:,} pictures for each query takes too much memory",
            facts=f"{takes / 1e9:,.1f} GB, at most {_MOST / 1e9:.1f} are taken",
            hint="--rerank kreciprocal:depth=1000",
        )
    rows = np.flatnonzero(row_mask("query", query, count))
    space = Space(embeddings, found, metric)

    codes = class_codes(labels, count)
    own = codes[space.gallery]

    def ask(places: Indices, wanted: int) -> Iterator[Ranked]:
        asked = rows[places]
        for ranked in rankings(space, asked, max(wanted, depth + 1), _BLOCK, codes):
            order, first = ranked.order.copy(), ranked.first.copy()
            for at, near in enumerate(ranked.order):
                row = asked[ranked.start + at]
                head = _others(near, space.position[row])[:depth]
                distance = k_reciprocal(
                    space.rows[row][None], space.found[head], k1=k1, k2=k2, weight=weight
                )[0]
                head = head[np.argsort(distance, kind="stable")]
                order[at, : len(head)] = head
                match = np.flatnonzero(own[head] == codes[row])
                if len(match):
                    first[at] = match[0] + 1
            if done:
                done(len(order))
            yield replace(ranked, order=order[:, :wanted], first=first)

    return judged(codes, ask, ks=ks, query=query, gallery=gallery)


def _others(places: Indices, own: int) -> Indices:
    """Without the query's own, which stands last where it stands at all."""
    others: Indices = places[places != own]
    return others


def expand_queries(
    queries: npt.ArrayLike, neighbours: npt.ArrayLike, *, alpha: float = 3.0
) -> Floats:
    """``q' = normalise(q + sum over neighbours x of max(q.x, 0)^alpha x)``.

    Args:
        queries: ``(Q, D)`` unit rows.
        neighbours: ``(Q, K, D)`` unit rows, the nearest of each query; K may be 0.
        alpha: From 0 up; 0 adds every neighbour whole.

    Returns:
        ``(Q, D)`` unit rows.

    Cost: O(Q K D) in float64.
    """
    wide = np.asarray(queries, np.float64)
    near = np.asarray(neighbours, np.float64)
    weights = np.maximum(np.einsum("qd,qkd->qk", wide, near), 0) ** alpha
    grown = wide + np.einsum("qk,qkd->qd", weights, near)
    lengths = np.linalg.norm(grown, axis=1, keepdims=True)
    unit: Floats = (grown / np.maximum(lengths, 1e-12)).astype(np.float32)
    return unit


def k_reciprocal(
    queries: npt.ArrayLike,
    gallery: npt.ArrayLike,
    *,
    k1: int = 20,
    k2: int = 6,
    weight: float = 0.3,
) -> Doubles:
    """The published routine: distances ``(Q, G)``, lower is nearer, from one pool of all rows.

    On the pool of queries and gallery, n rows, d the squared Euclidean distance divided by the
    largest of its row: N(i, k) are i and its k nearest others; R(i, k) those of them that have i in
    theirs. R(i, k1) grows by every R(c, k1/2) of a member c that shares more than two thirds of it.
    Row i is encoded by exp(-d) on that set, scaled to sum 1, and averaged over the `k2` nearest of
    i with itself. The result is ``(1 - weight) Jaccard + weight d``.

    It differs from the authors' code in two corners only: a row is always its own first neighbour
    (also where it has exact duplicates), and equal distances stand in the order of the rows.

    Args:
        queries: ``(Q, D)``.
        gallery: ``(G, D)``; both may be empty.
        k1: At least 1; more than there are rows takes all.
        k2: At least 1.
        weight: 0 to 1.

    Cost: n = Q + G: O(n^2 (D + log n) + n k1^2), memory 4 n^2 doubles: 1.3 GB for n = 6,400.
    """
    check_reciprocal(k1, k2, weight)
    ask, find = np.asarray(queries, np.float64), np.asarray(gallery, np.float64)
    if not len(ask) or not len(find):
        return np.zeros((len(ask), len(find)))
    distance = _scaled_distances(np.concatenate([ask, find]))
    own_first = distance.copy()
    np.fill_diagonal(own_first, -1)
    ranking = np.argsort(own_first, axis=1, kind="stable")
    encoded = _encode(distance, ranking, k1)
    if k2 > 1:
        encoded = np.stack([encoded[near].mean(axis=0) for near in ranking[:, :k2]])
    count = len(ask)
    shared = np.zeros((count, len(find)))
    for row in range(count):
        used = np.flatnonzero(encoded[row])
        shared[row] = np.minimum(encoded[row, used], encoded[count:, used]).sum(axis=1)
    jaccard = 1 - shared / (2 - shared)
    combined: Doubles = (1 - weight) * jaccard + weight * distance[:count, count:]
    return combined


def check_reciprocal(k1: int, k2: int, weight: float) -> None:
    """Refuse what k-reciprocal encoding cannot be done with.

    Raises:
        UsageError: Out of range.
    """
    if k1 < 1 or k2 < 1 or not 0 <= weight <= 1:
        raise UsageError(
            "k-reciprocal re-ranking takes k1 and k2 from 1 up and a lambda from 0 to 1",
            facts=f"got k1 {k1}, k2 {k2}, lambda {weight}",
        )


def _scaled_distances(rows: Doubles) -> Doubles:
    squares = (rows**2).sum(axis=1)
    distance = np.maximum(squares[:, None] + squares - 2 * rows @ rows.T, 0)
    np.fill_diagonal(distance, 0)
    # A row whose pool is all the same picture: every distance is 0.
    scaled: Doubles = distance / np.maximum(distance.max(axis=1, keepdims=True), 1e-30)
    return scaled


def _encode(distance: Doubles, ranking: Indices, k1: int) -> Doubles:
    half = int(np.rint(k1 / 2))  # to even, as the authors' Python has it
    mutual = [_mutual(ranking, row, k1) for row in range(len(ranking))]
    near = [_mutual(ranking, row, half) for row in range(len(ranking))]
    encoded = np.zeros_like(distance)
    for row, members in enumerate(mutual):
        grown = [members]
        for member in members:
            candidates = near[member]
            if len(np.intersect1d(candidates, members)) > 2 / 3 * len(candidates):
                grown.append(candidates)
        chosen = np.unique(np.concatenate(grown))
        weights = np.exp(-distance[row, chosen])
        encoded[row, chosen] = weights / weights.sum()
    return encoded


def _mutual(ranking: Indices, row: int, k: int) -> Indices:
    forward = ranking[row, : k + 1]
    mutual: Indices = forward[(ranking[forward, : k + 1] == row).any(axis=1)]
    return mutual
