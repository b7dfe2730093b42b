"""What all rows have in common: classes held out, folds, and the list of what must agree."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from embedkit.compare import Protocol, divide, quick_protocol
from embedkit.data import PhotoSet
from embedkit.errors import DataError, ImageError, UsageError
from embedkit.train import Recipe


def photo_set(labels: list[str], split: list[str] | None = None) -> PhotoSet:
    paths = tuple(Path(f"{label}/{row}.jpg") for row, label in enumerate(labels))
    return PhotoSet(Path("/photos"), paths, tuple(labels), tuple(split or [""] * len(labels)))


def classes(count: int, images: int = 3) -> list[str]:
    return [f"c{number:02d}" for number in range(count) for _ in range(images)]


def split_of(photos: PhotoSet, split: str) -> set[str]:
    return {label for label, name in zip(photos.labels, photos.split, strict=True) if name == split}


@pytest.mark.parametrize(("count", "folds"), [(16, 4), (19, 4), (9, 2), (25, 5)])
def test_every_training_class_validates_once_and_no_test_class_is_in_a_fold(
    count: int, folds: int
) -> None:
    photos = photo_set(classes(count))
    division = divide(photos, folds=folds, seed=3)
    validated = Counter(name for fold in division.folds for name in split_of(fold, "val"))
    assert set(validated.values()) == {1}
    assert set(validated) | set(division.test.labels) == set(photos.labels)
    assert set(validated).isdisjoint(division.test.labels)
    for fold in division.folds:
        assert split_of(fold, "train") == set(validated) - split_of(fold, "val")
        assert set(fold.split) == {"train", "val"}
    sizes = [len(split_of(fold, "val")) for fold in division.folds]
    assert max(sizes) - min(sizes) <= 1
    assert abs(len(set(division.test.labels)) - count / 2) < 1
    assert len(division.folds[0]) + len(division.test) == len(photos)


def test_a_seed_divides_alike_and_another_otherwise() -> None:
    photos = photo_set(classes(16))
    one, again, other = (divide(photos, folds=2, seed=seed) for seed in (0, 0, 1))
    assert one == again
    assert one.photos_hash == again.photos_hash != other.photos_hash


def test_a_marked_test_is_the_test_and_a_marked_val_is_for_training_then() -> None:
    labels = classes(12)
    marks = {**{f"c{n:02d}": "test" for n in range(3)}, **{f"c{n:02d}": "val" for n in (3, 4)}}
    photos = photo_set(labels, [marks.get(label, "train") for label in labels])
    division = divide(photos, folds=2, seed=0)
    assert set(division.test.labels) == {"c00", "c01", "c02"}
    assert {"c03", "c04"} <= set(division.folds[0].labels)
    only_val = photo_set(labels, ["val" if label < "c04" else "" for label in labels])
    assert set(divide(only_val, folds=2, seed=0).test.labels) == {"c00", "c01", "c02", "c03"}


def test_lone_and_broken_photos_are_left_out_and_counted() -> None:
    labels = [*classes(12), "lone", *("c00", "c00")]
    split = ["test" if label > "c07" and label != "lone" else "train" for label in labels]
    photos = photo_set(labels, split)
    broken = (photos.paths[0], ImageError("truncated", "it ends too soon"))
    division = divide(photos, folds=2, seed=0, failures=[broken])
    assert division.lone == ("lone",)
    assert photos.paths[0] not in division.folds[0].paths
    counts = division.counts()
    assert counts["train_images"] + counts["test_images"] + 1 + 1 == len(photos)
    assert (counts["lone_classes"], counts["unreadable"]) == (1, 1)


@pytest.mark.parametrize(
    ("labels", "split", "says"),
    [
        (classes(6), None, "3 training classes cannot make 2 folds"),
        (classes(3), None, "too few classes"),
        (classes(12), ["test"] * 3 + [""] * 33, "too few test classes"),
        (classes(12), ["test", "train", "train"] * 12, "must not be trained on"),
    ],
)
def test_photos_that_cannot_be_divided_are_refused(
    labels: list[str], split: list[str] | None, says: str
) -> None:
    with pytest.raises(DataError, match=says):
        divide(photo_set(labels, split), folds=2, seed=0)


def test_the_hint_names_how_many_folds_there_can_be() -> None:
    with pytest.raises(DataError) as refused:
        divide(photo_set(classes(14)), folds=4, seed=0)
    assert refused.value.hint == "--folds 3"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"folds": 1}, "folds must be 2 or more"),
        ({"trials": 0}, "trials must be 1 or more"),
        ({"repeats": 1}, "repeats must be 2 or more"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"dims": (8, 8)}, "different numbers"),
        ({"dims": (0,)}, "different numbers"),
        ({"ks": (2, 4)}, "1 among them"),
        ({"recipe": Recipe(max_time=5)}, "cannot be limited by time"),
    ],
)
def test_a_protocol_that_cannot_be_kept_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Protocol(**{"recipe": Recipe(), **changes})


def test_everything_is_fixed_but_the_loss_its_options_and_the_seed() -> None:
    protocol = Protocol(Recipe())
    fixed = protocol.fixed("hash", "cpu")
    settings = {field.name for field in dataclasses.fields(Recipe)}
    assert settings - set(fixed) == {"loss", "loss_options", "seed", "max_time"}
    assert Protocol(Recipe(loss="triplet", seed=9)).fixed("hash", "cpu") == fixed
    for changed in (
        Protocol(Recipe(dim=64)),
        Protocol(Recipe(augment_flip=False)),
        Protocol(Recipe(learning_rate=1e-3)),
        Protocol(Recipe(), folds=3),
        Protocol(Recipe(), trials=5),
        quick_protocol(Protocol(Recipe())),
    ):
        assert changed.fixed("hash", "cpu") != fixed
    assert protocol.fixed("other", "cpu") != fixed != protocol.fixed("hash", "cuda")


def test_weights_are_known_by_their_content_and_not_by_their_place(tmp_path: Path) -> None:
    files = [tmp_path / name / "w.pth" for name in ("a", "b", "c")]
    for file, content in zip(files, (b"1", b"1", b"2"), strict=True):
        file.parent.mkdir()
        file.write_bytes(content)
    a, b, c = (Protocol(Recipe(weights=str(file))).fixed("hash", "cpu") for file in files)
    assert a == b != c


def test_widths_may_be_added_later_but_not_to_rows_of_one_width() -> None:
    narrow, wide = (Protocol(Recipe(), dims=dims).fixed("hash", "cpu") for dims in ((8,), (16,)))
    assert narrow == wide != Protocol(Recipe()).fixed("hash", "cpu")


def test_quick_keeps_a_length_that_was_asked_for() -> None:
    assert quick_protocol(Protocol(Recipe())).recipe.steps == 20
    asked = quick_protocol(Protocol(Recipe(epochs=3))).recipe
    assert (asked.steps, asked.epochs) == (None, 3)
