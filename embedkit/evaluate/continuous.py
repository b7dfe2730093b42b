"""How well neighbours agree where photos are known by numbers, or by who is the odd one of three.

nDCG as in Kim, Seo, Laptev, Cho, Kwak, "Deep Metric Learning Beyond Binary Supervision", CVPR
2019, arXiv:1904.09626; triplet accuracy as in Vemulapalli, Agarwala, "A Compact Embedding for
Facial Expression Similarity", CVPR 2019, arXiv:1811.11283.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedkit.evaluate.several import greatest_cosines

__all__ = ["ContinuousMetrics", "TripletMetrics", "continuous_metrics", "triplet_metrics"]

Doubles = npt.NDArray[np.float64]

_BLOCK = 1024


@dataclass(frozen=True)
class ContinuousMetrics:
    """Means over the queries that have something to find.

    Attributes:
        ndcg: By k, 0 to 1, 1 where the nearest photos are the nearest in target, in this order.
        target_distance: By k: mean distance of targets from a query to its k nearest photos, in
            their units; the lower the better.
        chance: The same to all photos: what an embedding that knows nothing reaches.
        ideal: By k: the same to the k photos nearest in target: no embedding is better.
        queries: How many.
    """

    ndcg: dict[int, float]
    target_distance: dict[int, float]
    chance: float
    ideal: dict[int, float]
    queries: int

    def to_json(self) -> dict[str, float | int | None]:
        """Flat: ``ndcg@k``, ``target_distance@k``, ...; what is not a number is None."""

        def number(value: float) -> float | None:
            return value if np.isfinite(value) else None

        flat: dict[str, float | int | None] = {}
        for k in self.ndcg:
            flat[f"ndcg@{k}"] = number(self.ndcg[k])
            flat[f"target_distance@{k}"] = number(self.target_distance[k])
            flat[f"ideal_target_distance@{k}"] = number(self.ideal[k])
        return {**flat, "chance_target_distance": number(self.chance), "queries": self.queries}


@dataclass(frozen=True)
class TripletMetrics:
    """Attributes:
    accuracy: Share of the triplets whose odd one is farther from both others than these are from
        each other; a tie is wrong. NaN where there are none.
    triplets: How many.
    """

    accuracy: float
    triplets: int

    def to_json(self) -> dict[str, float | int | None]:
        """Flat; an accuracy that is none is None."""
        accuracy = None if np.isnan(self.accuracy) else self.accuracy
        return {"triplet_accuracy": accuracy, "triplets": self.triplets}


def continuous_metrics(
    embeddings: npt.ArrayLike,
    targets: npt.ArrayLike,
    *,
    ks: Sequence[int] = (1, 10),
    query: npt.ArrayLike | None = None,
    gallery: npt.ArrayLike | None = None,
    metric: str = "cosine",
) -> ContinuousMetrics:
    """Compare each query's nearest photos with those nearest in target.

        DCG@k  = sum over ranks r = 1..k of 1 / (1 + g_r) / log2(1 + r)
        nDCG@k = DCG@k / the greatest DCG@k there is

    g the Euclidean distance of targets in their own units: the gain 1 / (1 + g) is the paper's
    2^-log2(g + 1). It falls to a half at 1 unit, so choose units in which 1 is a difference that
    matters. A query is never found itself. Where the gallery has fewer than k others, all count.

    Args:
        embeddings: ``(N, D)``; or ``(N, K, D)``, K vectors per picture, for ``cosine`` only: two
            pictures are as alike as their most alike vectors.
        targets: ``(N,)`` or ``(N, d)``.
        ks: Of nDCG and distances, each at least 1.
        query: ``(N,)`` bool, the rows that ask; None is all.
        gallery: ``(N,)`` bool, the rows that can be found; None is all.
        metric: ``cosine`` or ``l2``.

    Cost: O(Q G (D + d)) time, O(1024 G) memory.
    """
    rows = np.asarray(embeddings, np.float64)
    points = np.asarray(targets, np.float64)
    points = points[:, None] if points.ndim == 1 else points
    asks, found = _flags(query, len(rows)), _flags(gallery, len(rows))
    rows = _comparable(rows, metric)
    queries, places = np.flatnonzero(asks), np.flatnonzero(found)
    ks = tuple(dict.fromkeys(ks))
    if not ks or min(ks) < 1:
        raise ValueError(f"ks must be numbers from 1 up, got {ks}")
    sums = {name: np.zeros(len(ks)) for name in ("ndcg", "near", "ideal")}
    chance, count = 0.0, 0
    for start in range(0, len(queries), _BLOCK):
        some = queries[start : start + _BLOCK]
        itself = some[:, None] == places
        some, itself = (part[(~itself).any(1)] for part in (some, itself))
        apart = np.where(itself, np.inf, _distances(points[some], points[places]))
        away = (
            _distances(rows[some], rows[places])
            if rows.ndim == 2
            else -greatest_cosines(rows[some], rows[places])
        )
        away = np.where(itself, np.inf, away)
        # Of equal distances the first photo comes first.
        ranked = np.take_along_axis(apart, np.argsort(away, axis=1, kind="stable"), 1)
        best = np.sort(apart, axis=1)
        for number, k in enumerate(ks):
            sums["ndcg"][number] += (_dcg(ranked[:, :k]) / _dcg(best[:, :k])).sum()
            sums["near"][number] += _mean(ranked[:, :k]).sum()
            sums["ideal"][number] += _mean(best[:, :k]).sum()
        chance += float(_mean(best).sum())
        count += len(some)
    with np.errstate(invalid="ignore"):
        means = {name: total / np.float64(count) for name, total in sums.items()}
        return ContinuousMetrics(
            ndcg=dict(zip(ks, means["ndcg"].tolist(), strict=True)),
            target_distance=dict(zip(ks, means["near"].tolist(), strict=True)),
            chance=float(chance / np.float64(count)),
            ideal=dict(zip(ks, means["ideal"].tolist(), strict=True)),
            queries=count,
        )


def triplet_metrics(
    embeddings: npt.ArrayLike, triplets: npt.ArrayLike, *, metric: str = "cosine"
) -> TripletMetrics:
    """How often the odd one of three is the odd one.

    Args:
        embeddings: ``(N, D)``, or ``(N, K, D)`` as for `continuous_metrics`.
        triplets: ``(T, 3)`` places: two alike, then the odd one.
        metric: ``cosine`` or ``l2``.

    Cost: O(T D).
    """
    rows = _comparable(np.asarray(embeddings, np.float64), metric)
    three = np.asarray(triplets, np.int64).reshape(-1, 3)
    a, b, odd = (rows[column] for column in three.T)
    alike, from_a, from_b = (_apart(x, y) for x, y in ((a, b), (a, odd), (b, odd)))
    right = (alike < from_a) & (alike < from_b)
    return TripletMetrics(float(right.mean()) if len(three) else float("nan"), len(three))


def _flags(column: npt.ArrayLike | None, count: int) -> npt.NDArray[np.bool_]:
    return np.ones(count, bool) if column is None else np.asarray(column, bool)


def _distances(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Euclidean, ``(len(a), len(b))``; of equal rows exactly 0 for few columns."""
    if a.shape[1] <= 8:
        squares = np.zeros((len(a), len(b)))
        for x, y in zip(a.T, b.T, strict=True):
            squares += (x[:, None] - y) ** 2
        return np.asarray(np.sqrt(squares))
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.asarray(np.sqrt(np.maximum(squares, 0)))


def _dcg(apart: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Of rows of distances by rank; what is infinitely far gains nothing."""
    discounts = 1 / np.log2(np.arange(2, apart.shape[1] + 2))
    return np.asarray((discounts / (1 + apart)).sum(1))


def _mean(apart: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Of the finite ones of each row."""
    finite = np.isfinite(apart)
    total = np.where(finite, apart, 0).sum(1)
    return np.asarray(total / np.maximum(finite.sum(1), 1))


def _comparable(rows: Doubles, metric: str) -> Doubles:
    """Of unit length for ``cosine``; as they are for ``l2``."""
    if metric not in ("cosine", "l2"):
        raise ValueError(f"metric must be cosine or l2, got {metric!r}")
    if metric == "l2":
        if rows.ndim == 3:
            raise ValueError("several vectors per picture are compared by their cosines only")
        return rows
    unit: Doubles = rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-30)
    return unit


def _apart(one: Doubles, other: Doubles) -> Doubles:
    """``(T,)``: squared distances of rows; minus the greatest cosines of several per picture."""
    if one.ndim == 3:
        nearest: Doubles = (one @ other.transpose(0, 2, 1)).max(axis=(1, 2))
        return -nearest
    squares: Doubles = ((one - other) ** 2).sum(1)
    return squares
