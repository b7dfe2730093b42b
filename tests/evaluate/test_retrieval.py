"""recall@k, MAP@R and R-precision against loops, a peer, and answers worked out by hand."""

from __future__ import annotations

import json
import math
import tracemalloc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedkit.errors import EmbedKitError
from embedkit.evaluate import nearest, neighbour_overlap, ranking, retrieval_metrics

Floats = npt.NDArray[Any]


def random_set(seed: int, n: int, d: int, classes: int) -> tuple[Floats, list[int]]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), [int(c) for c in rng.integers(classes, size=n)]


def ranking_by_loops(
    rows: list[list[float]], i: int, gallery: list[bool]
) -> list[tuple[float, int]]:
    """(score, row) of everything the query can find, best first, as plain Python sums."""

    def cosine(a: list[float], b: list[float]) -> float:
        lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
        return sum(x * y for x, y in zip(a, b, strict=True)) / (lengths or 1)

    scored = [
        (round(cosine(rows[i], rows[j]), 6), j) for j in range(len(rows)) if gallery[j] and j != i
    ]
    return sorted(scored, key=lambda pair: (-pair[0], pair[1]))


def metrics_by_loops(
    embeddings: Floats,
    labels: list[Any],
    ks: tuple[int, ...],
    query: list[bool] | None = None,
    gallery: list[bool] | None = None,
) -> dict[str, float]:
    rows, n = embeddings.tolist(), len(labels)
    asks, found = query or [True] * n, gallery or [True] * n
    hits_at: dict[int, list[bool]] = {k: [] for k in ks}
    map_at_r, precision, reciprocal, lone = [], [], [], 0
    for i in range(n):
        if not asks[i]:
            continue
        match = [labels[j] == labels[i] for _, j in ranking_by_loops(rows, i, found)]
        r = sum(match)
        if r == 0:
            lone += 1
            continue
        for k in ks:
            hits_at[k].append(any(match[:k]))
        reciprocal.append(1 / (match.index(True) + 1))
        precision.append(sum(match[:r]) / r)
        map_at_r.append(sum(sum(match[: p + 1]) / (p + 1) for p in range(r) if match[p]) / r)
    count = len(precision)
    result = {f"recall@{k}": sum(hits_at[k]) / count for k in ks}
    result |= {f"recall_all@{k}": sum(hits_at[k]) / (count + lone) for k in ks}
    result |= {"map@r": sum(map_at_r) / count, "r_precision": sum(precision) / count}
    result |= {"mrr": sum(reciprocal) / count}
    return result | {"queries": count + lone, "lone_queries": lone}


def without_ties(document: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name != "tie_share"}


@pytest.mark.parametrize(("n", "classes"), [(2, 1), (7, 3), (40, 5), (41, 30)])
@pytest.mark.parametrize("block", [1, 3, 1024])
def test_equals_the_definitions_written_as_loops(n: int, classes: int, block: int) -> None:
    embeddings, labels = random_set(n, n, 6, classes)
    got = retrieval_metrics(embeddings, labels, ks=(1, 2, 5, 100), block=block).to_json()
    assert without_ties(got) == pytest.approx(metrics_by_loops(embeddings, labels, (1, 2, 5, 100)))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_equals_the_loops_under_ties_masks_and_lone_queries(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 12))
    # Few distinct integer rows: duplicates, opposite rows and all-zero rows are common.
    value = st.integers(-1, 1)
    rows = data.draw(st.lists(st.lists(value, min_size=2, max_size=2), min_size=n, max_size=n))
    labels = data.draw(st.lists(st.sampled_from("abc"), min_size=n, max_size=n))
    masks = st.lists(st.booleans(), min_size=n, max_size=n)
    query, gallery = data.draw(masks), data.draw(masks)
    embeddings = np.array(rows, dtype=np.float32)
    got = retrieval_metrics(
        embeddings, labels, ks=(1, 3), query=query, gallery=gallery, block=data.draw(st.just(2))
    )
    if got.queries == got.lone_queries:
        assert math.isnan(got.map_at_r)
        return
    expected = metrics_by_loops(embeddings.astype(float), labels, (1, 3), query, gallery)
    assert without_ties(got.to_json()) == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore")
def test_agrees_with_pytorch_metric_learning() -> None:
    torch = pytest.importorskip("torch")
    calculator = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    inference = pytest.importorskip("pytorch_metric_learning.utils.inference")
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    rng = np.random.default_rng(3)
    labels = np.repeat(np.arange(12), rng.integers(1, 30, size=12))  # of very unequal size
    centres = rng.normal(size=(12, 16))
    embeddings = (centres[labels] + rng.normal(size=(len(labels), 16))).astype(np.float32)
    peer = calculator.AccuracyCalculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r"),
        k="max_bin_count",
        knn_func=inference.CustomKNN(distances.CosineSimilarity()),
    ).get_accuracy(torch.from_numpy(embeddings), torch.from_numpy(labels))
    got = retrieval_metrics(embeddings, labels)
    assert got.recall[1] == pytest.approx(peer["precision_at_1"])
    assert got.r_precision == pytest.approx(peer["r_precision"])
    assert got.map_at_r == pytest.approx(peer["mean_average_precision_at_r"])


def test_a_query_is_taken_out_by_its_row_not_by_being_first() -> None:
    # Rows 0..2 are one picture three times. By row, 0 sees 1 2 3, 1 sees 0 2 3, 2 sees 0 1 3 and
    # 3 sees 0 1 2, so the first match stands at 2, 3, 1, 2. Dropping whatever ranks first instead
    # would let row 1 find itself.
    embeddings = np.array([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    got = retrieval_metrics(embeddings, ["a", "b", "a", "b"], ks=(1, 2, 3))
    assert got.recall == {1: 0.25, 2: 0.75, 3: 1.0}
    assert got.tie_share == 1.0


def test_a_collapsed_embedding_earns_only_what_the_gallery_order_gives() -> None:
    labels = [0, 1, 2, 3] * 5
    got = retrieval_metrics(np.ones((20, 8)), labels, ks=(1, 4))
    # Everyone sees the gallery from row 0: class 0 and, through the gap it leaves, class 1.
    assert got.recall[1] == pytest.approx((5 - 1) / 20)
    assert got.tie_share == 1.0


def test_distinct_scores_have_no_ties() -> None:
    embeddings, labels = random_set(1, 50, 8, 5)
    assert retrieval_metrics(embeddings, labels).tie_share == 0.0


def test_lone_queries_are_counted_and_miss_only_in_recall_all() -> None:
    embeddings = np.array([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [-1, -1]])
    got = retrieval_metrics(embeddings, ["x", "x", "y", "y", "alone"], ks=(1,))
    assert (got.recall[1], got.recall_all[1]) == (1.0, 0.8)
    assert (got.queries, got.lone_queries) == (5, 1)


def test_separate_queries_and_gallery_see_each_other_only() -> None:
    # As in In-Shop: row 1 equals row 0 and shares its label, but it is a query too.
    embeddings = np.array([[1.0, 0], [1, 0], [0.6, 0.8], [0.8, 0.6]])
    query = np.array([True, True, False, False])
    got = retrieval_metrics(embeddings, [7, 7, 7, 8], ks=(1, 2), query=query, gallery=~query)
    assert got.recall == {1: 0.0, 2: 1.0}
    assert (got.map_at_r, got.queries) == (0.0, 2)


def test_only_one_mask_leaves_the_other_side_whole() -> None:
    embeddings, labels = random_set(2, 30, 4, 4)
    query = [i % 3 == 0 for i in range(30)]
    got = retrieval_metrics(embeddings, labels, ks=(1,), query=query)
    assert without_ties(got.to_json()) == pytest.approx(
        metrics_by_loops(embeddings, labels, (1,), query=query)
    )


def test_numbers_and_names_as_labels_give_the_same() -> None:
    embeddings, labels = random_set(4, 30, 4, 4)
    named = [f"class {label}" for label in labels]
    assert retrieval_metrics(embeddings, labels) == retrieval_metrics(embeddings, named)


def test_one_class_is_all_matches() -> None:
    got = retrieval_metrics(random_set(5, 9, 3, 1)[0], [0] * 9)
    assert (got.recall[1], got.map_at_r, got.r_precision) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("n", [0, 1])
def test_nothing_to_find_is_nan_and_null_in_json(n: int) -> None:
    got = retrieval_metrics(np.ones((n, 4)), ["only"] * n, ks=(1,))
    assert math.isnan(got.recall[1])
    assert math.isnan(got.map_at_r)
    assert (got.queries, got.lone_queries) == (n, n)
    document = json.loads(json.dumps(got.to_json(), allow_nan=False))
    assert document["map@r"] is None


def test_an_empty_gallery_makes_every_query_lone() -> None:
    got = retrieval_metrics(np.eye(3), [0, 0, 1], ks=(1,), gallery=np.zeros(3, dtype=bool))
    assert (got.lone_queries, got.recall_all[1]) == (3, 0.0)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_length_does_not_matter(scale: float) -> None:
    embeddings, labels = random_set(6, 40, 8, 4)
    lengths = np.random.default_rng(7).uniform(0.1, 10, size=(40, 1)) * scale
    scaled = retrieval_metrics((embeddings * lengths).astype(np.float32), labels)
    assert scaled == retrieval_metrics(embeddings.astype(np.float32), labels)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(bad: float) -> None:
    embeddings = np.ones((5, 3))
    embeddings[3, 1] = bad
    with pytest.raises(EmbedKitError, match="not finite") as caught:
        retrieval_metrics(embeddings, [0] * 5)
    assert "1 of 5 rows, first in row 3" in str(caught.value)
    with pytest.raises(EmbedKitError, match="not finite"):
        nearest(embeddings, 1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"embeddings": np.ones(3)}, r"embeddings must be \(N, D\)"),
        ({"labels": [0, 1]}, r"labels must be \(3,\)"),
        ({"query": [True]}, r"query must be \(3,\) bool"),
        ({"gallery": [0, 1, 2]}, r"gallery must be \(3,\) bool"),
        ({"ks": (0, 1)}, "at least 1"),
        ({"block": 0}, "block must be at least 1"),
    ],
)
def test_what_does_not_fit_is_said(arguments: dict[str, Any], sentence: str) -> None:
    call: dict[str, Any] = {"embeddings": np.eye(3), "labels": [0, 0, 1]} | arguments
    with pytest.raises(ValueError, match=sentence):
        retrieval_metrics(call.pop("embeddings"), call.pop("labels"), **call)


@pytest.mark.parametrize(("n", "k"), [(5, 2), (30, 4), (60, 59)])
def test_nearest_is_the_ranking_without_oneself(n: int, k: int) -> None:
    embeddings, _ = random_set(n, n, 5, 2)
    expected = [
        [j for _, j in ranking_by_loops(embeddings.tolist(), i, [True] * n)][:k] for i in range(n)
    ]
    assert nearest(embeddings, k, block=7).tolist() == expected
    some = np.arange(n) % 2 == 0
    assert nearest(embeddings, k, queries=some).tolist() == expected[::2]


def test_nearest_orders_duplicates_by_row_however_they_are_blocked() -> None:
    rng = np.random.default_rng(0)
    embeddings = np.tile(rng.normal(size=(23, 64)), (5, 1)).astype(np.float32)
    whole = nearest(embeddings, 6)
    for i, row in enumerate(whole.tolist()):
        twins = [j for j in range(115) if j % 23 == i % 23 and j != i]
        assert row[:4] == twins
    for block in (1, 2, 113, 114):
        assert np.array_equal(nearest(embeddings, 6, block=block), whole)


def test_of_many_equal_scores_the_first_rows_are_nearest() -> None:
    # In one dimension every score is 1 or -1.
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=200)
    for i, row in enumerate(nearest(signs[:, None], 9).tolist()):
        assert row == [j for j in range(200) if signs[j] == signs[i] and j != i][:9]


@pytest.mark.parametrize(("n", "shape"), [(0, (0, 0)), (1, (1, 0)), (3, (3, 2))])
def test_nearest_gives_no_more_columns_than_there_are_others(
    n: int, shape: tuple[int, int]
) -> None:
    assert nearest(np.ones((n, 2)), 10).shape == shape


def test_nearest_refuses_no_neighbours() -> None:
    with pytest.raises(ValueError, match="k must be at least 1"):
        nearest(np.eye(2), 0)


def test_neighbour_overlap_counts_shared_neighbours_whatever_their_order() -> None:
    a = [[1, 2, 3], [4, 5, 6]]
    assert neighbour_overlap(a, a) == 1.0
    assert neighbour_overlap(a, [[3, 1, 2], [6, 5, 4]]) == 1.0
    assert neighbour_overlap(a, [[1, 7, 8], [7, 8, 9]]) == pytest.approx(1 / 6)
    assert neighbour_overlap(np.empty((0, 4)), np.empty((0, 4))) == 1.0
    with pytest.raises(ValueError, match="one shape"):
        neighbour_overlap(a, [[1, 2, 3]])


def test_memory_is_bounded_by_blocks_not_by_the_square() -> None:
    n, d = 20_000, 8
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(n, d)).astype(np.float32)
    labels = np.arange(n) % 2000
    query = np.arange(n) < 1200
    tracemalloc.start()
    retrieval_metrics(embeddings, labels, query=query)
    nearest(embeddings, 10, queries=query)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    whole_square = n * n * 4
    assert peak < whole_square / 8


def test_a_large_gallery_takes_fewer_queries_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, labels = random_set(9, 80, 6, 9)
    expected = retrieval_metrics(embeddings, labels)
    monkeypatch.setattr(ranking, "_SCORES_AT_ONCE", 200)
    monkeypatch.setattr(ranking, "_GALLERY_ROWS_AT_ONCE", 7)
    tops = nearest(embeddings, 80)
    assert retrieval_metrics(embeddings, labels) == expected
    assert tops.shape == (80, 79)
