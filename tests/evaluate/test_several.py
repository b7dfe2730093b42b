"""Several vectors per picture: every figure equals one worked out pair by pair in plain Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from embedkit.errors import EmbedKitError, UsageError
from embedkit.evaluate import (
    calibrate,
    clustering,
    continuous_metrics,
    greatest_cosines,
    nearest,
    open_set,
    retrieval_metrics,
    split_rows,
    triplet_metrics,
)

Floats = npt.NDArray[np.float32]


def pictures(count: int, several: int, dim: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((count, several, dim), dtype=np.float32)


def by_loops(left: npt.NDArray[Any], right: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The greatest cosine of each two pictures, one pair of vectors after the other."""
    scores = np.empty((len(left), len(right)))
    for i, one in enumerate(left.astype(float)):
        for j, other in enumerate(right.astype(float)):
            scores[i, j] = max(
                float(a @ b) / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-30)
                for a in one
                for b in other
            )
    return scores


@pytest.mark.parametrize(("several", "dim"), [(1, 3), (2, 4), (3, 1), (5, 7)])
def test_likeness_is_the_greatest_cosine(several: int, dim: int) -> None:
    left, right = pictures(4, several, dim), pictures(6, several, dim, seed=1)
    left[1] *= 1e-8
    right[2, 0] = 0
    assert np.allclose(greatest_cosines(left, right), by_loops(left, right), atol=1e-12)


def test_a_row_is_cut_into_its_vectors_in_order() -> None:
    rows = np.arange(12.0).reshape(2, 6)
    assert split_rows(rows, 1) is rows
    assert split_rows(rows, 3)[1].tolist() == [[6, 7], [8, 9], [10, 11]]
    assert split_rows(np.empty((0, 6)), 2).shape[1] == 2
    with pytest.raises(ValueError, match="are not 4 vectors side by side"):
        split_rows(rows, 4)


@pytest.mark.parametrize(("count", "several"), [(2, 2), (40, 2), (41, 3)])
def test_neighbours_and_recall_are_those_of_the_loops(count: int, several: int) -> None:
    found = pictures(count, several, 5)
    labels = np.random.default_rng(1).integers(0, max(count // 4, 1), count)
    scores = by_loops(found, found)
    np.fill_diagonal(scores, -np.inf)
    order = np.argsort(-scores, axis=1, kind="stable")
    assert np.array_equal(nearest(found, 7), order[:, : min(7, count - 1)])
    asking = [row for row in range(count) if (labels == labels[row]).sum() > 1]
    right = [labels[order[row, 0]] == labels[row] for row in asking]
    assert retrieval_metrics(found, labels).recall[1] == pytest.approx(np.mean(right))


def test_large_sets_are_ranked_as_small_ones_are() -> None:
    # Beyond 2,048 another way is taken: a shortlist in float32. Equal pictures stand by row.
    found = pictures(2300, 2, 4)
    found[7] = found[2100]
    unit = found / np.linalg.norm(found, axis=2, keepdims=True)
    asks = np.zeros(len(found), bool)
    asks[[0, 7, 1500, 2100]] = True
    products = np.einsum("ikd,jld->ijkl", unit[asks].astype(float), unit.astype(float))
    scores = products.max(axis=(2, 3)).astype(np.float32)
    scores[np.arange(4), np.flatnonzero(asks)] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :10]
    assert np.array_equal(nearest(found, 10, queries=asks), order)


def test_one_vector_in_three_dimensions_is_one_vector() -> None:
    flat = pictures(120, 1, 6)[:, 0]
    labels = np.repeat(np.arange(30), 4)
    assert retrieval_metrics(flat[:, None], labels) == retrieval_metrics(flat, labels)
    assert calibrate(flat[:, None], labels) == calibrate(flat, labels)


def test_pairs_and_thresholds_are_of_the_greatest_cosine() -> None:
    found, labels = pictures(110, 2, 3), np.arange(110) // 2
    scores = by_loops(found, found)
    different = np.sort(scores[(labels[:, None] != labels)])[::-1]
    cut = open_set(found, labels, rates=(0.1,)).threshold[0.1]
    assert (different > cut).mean() <= 0.1
    assert cut == pytest.approx(different[int(0.1 * len(different))], abs=1e-6)
    strangers = np.where(labels[:, None] != labels, scores, -np.inf).max(axis=1)
    assert (strangers >= calibrate(found, labels)["match"]).mean() <= 0.01


def test_numbers_and_triplets_are_judged_by_it_too() -> None:
    found, targets = pictures(20, 2, 3), np.random.default_rng(2).random(20)
    scores = by_loops(found, found)
    np.fill_diagonal(scores, -np.inf)
    best = scores.argmax(axis=1)
    told = continuous_metrics(found, targets, ks=(1,)).target_distance[1]
    assert told == pytest.approx(np.abs(targets - targets[best]).mean())
    places = [(0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11)]
    right = [scores[a, b] > max(scores[a, odd], scores[b, odd]) for a, b, odd in places]
    assert triplet_metrics(found, places).to_json()["triplet_accuracy"] == np.mean(right)


def test_what_has_no_meaning_is_refused() -> None:
    found, labels = pictures(4, 2, 3), [0, 0, 1, 1]
    with pytest.raises(ValueError, match="compared by their cosines only"):
        retrieval_metrics(found, labels, metric="l2")
    with pytest.raises(ValueError, match="compared by their cosines only"):
        triplet_metrics(found, [(0, 1, 2)], metric="l2")
    with pytest.raises(ValueError, match=r"\(N, D\) or \(N, K, D\)"):
        nearest(found[None], 1)
    with pytest.raises(UsageError, match="NMI and AMI need one vector per picture"):
        clustering(found, labels)
    found[1, 1, 0] = np.nan
    with pytest.raises(EmbedKitError, match="not finite"):
        nearest(found, 1)


def test_no_picture_has_no_neighbour() -> None:
    assert nearest(np.empty((0, 2, 3)), 4).shape == (0, 0)
    assert nearest(pictures(1, 2, 3), 4).shape == (1, 0)
