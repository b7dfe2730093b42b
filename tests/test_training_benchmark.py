"""The training benchmark gives all trainers the same batches and compares them at one recall."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.training import make_course, time_to_recall
from embedkit.data import PhotoSet, PKSampler
from tests.tiny_recipe import tiny_recipe


def _curve(*recalls: float, seconds: float) -> list[dict[str, float]]:
    return [
        {"step": 10 * at, "recall": recall, "seconds": at * seconds, "processor": at * seconds / 2}
        for at, recall in enumerate(recalls)
    ]


def test_the_time_is_that_to_the_recall_which_all_reach_for_the_first_time() -> None:
    ours = _curve(0.2, 0.5, 0.9, 0.8, seconds=3)
    found = time_to_recall({"embedkit": ours, "pml": _curve(0.2, 0.3, 0.6, 0.7, seconds=4)})
    assert found["recall@1"] == 0.7  # the lower one of the two best
    assert found["reached"]["embedkit"]["seconds"] == 6
    assert found["reached"]["pml"]["seconds"] == 12
    assert found["time of embedkit against"] == {"pml": {"seconds": 0.5, "processor": 0.5}}


def test_a_trainer_that_never_learns_makes_no_one_the_winner() -> None:
    flat = _curve(0.4, 0.2, 0.3, seconds=1)
    found = time_to_recall({"embedkit": _curve(0.4, 0.6, 0.7, seconds=1), "pml": flat})
    assert found["recall@1"] == 0.4
    assert found["time of embedkit against"] == {"pml": {"seconds": None, "processor": None}}


def test_the_others_are_given_the_batches_of_our_epochs() -> None:
    labels = tuple("aaabbbcccddd")
    names = tuple(Path(f"{place}.jpg") for place in range(12))
    photos = PhotoSet(Path("/photos"), names, labels, ("",) * 12)
    recipe = tiny_recipe(epochs=3, epoch_steps=2)
    course = make_course(recipe, photos, held_out="x.npz", recall=True, workers=1).course
    sampler = PKSampler(
        [ord(label) - ord("a") for label in labels],
        classes_per_batch=3,
        images_per_class=2,
        seed=0,
        steps=2,
    )
    expected = [batch.tolist() for epoch in range(3) for batch in sampler.batches(epoch)]
    assert course.batches == expected
    assert course.every == 2
    assert course.rates == pytest.approx((1e-3, 1e-3, 1e-2))
