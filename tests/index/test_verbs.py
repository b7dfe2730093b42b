"""Single files in and out, compacting, verifying, merging: every count against sets and by hand."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import tempfile
from pathlib import Path

import numpy as np
import pytest

from embedkit.errors import DataError, EmbedKitError, Interrupted, MismatchError, UsageError
from embedkit.index import Catalog, SyncReport, sync_folder
from embedkit.index.edit import compact_index, remove_files
from embedkit.index.labels import read_labels
from embedkit.index.merge import merge_indexes
from embedkit.index.store import Store, store_path, writer_lock
from embedkit.index.sync import add_files, known_run
from embedkit.index.verify import Verified, verify_index
from tests.index.fakes import FakeEmbedder, names_and_vectors, truth, vector_of


def write(path: Path, content: bytes | str) -> Path:
    """A picture of this content, as old as a settled one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.utime(path, (1_700_000_000,) * 2)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of three, in a settled index `tmp_path/c.faiss`."""
    root = tmp_path / "photos"
    for n in range(6):
        write(root / f"class{n // 3}/{n}.jpg", f"picture {n}")
    sync(root, tmp_path / "c.faiss")
    return root


@pytest.fixture
def index(folder: Path, tmp_path: Path) -> Path:
    return tmp_path / "c.faiss"


def sync(root: Path, index: Path, **options: object) -> SyncReport:
    report = sync_folder(root, index, FakeEmbedder(), **options)  # type: ignore[arg-type]
    assert report.found == report.embedded + report.unchanged + report.moved + report.failed
    return report


def add(index: Path, *paths: Path, **options: object) -> SyncReport:
    report = add_files(index, paths, FakeEmbedder(), **options)  # type: ignore[arg-type]
    assert report.found == report.embedded + report.unchanged + report.moved + report.failed
    return report


def labels(index: Path) -> dict[str, str]:
    """Path -> label, read with `zipfile`."""
    held = names_and_vectors(index)
    return {os.fsdecode(path): os.fsdecode(label) for path, (label, _) in held.items()}


def bytes_beside(index: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in index.parent.iterdir() if path.is_file()}


# add


def test_what_is_added_from_elsewhere_is_found_and_outlasts_every_sync(
    folder: Path, index: Path, tmp_path: Path
) -> None:
    other = write(tmp_path / "else/where/x.jpg", "x")
    report = add(index, other)
    assert (report.found, report.embedded, report.count) == (1, 1, 7)
    for report in (sync(folder, index), sync(folder, index, rebuild=True)):
        assert (report.found, report.removed, report.count) == (7, 0, 7)
    (hit,) = Catalog.open(index).search([vector_of(b"x")], 1)[0]
    assert (hit.path, hit.label) == (other, "where")
    assert hit.score == pytest.approx(1)


def test_what_was_added_is_followed_and_named_while_it_is_gone(
    folder: Path, index: Path, tmp_path: Path
) -> None:
    other = write(tmp_path / "else/x.jpg", "x")
    add(index, other)
    other.write_bytes(b"changed")
    assert sync(folder, index).embedded == 1
    assert Catalog.open(index).search([vector_of(b"changed")], 1)[0][0].path == other
    other.unlink()
    for _ in range(2):
        report = sync(folder, index)
        assert [(path, error.code) for path, error in report.failures] == [(other, "unreadable")]
        assert report.count == 6
    write(other, "back")
    assert sync(folder, index).count == 7
    remove_files(index, [other])
    assert (sync(folder, index).found, len(Catalog.open(index))) == (6, 6)


def test_adding_inside_the_folder_is_what_a_sync_of_that_file_does(
    folder: Path, index: Path
) -> None:
    write(folder / "class1/new.jpg", "new")
    write(folder / "class1/newer.jpg", "newer")
    assert add(index, folder / "class1/new.jpg").count == 7
    assert labels(index)["class1/new.jpg"] == "class1"
    report = sync(folder, index)
    assert (report.embedded, report.unchanged, report.count) == (1, 7, 8)
    with Store(store_path(index), read_only=True) as store:
        assert store.choices() == ([], [], {})


def test_labels_of_what_is_added(folder: Path, index: Path, tmp_path: Path) -> None:
    write(tmp_path / "more/boots/deep/a.jpg", "a")
    write(tmp_path / "more/b.jpg", "b")
    write(tmp_path / "single/c.jpg", "c")
    write(folder / "class0/new.jpg", "d")
    add(index, tmp_path / "more", tmp_path / "single/c.jpg")
    add(index, folder / "class0/new.jpg", label="other")
    found = {Path(path).name: label for path, label in labels(index).items()}
    assert found.items() >= {"a.jpg": "boots", "b.jpg": "more", "c.jpg": "single"}.items()
    assert found["new.jpg"] == "other"
    write(folder / "class0/new.jpg", "changed")
    sync(folder, index)
    assert labels(index)["class0/new.jpg"] == "other"


def test_copies_and_known_content_cost_no_embedding(
    folder: Path, index: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copy(folder / "class0/0.jpg", tmp_path / "copy.jpg"))
    embedder = FakeEmbedder()
    report = add_files(index, [copy, copy, folder / "class0/1.jpg"], embedder)
    assert (report.found, report.moved, report.unchanged, embedder.embedded) == (2, 1, 1, [])


def test_what_is_no_picture_is_named_and_not_kept(
    folder: Path, index: Path, tmp_path: Path
) -> None:
    bad, good = write(tmp_path / "e/bad.jpg", "bad"), write(tmp_path / "e/good.txt", "good")
    report = add(index, bad, good)
    assert (report.failed, report.embedded, report.count) == (1, 1, 7)
    assert sync(folder, index).failures == []
    assert str(good) in labels(index)


def test_nothing_is_added_where_one_path_is_wrong(
    folder: Path, index: Path, tmp_path: Path
) -> None:
    before = bytes_beside(index)
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    good = write(tmp_path / "e/good.jpg", "good")
    for wrong in ("nothing.jpg", "pipe.jpg", "empty", "loop.jpg"):
        with pytest.raises(UsageError, match=wrong):
            add(index, good, tmp_path / wrong)
    with pytest.raises(UsageError, match="nothing was named"):
        add(index)
    with pytest.raises(MismatchError, match="--rebuild"):
        add_files(index, [good], FakeEmbedder(weights="other"))
    assert bytes_beside(index) == before


def test_ctrl_c_while_adding_is_made_good_by_the_next_sync(
    folder: Path, index: Path, tmp_path: Path
) -> None:
    for n in range(9):
        write(tmp_path / f"else/{n}.jpg", f"else {n}")

    def press(path: Path) -> None:
        if len(embedder.embedded) == 5:
            raise KeyboardInterrupt

    embedder = FakeEmbedder(before=press)
    with pytest.raises(Interrupted):
        add_files(index, [tmp_path / "else"], embedder, batch=2)
    report = sync(folder, index)
    assert (report.found, report.embedded, report.count) == (15, 4, 15)


def test_odd_names_go_in_and_out(folder: Path, index: Path, tmp_path: Path) -> None:
    names = [os.fsdecode(b"\xff.jpg"), "new\nline.jpg", "\u5199\u771f.jpg", "-x.jpg"]
    files = [write(tmp_path / "e" / name, name.encode("utf-8", "replace")) for name in names]
    assert add(index, *files).count == 10
    assert {str(file) for file in files} <= set(labels(index))
    assert remove_files(index, files).pictures == 4
    assert len(Catalog.open(index)) == 6


def test_a_folder_that_grows_around_what_was_added_has_it_once(
    folder: Path, tmp_path: Path, index: Path
) -> None:
    add(index, write(tmp_path / "photos2/x.jpg", "x"))
    folder.rename(tmp_path / "photos2/old")
    report = sync(tmp_path / "photos2", index)
    assert (report.found, report.count, report.embedded) == (7, 7, 0)
    assert set(labels(index)) == {os.fsdecode(name) for name in truth(tmp_path / "photos2")}


# rm


def test_what_is_removed_stays_out_until_it_is_added_again(folder: Path, index: Path) -> None:
    done = remove_files(index, [folder / "class0/1.jpg"])
    assert (done.pictures, done.kept_out, done.count) == (1, 1, 5)
    for options in ({}, {"retry": True}, {"rebuild": True}):
        report = sync(folder, index, **options)
        assert (report.found, report.left_out, report.count) == (5, 1, 5)
        assert "class0/1.jpg" not in labels(index)
    (folder / "class0/1.jpg").write_bytes(b"changed")
    assert sync(folder, index).count == 5
    assert add(index, folder / "class0/1.jpg").count == 6
    report = sync(folder, index)
    assert (report.left_out, report.count) == (0, 6)


def test_folders_and_labels_are_removed_as_a_whole(folder: Path, index: Path) -> None:
    write(folder / "class1/deep/7.jpg", "seven")
    sync(folder, index)
    assert [path.name for path in remove_files(index, [folder / "class1/deep"]).files] == ["7.jpg"]
    done = remove_files(index, [folder / "class0/0.jpg"], label="class1")
    assert [path.name for path in done.files] == ["0.jpg", "3.jpg", "4.jpg", "5.jpg"]
    assert set(labels(index)) == {"class0/1.jpg", "class0/2.jpg"}


def test_a_failure_can_be_removed_so_that_it_is_not_named_again(folder: Path, index: Path) -> None:
    write(folder / "bad.jpg", "bad")
    assert sync(folder, index).failed == 1
    done = remove_files(index, [folder / "bad.jpg"])
    assert (done.pictures, done.failures, done.count) == (0, 1, 6)
    assert sync(folder, index).failures == []


def test_a_file_that_is_gone_can_be_removed(folder: Path, index: Path) -> None:
    (folder / "class0/0.jpg").unlink()
    assert remove_files(index, [folder / "class0/0.jpg"]).count == 5


def test_nothing_is_removed_where_one_path_is_wrong_or_nothing_would_be_left(
    folder: Path, index: Path
) -> None:
    before = bytes_beside(index)
    good = folder / "class0/0.jpg"
    with pytest.raises(UsageError, match=r"nothing of .*7\.jpg"):
        remove_files(index, [good, folder / "7.jpg"])
    with pytest.raises(UsageError, match="label 'class7'") as caught:
        remove_files(index, [good], label="class7")
    assert "class0, class1" in str(caught.value)
    for everything in (folder, folder.parent, folder / ".."):
        with pytest.raises(UsageError, match="nothing would be left"):
            remove_files(index, [everything])
    with pytest.raises(UsageError, match="nothing was named"):
        remove_files(index, [])
    assert bytes_beside(index) == before


def test_what_is_in_every_place_was_removed(folder: Path, index: Path) -> None:
    remove_files(index, [folder / "class0"])
    shutil.rmtree(folder / "class1")
    with pytest.raises(DataError, match="removed by hand"):
        sync(folder, index)
    assert len(Catalog.open(index)) == 3


def test_a_rebuild_that_dies_at_once_keeps_the_choices(
    folder: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove_files(index, [folder / "class0/1.jpg"])
    add(index, write(tmp_path / "else/x.jpg", "x"))

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "see", die)
    with pytest.raises(Interrupted):
        sync(folder, index, rebuild=True)
    monkeypatch.undo()
    report = sync(folder, index, rebuild=True)
    assert (report.found, report.left_out) == (6, 1)


def test_another_folder_that_takes_over_is_not_bound_by_choices(
    folder: Path, index: Path, tmp_path: Path
) -> None:
    remove_files(index, [folder / "class0/1.jpg"])
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    assert sync(other, index, rebuild=True).count == 6


def test_the_choices_outlast_a_folder_that_moved(folder: Path, index: Path, tmp_path: Path) -> None:
    remove_files(index, [folder / "class0/1.jpg"])
    folder.rename(tmp_path / "pictures")
    assert sync(tmp_path / "pictures", index, rebuild=True).left_out == 1


# compact


def test_compact_drops_what_is_gone_and_gives_back_the_room(tmp_path: Path) -> None:
    root, index = tmp_path / "photos", tmp_path / "c.faiss"
    for n in range(300):
        write(root / f"{n:03}.jpg", f"{n}")
    embedder = FakeEmbedder(dim=512)
    sync_folder(root, index, embedder)
    write(root / "000.jpg", "changed")
    (root / "bad.jpg").symlink_to("nowhere")
    sync_folder(root, index, embedder)
    for n in range(100, 300):
        (root / f"{n:03}.jpg").unlink()
    looked = compact_index(index, dry_run=True)
    done = compact_index(index)
    assert looked.dropped == done.dropped == [root / f"{n:03}.jpg" for n in range(100, 300)]
    assert (looked.kept, looked.count) == (done.kept, done.count) == (101, 100)
    assert done.store_bytes[1] < 0.5 * done.store_bytes[0] == 0.5 * looked.store_bytes[1]
    assert done.store_bytes[1] == store_path(index).stat().st_size
    assert done.index_bytes[1] == index.stat().st_size < done.index_bytes[0]
    assert names_and_vectors(index) == truth(root, 512)
    report = sync_folder(root, index, embedder)
    assert (report.unchanged, report.failed, report.published) == (100, 1, False)
    assert verify_index(index).ok


def test_compact_makes_a_damaged_or_lost_catalog_whole(folder: Path, index: Path) -> None:
    whole = index.read_bytes()
    for damage in (b"", whole[:100], None):
        index.unlink() if damage is None else index.write_bytes(damage)
        compact_index(index)
        assert index.read_bytes() == whole


def test_compact_forgets_what_was_added_and_is_gone(
    folder: Path, index: Path, tmp_path: Path
) -> None:
    other = write(tmp_path / "e/x.jpg", "x")
    add(index, other)
    other.unlink()
    assert compact_index(index).dropped == [other]
    assert sync(folder, index).failures == []


def test_compact_does_not_empty_an_index_whose_disk_is_away(folder: Path, index: Path) -> None:
    before = bytes_beside(index)
    folder.rename(folder.with_name("away"))
    with pytest.raises(UsageError, match="is gone"):
        compact_index(index)
    folder.mkdir()
    with pytest.raises(UsageError, match="mounted"):
        compact_index(index)
    assert bytes_beside(index) == before


# All of them


def test_a_dry_run_of_each_writes_nothing_and_foretells_the_counts(
    folder: Path, index: Path, tmp_path: Path
) -> None:
    other = write(tmp_path / "e/x.jpg", "x")
    (folder / "class0/2.jpg").unlink()
    before = bytes_beside(index)
    added = add(index, other, folder / "class0/0.jpg", dry_run=True)
    removed = remove_files(index, [folder / "class0/0.jpg"], dry_run=True)
    compacted = compact_index(index, dry_run=True)
    assert bytes_beside(index) == before
    really = add(index, other, folder / "class0/0.jpg")
    assert (added.embedded, added.unchanged) == (really.embedded, really.unchanged) == (1, 1)
    assert remove_files(index, [other]).count == 6
    assert remove_files(index, [folder / "class0/0.jpg"]) == removed
    assert compact_index(index).dropped == compacted.dropped


def test_each_needs_the_store_and_says_which_line_makes_it_again(
    folder: Path, index: Path, tmp_path: Path
) -> None:
    store_path(index).unlink()
    attempts = [
        lambda: add(index, folder / "class0/0.jpg"),
        lambda: remove_files(index, [folder / "class0/0.jpg"]),
        lambda: compact_index(index),
        lambda: merge_indexes(tmp_path / "m.faiss", [index]),
    ]
    for attempt in attempts:
        with pytest.raises(MismatchError, match=r"store of c\.faiss is gone") as caught:
            attempt()
        assert f"embedkit index {folder} -o {index}" in str(caught.value)
    index.unlink()
    for attempt in attempts:
        with pytest.raises(UsageError, match="there is no index"):
            attempt()
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_each_is_sent_away_while_another_writes(folder: Path, index: Path, tmp_path: Path) -> None:
    with writer_lock(index):
        for attempt in (
            lambda: add(index, folder / "class0/0.jpg"),
            lambda: remove_files(index, [folder / "class0/0.jpg"]),
            lambda: compact_index(index),
            lambda: verify_index(index),
        ):
            with pytest.raises(EmbedKitError, match="another embedkit is writing"):
                attempt()


def test_a_store_of_the_first_version_is_taken_over(folder: Path, index: Path) -> None:
    with contextlib.closing(sqlite3.connect(store_path(index))) as old:
        first = {"run", "item", "spare", "sqlite_sequence"}
        for (name,) in old.execute(
            "SELECT name FROM sqlite_schema WHERE type = 'table'"
        ).fetchall():
            if name not in first:
                old.execute(f"DROP TABLE {name}")
        old.execute("PRAGMA user_version = 1")
        old.commit()
    before = store_path(index).read_bytes()
    assert remove_files(index, [folder / "class0/0.jpg"], dry_run=True).count == 5
    assert verify_index(index).ok
    assert store_path(index).read_bytes() == before
    assert remove_files(index, [folder / "class0/0.jpg"]).count == 5
    assert sync(folder, index).left_out == 1


def test_any_history_of_verbs_ends_where_plain_sets_do() -> None:
    rng = random.Random(3)
    for _ in range(6):
        with tempfile.TemporaryDirectory() as place:
            root, index = Path(place) / "photos", Path(place) / "c.faiss"
            outside = Path(place) / "outside"
            files = [root / f"{n}.jpg" for n in range(5)] + [outside / f"{n}.jpg" for n in range(5)]
            write(root / "always.jpg", "always")
            for file in files:
                write(file, str(file))
            sync(root, index)
            inside, added, out = {f for f in files if f.parent == root}, set(), set()
            for _ in range(25):
                file = rng.choice(files)
                what = rng.choice(["add", "rm", "sync", "write", "compact"])
                if what == "add":
                    add(index, file)
                    out.discard(file)
                    added |= {file} - inside
                elif what == "rm":
                    with contextlib.suppress(UsageError):
                        remove_files(index, [file])
                    out |= {file} & inside
                    added.discard(file)
                elif what == "sync":
                    sync(root, index)
                elif what == "compact":
                    compact_index(index)
                else:
                    write(file, f"{file} {rng.random()}")
            sync(root, index)
            expected = {root / "always.jpg"} | (inside - out) | added
            held = names_and_vectors(index)
            assert {root / os.fsdecode(name) for name in held} == expected
            for name, (_, vector) in held.items():
                content = (root / os.fsdecode(name)).read_bytes()
                assert vector == vector_of(content).tobytes()
            assert verify_index(index).ok


# Labels from a table


def test_labels_come_from_a_table_and_stay(folder: Path, index: Path, tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text(
        "\ufeffpath,label,split\nphotos/class0/0.jpg,red,train\nphotos/class0/9.jpg,blue,\n"
        'elsewhere/x.jpg,none,\n"photos/class1/3.jpg","a, b",\n',
        encoding="utf-8",
    )
    report = sync(folder, index, labels=read_labels(table, folder))
    assert (report.embedded, report.published) == (0, True)
    assert labels(index) == {
        "class0/0.jpg": "red",
        "class0/1.jpg": "class0",
        "class0/2.jpg": "class0",
        "class1/3.jpg": "a, b",
        "class1/4.jpg": "class1",
        "class1/5.jpg": "class1",
    }
    write(folder / "class0/9.jpg", "nine")
    write(folder / "class0/0.jpg", "changed")
    sync(folder, index)
    assert (labels(index)["class0/0.jpg"], labels(index)["class0/9.jpg"]) == ("red", "blue")
    assert Catalog.open(index).search([vector_of(b"nine")], 1)[0][0].label == "blue"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no column label and no column path"),
        ("path,name\na.jpg,x\n", "no column label"),
        ("path,label\nelse/a.jpg,x\n", "names no file of"),
        ("path,label\nphotos/a.jpg\n", "line 2: a path or label is missing"),
        ("path,label\nphotos/a.jpg,x\nphotos/./a.jpg,y\n", "line 3: .* another label"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(
    folder: Path, tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        read_labels(tmp_path / "labels.csv", folder)
    with pytest.raises(DataError, match="cannot be read"):
        read_labels(tmp_path / "nothing.csv", folder)


# verify


def bad(result: Verified) -> dict[str, str]:
    assert result.ok == (result.repair is None)
    return {check.name: check.facts for check in result.checks if not check.ok}


def repaired(line: str | None, folder: Path, index: Path) -> None:
    """Do what the line says, with the fake model."""
    assert line is not None
    if line == f"embedkit index compact {index}":
        compact_index(index)
    else:
        assert line.startswith(f"embedkit index {folder} -o {index}")
        sync(folder, index, rebuild=line.endswith(" --rebuild"))
    assert verify_index(index).ok


def test_a_sound_index_is_told_so(folder: Path, index: Path) -> None:
    before = bytes_beside(index)
    result = verify_index(index)
    assert [check.name for check in result.checks] == [
        "file",
        "vectors",
        "store",
        "agree",
        "pictures",
    ]
    assert bad(result) == {}
    assert bytes_beside(index) == before
    (folder / "class0/0.jpg").unlink()
    result = verify_index(index)
    assert result.ok
    assert result.checks[-1].facts == "5 of 6 are where they were, 1 have gone since"


def test_a_flipped_bit_anywhere_is_met_and_repaired_by_the_line(folder: Path, index: Path) -> None:
    whole = index.read_bytes()
    for place in range(0, len(whole), len(whole) // 23):
        index.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        result = verify_index(index)
        if result.ok:  # a date in the ZIP's lists, which means nothing
            assert place > 45 + 4 * 8 * 6
            continue
        repaired(result.repair, folder, index)
        assert index.read_bytes() == whole


def test_a_lost_half_is_told_with_the_line(folder: Path, index: Path) -> None:
    index.unlink()
    result = verify_index(index)
    assert bad(result) == {"file": "there is none; only its store is here"}
    repaired(result.repair, folder, index)
    store_path(index).unlink()
    result = verify_index(index)
    assert result.ok
    assert "not changed" in result.checks[2].facts
    index.unlink()
    with pytest.raises(UsageError, match="there is no index"):
        verify_index(index)


def test_a_run_that_did_not_end_is_told(folder: Path, index: Path) -> None:
    with Store(store_path(index)) as store:
        store.forget([b"class0/0.jpg"])
    result = verify_index(index)
    assert "a run did not end" in bad(result)["agree"]
    repaired(result.repair, folder, index)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("UPDATE item SET vector = zeroblob(32) WHERE id = 3", "agree"),
        ("UPDATE item SET label = 'x' WHERE id = 3", "agree"),
        ("UPDATE item SET path = 'x' WHERE id = 3", "agree"),
        ("UPDATE item SET vector = zeroblob(31) WHERE id = 3", "store"),
        ("DELETE FROM item WHERE id = 6", "agree"),
        ("DELETE FROM run", "store"),
        ("UPDATE run SET published = 'x'", "agree"),
    ],
)
def test_a_store_that_is_not_the_files_is_told(
    folder: Path, index: Path, change: str, name: str
) -> None:
    with contextlib.closing(sqlite3.connect(store_path(index))) as database:
        database.execute(change)
        database.commit()
    assert list(bad(verify_index(index))) == [name]


def test_a_store_that_is_garbage_is_told_and_built_again(folder: Path, index: Path) -> None:
    store_path(index).write_bytes(b"\x55" * 9000)
    result = verify_index(index)
    assert list(bad(result)) == ["store"]
    repaired(result.repair, folder, index)


@pytest.mark.parametrize("number", [np.nan, 3.0])
def test_vectors_that_cannot_be_are_told_although_every_checksum_agrees(
    folder: Path, index: Path, number: float
) -> None:
    vector = np.zeros(8, "<f4")
    vector[0] = number
    with Store(store_path(index)) as store:
        item = store.known(b"class0/0.jpg")
        assert item is not None
        store.put([item._replace(vector=vector.tobytes())])
    compact_index(index)
    result = verify_index(index)
    assert list(bad(result)) == ["vectors"]


# merge


def shards(place: Path, count: int) -> tuple[Path, list[Path]]:
    """A folder, and indexes of it that each saw only a part."""
    root = place / "photos"
    files = [write(root / f"class{n % 4}/{n:02}.jpg", f"picture {n}") for n in range(30)]
    write(root / "bad.jpg", "bad")
    parts = []
    for shard in range(count):
        index = place / f"shard{shard}.faiss"
        sync(root, index)
        others = [file for n, file in enumerate(files) if n % count != shard]
        if shard:
            others.append(root / "bad.jpg")
        with Store(store_path(index)) as store:
            store.forget([os.fsencode(file.relative_to(root)) for file in others])
        compact_index(index)
        parts.append(index)
    return root, parts


def test_shards_of_a_folder_become_the_index_of_the_folder(tmp_path: Path) -> None:
    root, parts = shards(tmp_path, 3)
    before = [part.read_bytes() for part in parts]
    out = tmp_path / "all.faiss"
    looked = merge_indexes(out, parts, dry_run=True)
    assert not out.exists()
    done = merge_indexes(out, parts)
    assert looked == done
    assert (done.parts, done.count, done.duplicates, done.failures) == ([10, 10, 10], 30, 0, 1)
    assert done.root == root
    assert names_and_vectors(out) == truth(root)
    assert verify_index(out).ok
    report = sync(root, out)
    assert (report.unchanged, report.failed, report.published) == (30, 1, False)
    assert [part.read_bytes() for part in parts] == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["photos", "all.faiss", "all.faiss.store"]
        + [name for n in range(3) for name in (f"shard{n}.faiss", f"shard{n}.faiss.store")]
    )


def test_folders_that_differ_become_their_common_one_and_labels_stay(tmp_path: Path) -> None:
    for name in "ab":
        for n in range(3):
            write(tmp_path / f"all/{name}/class{n}/{n}.jpg", f"{name}{n}")
        sync(tmp_path / "all" / name, tmp_path / f"{name}.faiss")
    elsewhere = write(tmp_path / "else/x.jpg", "x")
    add(tmp_path / "b.faiss", elsewhere, label="own")
    remove_files(tmp_path / "a.faiss", [tmp_path / "all/a/class1/1.jpg"])
    out = tmp_path / "m.faiss"
    done = merge_indexes(out, [tmp_path / "a.faiss", tmp_path / "b.faiss"])
    assert (done.root, done.parts, done.count) == (tmp_path / "all", [2, 4], 6)
    assert labels(out) == {
        "a/class0/0.jpg": "class0",
        "a/class2/2.jpg": "class2",
        "b/class0/0.jpg": "class0",
        "b/class1/1.jpg": "class1",
        "b/class2/2.jpg": "class2",
        str(elsewhere): "own",
    }
    write(tmp_path / "all/a/class0/0.jpg", "changed")
    report = sync(tmp_path / "all", out)
    assert (report.embedded, report.unchanged, report.left_out) == (1, 5, 1)
    assert labels(out)["a/class0/0.jpg"] == "class0"


def test_a_file_of_several_shards_is_taken_once_and_counted(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for n in range(4):
        write(root / f"{n}.jpg", "bad" if n == 3 else str(n))
    sync(root, tmp_path / "old.faiss")
    write(root / "0.jpg", "newer")
    write(root / "3.jpg", "good now")
    sync(root, tmp_path / "new.faiss")
    out = tmp_path / "m.faiss"
    done = merge_indexes(out, [tmp_path / "new.faiss", tmp_path / "old.faiss"])
    assert (done.parts, done.count, done.duplicates, done.differing) == ([4, 3], 4, 3, 1)
    assert names_and_vectors(out) == truth(root)
    again = tmp_path / "again.faiss"
    done = merge_indexes(again, [tmp_path / "old.faiss", tmp_path / "new.faiss"])
    assert (done.parts, done.count, done.duplicates, done.differing) == ([3, 4], 4, 3, 1)
    assert done.failures == 0  # the vector counts more than the older failure
    assert sync(root, again).embedded + sync(root, again).moved == 1
    assert names_and_vectors(again) == truth(root)


def test_what_cannot_be_merged_is_refused_and_nothing_is_left(
    folder: Path, index: Path, tmp_path: Path
) -> None:
    other, out = tmp_path / "o.faiss", tmp_path / "m.faiss"
    sync_folder(folder, other, FakeEmbedder(weights="other"))
    before = bytes_beside(index)
    with pytest.raises(MismatchError, match="different models") as caught:
        merge_indexes(out, [index, other])
    assert f"embedkit index {folder} -o {other} --rebuild" in str(caught.value)
    with pytest.raises(UsageError, match="named twice"):
        merge_indexes(out, [index, index])
    with pytest.raises(UsageError, match="there already"):
        merge_indexes(index, [index])
    with pytest.raises(UsageError, match="no folder"):
        merge_indexes(tmp_path / "no/m.faiss", [index])
    with pytest.raises(UsageError, match="nothing was named"):
        merge_indexes(out, [])
    assert bytes_beside(index) == before


@pytest.mark.parametrize(
    "point", ["_take_choices", "sync_folder", "publish_store", "Store.give_labels"]
)
def test_a_merge_that_dies_can_be_done_again_or_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    root, parts = shards(tmp_path, 2)
    out = tmp_path / "all.faiss"

    def die(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"embedkit.index.merge.{point}", die)
    with pytest.raises((EmbedKitError, OSError)):
        merge_indexes(out, parts)
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.tmp.*"))
    merge_indexes(out, parts)
    assert names_and_vectors(out) == truth(root)
    with pytest.raises(UsageError, match="there already"):
        merge_indexes(out, parts)


def test_one_index_can_be_merged_to_another_place(
    folder: Path, index: Path, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    merge_indexes(tmp_path / "there/c.faiss", [index])
    assert known_run(tmp_path / "there/c.faiss").root == b"../photos"
    assert names_and_vectors(tmp_path / "there/c.faiss") == truth(folder)
