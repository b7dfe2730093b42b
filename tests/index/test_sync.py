"""The folder is the truth: every way it can change, and every way a run can end."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import embedkit.index.sync as module
from embedkit.errors import DataError, EmbedKitError, Interrupted, MismatchError, UsageError
from embedkit.index import Catalog, SyncReport, remembered_model, sync_folder
from embedkit.index.store import Store, store_path
from tests.index.fakes import FakeEmbedder, names_and_vectors, truth

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of three, one picture on top; every file as old as a settled one."""
    root = tmp_path / "photos"
    for n in range(9):
        path = root / f"class{n // 3}" / f"{n}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"picture %d" % n)
    (root / "top.png").write_bytes(b"picture top")
    age(root)
    return root


@pytest.fixture
def index(tmp_path: Path) -> Path:
    return tmp_path / "catalog.faiss"


def age(folder: Path, seconds: float = 100) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, (time.time() - seconds,) * 2)


def sync(folder: Path, index: Path, **options: object) -> SyncReport:
    """A sync by a fresh embedder, after which the catalog must equal the folder."""
    report = sync_folder(folder, index, FakeEmbedder(), **options)  # type: ignore[arg-type]
    check(folder, index, report)
    return report


def check(folder: Path, index: Path, report: SyncReport) -> None:
    assert report.found == report.embedded + report.unchanged + report.moved + report.failed
    assert report.failed == len(report.failures)
    assert names_and_vectors(index) == truth(folder)
    assert report.count == len(truth(folder))


def counts(report: SyncReport) -> tuple[int, int, int, int, int]:
    """embedded, unchanged, moved, failed, removed"""
    return report.embedded, report.unchanged, report.moved, report.failed, report.removed


# What the folder does


def test_a_new_folder_is_embedded_once_and_then_left_alone(folder: Path, index: Path) -> None:
    assert counts(sync(folder, index)) == (10, 0, 0, 0, 0)
    before = index.stat()
    again = sync(folder, index)
    assert counts(again) == (0, 10, 0, 0, 0)
    assert not again.published
    assert index.stat().st_ino == before.st_ino
    assert sorted(path.name for path in index.parent.iterdir()) == [
        "catalog.faiss",
        "catalog.faiss.store",
        "photos",
    ]


def test_settled_files_are_not_even_opened(
    folder: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync(folder, index)
    opened: list[Path] = []
    monkeypatch.setattr(module, "hash_file", lambda path: opened.append(path) or "00" * 16)
    assert counts(sync(folder, index)) == (0, 10, 0, 0, 0)
    assert opened == []


def test_a_label_is_the_first_folder_below_the_root(folder: Path, index: Path) -> None:
    (folder / "class1/deep/er").mkdir(parents=True)
    (folder / "class1/deep/er/x.jpg").write_bytes(b"x")
    sync(folder, index)
    labels = {path: label for path, (label, _) in names_and_vectors(index).items()}
    assert labels[b"top.png"] == b""
    assert labels[b"class0/2.jpg"] == b"class0"
    assert labels[b"class1/deep/er/x.jpg"] == b"class1"


def test_new_changed_moved_copied_and_deleted(folder: Path, index: Path) -> None:
    sync(folder, index)
    (folder / "new.jpg").write_bytes(b"new")
    (folder / "class0/0.jpg").write_bytes(b"changed")
    (folder / "class0/1.jpg").rename(folder / "moved.jpg")
    shutil.copy(folder / "class1/3.jpg", folder / "copy.jpg")
    (folder / "class2").rename(folder / "class9")
    (folder / "top.png").unlink()
    report = sync(folder, index)
    assert counts(report) == (2, 4, 5, 0, 5)
    assert report.published


def test_touching_a_file_costs_a_hash_and_no_embedding(folder: Path, index: Path) -> None:
    sync(folder, index)
    age(folder, 50)
    report = sync(folder, index)
    assert counts(report) == (0, 10, 0, 0, 0)
    assert not report.published


def test_an_edit_that_keeps_size_and_time_just_after_the_run_is_seen(
    folder: Path, index: Path
) -> None:
    path = folder / "top.png"
    path.write_bytes(b"one way")
    stamp = path.stat().st_mtime_ns
    sync(folder, index)
    path.write_bytes(b"another"[:7])
    os.utime(path, ns=(stamp, stamp))
    assert counts(sync(folder, index)) == (1, 9, 0, 0, 0)


def test_copies_in_a_new_folder_are_embedded_once(tmp_path: Path, index: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    for n in range(50):
        (root / f"{n}.jpg").write_bytes(b"%d" % (n % 5))
    assert counts(sync(root, index)) == (5, 0, 45, 0, 0)


def test_names_may_change_places(
    folder: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", 2)  # the swap goes over chunks
    sync(folder, index)
    files = sorted(folder.rglob("*.jpg"))
    contents = [path.read_bytes() for path in files]
    for path, content in zip(files, contents[4:] + contents[:4], strict=True):
        path.write_bytes(content)
    assert counts(sync(folder, index)) == (0, 1, 9, 0, 0)


def test_the_same_folder_gives_the_same_bytes(
    folder: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder / "class0", folder / "class5")
    sync(folder, index)
    monkeypatch.setattr(module, "_CHUNK", 3)
    other = index.with_name("other.faiss")
    sync(folder, other, batch=1, workers=7)
    assert other.read_bytes() == index.read_bytes()


def test_odd_names_links_and_loops(folder: Path, index: Path) -> None:
    (folder / os.fsdecode(b"\xff\xfe.jpg")).write_bytes(b"1")
    (folder / "new\nline").mkdir()
    (folder / "new\nline/\u5199\u771f \u0438.JPG").write_bytes(b"2")
    (folder / "loop").symlink_to(".")
    (folder / "link.jpg").symlink_to("top.png")
    (folder / "dangling.jpg").symlink_to("nowhere")
    (folder / "self.jpg").symlink_to("self.jpg")
    os.mkfifo(folder / "pipe.jpg")
    report = sync(folder, index)
    assert counts(report) == (12, 0, 1, 2, 0)
    assert [(path.name, error.code) for path, error in report.failures] == [
        ("dangling.jpg", "unreadable"),
        ("self.jpg", "unreadable"),
    ]
    assert counts(sync(folder, index)) == (0, 13, 0, 2, 0)


# What fails


def test_failures_are_remembered_until_the_file_changes(folder: Path, index: Path) -> None:
    (folder / "bad.jpg").write_bytes(b"bad one")
    (folder / "worse.jpg").write_bytes(b"bad one")
    age(folder)
    embedder = FakeEmbedder()
    report = sync_folder(folder, index, embedder)
    check(folder, index, report)
    assert counts(report) == (10, 0, 0, 2, 0)
    assert len(embedder.embedded) == 11  # the copy of what is bad is not tried
    assert [error.code for _, error in report.failures] == ["not-an-image"] * 2
    embedder.embedded.clear()
    report = sync_folder(folder, index, embedder)
    assert counts(report) == (0, 10, 0, 2, 0)
    assert not report.published
    assert embedder.embedded == []
    assert [path.name for path, _ in report.failures] == ["bad.jpg", "worse.jpg"]
    (folder / "bad.jpg").write_bytes(b"good now")
    assert counts(sync(folder, index)) == (1, 10, 0, 1, 0)


def test_a_good_file_that_turns_bad_leaves_the_index(folder: Path, index: Path) -> None:
    sync(folder, index)
    (folder / "top.png").write_bytes(b"bad")
    report = sync(folder, index)
    assert counts(report) == (0, 9, 0, 1, 0)
    assert report.published


def test_retry_tries_again_what_failed(folder: Path, index: Path) -> None:
    (folder / "bad.jpg").write_bytes(b"bad")
    age(folder)
    sync(folder, index)
    embedder = FakeEmbedder()
    assert counts(sync_folder(folder, index, embedder, retry=True)) == (0, 10, 0, 1, 0)
    assert [path.name for path in embedder.embedded] == ["bad.jpg"]


def test_a_file_that_vanishes_under_way_is_a_failure(folder: Path, index: Path) -> None:
    def vanish(path: Path) -> None:
        if path.name == "4.jpg":
            path.unlink()

    report = sync_folder(folder, index, FakeEmbedder(before=vanish))
    check(folder, index, report)
    assert counts(report) == (9, 0, 0, 1, 0)
    assert [(path.name, error.code) for path, error in report.failures] == [("4.jpg", "unreadable")]
    assert counts(sync(folder, index)) == (0, 9, 0, 0, 0)


def test_a_file_that_vanishes_before_it_is_hashed_is_a_failure(
    folder: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hash_file = module.hash_file

    def vanish(path: Path) -> str:
        if path.name == "4.jpg":
            path.unlink()
        return hash_file(path)

    monkeypatch.setattr(module, "hash_file", vanish)
    assert counts(sync(folder, index)) == (9, 0, 0, 1, 0)


def test_a_file_that_changes_under_way_is_embedded_again(folder: Path, index: Path) -> None:
    (folder / "zz.jpg").write_bytes((folder / "top.png").read_bytes())
    age(folder)

    def change(path: Path) -> None:
        if path.name == "top.png":
            path.write_bytes(b"changed under way")

    report = sync_folder(folder, index, FakeEmbedder(before=change))
    check(folder, index, report)  # not even its copy was given the wrong vector
    assert sync(folder, index).failed == 0
    assert counts(sync(folder, index)) == (0, 11, 0, 0, 0)


def test_vectors_that_are_not_finite_are_failures(folder: Path, index: Path) -> None:
    class Broken(FakeEmbedder):
        def embed_files(self, *args, **options):  # type: ignore[no-untyped-def]
            for result in super().embed_files(*args, **options):
                if result.path.name == "3.jpg":
                    result.vector[2] = float("nan")
                yield result

    report = sync_folder(folder, index, Broken())
    assert counts(report) == (9, 0, 0, 1, 0)
    assert report.failures[0][0].name == "3.jpg"


@pytest.mark.parametrize("again", [False, True])
def test_without_a_usable_picture_nothing_is_published(
    tmp_path: Path, index: Path, again: bool
) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    if again:
        (root / "a.jpg").write_bytes(b"good")
        sync(root, index)
        (root / "a.jpg").unlink()
    before = index.read_bytes() if again else None
    with pytest.raises(DataError, match="no picture in"):
        sync_folder(root, index, FakeEmbedder())
    (root / "b.jpg").write_bytes(b"bad")
    with pytest.raises(DataError, match=r"(?s)is usable.*b\.jpg"):
        sync_folder(root, index, FakeEmbedder())
    assert (index.read_bytes() if again else None) == before
    assert index.exists() == again


def test_a_missing_folder_leaves_no_trace(tmp_path: Path, index: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        sync_folder(tmp_path / "nowhere", index, FakeEmbedder())
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no picture"):
        sync_folder(tmp_path / "empty", index, FakeEmbedder())
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


# Whose index


@pytest.mark.parametrize(("dim", "weights"), [(8, "other"), (9, "w"), (9, "other")])
@pytest.mark.parametrize("lost", ["nothing", "store", "catalog"])
def test_another_model_is_refused_until_told_to_rebuild(
    folder: Path, index: Path, dim: int, weights: str, lost: str
) -> None:
    sync(folder, index)
    if lost != "nothing":
        (store_path(index) if lost == "store" else index).unlink()
    files = {path: path.read_bytes() for path in index.parent.iterdir() if path.is_file()}
    other = FakeEmbedder(dim=dim, weights=weights)
    with pytest.raises(MismatchError, match="--rebuild") as caught:
        sync_folder(folder, index, other)
    assert other.contract.fingerprint in str(caught.value)
    assert FakeEmbedder().contract.fingerprint in str(caught.value)
    assert other.embedded == []
    for path, content in files.items():
        assert path.read_bytes() == content
    report = sync_folder(folder, index, other, rebuild=True)
    assert counts(report) == (10, 0, 0, 0, 0)
    assert names_and_vectors(index) == truth(folder, dim)
    assert Catalog.open(index).fingerprint == other.contract.fingerprint


def test_an_index_of_another_folder_is_not_taken_over(
    folder: Path, index: Path, tmp_path: Path
) -> None:
    sync(folder, index)
    other = tmp_path / "other"
    other.mkdir()
    (other / "x.jpg").write_bytes(b"x")
    with pytest.raises(UsageError, match="another folder"):
        sync_folder(other, index, FakeEmbedder())
    store_path(index).unlink()
    with pytest.raises(UsageError, match="another folder"):
        sync_folder(other, index, FakeEmbedder())
    assert names_and_vectors(index) == truth(folder)
    assert counts(sync(other, index, rebuild=True)) == (1, 0, 0, 0, 0)


def test_a_folder_that_moved_is_followed(folder: Path, index: Path, tmp_path: Path) -> None:
    sync(folder, index)
    folder.rename(tmp_path / "pictures")
    report = sync(tmp_path / "pictures", index)
    assert counts(report) == (0, 10, 0, 0, 0)
    assert Catalog.open(index).root == tmp_path / "pictures"


def test_the_whole_place_may_move(folder: Path, index: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    folder.rename(here / "photos")
    sync(here / "photos", here / "c.faiss")
    here.rename(tmp_path / "there")
    assert counts(sync(tmp_path / "there/photos", tmp_path / "there/c.faiss")) == (0, 10, 0, 0, 0)


@pytest.mark.parametrize("rebuild", [False, True])
def test_a_file_that_is_no_index_is_not_overwritten(
    folder: Path, tmp_path: Path, rebuild: bool
) -> None:
    target = tmp_path / "holiday.jpg"
    target.write_bytes(b"precious")
    with pytest.raises(UsageError, match="will not be overwritten"):
        sync_folder(folder, target, FakeEmbedder(), rebuild=rebuild)
    assert target.read_bytes() == b"precious"


def test_places_where_nothing_can_be_written_are_named(folder: Path, tmp_path: Path) -> None:
    for target in (tmp_path, tmp_path / "no/c.faiss"):
        with pytest.raises(UsageError):
            sync_folder(folder, target, FakeEmbedder())


def test_the_model_is_found_again(folder: Path, tmp_path: Path, index: Path) -> None:
    assert remembered_model(index) is None
    (tmp_path / "runs").mkdir()
    model = tmp_path / "runs/m.onnx"
    model.touch()
    sync(folder, index, model=model)
    assert remembered_model(index) == model
    store_path(index).unlink()
    assert remembered_model(index) == model
    model.rename(tmp_path / "m.onnx")
    assert remembered_model(index) == tmp_path / "m.onnx"
    sync(folder, index, model=tmp_path / "m.onnx")
    sync(folder, index)  # not told: kept
    assert remembered_model(index) == tmp_path / "m.onnx"


# Damage and loss


def test_a_lost_or_damaged_catalog_is_written_again_from_the_store(
    folder: Path, index: Path
) -> None:
    sync(folder, index)
    whole = index.read_bytes()
    for damage in (whole[:60], whole[:-30], whole[:100] + b"\0" * 50 + whole[150:], None):
        index.unlink() if damage is None else index.write_bytes(damage)
        report = sync(folder, index)
        assert counts(report) == (0, 10, 0, 0, 0)
        assert report.published
        assert index.read_bytes() == whole


def test_a_lost_store_costs_an_embedding_and_nothing_else(folder: Path, index: Path) -> None:
    sync(folder, index)
    store_path(index).unlink()
    assert counts(sync(folder, index)) == (10, 0, 0, 0, 0)


def test_a_damaged_store_is_refused_and_rebuilt(folder: Path, index: Path) -> None:
    sync(folder, index)
    before = index.read_bytes()
    store_path(index).write_bytes(b"\0" * 5000)
    with pytest.raises(MismatchError, match="--rebuild"):
        sync_folder(folder, index, FakeEmbedder())
    assert index.read_bytes() == before
    assert counts(sync(folder, index, rebuild=True)) == (10, 0, 0, 0, 0)


# Looking only


def test_a_dry_run_counts_and_writes_nothing(folder: Path, index: Path) -> None:
    embedder = FakeEmbedder()
    report = sync_folder(folder, index, embedder, dry_run=True)
    assert counts(report) == (10, 0, 0, 0, 0)
    assert sorted(path.name for path in index.parent.iterdir()) == ["photos"]
    sync(folder, index)
    (folder / "top.png").rename(folder / "up.png")
    (folder / "class0/0.jpg").write_bytes(b"changed")
    (folder / "new.jpg").write_bytes(b"new")
    (folder / "newer.jpg").write_bytes(b"new")
    (folder / "lost.jpg").symlink_to("nowhere")
    files = {path: path.read_bytes() for path in index.parent.iterdir() if path.is_file()}
    looked = sync_folder(folder, index, embedder, dry_run=True)
    assert embedder.embedded == []
    for path, content in files.items():
        assert path.read_bytes() == content
    done = sync(folder, index)
    assert counts(looked) == counts(done) == (2, 8, 2, 1, 1)
    assert [str(p) for p, _ in looked.failures] == [str(p) for p, _ in done.failures]
    rebuilt = sync_folder(folder, index, embedder, dry_run=True, rebuild=True)
    assert counts(rebuilt) == (11, 0, 1, 1, 0)


def test_progress_adds_up(folder: Path, index: Path) -> None:
    (folder / "bad.jpg").write_bytes(b"bad")
    steps: list[tuple[int, int, int]] = []
    sync(folder, index, progress=lambda *step: steps.append(step))
    assert (sum(s[0] for s in steps), sum(s[1] for s in steps)) == (11, 1)
    assert {s[2] for s in steps} == {11}


# Ending early


@pytest.mark.parametrize("stop", [0, 1, 4, 9])
def test_ctrl_c_keeps_what_was_embedded(folder: Path, index: Path, stop: int) -> None:
    def press(path: Path) -> None:
        if len(first.embedded) == stop:
            raise KeyboardInterrupt

    first = FakeEmbedder(before=press)
    with pytest.raises(Interrupted, match="again to go on"):
        sync_folder(folder, index, first, batch=3)
    assert not index.exists()
    assert counts(sync(folder, index)) == (10 - stop, stop, 0, 0, 0)


def test_a_failing_engine_loses_at_most_a_batch(folder: Path, index: Path) -> None:
    def fail(path: Path) -> None:
        if len(first.embedded) == 8:
            raise EmbedKitError("the engine failed")

    first = FakeEmbedder(before=fail)
    with pytest.raises(EmbedKitError, match="the engine failed"):
        sync_folder(folder, index, first, batch=3)
    assert counts(sync(folder, index)) == (4, 6, 0, 0, 0)


@pytest.mark.parametrize(
    "point",
    [
        "embedkit.index.sync.write_catalog",
        "embedkit.index.file._check_written",
        "pathlib.Path.replace",
        "embedkit.index.file.sync_folder",
        "embedkit.index.store.Store.set_published",
        "embedkit.index.store.Store.remove_gone",
    ],
)
def test_dying_at_any_point_of_the_end_is_made_good_by_the_next_run(
    folder: Path, index: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    sync(folder, index)
    old = truth(folder)
    (folder / "new.jpg").write_bytes(b"new")
    (folder / "top.png").unlink()

    class Killed(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise Killed

    monkeypatch.setattr(point, die)
    with pytest.raises(Killed):
        sync_folder(folder, index, FakeEmbedder())
    monkeypatch.undo()
    assert names_and_vectors(index) in (old, truth(folder))
    assert counts(sync(folder, index))[:4] == (0, 10, 0, 0)


def test_what_a_killed_run_left_is_swept_away(folder: Path, index: Path) -> None:
    for name in ("catalog.faiss.tmp.123", "catalog.faiss.tmp.99999"):
        index.with_name(name).write_bytes(b"half")
    theirs = index.with_name("other.faiss.tmp.1")
    theirs.write_bytes(b"half")
    sync(folder, index)
    assert [path.name for path in index.parent.glob("*.tmp.*")] == [theirs.name]


# The program that the next tests start, kill and start again.
_RUN = """
import sys
from pathlib import Path
from embedkit.errors import EmbedKitError
from embedkit.index import sync_folder
from tests.index.fakes import FakeEmbedder
print("go", flush=True)
try:
    report = sync_folder(
        Path(sys.argv[1]), Path(sys.argv[2]), FakeEmbedder(seconds=float(sys.argv[3])), batch=8
    )
except EmbedKitError as error:
    sys.exit(f"{error.exit_code}: {error}")
print(report.embedded, flush=True)
"""


def start(folder: Path, index: Path, *, seconds: float = 0.0) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", _RUN, str(folder), str(index), str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "go\n"
    return child


def edit(folder: Path, rng: random.Random, number: int) -> None:
    files = sorted(folder.glob("*.jpg"))
    for path in rng.sample(files, 6):
        choice = rng.randrange(4)
        if choice == 0:
            path.unlink()
        elif choice == 1:
            path.write_bytes(b"edit %d %d" % (number, rng.randrange(10**9)))
        elif choice == 2:
            path.rename(folder / f"moved-{number}-{rng.randrange(10**9)}.jpg")
        else:
            shutil.copy(path, folder / f"copy-{number}-{rng.randrange(10**9)}.jpg")


def test_killed_at_random_points_with_edits_between_it_stays_consistent(
    tmp_path: Path, index: Path
) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    for n in range(150):
        (root / f"{n}.jpg").write_bytes(b"bad" if n % 50 == 7 else b"picture %d" % n)
    rng = random.Random(5)
    killed = 0
    published: dict[bytes, tuple[bytes, bytes]] | None = None
    for number in range(9):
        # The first three need at least 3 s and are killed on any machine; of the others some end.
        child = start(root, index, seconds=0.02 if number < 3 or number % 2 else 0.0)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(rng.uniform(0.01, 0.45))
        child.send_signal(signal.SIGKILL)
        killed += child.wait() == -signal.SIGKILL
        child.communicate()
        now = names_and_vectors(index) if index.exists() else None
        assert now in (published, truth(root)), "a reader saw something that is neither"
        published = now
        with Store(store_path(index)) as store:
            assert store._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        edit(root, rng, number)
    assert killed >= 3
    report = sync(root, index)
    assert report.embedded < 100  # earlier runs were not in vain
    assert not list(tmp_path.glob("*.tmp.*"))
    assert counts(sync(root, index))[0] == 0


def test_the_second_writer_is_sent_away_and_the_first_goes_on(folder: Path, index: Path) -> None:
    first = start(folder, index, seconds=0.2)
    lock = index.with_name(index.name + ".lock")
    while not (lock.exists() and lock.read_text()):  # the holder's number, once it is held
        assert first.poll() is None
        time.sleep(0.01)
    with pytest.raises(EmbedKitError, match="another embedkit is writing"):
        sync_folder(folder, index, FakeEmbedder())
    out, error = first.communicate(timeout=60)
    assert (out, error) == ("10\n", "")
    assert counts(sync(folder, index)) == (0, 10, 0, 0, 0)


def test_readers_see_whole_catalogs_while_a_writer_writes(folder: Path, index: Path) -> None:
    sync(folder, index)
    allowed = [truth(folder)]
    for n in range(3):
        (folder / f"more{n}.jpg").write_bytes(b"more %d" % n)
        allowed.append(truth(folder))
        child = start(folder, index)
        while child.poll() is None:
            catalog = Catalog.open(index, verify=True)
            assert len(catalog) in (len(allowed[-1]), len(allowed[-2]))
            assert len(catalog.search([[1] + [0] * 7], 3)[0]) == 3
        child.communicate()
        assert names_and_vectors(index) == allowed[-1]


_FULL = """
import resource, sys
from pathlib import Path
from embedkit.errors import EmbedKitError
from embedkit.index import sync_folder
from tests.index.fakes import FakeEmbedder
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    sync_folder(Path(sys.argv[1]), Path(sys.argv[2]), FakeEmbedder(dim=512), batch=4)
except EmbedKitError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("room", [0, 30_000, 70_000, 110_000])
def test_a_full_disk_keeps_the_old_catalog_and_what_was_committed(
    tmp_path: Path, index: Path, room: int
) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    (root / "first.jpg").write_bytes(b"first")
    sync_folder(root, index, FakeEmbedder(dim=512))
    old = truth(root, 512)
    for n in range(60):
        (root / f"{n}.jpg").write_bytes(b"%d" % n)
    done = subprocess.run(
        [sys.executable, "-c", _FULL, str(root), str(index), str(room)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 1, done.stderr
    assert "catalog.faiss" in done.stdout
    assert "Traceback" not in done.stderr
    assert names_and_vectors(index) == old
    report = sync_folder(root, index, FakeEmbedder(dim=512))
    assert names_and_vectors(index) == truth(root, 512)
    if room == 110_000:
        assert report.embedded < 60


_NOBODY = (
    "import encodings.cp437, fcntl, os, sys, numpy.random; sys.path.insert(0, '.')\n"
    + _RUN.replace('print("go", flush=True)', "if os.getuid() == 0: os.setuid(65534)")
)


@pytest.mark.parametrize("writable", [True, False])
def test_a_folder_that_cannot_be_written_to_is_named(writable: bool) -> None:
    place = Path(tempfile.mkdtemp())
    try:
        (place / "photos").mkdir()
        (place / "photos/a.jpg").write_bytes(b"a")
        place.chmod(0o777 if writable else 0o555)
        done = subprocess.run(
            [sys.executable, "-c", _NOBODY, str(place / "photos"), str(place / "c.faiss"), "0"],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
        )
        assert done.returncode == (0 if writable else 1), done.stderr
        if not writable:
            assert "1: nothing can be written beside" in done.stderr
            assert "-o FILE" in done.stderr
    finally:
        place.chmod(0o755)
        shutil.rmtree(place)


# The property: however it came about, it equals the folder

_NAMES = ["a.jpg", "b.jpg", "x/a.jpg", "x/b.jpg", "x/c.jpg", "y/a.jpg", "\udcff.jpg"]
_EDITS = st.one_of(
    st.tuples(st.just("write"), st.sampled_from(_NAMES), st.sampled_from(["1", "2", "bad", "44"])),
    st.tuples(st.just("delete"), st.sampled_from(_NAMES), st.none()),
    st.tuples(st.just("move"), st.sampled_from(_NAMES), st.sampled_from(_NAMES)),
    st.tuples(st.just("copy"), st.sampled_from(_NAMES), st.sampled_from(_NAMES)),
    st.tuples(st.just("sync"), st.none(), st.none()),
    st.tuples(st.just("die"), st.integers(0, 3), st.none()),
)


def apply(root: Path, what: str, name: str, other: str | None) -> None:
    path = root / name
    if what == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(str(other).encode())
    elif path.exists():
        target = root / (other or name)
        target.parent.mkdir(exist_ok=True)
        if what == "delete":
            path.unlink()
        elif what == "move":
            path.rename(target)
        elif target != path:
            shutil.copy2(path, target)


def dying(after: int) -> FakeEmbedder:
    def stop(path: Path) -> None:
        if len(embedder.embedded) == after:
            raise KeyboardInterrupt

    embedder = FakeEmbedder(before=stop)
    return embedder


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(edits=st.lists(_EDITS, max_size=14))
def test_any_history_of_edits_and_syncs_equals_a_rebuild(
    edits: list[tuple[str, str | int | None, str | None]],
) -> None:
    with tempfile.TemporaryDirectory() as place:
        root, index = Path(place) / "photos", Path(place) / "c.faiss"
        root.mkdir()
        (root / "always.jpg").write_bytes(b"always")
        for what, name, other in edits:
            if what == "sync":
                check(root, index, sync_folder(root, index, FakeEmbedder(), batch=2))
            elif what == "die":
                with contextlib.suppress(Interrupted):
                    sync_folder(root, index, dying(int(name or 0)), batch=2)
            else:
                apply(root, what, str(name), other)
        check(root, index, sync_folder(root, index, FakeEmbedder()))
        rebuilt = Path(place) / "rebuilt.faiss"
        sync_folder(root, rebuilt, FakeEmbedder())
        assert names_and_vectors(rebuilt) == names_and_vectors(index)
