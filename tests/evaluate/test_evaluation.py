"""Intervals, open set, clusters, classes: each against another route to the same number."""

from __future__ import annotations

import itertools
import json
import math
import sys

import numpy as np
import pytest

from embedkit.errors import MismatchError, MissingExtraError
from embedkit.evaluate import (
    clustering,
    confidence_intervals,
    evaluate,
    open_set,
    paired_differences,
    query_results,
    read_per_query,
)


def clouds(seed: int, classes: int, each: int, noise: float = 1.0) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), each)
    vectors = rng.normal(size=(classes, 8))[labels] + noise * rng.normal(size=(len(labels), 8))
    return vectors, [f"class {label}" for label in labels]


# Intervals


def test_an_interval_is_the_quantiles_of_resampled_means() -> None:
    vectors, labels = clouds(0, 10, 6)
    results = query_results(vectors, labels)
    got = confidence_intervals(results, (1,), repeats=4000)["map@r"]
    rng = np.random.default_rng(99)
    means = [rng.choice(results.average_precision, 60).mean() for _ in range(4000)]
    low, high = np.quantile(means, [0.025, 0.975])
    assert (got.low, got.high) == pytest.approx((low, high), abs=0.01)


def test_intervals_repeat_by_seed_and_hold_the_figure() -> None:
    results = query_results(*clouds(1, 8, 5))
    first, again = confidence_intervals(results), confidence_intervals(results)
    other = confidence_intervals(results, seed=1)
    assert first == again != other
    for name, value in results.metrics().to_json().items():
        if name in first:
            assert first[name].low <= value <= first[name].high


def test_queries_that_stand_or_fall_together_are_less_sure_by_class() -> None:
    # Half of the classes are perfect and half hopeless.
    rng = np.random.default_rng(0)
    good = np.repeat(np.eye(20), 10, axis=0)[:100]
    bad = rng.normal(size=(100, 20))
    results = query_results(np.vstack([good, bad]), np.repeat(np.arange(20), 10))
    queries = confidence_intervals(results)["recall@1"]
    classes = confidence_intervals(results, by_class=True)["recall@1"]
    assert classes.high - classes.low > 2 * (queries.high - queries.low)


def test_lone_queries_widen_only_the_figure_that_counts_them() -> None:
    vectors, labels = clouds(2, 5, 4, noise=0.01)
    vectors = np.vstack([vectors, -np.eye(8)])
    labels = [*labels, *(f"lone {i}" for i in range(8))]
    intervals = confidence_intervals(query_results(vectors, labels, ks=(1,)), (1,))
    assert (intervals["recall@1"].low, intervals["recall@1"].high) == (1.0, 1.0)
    assert intervals["recall_all@1"].low < 20 / 28 < intervals["recall_all@1"].high


@pytest.mark.parametrize("n", [0, 1])
def test_nothing_to_resample_is_nan(n: int) -> None:
    results = query_results(np.ones((n, 2)), ["a"] * n)
    for by_class in (False, True):
        assert math.isnan(confidence_intervals(results, by_class=by_class)["map@r"].low)


def test_a_paired_difference_is_surer_than_two_intervals() -> None:
    vectors, labels = clouds(3, 20, 8, noise=1.5)
    better = vectors.copy()
    better[::5] = 0.5 * better[::5] + 0.5 * clouds(3, 20, 8, noise=0.0)[0][::5]
    before, after = query_results(vectors, labels), query_results(better, labels)
    got = paired_differences(before, after)["map@r"]
    alone = [confidence_intervals(one)["map@r"] for one in (before, after)]
    assert got.interval.high - got.interval.low < min(one.high - one.low for one in alone)
    assert got.after - got.before == pytest.approx(
        after.average_precision.mean() - before.average_precision.mean()
    )
    assert got.beyond_noise
    same = paired_differences(before, before)["map@r"]
    assert (same.interval.low, same.interval.high, same.beyond_noise) == (0, 0, False)


def test_a_difference_of_other_queries_is_refused() -> None:
    a, b = query_results(*clouds(4, 3, 3)), query_results(*clouds(4, 3, 4))
    with pytest.raises(MismatchError, match="query by query"):
        paired_differences(a, b)


# Open set


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_open_set_equals_the_best_point_of_the_roc_curve(metric: str) -> None:
    roc_curve = pytest.importorskip("sklearn.metrics").roc_curve
    vectors, labels = clouds(5, 12, 8)
    rows = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = list(itertools.permutations(range(len(labels)), 2))
    score = {
        "cosine": lambda i, j: rows[i] @ rows[j],
        "l2": lambda i, j: -np.linalg.norm(vectors[i] - vectors[j]),
    }[metric]
    scores = [round(float(score(i, j)), 5) for i, j in pairs]
    fpr, tpr, _ = roc_curve([labels[i] == labels[j] for i, j in pairs], scores)
    got = open_set(vectors, labels, metric=metric)
    for rate in (0.1, 0.01, 0.001):
        assert got.tpr[rate] == pytest.approx(tpr[fpr <= rate].max(), abs=0.01)
        passed = [
            abs(s) < got.threshold[rate] if metric == "l2" else s > got.threshold[rate]
            for s in scores
        ]
        assert sum(passed) / len(pairs) < 0.3
        wrong = [p for p, (i, j) in zip(passed, pairs, strict=True) if labels[i] != labels[j]]
        assert np.mean(wrong) <= rate + 0.002
    assert (got.sampled, got.same, got.different) == (False, 96 * 7, 96 * 88)


def test_drawn_pairs_say_about_the_same_as_all_of_them() -> None:
    vectors, labels = clouds(6, 40, 10)
    everything, drawn = open_set(vectors, labels), open_set(vectors, labels, most=30_000)
    assert drawn.sampled
    assert not everything.sampled
    for rate in (0.1, 0.01):
        assert drawn.tpr[rate] == pytest.approx(everything.tpr[rate], abs=0.03)
    assert drawn == open_set(vectors, labels, most=30_000)
    assert drawn.same == 400 * 9  # so few that they are all taken


def test_equal_scores_never_let_more_through_than_they_may() -> None:
    got = open_set(np.ones((40, 3)), [0, 1] * 20)
    assert got.tpr == {0.1: 0.0, 0.01: 0.0, 0.001: pytest.approx(float("nan"), nan_ok=True)}


def test_queries_and_gallery_apart_are_the_pairs_compared() -> None:
    vectors, labels = clouds(7, 4, 5)
    query = np.arange(20) % 5 == 0
    got = open_set(vectors, labels, query=query, gallery=~query)
    assert (got.same, got.different) == (4 * 4, 4 * 12)
    small = open_set(vectors, labels, query=query, gallery=~query, most=20)
    assert small.sampled
    assert small.same == 16


@pytest.mark.parametrize("labels", [[], ["a"], ["a", "b"], ["a", "a"]])
def test_too_few_pairs_are_nan_not_an_error(labels: list[str]) -> None:
    got = open_set(np.eye(3)[: len(labels)], labels)
    assert all(math.isnan(value) for value in got.tpr.values())
    assert got.to_json()["tpr@fpr=0.1"] is None


# Clusters


def test_clusters_that_are_the_classes_score_one() -> None:
    vectors, labels = clouds(8, 6, 10, noise=0.01)
    got = clustering(vectors, labels)
    assert (got.nmi, got.ami, got.clusters) == pytest.approx((1.0, 1.0, 6))


def test_nmi_is_over_the_arithmetic_mean_of_the_entropies() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    vectors, labels = clouds(9, 5, 12, noise=2.0)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    found = cluster.KMeans(5, n_init=1, random_state=0).fit_predict(unit.astype(np.float32))
    table = np.array(
        [
            [np.sum((np.array(labels) == a) & (found == b)) for b in range(5)]
            for a in sorted(set(labels))
        ]
    ) / len(labels)

    def entropy(p: np.ndarray) -> float:
        return -float(sum(x * math.log(x) for x in p.ravel() if x > 0))

    rows, columns = entropy(table.sum(1)), entropy(table.sum(0))
    expected = (rows + columns - entropy(table)) / ((rows + columns) / 2)
    assert clustering(vectors, labels).nmi == pytest.approx(expected)


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(MissingExtraError, match=r"embedkit\[train\]"):
        clustering(np.eye(2), ["a", "b"])


# All of it


def test_the_document_is_plain_json_whatever_the_input() -> None:
    for n, classes in ((0, 1), (1, 1), (2, 1), (30, 6)):
        vectors, labels = clouds(10, max(classes, 1), max(n // classes, 0))
        figures = evaluate(vectors, labels, ks=(1, 3), repeats=50, clusters=n == 30)
        document = json.loads(json.dumps(figures.to_json(), allow_nan=False))
        assert document["metrics"]["p@1"] == document["metrics"]["recall@1"]
        assert document["images"] == n


def test_the_worst_class_comes_first() -> None:
    vectors, labels = clouds(11, 6, 8, noise=0.05)
    rng = np.random.default_rng(0)
    vectors[8:16] = rng.normal(size=(8, 8))
    table = evaluate(vectors, labels, repeats=2).classes()
    assert table[0].label == "class 1"
    results = query_results(vectors, labels)
    of_it = [row for row, label in enumerate(labels) if label == "class 1"]
    assert table[0].map_at_r == pytest.approx(results.average_precision[of_it].mean())
    assert table[0].recall_at_1 == pytest.approx(np.mean(results.first[of_it] <= 1))
    assert [row.queries for row in table] == [8] * 6
    assert [row.map_at_r for row in table] == sorted(row.map_at_r for row in table)


def test_per_query_results_come_back_as_they_went() -> None:
    vectors, labels = clouds(12, 5, 3)
    labels[0] = "lone"
    query = np.arange(15) % 2 == 0
    figures = evaluate(vectors, labels, repeats=2, query=query)
    names = [f"photos/{row}.jpg" for row in range(15)]
    document = json.loads(json.dumps(figures.per_query(names), allow_nan=False))
    got_names, got_labels, results = read_per_query(document)
    assert got_names == names[::2]
    assert got_labels == labels[::2]
    for column in ("matches", "first", "average_precision", "r_precision", "tied"):
        assert np.array_equal(getattr(results, column), getattr(figures.results, column))


@pytest.mark.parametrize(
    "change", [{"first": None}, {"matches": ["x"]}, {"first": [1]}, {"name": 3}]
)
def test_damaged_per_query_results_are_refused(change: dict[str, object]) -> None:
    vectors, labels = clouds(13, 2, 3)
    document = evaluate(vectors, labels, repeats=2).per_query([str(i) for i in range(6)])
    with pytest.raises(MismatchError, match="per-query"):
        read_per_query(document | change)


@pytest.mark.filterwarnings("ignore")
def test_a_separate_gallery_agrees_with_pytorch_metric_learning() -> None:
    torch = pytest.importorskip("torch")
    calculator = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    inference = pytest.importorskip("pytorch_metric_learning.utils.inference")
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    vectors, names = clouds(14, 9, 11, noise=1.5)
    labels = np.array([int(name.split()[1]) for name in names])
    query = np.random.default_rng(0).random(99) < 0.3
    for metric, distance in (
        ("cosine", distances.CosineSimilarity()),
        ("l2", distances.LpDistance(normalize_embeddings=False)),
    ):
        peer = calculator.AccuracyCalculator(
            include=(
                "precision_at_1",
                "r_precision",
                "mean_average_precision_at_r",
                "mean_reciprocal_rank",
            ),
            k=int((~query).sum()),
            knn_func=inference.CustomKNN(distance),
        ).get_accuracy(
            *(torch.from_numpy(one) for one in (vectors[query], labels[query])),
            *(torch.from_numpy(one) for one in (vectors[~query], labels[~query])),
        )
        got = query_results(vectors, labels, query=query, gallery=~query, metric=metric).metrics()
        assert got.recall[1] == pytest.approx(peer["precision_at_1"])
        assert got.r_precision == pytest.approx(peer["r_precision"])
        assert got.map_at_r == pytest.approx(peer["mean_average_precision_at_r"])
        assert got.mrr == pytest.approx(peer["mean_reciprocal_rank"])
