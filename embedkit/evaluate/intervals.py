"""How sure a figure is: percentile bootstrap over queries or over whole classes, also of a change.

Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13; for clusters: Field and
Welsh, "Bootstrapping clustered data", 2007. Queries of one class succeed and fail together, so
that intervals over classes are the wider and the safer ones where classes are what is sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedkit.errors import MismatchError
from embedkit.evaluate.retrieval import QueryResults

__all__ = ["Difference", "Interval", "confidence_intervals", "paired_differences"]

Doubles = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Interval:
    """Between these two lies the middle `level` of the resampled figures."""

    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """One figure of two evaluations of the same queries.

    Attributes:
        before: Of the other evaluation.
        after: Of this one.
        interval: Of ``after - before``.
    """

    before: float
    after: float
    interval: Interval

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.interval.low > 0 or self.interval.high < 0


def confidence_intervals(
    results: QueryResults,
    ks: Sequence[int] = (1, 2, 4, 8),
    *,
    by_class: bool = False,
    repeats: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Intervals by the names of `RetrievalMetrics.to_json`; NaN where a figure is.

    Args:
        results: The queries.
        ks: Of recall@k.
        by_class: Draw classes with all their queries instead of queries.
        repeats: Resamples.
        level: Share of them between the two ends, in (0, 1).
        seed: Of the resampling.

    Cost: O(repeats x Q), or O(repeats x classes); memory O(Q).
    """
    names, values, weights = _columns(results, ks)
    means = _resampled(
        np.hstack([values, weights]), results.codes if by_class else None, repeats, seed
    )
    width = len(names)
    return dict(zip(names, _ends(_divide(means[:, :width], means[:, width:]), level), strict=True))


def paired_differences(
    before: QueryResults,
    after: QueryResults,
    ks: Sequence[int] = (1, 2, 4, 8),
    *,
    by_class: bool = False,
    repeats: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Difference]:
    """Two evaluations of the same queries, each resample drawn from both alike.

    Arguments are those of `confidence_intervals`; the classes are those of `after`.

    Raises:
        MismatchError: The two do not have equally many queries.
    """
    if len(before.rows) != len(after.rows):
        raise MismatchError(
            "the two evaluations cannot be compared query by query",
            facts=f"{len(before.rows):,} and {len(after.rows):,} queries",
        )
    names, old, old_weights = _columns(before, ks)
    _, new, new_weights = _columns(after, ks)
    columns = np.hstack([old, old_weights, new, new_weights])
    means = _resampled(columns, after.codes if by_class else None, repeats, seed)
    width = len(names)
    a = _divide(means[:, :width], means[:, width : 2 * width])
    b = _divide(means[:, 2 * width : 3 * width], means[:, 3 * width :])
    ends = _ends(b - a, level)
    was = _divide(old.sum(axis=0), old_weights.sum(axis=0))
    now = _divide(new.sum(axis=0), new_weights.sum(axis=0))
    return {
        name: Difference(float(was[at]), float(now[at]), ends[at]) for at, name in enumerate(names)
    }


def _columns(results: QueryResults, ks: Sequence[int]) -> tuple[list[str], Doubles, Doubles]:
    """Names, and ``(Q, M)`` values and weights: a figure is sum of values by sum of weights."""
    has_match = (results.matches > 0).astype(np.float64)
    everyone = np.ones(len(has_match))
    pairs = {f"recall@{k}": ((results.first <= k).astype(np.float64), has_match) for k in ks}
    pairs |= {f"recall_all@{k}": (pairs[f"recall@{k}"][0], everyone) for k in ks}
    pairs["map@r"] = results.average_precision, has_match
    pairs["r_precision"] = results.r_precision, has_match
    pairs["mrr"] = 1 / results.first, has_match
    values, weights = zip(*pairs.values(), strict=True)
    return list(pairs), np.column_stack(values), np.column_stack(weights)


def _resampled(columns: Doubles, classes: Indices | None, repeats: int, seed: int) -> Doubles:
    """``(repeats, M)`` sums of the columns over rows, or classes of rows, drawn with return."""
    if classes is not None and len(classes):
        number = np.unique(classes, return_inverse=True)[1]
        columns = np.column_stack([np.bincount(number, weights=one) for one in columns.T])
    count = len(columns)
    sums = np.zeros((repeats, columns.shape[1]))
    rng = np.random.default_rng(seed)
    for repeat in range(repeats if count else 0):
        drawn = np.bincount(rng.integers(count, size=count), minlength=count)
        sums[repeat] = drawn @ columns
    return sums


def _divide(values: Doubles, weights: Doubles) -> Doubles:
    empty = np.full(values.shape, np.nan)
    np.divide(values, weights, out=empty, where=weights > 0)
    return empty


def _ends(figures: Doubles, level: float) -> list[Interval]:
    """The middle `level` of each column; resamples without a figure do not count."""
    ends = []
    for column in figures.T:
        known = column[~np.isnan(column)]
        tail = (1 - level) / 2
        low, high = np.quantile(known, [tail, 1 - tail]) if len(known) else (np.nan, np.nan)
        ends.append(Interval(float(low), float(high)))
    return ends
