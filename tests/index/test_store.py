"""The working store: what it promises, what it refuses, and that one process writes at a time."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from embedkit.errors import EmbedKitError, MismatchError
from embedkit.index.store import Item, Run, Seen, Store, writer_lock

ROOT = Path(__file__).parents[2]
VECTOR = np.arange(4, dtype="<f4").tobytes()


def item(name: bytes, hash: bytes = b"h" * 16, vector: bytes | None = VECTOR) -> Item:
    bad = vector is None
    return Item(name, 1, 2, hash, b"", "empty" if bad else None, "why" if bad else None, vector)


def test_it_waits_for_the_disk_and_says_what_it_is(tmp_path: Path) -> None:
    with Store(tmp_path / "s") as store:
        database = store._db
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert database.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
        assert database.execute("PRAGMA busy_timeout").fetchone() == (30_000,)
    with Store(tmp_path / "s") as store:
        assert store._db.execute("PRAGMA synchronous").fetchone() == (2,)
    with (tmp_path / "s").open("rb") as file:
        assert file.read()[68:72] == b"emki"
    assert list(tmp_path.iterdir()) == [tmp_path / "s"]  # no -wal and -shm left


def test_a_vector_comes_back_bit_for_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((3, 5)).astype("<f4") * np.float32([[1e-38], [1], [1e38]])
    names = [b"a", b"\xff\n", "\u5199".encode()]
    with Store(tmp_path / "s") as store:
        store.put([item(n, vector=v.tobytes()) for n, v in zip(names, vectors, strict=True)])
    with Store(tmp_path / "s") as store:
        rows = list(store.rows(5))
        assert [row.path for row in rows] == names
        assert np.array_equal(np.stack([row.vector for row in rows]), vectors)
        with pytest.raises(MismatchError, match="damaged"):
            list(store.rows(6))


def test_an_id_stays_with_its_path_and_is_never_given_again() -> None:
    with Store(None) as store:
        store.put([item(b"a"), item(b"b")])
        store.put([item(b"a", b"i" * 16)])
        assert [(row.id, row.path) for row in store.rows(4)] == [(1, b"a"), (2, b"b")]
        store.see([Seen(b"a", 1, 2)])
        store.remove_gone()
        store.put([item(b"c")])
        (first, last) = list(store.rows(4))
        assert (first.path, last.path) == (b"a", b"c")
        assert last.id > 2


def test_content_is_known_under_any_name_until_nobody_has_it() -> None:
    with Store(None) as store:
        store.put([item(b"a", b"1" * 16)])
        known = store.content(b"1" * 16)
        assert known is not None
        assert known.vector == VECTOR
        store.put([item(b"a", b"2" * 16)])  # overwritten: another file may still turn up with it
        assert store.content(b"1" * 16) is not None
        store.see([Seen(b"a", 1, 2)])
        store.remove_gone()
        assert store.content(b"1" * 16) is None
        assert store.content(b"2" * 16) is not None


def test_only_what_differs_is_pending() -> None:
    with Store(None) as store:
        store.put([item(b"same"), item(b"grown"), item(b"bad", vector=None), item(b"gone")])
        store.put([item(b"unreadable", vector=None)._replace(error="unreadable")])
        walk = [(b"new", 1, 2), (b"same", 1, 2), (b"grown", 9, 2), (b"bad", 1, 2)]
        walk += [(b"unreadable", 1, 2)]
        assert store.see(Seen(*file) for file in walk) == 5
        assert store.settled() == (1, 1)
        names = [seen.path for _, seen in store.pending(0, 99)]
        assert names == [b"new", b"grown", b"unreadable"]
        (first, _), *_ = store.pending(0, 1)
        assert [seen.path for _, seen in store.pending(first, 99)] == [b"grown", b"unreadable"]
        assert store.count_gone() == 1


def test_a_catalog_stays_true_until_a_vector_changes() -> None:
    with Store(None) as store:
        store.set_run(Run("f", "{}", b".", None, published="digest"))

        def published() -> str:
            run = store.run()
            assert run is not None
            return run.published

        store.put([item(b"bad", vector=None)])
        store.touch([Seen(b"bad", 5, 6)])
        store.see([Seen(b"bad", 5, 6)])
        store.remove_gone()
        assert published() == "digest"
        store.put([item(b"good")])
        assert published() == ""
        store.set_published("digest")
        store.put([item(b"good", vector=None)])
        assert published() == ""


@pytest.mark.parametrize("read_only", [False, True])
def test_what_is_no_store_is_refused_and_left_alone(tmp_path: Path, read_only: bool) -> None:
    file = tmp_path / "s"
    with sqlite3.connect(file) as other:
        other.execute("CREATE TABLE theirs (x)")
    other.close()
    before = file.read_bytes()
    with pytest.raises(MismatchError, match="another program"):
        Store(file, read_only=read_only)
    file.write_bytes(b"text" * 1000)
    with pytest.raises(MismatchError, match="damaged"):
        Store(file, read_only=read_only)
    assert before.startswith(b"SQLite")
    assert file.read_bytes() == b"text" * 1000


def test_a_store_of_another_version_says_so(tmp_path: Path) -> None:
    Store(tmp_path / "s").close()
    with sqlite3.connect(tmp_path / "s") as other:
        other.execute("PRAGMA user_version = 7")
    other.close()
    with pytest.raises(MismatchError, match="version 7"):
        Store(tmp_path / "s")


def test_damage_inside_is_named_with_the_way_out(tmp_path: Path) -> None:
    file = tmp_path / "s"
    with Store(file) as store:
        store.put([item(b"%d" % n, b"%016d" % n, VECTOR * 50) for n in range(200)])
    content = bytearray(file.read_bytes())
    content[4096 * 3 : -100] = b"\x55" * (len(content) - 4096 * 3 - 100)
    file.write_bytes(content)
    with pytest.raises(EmbedKitError, match="--rebuild"), Store(file) as store:
        list(store.rows(200))


def test_a_failed_transaction_leaves_nothing_half() -> None:
    with Store(None) as store:
        store.put([item(b"a")])
        wrong = item(b"c")._replace(error="empty")  # a vector and an error
        with pytest.raises(MismatchError):
            store.put([item(b"b"), wrong])
        assert [row.path for row in store.rows(4)] == [b"a"]
        store.put([item(b"b")])


def test_the_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    index = tmp_path / "c.faiss"
    with writer_lock(index):
        with pytest.raises(EmbedKitError, match=f"process {os.getpid()}"), writer_lock(index):
            pass
        assert (tmp_path / "c.faiss.lock").exists()
    with writer_lock(index):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_holds_nothing(tmp_path: Path) -> None:
    index = tmp_path / "c.faiss"
    code = (
        "import sys, time; from pathlib import Path; from embedkit.index.store import writer_lock\n"
        "with writer_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(index)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with pytest.raises(EmbedKitError, match=f"process {child.pid}"), writer_lock(index):
            pass
        child.send_signal(signal.SIGKILL)
        child.wait()
    with writer_lock(index):
        pass


def test_of_many_writers_one_is_in_at_a_time(tmp_path: Path) -> None:
    inside: list[int] = []
    entered = 0
    most = 0
    others: list[str] = []

    def write() -> None:
        nonlocal entered, most
        for _ in range(150):
            try:
                with writer_lock(tmp_path / "c.faiss"):
                    inside.append(1)
                    entered += 1
                    most = max(most, len(inside))
                    inside.pop()
            except EmbedKitError as error:
                others.append(error.what)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert entered + len(others) == 600
    assert set(others) <= {"another embedkit is writing c.faiss"}
