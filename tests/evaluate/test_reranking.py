"""Re-ranked figures: every query by hand, in loops, against what is done in blocks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from embedkit.errors import UsageError
from embedkit.evaluate import evaluate
from embedkit.evaluate.reranking import (
    expanded_results,
    k_reciprocal,
    reciprocal_results,
    reranked,
)

Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.float32]

COUNT = 70


def rows_of(seed: int = 0) -> tuple[Rows, list[str]]:
    """Seven classes, loose enough that the nearest is often wrong."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 7, COUNT)
    rows = rng.standard_normal((7, 12))[codes] + 1.1 * rng.standard_normal((COUNT, 12))
    return rows.astype(np.float32), [f"class {code}" for code in codes]


def masks(kind: str) -> tuple[Mask | None, Mask | None]:
    if kind == "leave one out":
        return None, None
    rng = np.random.default_rng(3)
    query = rng.random(COUNT) < 0.4
    gallery = ~query if kind == "apart" else rng.random(COUNT) < 0.7
    return query, gallery


def judged_by_hand(
    order: list[int], own: int, labels: list[str], gallery: list[int]
) -> tuple[float, float, float]:
    """Rank of the first match, average precision at R and R-precision."""
    wanted = [row for row in gallery if row != own and labels[row] == labels[own]]
    if not wanted:
        return np.inf, 0.0, 0.0
    hits = [labels[row] == labels[own] for row in order]
    total = sum(sum(hits[: i + 1]) / (i + 1) for i in range(len(wanted)) if hits[i])
    return hits.index(True) + 1, total / len(wanted), sum(hits[: len(wanted)]) / len(wanted)


def unit(rows: Rows) -> npt.NDArray[np.float64]:
    wide = rows.astype(np.float64)
    out: npt.NDArray[np.float64] = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return out


@pytest.mark.parametrize("kind", ["leave one out", "apart", "overlapping"])
@pytest.mark.parametrize("method", ["aqe", "kreciprocal", "kreciprocal l2"])
def test_every_query_is_what_loops_give(kind: str, method: str) -> None:
    rows, labels = rows_of()
    query, gallery = masks(kind)
    asking = range(COUNT) if query is None else np.flatnonzero(query).tolist()
    there = list(range(COUNT)) if gallery is None else np.flatnonzero(gallery).tolist()
    space = rows.astype(np.float64) if method.endswith("l2") else unit(rows)
    if method == "aqe":
        results = expanded_results(rows, labels, 4, 2.0, query=query, gallery=gallery)
    else:
        results = reciprocal_results(
            rows,
            labels,
            15,
            k1=6,
            k2=3,
            query=query,
            gallery=gallery,
            metric="l2" if method.endswith("l2") else "cosine",
        )
    assert results.rows.tolist() == list(asking)
    for at, own in enumerate(asking):
        others = [row for row in there if row != own]
        near = sorted(others, key=lambda row: float(((space[row] - space[own]) ** 2).sum()))
        if method == "aqe":
            grown = space[own].copy()
            for row in near[:4]:
                grown += max(float(space[row] @ space[own]), 0) ** 2.0 * space[row]
            near = sorted(others, key=lambda row: -float(space[row] @ grown))
        else:
            head = near[:15]
            far = k_reciprocal(space[own][None], space[head], k1=6, k2=3)[0]
            near = [head[n] for n in np.argsort(far, kind="stable")] + near[15:]
        first, precise, share = judged_by_hand(near, own, labels, there)
        assert results.first[at] == first
        assert results.average_precision[at] == pytest.approx(precise)
        assert results.r_precision[at] == pytest.approx(share)


def test_it_stands_beside_the_plain_figures_with_the_difference_of_each() -> None:
    rows, labels = rows_of(1)
    figures = evaluate(rows, labels, ks=(1, 5), repeats=50)
    settings = {"k": 5, "alpha": 3.0}
    seen: list[int] = []
    again = reranked(figures, rows, "aqe", settings, done=seen.append)
    assert sum(seen) == COUNT
    for name in ("recall@1", "recall@5", "map@r", "mrr"):
        before, after = figures.metrics.to_json()[name], again.metrics.to_json()[name]
        assert again.differences[name].before == pytest.approx(before)
        assert again.differences[name].after == pytest.approx(after)
    document = again.to_json()
    assert (document["method"], document["settings"]) == ("aqe", settings)
    assert document["metrics"]["queries"] == COUNT
    gained = again.metrics.map_at_r - figures.metrics.map_at_r
    assert document["differences"]["map@r"]["difference"] == pytest.approx(gained)
    assert gained > 0


def test_a_gallery_of_one_and_no_queries_are_no_trouble() -> None:
    rows, labels = rows_of()
    only = np.arange(COUNT) == 5
    none = np.zeros(COUNT, np.bool_)
    for query, gallery in ((None, only), (none, None), (None, none)):
        figures = evaluate(rows, labels, ks=(1,), query=query, gallery=gallery, repeats=2)
        for name, settings in (
            ("aqe", {"k": 3, "alpha": 3.0}),
            ("kreciprocal", {"depth": 9, "k1": 4, "k2": 2, "lambda": 0.3}),
        ):
            again = reranked(figures, rows, name, settings, query=query, gallery=gallery)
            assert again.results.first.tolist() == figures.results.first.tolist()


def test_what_cannot_be_is_refused_in_a_sentence() -> None:
    rows, labels = rows_of()
    by_distance = evaluate(rows, labels, ks=(1,), metric="l2", repeats=2)
    with pytest.raises(UsageError, match="cosine"):
        reranked(by_distance, rows, "aqe", {"k": 3, "alpha": 3.0})
    with pytest.raises(UsageError, match="one vector"):
        reranked(by_distance, rows.reshape(COUNT, 2, 6), "aqe", {"k": 3, "alpha": 3.0})
    with pytest.raises(UsageError, match="depth"):
        reciprocal_results(rows, labels, 0)
    with pytest.raises(UsageError, match="k1"):
        reciprocal_results(rows, labels, 9, k1=0)
    with pytest.raises(UsageError, match="neighbour"):
        expanded_results(rows, labels, 0, 3.0)


def test_a_depth_that_memory_has_no_room_for_is_refused_before_it_is_begun() -> None:
    many = np.zeros((9_000, 2), np.float32)
    many[:, 0] = 1
    with pytest.raises(UsageError, match="too much memory") as told:
        reciprocal_results(many, ["a"] * 9_000, 9_000)
    assert "2.6 GB" in (told.value.facts or "")
