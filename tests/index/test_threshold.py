"""Verdicts from a contract's thresholds, near-duplicate groups, and clusters."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedkit.errors import MismatchError, UsageError
from embedkit.index.cluster import ALONE, cluster_by_density, cluster_by_links, cluster_by_means
from embedkit.index.duplicates import linked_groups, same_content
from embedkit.index.threshold import Thresholds
from tests.index.fakes import contract
from tests.index.test_rerank import catalog_of, unit

GOOD = {"match": 0.8, "unsure": 0.5, "match_false": 0.01, "unsure_false": 0.1, "queries": 300.0}


def carrying(thresholds: Any) -> Any:
    return dataclasses.replace(contract(), thresholds=thresholds)


@pytest.mark.parametrize(
    ("score", "verdict"),
    [(1, "match"), (0.8, "match"), (0.79, "unsure"), (0.5, "unsure"), (0.49, "none"), (-1, "none")],
)
def test_a_score_falls_in_one_of_three(score: float, verdict: str) -> None:
    thresholds = Thresholds.for_search(carrying(GOOD))
    assert thresholds is not None
    assert thresholds.verdict(score) == verdict
    assert thresholds.queries == 300


def test_a_model_without_thresholds_has_none() -> None:
    assert Thresholds.for_search(contract()) is None
    assert Thresholds.for_search(carrying({"match": 0.8})) is None
    assert Thresholds.for_pairs(carrying(GOOD)) is None
    pairs = {f"pair_{name}": value for name, value in GOOD.items()}
    assert Thresholds.for_pairs(carrying(pairs)) == Thresholds(0.8, 0.5, 0.01, 0.1)


@pytest.mark.parametrize(
    "change", [{"match": "high"}, {"unsure": float("nan")}, {"match": 0.1}, {"queries": None}]
)
def test_thresholds_that_are_none_are_a_damaged_model(change: dict[str, Any]) -> None:
    with pytest.raises(MismatchError, match="damaged"):
        Thresholds.for_search(carrying(GOOD | change))


# Near duplicates


def by_walking(vectors: Any, least: float, metric: str) -> list[int]:
    """The lowest row of each row's connected component, by depth first search over all pairs."""
    rows = vectors.astype(np.float64)

    def linked(i: int, j: int) -> bool:
        score = rows[i] @ rows[j] if metric == "cosine" else -np.linalg.norm(rows[i] - rows[j])
        return bool(np.float32(score) >= np.float32(least))

    roots = [-1] * len(rows)
    for start in range(len(rows)):
        waiting = [start] if roots[start] < 0 else []
        while waiting:
            one = waiting.pop()
            if roots[one] < 0:
                roots[one] = start
                waiting += [j for j in range(len(rows)) if roots[j] < 0 and linked(one, j)]
    return roots


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("least", [0.9, 0.99, 1.0])
def test_groups_are_what_a_walk_over_all_pairs_reaches(metric: str, least: float) -> None:
    vectors = unit(120, 3, 4)
    vectors[50:60] = vectors[:10]
    cut = least if metric == "cosine" else -float(np.sqrt(2 - 2 * least))
    got = linked_groups(lambda rows: vectors[rows], 120, cut, metric=metric)
    assert got.tolist() == by_walking(vectors, cut, metric)


def test_groups_over_several_blocks_equal_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = unit(300, 4, 1)
    whole = linked_groups(lambda rows: vectors[rows], 300, 0.95)
    monkeypatch.setattr("embedkit.index.duplicates._ROWS", 7)
    monkeypatch.setattr("embedkit.index.duplicates._COLUMNS", 11)
    seen: list[int] = []
    parts = linked_groups(lambda rows: vectors[rows], 300, 0.95, progress=seen.append)
    assert parts.tolist() == whole.tolist()
    assert sum(seen) == 300


def test_a_long_chain_and_one_crowd_are_one_group_each() -> None:
    angles = np.linspace(0, np.pi / 2, 2000)
    chain = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    order = np.random.default_rng(0).permutation(2000)
    assert not linked_groups(lambda rows: chain[order][rows], 2000, 0.9999996).any()
    crowd = np.ones((3000, 1), np.float32)
    assert not linked_groups(lambda rows: crowd[rows], 3000, 1.0).any()


def test_nothing_one_and_links_alone() -> None:
    assert linked_groups(None, 0, 0.9).tolist() == []
    assert linked_groups(lambda rows: unit(1, 2), 1, 0.9).tolist() == [0]
    links = [(np.array([4, 4]), np.array([2, 1])), (np.array([3]), np.array([0]))]
    assert linked_groups(None, 6, 0.9, links=links).tolist() == [0, 1, 1, 0, 1, 5]
    with pytest.raises(UsageError, match="least score"):
        linked_groups(None, 3, float("nan"))


def test_files_of_one_content_are_found_and_lost_ones_named(tmp_path: Path) -> None:
    contents = [b"aa", b"bb", b"aa", b"c", b"aa", b"bb", b"ddd"]
    files: list[Path | None] = []
    for n, content in enumerate(contents):
        file = tmp_path / f"{n}"
        file.write_bytes(content)
        files.append(file)
    files += [tmp_path / "gone", None]
    assert same_content(files) == ([[0, 2, 4], [1, 5]], [7, 8])
    assert same_content([]) == ([], [])


# Clusters


def blobs(folder: Path) -> tuple[Any, list[int]]:
    """Three tight groups of 20, 30 and 10, and 5 far from all."""
    rng = np.random.default_rng(2)
    centres = np.eye(8)[:3]
    belongs = [1] * 30 + [0] * 20 + [2] * 10 + [ALONE] * 5
    rng.shuffle(belongs)
    extra = itertools.count(3)
    rows = [
        centres[one] + 0.02 * rng.standard_normal(8) if one >= 0 else np.eye(8)[next(extra)]
        for one in belongs
    ]
    vectors = np.stack(rows).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    # Numbered by size: 30, 20, 10.
    number = {1: 0, 0: 1, 2: 2, ALONE: ALONE}
    return catalog_of(folder, vectors), [number[one] for one in belongs]


def test_links_find_the_groups_and_leave_the_lone_ones(tmp_path: Path) -> None:
    catalog, wanted = blobs(tmp_path)
    assert cluster_by_links(catalog, 0.9).tolist() == wanted
    assert set(cluster_by_links(catalog, 0.99999999).tolist()) == {ALONE}


def test_means_put_every_picture_somewhere_and_repeat(tmp_path: Path) -> None:
    catalog, wanted = blobs(tmp_path)
    got = cluster_by_means(catalog, 8)
    assert (got >= 0).all()
    assert got.tolist() == cluster_by_means(catalog, 8).tolist()
    sizes = np.bincount(got)
    assert sizes.tolist() == sorted(sizes, reverse=True)
    assert cluster_by_means(catalog, 1).tolist() == [0] * 65
    assert sorted(cluster_by_means(catalog, 65).tolist())[0] == 0
    del wanted
    for wrong in (0, 66):
        with pytest.raises(UsageError, match="65 pictures"):
            cluster_by_means(catalog, wrong)


def test_density_finds_the_groups(tmp_path: Path) -> None:
    catalog, wanted = blobs(tmp_path)
    assert cluster_by_density(catalog, 6).tolist() == wanted
    assert cluster_by_density(catalog, 66).tolist() == [ALONE] * 65
    with pytest.raises(UsageError, match="at least 2"):
        cluster_by_density(catalog, 1)
