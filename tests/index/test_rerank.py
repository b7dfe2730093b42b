"""Re-ranking against the formulas written as loops, and what it does to a catalog's hits."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from embedkit.errors import MismatchError, UsageError
from embedkit.index import Catalog, Row, write_catalog
from embedkit.index.answer import best_of_any, grouped, labelled, mean_query, plain
from embedkit.index.fuse import Fusion
from embedkit.index.rerank import Expansion, Reciprocal, Reranked, expand_queries, k_reciprocal
from tests.index.fakes import contract

Matrix = npt.NDArray[np.float32]


def unit(count: int, dim: int, seed: int = 0) -> Matrix:
    rows = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    out: Matrix = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return out


def catalog_of(
    folder: Path, vectors: Matrix, labels: list[str] | None = None, *, metric: str = "cosine"
) -> Catalog:
    """Ids are 10, 13, 16, ...: no positions."""
    labels = labels or [f"class{n % 3}" for n in range(len(vectors))]
    rows = [
        Row(10 + 3 * n, f"{label}/{n}.jpg".encode(), label.encode(), vector)
        for n, (label, vector) in enumerate(zip(labels, vectors, strict=True))
    ]
    file = folder / f"{metric}{len(list(folder.iterdir()))}.faiss"
    about = contract(dim=vectors.shape[1], metric=metric)
    write_catalog(file, rows, contract=about, root=folder / "photos")
    return Catalog.open(file)


def numbers(hits: list[Reranked]) -> list[int]:
    """Positions from the ids of `catalog_of`."""
    return [(one.hit.id - 10) // 3 for one in hits]


# k-reciprocal encoding


def paper(queries: Matrix, gallery: Matrix, k1: int, k2: int, weight: float) -> list[list[float]]:
    """Zhong et al. 2017 with sets and dictionaries, one pair at a time."""
    rows = [list(map(float, row)) for row in np.concatenate([queries, gallery])]
    n = len(rows)
    d = [[sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) for y in rows] for x in rows]
    d = [[value / max(row) if max(row) > 0 else 0.0 for value in row] for row in d]
    rank = [sorted(range(n), key=lambda j: (j != i, d[i][j], j)) for i in range(n)]

    def reciprocal(i: int, k: int) -> set[int]:
        return {c for c in rank[i][: k + 1] if i in rank[c][: k + 1]}

    encoded: list[dict[int, float]] = []
    for i in range(n):
        members = reciprocal(i, k1)
        grown = set(members)
        for c in members:
            small = reciprocal(c, round(k1 / 2))
            if len(small & members) > 2 / 3 * len(small):
                grown |= small
        total = sum(math.exp(-d[i][j]) for j in grown)
        encoded.append({j: math.exp(-d[i][j]) / total for j in grown})
    if k2 > 1:
        averaged = []
        for i in range(n):
            near = rank[i][:k2]
            keys = set().union(*(encoded[j] for j in near))
            averaged.append({t: sum(encoded[j].get(t, 0) for j in near) / len(near) for t in keys})
        encoded = averaged
    out = []
    for i in range(len(queries)):
        line = []
        for j in range(len(queries), n):
            m = sum(min(value, encoded[j].get(t, 0)) for t, value in encoded[i].items())
            line.append((1 - weight) * (1 - m / (2 - m)) + weight * d[i][j])
        out.append(line)
    return out


@pytest.mark.parametrize(
    ("queries", "gallery", "k1", "k2", "weight"),
    [
        (1, 30, 20, 6, 0.3),
        (4, 40, 20, 6, 0.3),
        (3, 25, 5, 1, 0.0),
        (2, 9, 23, 3, 1.0),  # k1 beyond the pool; half of 23 rounds to even
        (1, 1, 1, 1, 0.3),
    ],
)
def test_k_reciprocal_equals_the_paper_written_with_sets(
    queries: int, gallery: int, k1: int, k2: int, weight: float
) -> None:
    ask, find = unit(queries, 6, 1), unit(gallery, 6, 2)
    got = k_reciprocal(ask, find, k1=k1, k2=k2, weight=weight)
    np.testing.assert_allclose(got, paper(ask, find, k1, k2, weight), atol=1e-9)


def test_k_reciprocal_takes_exact_duplicates_and_identical_pools() -> None:
    find = unit(12, 4, 3)[[0, 0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8]]
    got = k_reciprocal(find[:2], find, k1=4, k2=3, weight=0.3)
    np.testing.assert_allclose(got, paper(find[:2], find, 4, 3, 0.3), atol=1e-9)
    assert np.isfinite(k_reciprocal(find[:1], find[[0, 0, 0]])).all()


def test_k_reciprocal_of_nothing_is_nothing() -> None:
    assert k_reciprocal(np.empty((0, 4)), unit(3, 4)).shape == (0, 3)
    assert k_reciprocal(unit(2, 4), np.empty((0, 4))).shape == (2, 0)


@pytest.mark.parametrize(("k1", "k2", "weight"), [(0, 6, 0.3), (20, 0, 0.3), (20, 6, 1.5)])
def test_k_reciprocal_refuses_what_has_no_meaning(k1: int, k2: int, weight: float) -> None:
    with pytest.raises(UsageError, match="k-reciprocal"):
        Reciprocal(k1=k1, k2=k2, weight=weight)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_reciprocal_search_orders_the_shortlist_and_keeps_the_scores(
    tmp_path: Path, metric: str
) -> None:
    vectors, ask = unit(60, 5), unit(2, 5, 9)
    catalog = catalog_of(tmp_path, vectors, metric=metric)
    lists = Reciprocal(depth=25, k1=6, k2=3).search(catalog, ask, 10)
    for query, hits in zip(ask, lists, strict=True):
        near = np.argsort(-(vectors @ query), kind="stable")[:25]
        (distance,) = paper(query[None], vectors[near], 6, 3, 0.3)
        order = sorted(range(25), key=lambda n: (distance[n], n))[:10]
        assert numbers(hits) == [int(near[n]) for n in order]
        assert [one.hit.rank for one in hits] == list(range(1, 11))
        for one, n in zip(hits, order, strict=True):
            cosine = float(vectors[near[n]] @ query)
            score = cosine if metric == "cosine" else -math.sqrt(max(2 - 2 * cosine, 0))
            assert one.hit.score == pytest.approx(score, abs=1e-5)
            assert one.value == pytest.approx(-distance[n], abs=1e-6)


def test_a_query_is_answered_the_same_whoever_else_asks(tmp_path: Path) -> None:
    catalog, ask = catalog_of(tmp_path, unit(50, 5)), unit(4, 5, 8)
    together = Reciprocal(depth=20).search(catalog, ask, 5)
    assert together == [Reciprocal(depth=20).search(catalog, row[None], 5)[0] for row in ask]


# Query expansion


def expanded_by_loops(query: Matrix, near: Matrix, alpha: float) -> list[float]:
    total = [float(x) for x in query]
    for row in near:
        weight = max(sum(float(a) * float(b) for a, b in zip(query, row, strict=True)), 0) ** alpha
        total = [t + weight * float(x) for t, x in zip(total, row, strict=True)]
    length = math.sqrt(sum(t * t for t in total))
    return [t / length for t in total]


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.5, 3.0])
def test_query_expansion_equals_the_sum_written_out(alpha: float) -> None:
    ask, near = unit(3, 4, 1), unit(15, 4, 2).reshape(3, 5, 4)
    got = expand_queries(ask, near, alpha=alpha)
    for row, query, neighbours in zip(got, ask, near, strict=True):
        np.testing.assert_allclose(row, expanded_by_loops(query, neighbours, alpha), atol=1e-6)


def test_expansion_without_neighbours_is_the_query() -> None:
    ask = unit(2, 4)
    np.testing.assert_allclose(expand_queries(ask, np.empty((2, 0, 4))), ask, atol=1e-7)


def test_expanded_search_asks_again_and_gives_the_first_querys_scores(tmp_path: Path) -> None:
    vectors, ask = unit(40, 6), unit(2, 6, 5)
    catalog = catalog_of(tmp_path, vectors)
    lists = Expansion(neighbours=4, alpha=3).search(catalog, ask, 7)
    for query, hits in zip(ask, lists, strict=True):
        near = vectors[np.argsort(-(vectors @ query))[:4]]
        better = np.array(expanded_by_loops(query, near, 3))
        wanted = np.argsort(-(vectors @ better))[:7].tolist()
        assert numbers(hits) == wanted
        assert [one.value for one in hits] == pytest.approx((vectors @ better)[wanted], abs=1e-6)
        assert [one.hit.score for one in hits] == pytest.approx((vectors @ query)[wanted], abs=1e-6)


def test_expansion_takes_fewer_pictures_than_neighbours_and_no_query(tmp_path: Path) -> None:
    catalog = catalog_of(tmp_path, unit(2, 3))
    ((first, second),) = Expansion(neighbours=10).search(catalog, unit(1, 3, 4), 5)
    assert (first.hit.rank, second.hit.rank) == (1, 2)
    assert Expansion().search(catalog, np.empty((0, 3), np.float32), 5) == []


def test_expansion_refuses_distances_and_meaningless_numbers(tmp_path: Path) -> None:
    catalog = catalog_of(tmp_path, unit(4, 3), metric="l2")
    with pytest.raises(UsageError, match="cosine"):
        Expansion().search(catalog, unit(1, 3), 2)
    with pytest.raises(UsageError, match="alpha"):
        Expansion(alpha=-1)
    with pytest.raises(UsageError, match="neighbour"):
        Expansion(neighbours=0)


# Narrowed and combined searches


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize(("count", "k"), [(1, 1), (40, 7), (5000, 3), (9000, 60)])
def test_a_search_among_some_equals_a_loop_over_them(
    tmp_path: Path, metric: str, count: int, k: int
) -> None:
    vectors, ask = unit(count, 4), unit(3, 4, 7)
    catalog = catalog_of(tmp_path, vectors, metric=metric)
    among = np.random.default_rng(1).permutation(count)[: max(1, count // 2)]
    got = catalog.search(ask, k, among=among)
    for query, hits in zip(ask, got, strict=True):
        wide = vectors[among].astype(np.float64)
        if metric == "cosine":
            scores = (wide * query.astype(np.float64)).sum(1).astype(np.float32)
        else:
            scores = -np.sqrt(((wide - query.astype(np.float64)) ** 2).sum(1)).astype(np.float32)
        order = np.lexsort((among, -scores))[:k]
        assert [(hit.id - 10) // 3 for hit in hits] == among[order].tolist()
        assert [hit.score for hit in hits] == scores[order].tolist()


def test_a_search_among_duplicates_keeps_the_order_of_ids_at_the_cut(tmp_path: Path) -> None:
    catalog = catalog_of(tmp_path, np.repeat(unit(2, 4), 100, axis=0))
    among = np.arange(199, 40, -1)
    (hits,) = catalog.search(unit(2, 4)[1:], 30, among=among)
    assert [(hit.id - 10) // 3 for hit in hits] == list(range(100, 130))


def test_a_search_among_none_finds_nothing_and_strange_positions_are_refused(
    tmp_path: Path,
) -> None:
    catalog = catalog_of(tmp_path, unit(5, 4))
    assert catalog.search(unit(2, 4), 3, among=[]) == [[], []]
    for wrong in ([5], [-1], [[0]]):
        with pytest.raises(UsageError, match="0 to 4"):
            catalog.search(unit(1, 4), 3, among=wrong)


def test_a_filter_gives_the_labelled_pictures_and_names_near_labels(tmp_path: Path) -> None:
    labels = ["shoe", "bag", "", "shoe", "hat"]
    catalog = catalog_of(tmp_path, unit(5, 4), labels)
    assert labelled(catalog, ["shoe"]).tolist() == [0, 3]
    assert labelled(catalog, ["hat", "bag", "hat"]).tolist() == [1, 4]
    assert labelled(catalog, [""]).tolist() == [2]
    with pytest.raises(UsageError, match="'shoes'") as error:
        labelled(catalog, ["shoes"])
    assert "shoe" in str(error.value.facts)
    assert error.value.hint == "--filter label=shoe"


@pytest.mark.parametrize("k", [1, 3, 5, 9])
def test_groups_are_the_best_of_each_label_however_deep_they_lie(tmp_path: Path, k: int) -> None:
    rng = np.random.default_rng(0)
    # One label fills the first ranks; the rare ones lie far behind.
    labels = ["many"] * 120 + [f"rare{n}" for n in range(4)] + [""] * 6
    vectors, ask = unit(130, 5), unit(2, 5, 3)
    order = rng.permutation(130)
    catalog = catalog_of(tmp_path, vectors, [labels[n] for n in order])
    got = grouped(plain(catalog, ask, None, None), k, len(catalog))
    for query, hits in zip(ask, got, strict=True):
        best: dict[str, int] = {}
        for n in np.argsort(-(vectors @ query), kind="stable").tolist():
            best.setdefault(labels[order[n]], n)
        assert numbers(hits) == list(best.values())[:k]
        assert [one.hit.rank for one in hits] == list(range(1, len(hits) + 1))


@pytest.mark.parametrize("by_label", [False, True])
def test_any_of_several_queries_is_the_best_score_of_each_picture(
    tmp_path: Path, by_label: bool
) -> None:
    vectors, ask = unit(50, 4), unit(4, 4, 6)
    catalog = catalog_of(tmp_path, vectors)
    search = plain(catalog, ask, None, None)
    lists = grouped(search, 3, 50) if by_label else search(8)
    hits = best_of_any(lists, 3 if by_label else 8, by_label=by_label)
    best = (vectors @ ask.T).max(axis=1)
    order = np.argsort(-best, kind="stable").tolist()
    if by_label:
        order = [next(n for n in order if n % 3 == label) for label in range(3)]
        order = sorted(order, key=lambda n: -best[n])
    wanted = order[:8]
    assert numbers(hits) == wanted
    assert [one.hit.score for one in hits] == pytest.approx(best[wanted], abs=1e-6)


def test_the_mean_of_queries_is_of_unit_length_for_cosine_and_plain_for_distances() -> None:
    ask = unit(3, 4)
    mean = ask.mean(axis=0)
    np.testing.assert_allclose(mean_query(ask, "cosine")[0], mean / np.linalg.norm(mean), atol=1e-6)
    np.testing.assert_allclose(mean_query(ask, "l2")[0], mean, atol=1e-6)
    with pytest.raises(UsageError, match="opposites"):
        mean_query(np.array([[1.0, 0], [-1, 0]]), "cosine")


def test_threads_search_one_catalog_at_once_and_get_what_one_alone_gets(tmp_path: Path) -> None:
    vectors = unit(3000, 16)
    catalog = catalog_of(tmp_path, vectors)
    asks = [unit(3, 16, seed) for seed in range(24)]
    among = np.arange(0, 3000, 3)
    alone = [(catalog.search(ask, 5), catalog.search(ask, 5, among=among)) for ask in asks]
    with ThreadPoolExecutor(6) as pool:
        searched = pool.map(
            lambda ask: (catalog.search(ask, 5), catalog.search(ask, 5, among=among)), asks
        )
        assert list(searched) == alone


# Fusion of several models


def test_fused_scores_are_the_weighted_mean_over_shared_pictures(tmp_path: Path) -> None:
    first, second = unit(70, 6, 1), unit(90, 3, 2)
    # The second holds pictures 20 to 109, in another order.
    order = np.random.default_rng(0).permutation(90)
    a = catalog_of(tmp_path, first, ["x"] * 70)
    rows = sorted(
        (Row(500 + int(at), f"x/{20 + n}.jpg".encode(), b"x", second[n]))
        for n, at in enumerate(order)
    )
    write_catalog(
        tmp_path / "b.faiss", rows, contract=contract(dim=3, weights="b"), root=tmp_path / "photos"
    )
    b = Catalog.open(tmp_path / "b.faiss")
    fusion = Fusion([a, b], weights=[3, 1])
    assert (fusion.shared, fusion.left_out) == (50, 20 + 40)
    ask = unit(5, 6, 8), unit(5, 3, 9)
    for row, hits in enumerate(fusion.search(ask, 12)):
        scores = {
            n: 0.75 * float(first[n] @ ask[0][row]) + 0.25 * float(second[n - 20] @ ask[1][row])
            for n in range(20, 70)
        }
        wanted = sorted(scores, key=lambda n: -scores[n])[:12]
        assert [(hit.id - 10) // 3 for hit in hits] == wanted
        assert [hit.score for hit in hits] == pytest.approx([scores[n] for n in wanted], abs=1e-6)
        assert [hit.rank for hit in hits] == list(range(1, 13))
    assert [len(hits) for hits in fusion.search(ask, 1000)] == [50] * 5


def test_fusion_of_a_catalog_with_itself_is_the_catalog(tmp_path: Path) -> None:
    vectors = np.repeat(unit(10, 4), 2, axis=0)  # ties
    catalog, ask = catalog_of(tmp_path, vectors), unit(2, 4, 5)
    assert Fusion([catalog, catalog]).search([ask, ask], 5) == catalog.search(ask, 5)


def test_fusion_refuses_what_does_not_belong_together(tmp_path: Path) -> None:
    a = catalog_of(tmp_path, unit(3, 4), ["x"] * 3)
    other = catalog_of(tmp_path, unit(3, 4), ["y"] * 3)
    far = catalog_of(tmp_path, unit(3, 4), metric="l2")
    with pytest.raises(MismatchError, match="no picture in common"):
        Fusion([a, other])
    with pytest.raises(MismatchError, match="distance"):
        Fusion([a, far])
    with pytest.raises(UsageError, match="two catalogs"):
        Fusion([a])
    with pytest.raises(UsageError, match="positive weight"):
        Fusion([a, a], weights=[1, 0])
    with pytest.raises(UsageError, match="once for each catalog"):
        Fusion([a, a]).search([unit(1, 4)], 3)
