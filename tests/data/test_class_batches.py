"""What the two other ways of making batches promise, held against small sets of labels."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from embedkit.data import HardClassSampler, VariedPKSampler

LABELS = np.repeat(np.arange(25), [2, 3, 5, 8, 12] * 5)


def test_the_shape_varies_and_the_size_does_not() -> None:
    labels = np.repeat(np.arange(40), 8)
    sampler = VariedPKSampler(labels, classes_per_batch=8, images_per_class=4, seed=1, steps=30)
    shapes = Counter()
    for batch in sampler.batches(0):
        assert len(batch) == len(set(batch.tolist())) == 32
        sizes = set(Counter(labels[batch].tolist()).values())
        assert len(sizes) == 1
        shapes[sizes.pop()] += 1
    assert set(shapes) == {2, 4, 8}
    assert min(shapes.values()) >= 3


@pytest.mark.parametrize(("classes", "images"), [(2, 2), (3, 2), (4, 6), (16, 4), (60, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_every_class_and_image_comes_and_small_classes_are_no_trouble(
    classes: int, images: int, seed: int
) -> None:
    sampler = VariedPKSampler(LABELS, classes_per_batch=classes, images_per_class=images, seed=seed)
    least = max(2, images // 2)
    seen: set[int] = set()
    for epoch in range(-(-12 // least)):
        batches = sampler.batches(epoch)
        assert len(batches) == sampler.steps
        for batch, again in zip(batches, sampler.batches(epoch), strict=True):
            assert np.array_equal(batch, again)
            assert len(batch) == len(set(batch.tolist())) <= classes * images
            counts = Counter(LABELS[batch].tolist())
            assert len(counts) >= 2
            assert min(counts.values()) >= 2
        assert {label for batch in batches for label in LABELS[batch].tolist()} == set(range(25))
        seen |= {row for batch in batches for row in batch.tolist()}
    assert seen == set(range(len(LABELS)))


def test_two_epochs_and_two_seeds_differ() -> None:
    def plan(seed: int, epoch: int) -> list[list[int]]:
        sampler = VariedPKSampler(LABELS, classes_per_batch=4, images_per_class=4, seed=seed)
        return [batch.tolist() for batch in sampler.batches(epoch)]

    assert plan(0, 0) == plan(0, 0)
    assert plan(0, 0) != plan(0, 1)
    assert plan(0, 0) != plan(1, 0)


@pytest.mark.parametrize("classes", [2, 3, 8, 30])
def test_half_of_the_others_are_near_the_class_in_turn(classes: int) -> None:
    near = np.array([[(one + step) % 25 for step in (1, 24, 2, 23, 3)] for one in range(25)])
    sampler = HardClassSampler(
        LABELS, near=lambda: near, classes_per_batch=classes, images_per_class=3, seed=0
    )
    for epoch in range(3):
        met: set[int] = set()
        for batch in sampler.batches(epoch):
            assert len(batch) == len(set(batch.tolist())) <= 3 * classes
            seen = list(dict.fromkeys(LABELS[batch].tolist()))
            expected = near[seen[0]][: min(classes, 25) // 2].tolist()
            assert seen[1 : 1 + len(expected)] == expected
            met.update(seen)
        assert met == set(range(25))


def test_what_is_near_is_asked_at_every_epoch_and_a_class_of_one_image_is_passed_over() -> None:
    labels = np.array([0, 0, 1, 2, 2, 3, 3, 4, 4])
    asked = []

    def near() -> np.ndarray:
        asked.append(len(asked))
        other = 2 if len(asked) == 1 else 3
        return np.array([[1, other], [0, 2], [0, 1], [0, 1], [1, 0]])

    sampler = HardClassSampler(labels, near=near, classes_per_batch=2, images_per_class=2, seed=0)
    for wanted in (2, 3):
        pairs = [list(dict.fromkeys(labels[batch].tolist())) for batch in sampler.batches(wanted)]
        assert all(1 not in pair for pair in pairs)
        # `P // 2` is 1, and that one is class 1, which cannot be had: the next stands in.
        assert [pair for pair in pairs if pair[0] == 0] == [[0, wanted]]
    assert asked == [0, 1]
