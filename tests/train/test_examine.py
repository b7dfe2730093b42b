"""Before a training: what `embedkit check` finds is told, refused or left out, and not redone."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from embedkit.data import FactCache, PhotoSet, doctor_facts, read_photos
from embedkit.errors import DataError, MismatchError
from embedkit.train import examine, train
from embedkit.train.examine import failure_lines, read_failures
from tests.tiny_recipe import tiny_recipe
from tests.train.listener import Listener

_TINY = tiny_recipe(loss="rll", epochs=None, epoch_steps=None, steps=1)
_UNLABELLED = dataclasses.replace(_TINY, loss="isif")


@pytest.fixture
def copied(pictures: Path, tmp_path: Path) -> Path:
    """The pictures, to be spoilt."""
    folder = tmp_path / "photos"
    shutil.copytree(pictures, folder)
    return folder


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Grows with every file that is decoded for the check."""
    seen: list[Path] = []
    genuine = doctor_facts._look

    def look(path: Path, *rest: Any) -> Any:
        seen.append(path)
        return genuine(path, *rest)

    monkeypatch.setattr(doctor_facts, "_look", look)
    return seen


def test_twins_under_two_labels_and_across_splits_are_told_in_two_lines(copied: Path) -> None:
    classes = sorted(path for path in copied.iterdir() if path.is_dir())
    twin = sorted(classes[0].iterdir())[0]
    shutil.copy(twin, classes[1] / "twin.jpg")
    listener = Listener()
    photos = read_photos(copied)
    checkup = examine(_TINY, photos, listener)
    assert checkup.verdict == "usable"
    said = [text.splitlines() for text in listener.warnings]
    assert ["2 photos have a twin under another label"] in [lines[:1] for lines in said]
    assert all(len(lines) == 2 and lines[1].lstrip().startswith("-> ") for lines in said)
    assert listener.notes == [("look", "embedkit check DATA --html check.html")]
    split = tuple("test" if name == classes[1].name else "train" for name in photos.labels)
    listener = Listener()
    examine(_TINY, PhotoSet(photos.root, photos.paths, photos.labels, split), listener)
    assert any("1 photo of val or test has a twin in train" in text for text in listener.warnings)


def test_what_cannot_work_is_refused_with_the_reason_before_anything_is_written(
    copied: Path, tmp_path: Path
) -> None:
    photos = read_photos(copied)
    firsts = {name: row for row, name in reversed(list(enumerate(photos.labels)))}
    singles = photos.subset(sorted(firsts.values()))
    with pytest.raises(DataError, match=r"(?s)cannot work.*0 classes of 9 to train on.*check DATA"):
        train(_TINY, singles, tmp_path / "run", device="cpu")
    for path in photos.files():
        path.write_bytes(b"no picture")
    with pytest.raises(DataError, match="no photo to train on can be read"):
        train(_TINY, photos, tmp_path / "run", device="cpu")
    with pytest.raises(DataError, match="not one of them can be read"):
        examine(_UNLABELLED, photos, Listener())
    assert not (tmp_path / "run").exists()


def test_where_classes_are_no_matter_nothing_is_said_of_them(copied: Path) -> None:
    photos = read_photos(copied)
    alone = photos.subset([row for row, name in enumerate(photos.labels) if name == "a" or row < 5])
    with pytest.raises(DataError):
        examine(_TINY, alone, Listener())
    listener = Listener()
    examine(_UNLABELLED, alone, listener)
    assert not [text for text in listener.warnings if "class" in text]


def test_a_training_decodes_for_the_check_once_and_a_resumed_one_not_at_all(
    copied: Path, tmp_path: Path, looked: list[Path]
) -> None:
    broken = sorted(copied.glob("*/*.jpg"))[7]
    broken.write_bytes(b"no picture")
    photos, cache = read_photos(copied), tmp_path / "looks.sqlite"
    run = train(_TINY, photos, tmp_path / "one", device="cpu", cache=cache)
    assert sorted(looked) == sorted(photos.files())
    assert run.record["data"]["unreadable"] == 1
    assert run.record["check"]["counts"]["unreadable"] == 1
    assert "few-classes" in [finding["code"] for finding in run.record["check"]["findings"]]
    looked.clear()
    for again in (photos, run.photos()):
        resumed = train(_TINY, again, tmp_path / "one", device="cpu", resume=True)
        assert resumed.record["data"] == run.record["data"]
        assert resumed.record["check"] == run.record["check"]
    assert not looked
    train(_TINY, photos, tmp_path / "two", device="cpu", cache=cache)
    assert looked == [broken]


def test_a_cache_that_is_no_cache_is_a_warning_and_not_touched(
    copied: Path, tmp_path: Path, looked: list[Path]
) -> None:
    cache = tmp_path / "notes.txt"
    cache.write_text("mine " * 100)
    listener = Listener()
    examine(_TINY, read_photos(copied), listener, cache=cache)
    assert any("is no cache" in text for text in listener.warnings)
    assert cache.read_text() == "mine " * 100
    assert len(looked) == 45


def test_without_imagehash_only_equal_files_are_told(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = sorted(path for path in copied.iterdir() if path.is_dir())
    twin = sorted(classes[0].iterdir())[0]
    shutil.copy(twin, classes[1] / "twin.jpg")
    monkeypatch.setitem(sys.modules, "imagehash", None)
    cache = tmp_path / "check.sqlite"
    listener = Listener()
    counts = examine(_TINY, read_photos(copied), listener, cache=cache).counts
    assert (counts["copies"], counts["label_conflicts"]) == (1, 2)
    assert "near_duplicates" not in counts
    assert "imagehash is missing" in listener.warnings[0]
    monkeypatch.undo()
    # Nothing of it is kept as if near copies had been looked for.
    listener = Listener()
    examine(_TINY, read_photos(copied), listener, cache=cache)
    assert not any("imagehash" in text for text in listener.warnings)
    with FactCache(cache) as kept:
        stamp = twin.stat()
        fact = kept.find(twin, stamp.st_size, stamp.st_mtime_ns)
    assert fact is not None
    assert fact.phash != 2 * fact.content


def test_failures_are_read_back_as_they_were_written(copied: Path, tmp_path: Path) -> None:
    assert read_failures(tmp_path) == []
    first = sorted(copied.glob("*/*.jpg"))[0]
    first.write_bytes(b"no picture")
    failures = examine(_TINY, read_photos(copied), Listener()).failures()
    (tmp_path / "failed.jsonl").write_text(failure_lines(failures))
    again = read_failures(tmp_path)
    assert [(path, error.code, error.reason) for path, error in again] == [
        (path, error.code, error.reason) for path, error in failures
    ]
    (tmp_path / "failed.jsonl").write_text(json.dumps({"path": "x"}) + "\n")
    with pytest.raises(MismatchError, match="damaged"):
        read_failures(tmp_path)
