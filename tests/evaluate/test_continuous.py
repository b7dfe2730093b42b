"""nDCG, target distances and triplet accuracy against the same sums written as loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from embedkit.evaluate import continuous, continuous_metrics, triplet_metrics


def _by_loops(
    rows: list[list[float]],
    targets: list[list[float]],
    k: int,
    asks: list[bool],
    found: list[bool],
    metric: str,
) -> tuple[float, float, float, float]:
    """nDCG@k, mean target distance of the k nearest, of all, and of the k best."""

    def away(i: int, j: int) -> float:
        a, b = rows[i], rows[j]
        if metric == "l2":
            return math.dist(a, b)
        return math.dist([v / math.hypot(*a) for v in a], [v / math.hypot(*b) for v in b])

    totals, count = [0.0] * 4, 0
    for query in range(len(rows)):
        others = [row for row in range(len(rows)) if found[row] and row != query]
        if not asks[query] or not others:
            continue
        count += 1
        g = {row: math.dist(targets[query], targets[row]) for row in others}
        near = sorted(others, key=lambda row: (away(query, row), row))[:k]
        best = sorted(g.values())[:k]
        dcg = sum(2 ** -math.log2(g[row] + 1) / math.log2(r + 2) for r, row in enumerate(near))
        most = sum(2 ** -math.log2(one + 1) / math.log2(r + 2) for r, one in enumerate(best))
        totals[0] += dcg / most
        totals[1] += sum(g[row] for row in near) / len(near)
        totals[2] += sum(g.values()) / len(g)
        totals[3] += sum(best) / len(best)
    first, second, third, fourth = (total / count for total in totals)
    return first, second, third, fourth


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("width", [1, 2, 12])
@pytest.mark.parametrize("marked", [False, True])
def test_it_is_the_sum_written_as_loops(
    metric: str, width: int, marked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(width)
    rows, targets = rng.normal(size=(17, 5)), rng.normal(size=(17, width)).round(1)
    targets[3] = targets[9]
    asks = rng.random(17) < 0.6 if marked else np.ones(17, bool)
    found = rng.random(17) < 0.7 if marked else np.ones(17, bool)
    monkeypatch.setattr(continuous, "_BLOCK", 4)
    got = continuous_metrics(
        rows,
        targets[:, 0] if width == 1 else targets,
        ks=(1, 3, 30),
        query=asks if marked else None,
        gallery=found if marked else None,
        metric=metric,
    )
    for k in (1, 3, 30):
        wanted = _by_loops(
            rows.tolist(), targets.tolist(), k, asks.tolist(), found.tolist(), metric
        )
        given = (got.ndcg[k], got.target_distance[k], got.chance, got.ideal[k])
        assert given == pytest.approx(wanted, abs=1e-9)
    assert got.queries == asks.sum()


def test_the_targets_themselves_are_a_perfect_embedding() -> None:
    targets = np.random.default_rng(0).normal(size=(30, 2))
    got = continuous_metrics(targets, targets, metric="l2")
    assert got.ndcg == {1: pytest.approx(1), 10: pytest.approx(1)}
    assert got.target_distance == pytest.approx(got.ideal)
    assert got.chance > got.target_distance[10]


def test_one_photo_and_none_have_nothing_to_find() -> None:
    for count in (0, 1):
        got = continuous_metrics(np.ones((count, 3)), np.ones(count))
        assert got.queries == 0
        assert got.to_json()["ndcg@10"] is None
        assert got.to_json()["chance_target_distance"] is None
    pair = continuous_metrics(np.ones((2, 3)), [0.0, 4.0])
    assert pair.ndcg[10] == pytest.approx(1)
    assert pair.target_distance[1] == 4


@pytest.mark.parametrize("ks", [(), (0,), (-1, 2)])
def test_impossible_arguments_are_refused(ks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="ks must be"):
        continuous_metrics(np.ones((3, 2)), np.ones(3), ks=ks)
    with pytest.raises(ValueError, match="cosine or l2"):
        continuous_metrics(np.ones((3, 2)), np.ones(3), metric="dot")
    with pytest.raises(ValueError, match="cosine or l2"):
        triplet_metrics(np.ones((3, 2)), [[0, 1, 2]], metric="dot")


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_triplet_accuracy_is_counted_one_by_one(metric: str) -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(9, 4))
    triplets = [rng.permutation(9)[:3].tolist() for _ in range(50)]
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True) if metric == "cosine" else rows
    right = 0
    for a, b, odd in triplets:
        alike = math.dist(unit[a], unit[b])
        right += alike < math.dist(unit[a], unit[odd]) and alike < math.dist(unit[b], unit[odd])
    got = triplet_metrics(rows, triplets, metric=metric)
    assert got.accuracy == pytest.approx(right / 50)
    assert got.to_json() == {"triplet_accuracy": got.accuracy, "triplets": 50}


def test_ties_are_wrong_and_no_triplets_are_no_accuracy() -> None:
    assert triplet_metrics(np.ones((3, 2)), [[0, 1, 2]]).accuracy == 0
    assert triplet_metrics(np.ones((3, 2)), []).to_json() == {
        "triplet_accuracy": None,
        "triplets": 0,
    }
