"""Everything `embedkit eval` says about some vectors, in one document, whoever made the vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import MismatchError
from embedkit.evaluate.clustering import Clustering, clustering
from embedkit.evaluate.intervals import Interval, confidence_intervals
from embedkit.evaluate.open_set import OpenSet, open_set
from embedkit.evaluate.retrieval import QueryResults, RetrievalMetrics, query_results

__all__ = ["ClassResult", "Evaluation", "evaluate", "read_per_query"]


@dataclass(frozen=True)
class ClassResult:
    """The queries of one class that have a match: how many, and their means."""

    label: str
    queries: int
    recall_at_1: float
    map_at_r: float


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of N vectors.

    Attributes:
        labels: ``(N,)`` as strings.
        metric: ``cosine`` or ``l2``.
        ks: Of recall@k.
        results: Per query.
        metrics: The means.
        intervals: By the names of ``metrics.to_json()``.
        by_class: Whether the intervals are over classes; else over queries.
        repeats: Resamples behind them.
        level: Share of the resamples in an interval.
        seed: Of resampling and of drawing pairs.
        open_set: Same or different from the score alone.
        clusters: None where it was not asked for.
    """

    labels: tuple[str, ...]
    metric: str
    ks: tuple[int, ...]
    results: QueryResults
    metrics: RetrievalMetrics
    intervals: dict[str, Interval]
    by_class: bool
    repeats: int
    level: float
    seed: int
    open_set: OpenSet
    clusters: Clustering | None

    def classes(self) -> list[ClassResult]:
        """Every class with a query that has a match, the worst MAP@R first, then by name."""
        results = self.results
        known = results.matches > 0
        codes = results.codes[known]
        counts = np.bincount(codes)
        means = [
            np.bincount(codes, weights=column[known].astype(np.float64)) / np.maximum(counts, 1)
            for column in (results.first <= 1, results.average_precision)
        ]
        names = sorted(set(self.labels))
        table = [
            ClassResult(names[at], int(counts[at]), float(means[0][at]), float(means[1][at]))
            for at in np.flatnonzero(counts)
        ]
        return sorted(table, key=lambda row: (row.map_at_r, row.label))

    def to_json(self, *, worst: int = 20) -> dict[str, Any]:
        """The document without the per-query results; what is not a number is None."""
        intervals = {
            name: None if np.isnan(one.low) else [one.low, one.high]
            for name, one in self.intervals.items()
        }
        metrics = self.metrics.to_json()
        first = (self.results.first[self.results.matches > 0] <= 1).astype(np.float64)
        return {
            "metric": self.metric,
            "images": len(self.labels),
            "classes": len(set(self.labels)),
            "metrics": {"p@1": float(first.mean()) if len(first) else None, **metrics},
            "intervals": {
                "level": self.level,
                "repeats": self.repeats,
                "seed": self.seed,
                "over": "classes" if self.by_class else "queries",
                **intervals,
            },
            "open_set": {**self.open_set.to_json(), "seed": self.seed},
            "clustering": None if self.clusters is None else self.clusters.to_json(),
            "worst_classes": [
                {
                    "label": row.label,
                    "queries": row.queries,
                    "recall@1": row.recall_at_1,
                    "map@r": row.map_at_r,
                }
                for row in self.classes()[:worst]
            ],
        }

    def per_query(self, names: Sequence[str]) -> dict[str, Any]:
        """A column per figure, to be compared with another evaluation of the same queries.

        Args:
            names: ``(N,)`` what tells the rows apart: paths.
        """
        results = self.results
        return {
            "name": [names[row] for row in results.rows],
            "label": [self.labels[row] for row in results.rows],
            "matches": results.matches.tolist(),
            "first": [int(rank) if np.isfinite(rank) else None for rank in results.first],
            "average_precision": results.average_precision.tolist(),
            "r_precision": results.r_precision.tolist(),
            "tied": results.tied.tolist(),
        }


def evaluate(
    embeddings: npt.ArrayLike,
    labels: Sequence[str],
    *,
    ks: Sequence[int] = (1, 2, 4, 8, 10),
    query: npt.ArrayLike | None = None,
    gallery: npt.ArrayLike | None = None,
    metric: str = "cosine",
    by_class: bool = False,
    repeats: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    clusters: bool = False,
) -> Evaluation:
    """All figures of some vectors; see the functions behind them for what they mean and cost.

    Args:
        embeddings: ``(N, D)``, or ``(N, K, D)`` as for `query_results`.
        labels: ``(N,)``.
        ks: Of recall@k.
        query: ``(N,)`` bool, the rows that ask; None is all.
        gallery: ``(N,)`` bool, the rows that can be found; None is all.
        metric: ``cosine`` or ``l2``.
        by_class: Intervals over classes instead of queries.
        repeats: Resamples for the intervals.
        level: Share of the resamples in an interval.
        seed: Of resampling and of drawing pairs.
        clusters: Also NMI and AMI, of all rows; needs scikit-learn.
    """
    results = query_results(embeddings, labels, ks=ks, query=query, gallery=gallery, metric=metric)
    return Evaluation(
        labels=tuple(labels),
        metric=metric,
        ks=tuple(ks),
        results=results,
        metrics=results.metrics(ks),
        intervals=confidence_intervals(
            results, ks, by_class=by_class, repeats=repeats, level=level, seed=seed
        ),
        by_class=by_class,
        repeats=repeats,
        level=level,
        seed=seed,
        open_set=open_set(
            embeddings, labels, query=query, gallery=gallery, metric=metric, seed=seed
        ),
        clusters=clustering(embeddings, labels, metric=metric)
        if clusters and len(labels)
        else None,
    )


def read_per_query(document: dict[str, Any]) -> tuple[list[str], list[str], QueryResults]:
    """Names, labels and results that `Evaluation.per_query` wrote.

    Raises:
        MismatchError: It is no such document.
    """
    try:
        names, labels = list(document["name"]), list(document["label"])
        count = len(names)
        results = QueryResults(
            rows=np.arange(count),
            codes=np.unique(np.array(labels, dtype=str), return_inverse=True)[1].astype(np.int64),
            matches=np.array(document["matches"], dtype=np.int64),
            first=np.array([np.inf if one is None else one for one in document["first"]], float),
            average_precision=np.array(document["average_precision"], float),
            r_precision=np.array(document["r_precision"], float),
            tied=np.array(document["tied"], dtype=np.bool_),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise MismatchError(
            "the per-query results cannot be read", facts=f"{type(error).__name__}: {error}"
        ) from error
    columns = (labels, results.matches, results.first, results.average_precision)
    if any(len(column) != count for column in (*columns, results.r_precision, results.tied)):
        raise MismatchError(
            "the per-query results cannot be read", facts="columns differ in length"
        )
    return names, labels, results
