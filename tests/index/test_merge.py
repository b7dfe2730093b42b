"""Merges that did not end: the same command finishes them, killed wherever they were."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from embedkit.errors import UsageError
from embedkit.index import Wanted
from embedkit.index.merge import merge_indexes
from embedkit.index.store import Store, store_path
from embedkit.index.verify import verify_index
from tests.index.fakes import names_and_vectors, truth
from tests.index.test_verbs import shards, sync


def test_a_merge_killed_at_any_step_is_finished_by_the_same_merge(tmp_path: Path) -> None:
    root, _ = shards(tmp_path / "start", 3)
    shutil.rmtree(root)  # the vectors are in the shards' stores: no picture is needed
    done = subprocess.run(
        [sys.executable, "-m", "tests.index.merge_kills", str(tmp_path / "start")],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    met = [left for left, _ in itertools.groupby(json.loads(done.stdout))]
    assert met == ["leftovers", "store", "store leftovers", "catalog store"]


def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> tuple[Path, list[Path]]:
    """A merge that died before its catalog was published."""
    _, parts = shards(tmp_path, count)
    out = tmp_path / "all.faiss"

    def die(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("embedkit.index.merge.publish_store", die)
    with pytest.raises(OSError, match="No space"):
        merge_indexes(out, parts)
    monkeypatch.undo()
    assert not out.exists()
    return out, parts


def test_an_unfinished_merge_needs_its_shards_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, parts = begun(tmp_path, monkeypatch, 2)
    looked = merge_indexes(out, parts, dry_run=True)
    assert not out.exists()
    for part in parts:
        part.unlink()
        store_path(part).unlink()
    done = merge_indexes(out, parts)
    assert done == looked
    assert (done.parts, done.count, done.duplicates, done.failures) == ([15, 15], 30, 0, 1)
    assert names_and_vectors(out) == truth(tmp_path / "photos")
    assert verify_index(out).ok


def test_an_unfinished_merge_begins_anew_where_a_shard_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, parts = begun(tmp_path, monkeypatch, 2)
    sync(tmp_path / "photos", parts[0])
    done = merge_indexes(out, parts)
    assert (done.parts, done.count, done.duplicates) == ([30, 15], 30, 15)
    assert names_and_vectors(out) == truth(tmp_path / "photos")


def test_an_unfinished_merge_takes_another_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, parts = begun(tmp_path, monkeypatch, 2)
    done = merge_indexes(out, parts, wanted=Wanted("hnsw"))
    assert (done.parts, done.count) == ([15, 15], 30)
    with Store(store_path(out), read_only=True) as store:
        assert Wanted.loads(store.wanted()).type == "hnsw"


def test_an_unfinished_merge_of_other_shards_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, parts = begun(tmp_path, monkeypatch, 3)
    before = store_path(out).read_bytes()
    with pytest.raises(UsageError, match="there already") as told:
        merge_indexes(out, parts[:2])
    assert told.value.hint is not None
    assert told.value.hint.endswith(
        shlex.join(["embedkit", "index", "merge", *map(str, [out, *parts])])
    )
    assert store_path(out).read_bytes() == before


@pytest.mark.parametrize("note", ["{", '{"shards": {}}', '{"shards": {}, "more": 1}', "{[]}"])
def test_a_damaged_note_of_a_merge_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note: str
) -> None:
    out, parts = begun(tmp_path, monkeypatch, 2)
    with Store(store_path(out)) as store:
        store.set_published(note)
    for dry_run in (False, True):
        with pytest.raises(UsageError, match="there already") as told:
            merge_indexes(out, parts, dry_run=dry_run)
        assert told.value.hint is not None
        assert told.value.hint.endswith(f"embedkit index compact {shlex.quote(str(out))}")


def test_an_unfinished_merge_is_an_index_for_every_other_verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, parts = begun(tmp_path, monkeypatch, 2)
    report = sync(tmp_path / "photos", out)
    assert (report.unchanged, report.embedded, report.published) == (30, 0, True)
    with pytest.raises(UsageError, match="there already"):
        merge_indexes(out, parts)
