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

from embedkit.errors import UsageError
from embedkit.evaluate.reranking import check_reciprocal, expand_queries, k_reciprocal
from embedkit.index.catalog import Catalog, Hit, Indices, Vectors
from embedkit.index.several import needs_one_vector

__all__ = ["Expansion", "Reciprocal", "Reranked", "expand_queries", "k_reciprocal"]


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
        needs_one_vector("query expansion", catalog)
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
        check_reciprocal(self.k1, self.k2, self.weight)

    def search(
        self, catalog: Catalog, vectors: Vectors, k: int, *, among: Indices | None = None
    ) -> list[list[Reranked]]:
        """The first `k` of the `depth` (or `k`, if that is more) nearest, in their new order.

        Cost: one search for n = max(depth, k), then for each query O(n^2 (D + k1)) and 4 matrices
        of n x n in float64.
        """
        needs_one_vector("k-reciprocal re-ranking", catalog)
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


def _own_scores(catalog: Catalog, query: Vectors, hits: Sequence[Hit]) -> list[float]:
    return [float(score) for score in catalog.scores(query, catalog.positions(hits))]
