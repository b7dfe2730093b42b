"""Order the nearest again, by what they say about each other.

* Query expansion: Radenovic, Tolias, Chum, "Fine-tuning CNN Image Retrieval with No Human
  Annotation", TPAMI 2018 (alpha-QE): ask again with the query plus its nearest, weighted.
* k-reciprocal: Zhong, Zheng, Cao, Li, "Re-ranking Person Re-identification with k-reciprocal
  Encoding", CVPR 2017: near is who has nearly the same mutual neighbours.

Both move what several pictures agree on up; a query with one or two true matches may lose by it.
Measure on held-out classes before you rely on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from embedkit.errors import UsageError
from embedkit.index.catalog import Catalog, Hit, Indices, Vectors

__all__ = ["Expansion", "Reciprocal", "Reranked", "expand_queries", "k_reciprocal"]

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Reranked:
    """A hit in its new place.

    Attributes:
        hit: With the rank it has now, and the score it had: that of the query itself, which is what
            thresholds are for.
        value: What the new order is by, higher first.
    """

    hit: Hit
    value: float


@dataclass(frozen=True)
class Expansion:
    """alpha query expansion; a second search with better queries. Cosine catalogs only.

    Attributes:
        neighbours: Nearest pictures that are added to the query; more than there are take all.
        alpha: Their weight is the cosine to this power; negative cosines weigh nothing.
    """

    neighbours: int = 10
    alpha: float = 3.0

    def __post_init__(self) -> None:
        if self.neighbours < 1 or not 0 <= self.alpha < np.inf:
            raise UsageError(
                "query expansion takes at least 1 neighbour and an alpha from 0 up",
                facts=f"got {self.neighbours} and {self.alpha}",
            )

    def expanded(self, catalog: Catalog, vectors: Vectors, among: Indices | None) -> Vectors:
        """The better queries ``(Q, D)``, unit rows. Cost: one search, and O(Q k D)."""
        if catalog.metric != "cosine":
            raise UsageError(
                "query expansion needs vectors that are compared by their cosine",
                facts=f"{catalog.path.name} compares by distance",
                hint="--rerank kreciprocal",
            )
        better = np.empty_like(vectors)
        found = catalog.search(vectors, self.neighbours, among=among)
        for row, hits in enumerate(found):
            near = catalog.vectors(catalog.positions(hits))
            better[row] = expand_queries(vectors[row][None], near[None], alpha=self.alpha)[0]
        return better

    def search(
        self, catalog: Catalog, vectors: Vectors, k: int, *, among: Indices | None = None
    ) -> list[list[Reranked]]:
        """The `k` nearest of the expanded queries. Cost: two searches."""
        better = self.expanded(catalog, vectors, among)
        lists = catalog.search(better, k, among=among)
        return [
            [
                Reranked(replace(hit, score=score), hit.score)
                for hit, score in zip(hits, _own_scores(catalog, query, hits), strict=True)
            ]
            for query, hits in zip(vectors, lists, strict=True)
        ]


@dataclass(frozen=True)
class Reciprocal:
    """k-reciprocal encoding of each query alone with the pictures nearest to it.

    The published form puts all queries into one pool with the whole gallery, so that an answer
    depends on who else asks; `k_reciprocal` is that form. Here each query has its own pool, and the
    answer to it is always the same.

    Attributes:
        depth: Pictures that are ordered again; those behind them stay away.
        k1: Neighbours that must be mutual.
        k2: Neighbours whose encodings are averaged; 1 leaves that out.
        weight: Of the plain distance against the Jaccard distance, 0 to 1 (lambda in the paper).
    """

    depth: int = 100
    k1: int = 20
    k2: int = 6
    weight: float = 0.3

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise UsageError(f"the depth of re-ranking must be at least 1, got {self.depth}")
        _check(self.k1, self.k2, self.weight)

    def search(
        self, catalog: Catalog, vectors: Vectors, k: int, *, among: Indices | None = None
    ) -> list[list[Reranked]]:
        """The first `k` of the `depth` (or `k`, if that is more) nearest, in their new order.

        Cost: one search for n = max(depth, k), then for each query O(n^2 (D + k1)) and 4 matrices
        of n x n in float64.
        """
        lists = catalog.search(vectors, max(self.depth, k), among=among)
        return [
            self._ordered(catalog, query, hits)[:k]
            for query, hits in zip(vectors, lists, strict=True)
        ]

    def _ordered(self, catalog: Catalog, query: Vectors, hits: list[Hit]) -> list[Reranked]:
        rows = catalog.vectors(catalog.positions(hits))
        distance = k_reciprocal(query[None], rows, k1=self.k1, k2=self.k2, weight=self.weight)[0]
        order = np.argsort(distance, kind="stable").tolist()
        return [
            Reranked(replace(hits[at], rank=rank), -float(distance[at]))
            for rank, at in enumerate(order, start=1)
        ]


def expand_queries(
    queries: npt.ArrayLike, neighbours: npt.ArrayLike, *, alpha: float = 3.0
) -> Vectors:
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
    unit: Vectors = (grown / np.maximum(lengths, 1e-12)).astype(np.float32)
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
    _check(k1, k2, weight)
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


def _check(k1: int, k2: int, weight: float) -> None:
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


def _own_scores(catalog: Catalog, query: Vectors, hits: Sequence[Hit]) -> list[float]:
    return [float(score) for score in catalog.scores(query, catalog.positions(hits))]
