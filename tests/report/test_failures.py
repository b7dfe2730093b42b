"""The page of failures: the same worst queries as plain loops find, counts that add up."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedkit.evaluate import Evaluation, evaluate
from embedkit.report.failures import failures_page, worst_failures


def measured(
    vectors: np.ndarray[Any, Any], labels: list[str], gallery: Any = None, metric: str = "cosine"
) -> Evaluation:
    return evaluate(vectors, labels, ks=(1,), gallery=gallery, metric=metric, repeats=2)


def some(rows: int = 60, classes: int = 8) -> tuple[np.ndarray[Any, Any], list[str]]:
    rng = np.random.default_rng(3)
    labels = [f"c{number}" for number in rng.integers(0, classes, rows)]
    return rng.normal(size=(rows, 4)).astype(np.float32), labels


def by_loops(
    vectors: list[list[float]], labels: list[str], found: list[bool], metric: str
) -> dict[int, tuple[list[int], int, int, float]]:
    """Each failed query: the wrong ones before the first right, that, its rank and its score."""

    def score(a: list[float], b: list[float]) -> float:
        if metric == "l2":
            return math.dist(a, b)
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    failed = {}
    for query, vector in enumerate(vectors):
        others = [row for row in range(len(vectors)) if row != query and found[row]]
        sign = 1 if metric == "l2" else -1
        others.sort(key=lambda row, vector=vector: sign * score(vector, vectors[row]))  # type: ignore[misc]
        rank = next((at for at, row in enumerate(others) if labels[row] == labels[query]), None)
        if rank:
            right = others[rank]
            failed[query] = (others[:rank], right, rank + 1, score(vector, vectors[right]))
    return failed


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("part", [False, True])
def test_the_worst_queries_are_those_that_plain_loops_find(metric: str, part: bool) -> None:
    vectors, labels = some()
    gallery = np.arange(len(labels)) % 3 != 0 if part else np.ones(len(labels), bool)
    expected = by_loops(vectors.tolist(), labels, gallery.tolist(), metric)
    figures = measured(vectors, labels, gallery, metric)
    found = worst_failures(figures, vectors, gallery=gallery, most=1000)
    assert sorted(one.query for one in found) == sorted(expected)
    for one in found:
        wrong, right, rank, score = expected[one.query]
        assert (list(one.winners), one.right, one.rank) == (wrong[:3], right, rank)
        assert one.right_score == pytest.approx(score, abs=1e-4)
    ranks = [one.rank for one in found]
    assert ranks == sorted(ranks, reverse=True)
    assert worst_failures(figures, vectors, gallery=gallery, most=3) == found[:3]


def test_right_wrong_and_lone_queries_add_up_on_the_page(tmp_path: Path) -> None:
    vectors, labels = some()
    labels[0] = "nobody else"
    figures = measured(vectors, labels)
    page = failures_page(
        figures,
        vectors,
        files=[tmp_path / f"{row}.jpg" for row in range(len(labels))],
        names=[f"{row}.jpg" for row in range(len(labels))],
        title="Where it fails",
    )
    said = re.search(r"(\d+) queries; 1 more have.*?right for (\d+), wrong for (\d+)", page)
    assert said is not None
    asked, right, wrong = map(int, said.groups())
    assert (asked, right + wrong) == (len(labels) - 1, asked)
    assert right / asked == pytest.approx(figures.metrics.recall[1])
    assert page.count('class="card row"') == min(wrong, 40)
    table = page[page.index("taken for</th>") : page.index("Worst queries")]
    counts = [int(cell) for cell in re.findall(r"</td><td>(\d+)</td>", table)]
    assert counts == sorted(counts, reverse=True)
    assert sum(counts) <= wrong
    assert "the picture is gone" in page


def test_a_hostile_label_stays_text_and_no_failure_says_so() -> None:
    vectors = np.eye(2, dtype=np.float32)[[0, 0, 1, 1]]
    labels = ["<script>", "b", "<script>", "b"]

    def page(labels: list[str]) -> str:
        return failures_page(
            measured(vectors, labels),
            vectors,
            files=[Path("gone.jpg")] * 4,
            names=["gone.jpg"] * 4,
            title="t",
        )

    assert "<script>" not in page(labels)
    assert "&lt;script&gt;" in page(labels)
    assert "No query failed." in page(["a", "a", "b", "b"])
    assert "No query has a match to find." in page(["a", "b", "c", "d"])
