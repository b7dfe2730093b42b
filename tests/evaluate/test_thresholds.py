"""Thresholds of a model: what they let through, counted in loops."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from embedkit.evaluate import calibrate


def clusters(classes: int, each: int, *, spread: float, dim: int = 8, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    centres = np.repeat(rng.standard_normal((classes, dim)), each, axis=0)
    rows = centres + spread * rng.standard_normal(centres.shape)
    labels = [f"c{n}" for n in np.repeat(np.arange(classes), each)]
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), labels


def scored(a: Any, b: Any, metric: str) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.float32(a @ b if metric == "cosine" else -np.sqrt(((a - b) ** 2).sum())))


def trials(rows: Any, labels: list[str], metric: str) -> tuple[list[float], list[float]]:
    """For each picture its best score in another class and in its own."""
    other, same = [], []
    for i in range(len(rows)):
        scores = [(scored(rows[i], rows[j], metric), labels[j]) for j in range(len(rows)) if j != i]
        other.append(max(score for score, label in scores if label != labels[i]))
        same.append(max((s for s, label in scores if label == labels[i]), default=-np.inf))
    return other, same


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("spread", [0.2, 0.7])
def test_at_most_the_stated_share_of_strangers_is_let_through(metric: str, spread: float) -> None:
    rows, labels = clusters(30, 7, spread=spread)
    labels[-1] = "alone"
    figures = calibrate(rows, labels, metric=metric)
    other, same = trials(rows, labels, metric)
    for name, rate in (("match", 0.01), ("unsure", 0.1)):
        cut = figures[name]
        let_through = sum(score >= cut - 1e-5 for score in other)
        assert sum(score >= cut for score in other) <= rate * len(other) <= let_through + 1
        pairs = [(a, b) for a, b in zip(other, same, strict=True) if b > -np.inf]
        found = sum(b >= cut and b > a for a, b in pairs) / len(pairs)
        assert figures[f"{name}_found"] == pytest.approx(found, abs=0.011)
        assert figures[f"{name}_false"] == rate
        assert figures[f"{name}_low"] <= cut <= figures[f"{name}_high"]
    assert figures["unsure"] <= figures["match"]
    assert (figures["queries"], figures["classes"]) == (210, 31)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_pairs_have_thresholds_of_their_own(metric: str) -> None:
    rows, labels = clusters(25, 5, spread=0.4)
    figures = calibrate(rows, labels, metric=metric)
    different, same = [], []
    for i in range(len(rows)):
        for j in range(len(rows)):
            if i != j:
                kind = same if labels[i] == labels[j] else different
                kind.append(scored(rows[i], rows[j], metric))
    for name, rate in (("pair_match", 0.001), ("pair_unsure", 0.01)):
        assert np.mean(np.array(different) >= figures[name]) <= rate
        assert np.mean(np.array(different) >= figures[name] - 1e-3) > 0
        assert figures[f"{name}_found"] == pytest.approx(np.mean(np.array(same) >= figures[name]))
        assert figures[f"{name}_false"] == rate
    # A stranger in a search has many chances, a pair has one.
    assert figures["pair_match"] < figures["match"]


def test_strangers_that_score_the_same_are_refused_together() -> None:
    rows = np.tile(np.eye(4, dtype=np.float32), (40, 1))
    labels = [f"c{n}" for n in range(160)]  # every picture has 39 twins of other classes
    figures = calibrate(rows, labels)
    assert figures["match"] > 1 - 1e-6
    assert figures["match"] == pytest.approx(1, abs=1e-5)
    assert "match_found" not in figures  # nobody has a second one of its class


@pytest.mark.parametrize(
    ("classes", "each"), [(1, 200), (33, 3), (0, 0)], ids=["one class", "99 pictures", "none"]
)
def test_too_little_to_tell_gives_nothing(classes: int, each: int) -> None:
    rows, labels = clusters(classes, each, spread=0.1)
    assert calibrate(rows, labels) == {}


def test_vectors_that_are_not_finite_give_nothing() -> None:
    rows, labels = clusters(30, 5, spread=0.1)
    rows[3, 2] = np.nan
    assert calibrate(rows, labels) == {}


def test_the_same_pictures_give_the_same_plain_numbers() -> None:
    rows, labels = clusters(30, 5, spread=0.5)
    figures = calibrate(rows, labels)
    assert calibrate(rows, labels) == figures
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert all(type(value) is float for value in figures.values())
