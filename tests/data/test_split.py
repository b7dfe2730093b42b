"""Whole classes are held out, enough on each side, and the same ones every time."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedkit.data import PhotoSet, hold_out_classes
from embedkit.errors import DataError


def photo_set(sizes: dict[str, int], split: str = "") -> PhotoSet:
    labels = tuple(label for label, size in sizes.items() for _ in range(size))
    paths = tuple(Path(f"{number}.jpg") for number in range(len(labels)))
    return PhotoSet(Path("/photos"), paths, labels, (split,) * len(labels))


def classes_of(photos: PhotoSet, split: str) -> set[str]:
    return {label for label, name in zip(photos.labels, photos.split, strict=True) if name == split}


@pytest.mark.parametrize(
    ("classes", "share", "held_out"),
    [
        (4, 0.2, 2),
        (4, 0.9, 2),
        (5, 0.5, 2),
        (10, 0.2, 2),
        (10, 0.5, 5),
        (40, 0.2, 8),
        (40, 0.99, 38),
    ],
)
def test_a_share_of_whole_classes_goes_to_val(classes: int, share: float, held_out: int) -> None:
    photos = photo_set({f"class {number}": 2 + number % 3 for number in range(classes)})
    got = hold_out_classes(photos, share=share)
    assert len(classes_of(got, "val")) == held_out
    assert not classes_of(got, "val") & classes_of(got, "train")
    assert classes_of(got, "val") | classes_of(got, "train") == set(photos.labels)
    assert (got.paths, got.labels) == (photos.paths, photos.labels)


def test_the_choice_follows_from_names_and_seed_not_from_the_order_of_photos() -> None:
    photos = photo_set(dict.fromkeys("abcdefghijkl", 3))
    chosen = classes_of(hold_out_classes(photos, share=0.5, seed=4), "val")
    turned = hold_out_classes(photos.subset(range(35, -1, -1)), share=0.5, seed=4)
    assert classes_of(turned, "val") == chosen
    seeds = {frozenset(classes_of(hold_out_classes(photos, seed=s), "val")) for s in range(8)}
    assert len(seeds) > 3


def test_classes_of_one_photo_stay_in_training() -> None:
    photos = photo_set({"a": 2, "b": 2, "c": 2, "d": 2, **{f"lone {n}": 1 for n in range(20)}})
    assert classes_of(hold_out_classes(photos), "val") <= set("abcd")


def test_photos_already_marked_keep_their_mark() -> None:
    given = photo_set({"a": 2, "t": 3}, "test")
    free = photo_set(dict.fromkeys("abcd", 2), "train")
    both = PhotoSet(
        given.root, given.paths + free.paths, given.labels + free.labels, given.split + free.split
    )
    got = hold_out_classes(both, share=0.5)
    assert classes_of(got, "test") == {"a", "t"}
    assert len(classes_of(got, "val")) == len(classes_of(got, "train")) == 2


@pytest.mark.parametrize(
    "sizes", [{}, {"a": 9}, {"a": 2, "b": 2, "c": 2}, {"a": 2, "b": 2, "c": 2, "d": 1, "e": 1}]
)
def test_too_few_classes_of_two_photos_are_refused_with_the_reason(sizes: dict[str, int]) -> None:
    with pytest.raises(DataError, match="too few classes") as caught:
        hold_out_classes(photo_set(sizes))
    paired = sum(size > 1 for size in sizes.values())
    assert f"found {paired} classes with two photos or more" in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0])
def test_a_share_is_a_part(share: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        hold_out_classes(photo_set(dict.fromkeys("abcd", 2)), share=share)
