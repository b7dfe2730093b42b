"""What `PKSampler` promises, held against many small sets of labels."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedkit.data import PKSampler
from embedkit.errors import DataError


@st.composite
def samplers(draw: st.DrawFn) -> tuple[PKSampler, list[int], int, int]:
    """A sampler of shuffled labels, with P and K."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=2, max_size=12))
    sizes += draw(st.lists(st.integers(2, 9), min_size=2, max_size=2))
    labels = [10 * number - 7 for number, size in enumerate(sizes) for _ in range(size)]
    labels = draw(st.permutations(labels))
    p, k = draw(st.integers(2, 6)), draw(st.integers(2, 6))
    sampler = PKSampler(
        labels, classes_per_batch=p, images_per_class=k, seed=draw(st.integers(0, 99))
    )
    return sampler, labels, p, k


def members_of(batch: np.ndarray, labels: list[int], p: int) -> list[int]:
    """The first P classes of a batch; images of a class stand together."""
    seen = list(dict.fromkeys(labels[row] for row in batch))
    assert [labels[row] for row in batch] == [c for c in seen for row in batch if labels[row] == c]
    return seen[:p]


@settings(max_examples=150, deadline=None)
@given(samplers(), st.integers(0, 50))
def test_every_batch_keeps_its_promises(
    drawn: tuple[PKSampler, list[int], int, int], epoch: int
) -> None:
    sampler, labels, p, k = drawn
    sizes = Counter(labels)
    usable = {label for label, size in sizes.items() if size > 1}
    assert sampler.left_out == tuple(sorted(set(labels) - usable))
    batches = sampler.batches(epoch)
    assert len(batches) == sampler.steps
    for batch in batches:
        counts = Counter(labels[row] for row in batch)
        assert len(set(batch.tolist())) == len(batch) <= p * k
        assert 2 <= min(p, len(usable)) <= len(counts)
        assert min(counts.values()) >= 2
        assert set(counts) <= usable
        for label in members_of(batch, labels, min(p, len(usable))):
            assert counts[label] == min(k, sizes[label])
        # Room is left only where nothing fits: every class is in, or one place is free.
        assert len(batch) >= p * k - 1 or set(counts) == usable


@settings(max_examples=150, deadline=None)
@given(samplers(), st.integers(0, 50))
def test_an_epoch_reaches_every_class_and_is_fair_to_classes_and_images(
    drawn: tuple[PKSampler, list[int], int, int], epoch: int
) -> None:
    sampler, labels, p, _ = drawn
    usable = {label for label, size in Counter(labels).items() if size > 1}
    batches = sampler.batches(epoch)
    turns = Counter(c for b in batches for c in members_of(b, labels, min(p, len(usable))))
    assert set(turns) == usable
    assert max(turns.values()) - min(turns.values()) <= 1
    uses = Counter(int(row) for batch in batches for row in batch)
    for label in usable:
        of_class = [uses[row] for row in range(len(labels)) if labels[row] == label]
        assert max(of_class) - min(of_class) <= 1


@settings(max_examples=60, deadline=None)
@given(samplers(), st.integers(0, 3))
def test_every_image_is_used_within_as_many_epochs_as_its_class_has_portions(
    drawn: tuple[PKSampler, list[int], int, int], cycle: int
) -> None:
    sampler, labels, _, k = drawn
    sizes = Counter(labels)
    used: dict[int, set[int]] = {}
    for row, label in enumerate(labels):
        if sizes[label] < 2:
            continue
        epochs = math.ceil(sizes[label] / min(k, sizes[label]))
        for epoch in range(cycle * epochs, (cycle + 1) * epochs):
            if epoch not in used:
                used[epoch] = {int(place) for batch in sampler.batches(epoch) for place in batch}
        assert any(row in used[e] for e in range(cycle * epochs, (cycle + 1) * epochs))


def test_a_plan_follows_from_seed_and_epoch_alone() -> None:
    labels = [label for label in range(9) for _ in range(5)]

    def plan(seed: int, epoch: int) -> list[list[int]]:
        sampler = PKSampler(labels, classes_per_batch=3, images_per_class=2, seed=seed)
        sampler.batches(7)  # what was asked before does not matter
        return [batch.tolist() for batch in sampler.batches(epoch)]

    assert plan(0, 3) == plan(0, 3)
    assert plan(0, 3) != plan(0, 4)
    assert plan(0, 3) != plan(1, 3)


@pytest.mark.parametrize(
    ("sizes", "p", "k", "steps"),
    [
        ([10, 10], 2, 5, 2),  # 20 images in batches of 10
        ([11, 10], 2, 5, 3),  # one more image
        ([2] * 9, 2, 8, 5),  # few images, but nine classes two at a time
        ([3, 3], 50, 50, 1),  # everything in one batch
    ],
)
def test_an_epoch_holds_the_images_once_and_all_classes(
    sizes: list[int], p: int, k: int, steps: int
) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    assert PKSampler(labels, classes_per_batch=p, images_per_class=k, seed=0).steps == steps


def test_small_classes_bring_what_they_have_and_others_fill_the_batch() -> None:
    labels = np.repeat(np.arange(8), [2, 2, 2, 2, 2, 2, 2, 2])
    sampler = PKSampler(labels, classes_per_batch=2, images_per_class=4, seed=0)
    for batch in sampler.batches(0):
        assert len(batch) == 8
        assert len(set(labels[batch].tolist())) == 4


def test_fewer_steps_than_classes_need_take_another_part_each_epoch() -> None:
    labels = np.repeat(np.arange(40), 2)
    sampler = PKSampler(labels, classes_per_batch=2, images_per_class=2, seed=0, steps=3)
    parts = [frozenset(labels[np.concatenate(sampler.batches(e))].tolist()) for e in range(20)]
    assert all(len(part) == 6 for part in parts)
    assert len(set(parts)) == 20


@pytest.mark.parametrize("labels", [[], [1], [1, 1, 1], [1, 2, 3], [1, 1, 2, 3]])
def test_fewer_than_two_classes_of_two_are_refused(labels: list[int]) -> None:
    with pytest.raises(DataError, match="at least two classes with two photos"):
        PKSampler(labels, classes_per_batch=2, images_per_class=2, seed=0)


@pytest.mark.parametrize(("p", "k", "steps"), [(1, 2, None), (2, 1, None), (2, 2, 0)])
def test_what_cannot_make_pairs_is_refused(p: int, k: int, steps: int | None) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        PKSampler([0, 0, 1, 1], classes_per_batch=p, images_per_class=k, seed=0, steps=steps)
