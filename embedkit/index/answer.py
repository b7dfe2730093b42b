"""Narrow a search and put its lists together: by label, by group, from several queries."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from embedkit.errors import UsageError
from embedkit.index.catalog import Catalog, Indices, Vectors
from embedkit.index.rerank import Reranked

__all__ = ["Search", "best_of_any", "grouped", "labelled", "mean_query", "plain"]

Search = Callable[[int], list[list[Reranked]]]
"""Given how many are wanted: the first so many of each query, in their order."""


class Rerank(Protocol):
    """`rerank.Expansion` or `rerank.Reciprocal`."""

    def search(
        self, catalog: Catalog, vectors: Vectors, k: int, *, among: Indices | None = None
    ) -> list[list[Reranked]]: ...


def labelled(catalog: Catalog, labels: Sequence[str]) -> Indices:
    """The positions of the pictures with one of these labels.

    Raises:
        UsageError: No picture has one of them; the message names the nearest real ones.
    """
    real = set(catalog.labels())
    for label in labels:
        if label not in real:
            near = difflib.get_close_matches(label, sorted(real - {""}), n=3)
            raise UsageError(
                f"no picture of {catalog.path.name} has the label {label!r}",
                facts=f"it has {len(real - {''}):,} labels"
                + (f"; near: {', '.join(near)}" if near else ""),
                hint=f"--filter label={near[0]}" if near else None,
            )
    return catalog.positions_labelled(labels)


def plain(
    catalog: Catalog, vectors: Vectors, among: Indices | None, rerank: Rerank | None
) -> Search:
    """The search of some queries ``(Q, D)`` as a function of how many hits are wanted."""

    def search(k: int) -> list[list[Reranked]]:
        if rerank is not None:
            return rerank.search(catalog, vectors, k, among=among)
        lists = catalog.search(vectors, k, among=among)
        return [[Reranked(hit, hit.score) for hit in hits] for hits in lists]

    return search


def grouped(search: Search, k: int, most: int) -> list[list[Reranked]]:
    """The best hit of each label, for the `k` best labels; pictures without one are one group.

    Args:
        search: See `plain`.
        k: Groups wanted, at least 1.
        most: Pictures there are: looked through to the last where fewer groups are found.

    Cost: searches of 4 k, 16 k, ... hits until every query has its groups.
    """
    depth = min(4 * k, most)
    while True:
        lists = [_firsts(hits)[:k] for hits in search(max(depth, 1))]
        if depth >= most or all(len(hits) == k for hits in lists):
            return [_ranked(hits) for hits in lists]
        depth = min(4 * depth, most)


def best_of_any(lists: Sequence[list[Reranked]], k: int, *, by_label: bool) -> list[Reranked]:
    """One list out of several: each picture with the best score any query gave it.

    Exact, because a picture among the `k` best of all is among the `k` best of one.

    Args:
        lists: One for each query, `k` long where there are so many.
        k: How many are wanted.
        by_label: The lists hold the best of each label, and so must the result.
    """
    best: dict[int, Reranked] = {}
    for one in (one for hits in lists for one in hits):
        known = best.get(one.hit.id)
        if known is None or one.value > known.value:
            best[one.hit.id] = one
    order = sorted(best.values(), key=lambda one: (-one.value, one.hit.id))
    return _ranked((_firsts(order) if by_label else order)[:k])


def mean_query(vectors: npt.ArrayLike, metric: str) -> Vectors:
    """One query ``(1, D)`` for several ``(Q, D)``, Q at least 1: their mean.

    Of unit length where the metric is cosine.

    Raises:
        UsageError: The mean has no direction: the queries cancel each other out.
    """
    mean = np.asarray(vectors, np.float64).mean(axis=0)
    if metric == "cosine":
        length = float(np.linalg.norm(mean))
        if length < 1e-6:
            raise UsageError("the queries are opposites: they have no mean", hint="--combine any")
        mean = mean / length
    one: Vectors = mean[None].astype(np.float32)
    return one


def _firsts(hits: Iterable[Reranked]) -> list[Reranked]:
    first: dict[str, Reranked] = {}
    for one in hits:
        first.setdefault(one.hit.label, one)
    return list(first.values())


def _ranked(hits: Sequence[Reranked]) -> list[Reranked]:
    return [replace(one, hit=replace(one.hit, rank=rank)) for rank, one in enumerate(hits, start=1)]
