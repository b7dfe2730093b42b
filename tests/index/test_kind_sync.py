"""The kind of index is what the user said, at every later sync too."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from embedkit.errors import UsageError
from embedkit.index import Catalog, Choice, SyncReport, Wanted, sync_folder
from embedkit.index.store import Store, store_path
from tests.index.fakes import FakeEmbedder

COUNT = 1100


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    root.mkdir()
    then = time.time() - 100
    for n in range(COUNT):
        path = root / f"{n}.jpg"
        path.write_bytes(b"picture %d" % n)
        os.utime(path, (then, then))
    return root


def sync(folder: Path, index: Path, **options: object) -> tuple[SyncReport, Choice]:
    report = sync_folder(folder, index, FakeEmbedder(), **options)  # type: ignore[arg-type]
    choice = Catalog.open(index, verify=True).choice
    assert choice is not None
    return report, choice


def test_another_kind_rebuilds_the_file_and_embeds_nothing(folder: Path, tmp_path: Path) -> None:
    index = tmp_path / "c.faiss"
    stages: list[str] = []
    assert sync(folder, index)[1].kind == "flat"
    report, choice = sync(
        folder,
        index,
        wanted=Wanted(type="pq", recall=0.9),
        building=lambda stage, done, total: stages.append(stage),
    )
    assert (report.embedded, report.unchanged, report.published) == (0, COUNT, True)
    assert choice.kind == "pq"
    assert list(dict.fromkeys(stages)) == ["reading", "training", "adding", "tuning"]

    report, choice = sync(folder, index)
    assert not report.published
    assert choice.kind == "pq"

    # A new picture: the same kind again. Half of what is said leaves the other half.
    (folder / "new.jpg").write_bytes(b"picture new")
    assert sync(folder, index)[1].kind == "pq"
    report, choice = sync(folder, index, wanted=Wanted(recall=0.99))
    assert report.published
    assert (choice.kind, choice.recall >= 0.99) == ("pq", True)

    index.unlink()
    assert sync(folder, index)[1].kind == "pq"
    assert sync(folder, index, rebuild=True)[1].kind == "pq"
    assert sync(folder, index, wanted=Wanted(type="auto"))[1].kind == "flat"


def test_what_does_not_fit_leaves_the_file_and_what_was_embedded(
    folder: Path, tmp_path: Path
) -> None:
    index = tmp_path / "c.faiss"
    with pytest.raises(UsageError, match="fits into 1 KB"):
        sync(folder, index, wanted=Wanted(memory=1000))
    assert not index.exists()
    with Store(store_path(index), read_only=True) as store:
        assert store.count_usable() == COUNT
    report, choice = sync(folder, index, wanted=Wanted(memory=0))
    assert (report.unchanged, choice.kind) == (COUNT, "flat")
