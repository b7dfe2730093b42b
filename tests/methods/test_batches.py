"""How methods make batches: each property by counting."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedkit import methods
from embedkit.data import PhotoSet, Triplet
from embedkit.errors import DataError
from embedkit.methods import Batch, Setting
from embedkit.train import Recipe
from embedkit.train.run import create_untrained

_Make = Callable[..., Setting]


@pytest.fixture
def setting(tiny: Callable[..., Recipe]) -> _Make:
    """Of so many photos that need not exist, five of a class."""

    def make(count: int, *, columns: dict[str, Any] | None = None, **changes: Any) -> Setting:
        labels = tuple(f"{row // 5:03}" for row in range(count))
        paths = tuple(Path(f"{row}.jpg") for row in range(count))
        photos = PhotoSet(Path("/x"), paths, labels, ("train",) * count, **(columns or {}))
        numbers = np.arange(count) // 5
        return Setting(tiny(**changes), photos, numbers, photos.classes(), 4, 3)

    return make


def test_isif_shows_every_image_twice_and_no_other_image_again(setting: _Make) -> None:
    given = setting(23)
    sampler = methods.create("isif").sampler(given, None)
    assert sampler.steps == 23 // 3
    for epoch in range(3):
        batches = sampler.batches(epoch)
        firsts = np.concatenate([batch[:3] for batch in batches])
        assert len(set(firsts.tolist())) == len(firsts)
        assert all(np.array_equal(batch[:3], batch[3:]) for batch in batches)
    assert not np.array_equal(sampler.batches(0)[0], sampler.batches(1)[0])


def test_isif_takes_the_nearest_photo_as_a_second_view_as_often_as_asked(setting: _Make) -> None:
    given = setting(40)
    method = methods.create("isif", neighbour_views=0.5)
    method.prepare(given, create_untrained(given.recipe, weights="none"))
    features = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    method.begin_epoch(0, type("View", (), {"features": lambda self: features})())
    nearest = [
        min(
            (j for j in range(40) if j != i),
            key=lambda j: float((features[i] - features[j]).norm()),
        )
        for i in range(40)
    ]
    other = 0
    batches = method.sampler(given, 200).batches(0)
    for first, second in (
        (one, two) for batch in batches for one, two in zip(batch[:3], batch[3:], strict=True)
    ):
        assert second in (first, nearest[first])
        other += second != first
    assert 0.4 < other / 600 < 0.6
    with pytest.raises(DataError, match="two photos"):
        methods.create("isif").sampler(setting(1), None)


@pytest.mark.parametrize("name", ["log-ratio", "dense-triplet"])
def test_a_batch_is_an_anchor_its_nearest_in_label_space_and_others(
    setting: _Make, name: str
) -> None:
    rng = np.random.default_rng(0)
    targets = tuple((float(a), float(b)) for a, b in rng.integers(0, 4, (30, 2)))
    given = setting(30, columns={"targets": targets}, classes_per_batch=5)
    sampler = methods.create(name, neighbours=3).sampler(given, 6)
    anchors = []
    for batch in itertools.chain.from_iterable(sampler.batches(epoch) for epoch in range(10)):
        assert len(batch) == len(set(batch.tolist())) == 10
        anchor, *near = batch[:4]
        anchors.append(int(anchor))
        apart = {
            row: float(np.linalg.norm(np.subtract(targets[row], targets[anchor])))
            for row in range(30)
            if row != anchor
        }
        if name == "log-ratio":
            apart = {row: one for row, one in apart.items() if one > 0}
        assert [apart[row] for row in near] == sorted(apart.values())[:3]
    assert sorted(anchors[:30]) == sorted(anchors[30:]) == list(range(30))
    assert anchors[:30] != anchors[30:]


def test_one_target_cannot_be_learned_from(setting: _Make) -> None:
    given = setting(10, columns={"targets": ((1.0,),) * 10})
    with pytest.raises(DataError, match="10 photos with 1 different targets"):
        methods.create("log-ratio").sampler(given, None)


def test_triplets_come_in_turn_each_with_its_margin(setting: _Make) -> None:
    rng = np.random.default_rng(0)
    triplets = tuple(
        Triplet(*rng.permutation(20)[:3].tolist(), 0.5 if number % 2 else None)
        for number in range(7)
    )
    given = setting(20, columns={"triplets": triplets})
    method = methods.create("expression-triplet", margin=0.25)
    network = create_untrained(given.recipe, weights="none")
    method.prepare(given, network)
    sampler = method.sampler(given, 4)
    seen = []
    asked: list[list[float]] = []
    method.loss.forward = lambda rows, labels: asked.append(labels.tolist()) or rows.sum() * 0
    for epoch, step in itertools.product(range(3), range(4)):
        rows = sampler.batches(epoch)[step]
        assert len(rows) == 6
        seen += [tuple(three) for three in rows.reshape(-1, 3).tolist()]
        pixels = torch.zeros(6, 32, 32, 3, dtype=torch.uint8)
        whole = Batch(pixels, torch.from_numpy(rows), torch.zeros(6).long(), None, epoch, step)
        method.step(network.eval(), whole)
        own = {(one.a, one.b, one.odd): one.margin or 0.25 for one in triplets}
        assert asked[-1] == [own[three] for three in seen[-2:] for _ in range(3)]
    for turn in range(3):
        assert sorted(seen[7 * turn : 7 * turn + 7]) == sorted(
            (one.a, one.b, one.odd) for one in triplets
        )


def test_fastap_fills_a_batch_from_two_categories_pair_by_pair(setting: _Make) -> None:
    category = tuple("abc"[row // 40] for row in range(120))
    given = setting(120, columns={"category": category}, classes_per_batch=20)
    sampler = methods.create("fastap", batches_per_pair=2).sampler(given, 3)
    pairs = []
    for epoch in range(4):
        met: dict[str, list[int]] = {"a": [], "b": [], "c": []}
        for batch in sampler.batches(epoch):
            halves = [{category[row] for row in half} for half in (batch[:20], batch[20:])]
            assert all(len(half) == 1 for half in halves)
            pairs.append(tuple(name for half in halves for name in half))
            for half in (batch[:20], batch[20:]):
                met[category[half[0]]] += half.tolist()
        for rows in met.values():
            # Round and round: no photo again before all of its category were there, a class whole.
            assert len(set(rows[:40])) == len(rows[:40])
            classes = [row // 5 for row in rows[:40]]
            assert classes == sorted(classes, key=classes.index)
    assert len(pairs) == 12
    assert all(one == two for one, two in zip(pairs[::2], pairs[1::2], strict=True))
    assert set(pairs[:6]) == set(pairs[6:]) == {("a", "b"), ("a", "c"), ("b", "c")}


def test_fastap_takes_no_large_class_whole(setting: _Make) -> None:
    category, labels = ("x",) * 120 + ("y",) * 120, np.arange(240) // 30
    given = setting(240, columns={"category": category}, classes_per_batch=16)
    given = dataclasses.replace(given, labels=labels, classes=tuple("abcdefgh"))
    batches = methods.create("fastap").sampler(given, 7).batches(0)
    # Classes of 30 in halves of 16: at most 4 in one go, and most goes are of different classes.
    assert np.mean([len(set(labels[batch].tolist())) for batch in batches]) > 5
    for half in (slice(16), slice(16, None)):
        rows = np.concatenate([batch[half] for batch in batches])
        assert len(set(rows.tolist())) == len(rows)


def test_fastap_without_categories_of_several_classes_is_pk(setting: _Make) -> None:
    plain = methods.create("rll").sampler(setting(60), 3).batches(1)
    few = tuple("abcd"[row // 15] for row in range(60))  # three classes in each
    for columns in ({}, {"category": ("all",) * 60}, {"category": few}):
        given = methods.create("fastap").sampler(setting(60, columns=columns), 3).batches(1)
        assert all(np.array_equal(a, b) for a, b in zip(plain, given, strict=True))
