"""The fast way gives exactly what whole rows in float64 give, and it really is taken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from embedkit.errors import UnknownNameError
from embedkit.evaluate import QueryResults, nearest, query_results, ranking, retrieval_metrics

COLUMNS = ("rows", "codes", "matches", "first", "average_precision", "r_precision", "tied")


def rows_of(kind: str, rng: np.random.Generator, n: int, d: int) -> Any:
    """Vectors of a kind that is hard in its own way."""
    vectors = rng.normal(size=(n, d)).astype(np.float32)
    if kind == "duplicates":
        return vectors[rng.integers(max(1, n // 5), size=n)]
    if kind == "few values":
        return np.round(vectors)
    if kind == "nearly equal":
        return (1 + 1e-7 * rng.integers(0, 9, (n, d))).astype(np.float32)
    if kind == "one point":
        return np.ones((n, d), np.float32)
    return vectors


def same(a: QueryResults, b: QueryResults) -> None:
    for name in COLUMNS:
        assert np.array_equal(getattr(a, name), getattr(b, name)), name


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Even a small gallery is streamed, in parts; holds how often, and how many rows gave up."""
    counts = [0, 0]
    streamed, whole = ranking._by_shortlist, ranking._by_whole_rows

    def by_shortlist(*arguments: Any) -> Any:
        counts[0] += 1
        return streamed(*arguments)

    def by_whole_rows(space: Any, rows: Any, *arguments: Any) -> Any:
        counts[1] += len(rows)
        return whole(space, rows, *arguments)

    monkeypatch.setattr(ranking, "_WHOLE_ROWS_BELOW", 8)
    monkeypatch.setattr(ranking, "_WHOLE_ROWS_SHARE", 2)
    monkeypatch.setattr(ranking, "_STREAMED_COLUMNS", 50)
    monkeypatch.setattr(ranking, "_by_shortlist", by_shortlist)
    monkeypatch.setattr(ranking, "_by_whole_rows", by_whole_rows)
    return counts


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize(
    "kind", ["distinct", "duplicates", "few values", "nearly equal", "one point"]
)
@pytest.mark.parametrize("seed", range(6))
def test_streaming_equals_whole_rows_to_the_last_tie(
    kind: str, metric: str, seed: int, fast: list[int]
) -> None:
    rng = np.random.default_rng(seed)
    n, d = int(rng.integers(60, 400)), int(rng.integers(1, 40))
    vectors, labels = rows_of(kind, rng, n, d), rng.integers(n // 4, size=n)
    masks = {"query": rng.random(n) < 0.5, "gallery": rng.random(n) < 0.7}
    for masked in ({}, masks):
        streamed = query_results(vectors, labels, metric=metric, ks=(1, 3), **masked)
        assert fast[0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranking, "_WHOLE_ROWS_BELOW", 1 << 30)
            expected = query_results(vectors, labels, metric=metric, ks=(1, 3), **masked)
        same(streamed, expected)


def test_vectors_all_alike_fall_back_to_whole_rows(fast: list[int]) -> None:
    labels = np.arange(300) % 100
    got = query_results(np.ones((300, 4)), labels)
    assert fast[1] >= 300
    # Equal scores by row: the first match of row i >= 100 is row i % 100, behind i % 100 others.
    assert got.first[150] == 51
    assert got.tied.all()


def test_the_first_match_is_counted_however_far_down_it_is(fast: list[int]) -> None:
    rng = np.random.default_rng(0)
    vectors, labels = rng.normal(size=(500, 16)), np.arange(500) // 2
    got = query_results(vectors, labels, ks=(1,))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for row in range(0, 500, 7):
        scores = unit @ unit[row]
        twin = row ^ 1
        assert got.first[row] == 1 + sum(scores[j] > scores[twin] for j in range(500) if j != row)
    assert got.first.max() > 100
    assert got.metrics((1,)).mrr == pytest.approx(float(np.mean(1 / got.first)))
    assert fast[1] == 0


def test_rows_that_give_up_in_the_middle_are_exact_too(
    fast: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "_UNCLEAR", 2)
    monkeypatch.setattr(ranking, "_SPARE", 0)
    rng = np.random.default_rng(1)
    vectors = np.vstack([rng.normal(size=(200, 6)), np.repeat(rng.normal(size=(2, 6)), 60, axis=0)])
    labels = rng.integers(60, size=len(vectors))
    streamed = query_results(vectors, labels)
    assert 0 < fast[1] < len(vectors)
    monkeypatch.setattr(ranking, "_WHOLE_ROWS_BELOW", 1 << 30)
    same(streamed, query_results(vectors, labels))


@pytest.mark.parametrize("block", [1, 64, 1024])
def test_nearest_is_the_same_in_every_block(block: int, fast: list[int]) -> None:
    rng = np.random.default_rng(2)
    vectors = np.tile(rng.normal(size=(40, 24)), (6, 1)).astype(np.float32)
    got = nearest(vectors, 9, block=block)
    assert fast[0]
    for row in range(0, 240, 11):
        twins = [j for j in range(240) if j % 40 == row % 40 and j != row]
        assert got[row, :5].tolist() == twins


def test_two_threads_change_nothing(fast: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    vectors, labels = rng.normal(size=(300, 8)), rng.integers(40, size=300)
    monkeypatch.setattr(ranking, "_STREAMED_AT_ONCE", 2000)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    two = query_results(vectors, labels)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    same(two, query_results(vectors, labels))
    assert fast[0] > 8


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_l2_ranks_by_distance_and_knows_length(shift: float) -> None:
    # By cosine, 2 is nearest to 0 and to 1; by distance, 0 and 1 are each other's.
    vectors = np.array([[1.0, 0], [1, 0.5], [10, 2], [10, 3]]) + shift
    labels = ["a", "a", "b", "b"]
    assert retrieval_metrics(vectors, labels, metric="l2").recall[1] == 1.0
    expected = [
        sorted(
            (j for j in range(4) if j != i), key=lambda j: np.sum((vectors[i] - vectors[j]) ** 2)
        )
        for i in range(4)
    ]
    assert nearest(vectors, 3, metric="l2").tolist() == expected


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_unit_rows_rank_the_same_by_both(metric: str) -> None:
    vectors = np.random.default_rng(4).normal(size=(50, 6))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -np.inf)
    assert np.array_equal(nearest(vectors, 10, metric=metric), np.argsort(-scores, axis=1)[:, :10])


def test_another_metric_is_named() -> None:
    with pytest.raises(UnknownNameError, match="cosine"):
        retrieval_metrics(np.eye(3), [0, 0, 1], metric="cosin")
