"""`catalog.faiss.store`: who was embedded, with what, and what failed; the truth while building.

One SQLite file in WAL mode with ``synchronous=FULL``: what was committed outlasts a killed process
and a power cut. The published catalog is derived from it. Vectors are kept as float32, so that what
is searched equals a fresh embedding bit for bit; float16 would halve the file and move scores by
about 2e-4, enough to swap close neighbours.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from embedkit.errors import EmbedKitError, MismatchError
from embedkit.index.catalog import Row, Vectors

__all__ = ["Choices", "Content", "Item", "Run", "Seen", "Store", "store_path", "writer_lock"]

APPLICATION_ID = 0x656D6B69  # "emki"
VERSION = 2
BUSY_SECONDS = 30

# No file's own time: such an item is hashed again by the next run.
UNSETTLED = -(1 << 62)
# A file that could not be read is tried again by every run: its bytes may be fine.
UNREADABLE = "unreadable"

_TABLES = """
CREATE TABLE run (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    fingerprint TEXT NOT NULL,
    contract TEXT NOT NULL,
    root BLOB NOT NULL,
    model BLOB,
    published TEXT NOT NULL DEFAULT ''
);
CREATE TABLE item (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    path BLOB NOT NULL UNIQUE,
    size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    hash BLOB,
    label BLOB NOT NULL,
    error TEXT,
    reason TEXT,
    vector BLOB,
    CHECK ((vector IS NULL) <> (error IS NULL))
);
CREATE INDEX item_hash ON item (hash);
CREATE TABLE spare (hash BLOB PRIMARY KEY, vector BLOB NOT NULL);
"""
# What the user said about single files, which outlasts what is in the folder: added from elsewhere
# (wanted) or kept out (not wanted), and labels other than the folder's name; and, in one row, what
# kind of index it is to be. New in version 2.
_CHOICES = """
CREATE TABLE choice (path BLOB PRIMARY KEY, wanted INTEGER NOT NULL);
CREATE TABLE label (path BLOB PRIMARY KEY, label BLOB NOT NULL);
CREATE TABLE kind (id INTEGER PRIMARY KEY CHECK (id = 1), wanted TEXT NOT NULL);
"""
_SEEN = """
CREATE TEMP TABLE seen (
    id INTEGER PRIMARY KEY, path BLOB NOT NULL UNIQUE, size INTEGER NOT NULL, mtime_ns INTEGER NOT
    NULL
)
"""
# A file whose size and time are as remembered is not opened, unless it could not be opened before.
_SETTLED = """
item.size = seen.size AND item.mtime_ns = seen.mtime_ns
AND (item.error IS NULL OR item.error <> 'unreadable')
"""


@dataclass(frozen=True)
class Run:
    """What an index was built from.

    Attributes:
        fingerprint: Of the model.
        contract: The model's whole contract, JSON.
        root: The folder, as `portable_path` keeps it.
        model: The model's file in the same way; None where it was not told.
        published: Digest of the manifest of the catalog that equals this store; empty while none
            does; of an unfinished merge what it is of, JSON.
    """

    fingerprint: str
    contract: str
    root: bytes
    model: bytes | None
    published: str = ""

    @property
    def merging(self) -> bool:
        """Whether this is a whole merge that no catalog was published of."""
        return self.published.startswith("{")


class Seen(NamedTuple):
    """One file the walk met: path in bytes, size in bytes, time.

    The path is relative to the root; of a file that was added from elsewhere it is absolute.
    """

    path: bytes
    size: int
    mtime_ns: int


class Item(NamedTuple):
    """What is remembered of one file: a vector, or why there is none.

    Attributes:
        path: As in `Seen`.
        size: In bytes.
        mtime_ns: `UNSETTLED` where the file may have changed since without showing it.
        hash: blake2b-128 of the content; None where it is not known.
        label: In bytes.
        error: Code of the `ImageError`; None where there is a vector.
        reason: Its reason.
        vector: float32 bytes, and behind them the codes of a model that gives codes, a byte each;
            None where there is an error.
    """

    path: bytes
    size: int
    mtime_ns: int
    hash: bytes | None
    label: bytes
    error: str | None
    reason: str | None
    vector: bytes | None


class Content(NamedTuple):
    """What some content gave before: a vector, or an error with its reason."""

    vector: bytes | None
    error: str | None
    reason: str | None


class Choices(NamedTuple):
    """What the user said about single files, by path: `Store.added` and its neighbours."""

    added: list[bytes]
    kept_out: list[bytes]
    labels: dict[bytes, bytes]


def store_path(index: Path) -> Path:
    """Where the store of an index stands: beside it."""
    return index.with_name(index.name + ".store")


class Store:
    """One open store; used by one thread. Every method that writes commits before it returns.

    Args:
        file: The file, made when it is not there; None keeps everything in memory.
        read_only: Nothing is written to the file, which must be there.

    Raises:
        MismatchError: The file is damaged, or no store of this version.
        EmbedKitError: It cannot be opened or written.
    """

    def __init__(self, file: Path | None, *, read_only: bool = False) -> None:
        self.file = file or Path(":memory:")
        self._read_only = read_only and file is not None
        name, uri = str(self.file), False
        if self._read_only:
            # A reader that may write takes its lock files away when it leaves. One that may not can
            # make none: then nobody else writes here either.
            free = os.access(self.file, os.W_OK) and os.access(self.file.parent, os.W_OK)
            how = "mode=rw" if free else "mode=ro&immutable=1"
            name, uri = f"{self.file.absolute().as_uri()}?{how}", True
        with self._explained():
            self._db = sqlite3.connect(name, uri=uri, timeout=BUSY_SECONDS, isolation_level=None)
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    def run(self) -> Run | None:
        """What the index is built from; None in a new store."""
        with self._explained():
            row = self._db.execute(
                "SELECT fingerprint, contract, root, model, published FROM run"
            ).fetchone()
        return Run(*row) if row else None

    def set_run(self, run: Run) -> None:
        """Remember what the index is built from."""
        with self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO run VALUES (1, ?, ?, ?, ?, ?)",
                (run.fingerprint, run.contract, run.root, run.model, run.published),
            )

    def set_published(self, digest: str) -> None:
        """Remember that the catalog with this manifest equals the store."""
        with self._transaction():
            self._db.execute("UPDATE run SET published = ?", (digest,))

    # The files of this run

    def see(self, files: Iterable[Seen]) -> int:
        """Take in what the walk met, in its order; how many. For this connection only."""
        with self._explained():
            self._db.execute("DROP TABLE IF EXISTS temp.seen")
            self._db.execute(_SEEN)
            self._db.execute("BEGIN")
            self._db.executemany("INSERT INTO seen (path, size, mtime_ns) VALUES (?, ?, ?)", files)
            self._db.execute("COMMIT")
            return self._count("SELECT count(*) FROM seen")

    def settled(self) -> tuple[int, int]:
        """Seen files that are as remembered: how many with a vector, how many with an error."""
        with self._explained():
            good, bad = self._db.execute(
                "SELECT count(item.vector), count(item.error) FROM seen"
                f" JOIN item ON item.path = seen.path WHERE {_SETTLED}"
            ).fetchone()
        return good, bad

    def pending(self, after: int, limit: int) -> list[tuple[int, Seen]]:
        """The next `limit` seen files that are not settled, in order, beyond number `after`."""
        with self._explained():
            rows = self._db.execute(
                "SELECT seen.id, seen.path, seen.size, seen.mtime_ns FROM seen"
                f" LEFT JOIN item ON item.path = seen.path AND {_SETTLED}"
                " WHERE item.id IS NULL AND seen.id > ? ORDER BY seen.id LIMIT ?",
                (after, limit),
            ).fetchall()
        return [(number, Seen(*rest)) for number, *rest in rows]

    def count_gone(self) -> int:
        """Remembered pictures with a vector whose file was not seen."""
        with self._explained():
            return self._count(
                "SELECT count(vector) FROM item WHERE path NOT IN (SELECT path FROM seen)"
            )

    def remove_gone(self) -> None:
        """Forget every file that was not seen, and what was kept for files that moved."""
        leaving = self.count_gone()
        with self._transaction():
            self._db.execute("DELETE FROM spare")
            self._db.execute("DELETE FROM item WHERE path NOT IN (SELECT path FROM seen)")
            if leaving:
                self._db.execute("UPDATE run SET published = ''")

    # What the user said

    def added(self) -> list[bytes]:
        """Files that belong to the index although no walk meets them, by path."""
        with self._explained():
            rows = self._db.execute("SELECT path FROM choice WHERE wanted ORDER BY path").fetchall()
        return [path for (path,) in rows]

    def kept_out(self) -> list[bytes]:
        """Files that stay out of the index although the folder holds them, by path."""
        with self._explained():
            rows = self._db.execute(
                "SELECT path FROM choice WHERE NOT wanted ORDER BY path"
            ).fetchall()
        return [path for (path,) in rows]

    def labels(self) -> dict[bytes, bytes]:
        """Labels that were given by hand, by path."""
        with self._explained():
            return dict(self._db.execute("SELECT path, label FROM label"))

    def choose(
        self,
        *,
        added: Iterable[bytes] = (),
        kept_out: Iterable[bytes] = (),
        neither: Iterable[bytes] = (),
    ) -> None:
        """Remember these as added, as kept out, or as the folder says."""
        with self._transaction():
            self._db.executemany("DELETE FROM choice WHERE path = ?", ((path,) for path in neither))
            for paths, wanted in ((added, True), (kept_out, False)):
                self._db.executemany(
                    "INSERT OR REPLACE INTO choice VALUES (?, ?)",
                    ((path, wanted) for path in paths),
                )

    def give_labels(self, labels: Mapping[bytes, bytes]) -> None:
        """Remember these labels by path, for files that are here and for those that come."""
        pairs = [(label, path) for path, label in labels.items()]
        with self._transaction():
            self._db.executemany("INSERT OR REPLACE INTO label (label, path) VALUES (?, ?)", pairs)
            before = self._db.total_changes
            self._db.executemany(
                "UPDATE item SET label = ?1 WHERE path = ?2 AND label <> ?1", pairs
            )
            if self._db.total_changes > before:
                self._db.execute("UPDATE run SET published = ''")

    def wanted(self) -> str:
        """What kind of index it is to be (`Wanted.dumps`); empty where nothing was said."""
        with self._explained():
            row = self._db.execute("SELECT wanted FROM kind").fetchone()
        return row[0] if row else ""

    def want(self, wanted: str) -> None:
        """Remember what kind of index it is to be; the catalog equals the store no more."""
        if wanted == self.wanted():
            return
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO kind VALUES (1, ?)", (wanted,))
            self._db.execute("UPDATE run SET published = ''")

    def choices(self) -> Choices:
        """All of what the user said."""
        return Choices(self.added(), self.kept_out(), self.labels())

    def take_choices(self, choices: Choices | None) -> None:
        """Remember what another store was told."""
        if choices is not None:
            self.choose(added=choices.added, kept_out=choices.kept_out)
            self.give_labels(choices.labels)

    def clear(self) -> None:
        """Forget every file, but not what the user said, and whose index it is."""
        with self._transaction():
            self._db.execute("DELETE FROM item")
            self._db.execute("DELETE FROM spare")
            self._db.execute("UPDATE run SET published = ''")

    def leave_out(self) -> int:
        """Take what is kept out from among the seen files; how many those are."""
        with self._explained():
            return self._db.execute(
                "DELETE FROM seen WHERE path IN (SELECT path FROM choice WHERE NOT wanted)"
            ).rowcount

    # Items

    def content(self, hash: bytes) -> Content | None:
        """What this content gave before, under any name; None where it is new."""
        with self._explained():
            row = self._db.execute(
                "SELECT vector, error, reason FROM item WHERE hash = ?1"
                " UNION ALL SELECT vector, NULL, NULL FROM spare WHERE hash = ?1 LIMIT 1",
                (hash,),
            ).fetchone()
        return Content(*row) if row else None

    def known(self, path: bytes) -> Item | None:
        """What is remembered of a path; None where nothing is."""
        with self._explained():
            row = self._db.execute(
                "SELECT path, size, mtime_ns, hash, label, error, reason, vector FROM item"
                " WHERE path = ?",
                (path,),
            ).fetchone()
        return Item(*row) if row else None

    def hash_of(self, path: bytes) -> bytes | None:
        """The remembered content hash of a path."""
        with self._explained():
            row = self._db.execute("SELECT hash FROM item WHERE path = ?", (path,)).fetchone()
        return row[0] if row else None

    def put(self, items: list[Item]) -> None:
        """Remember these, in one transaction; a path that is known keeps its id.

        The vector a path had for other content is kept until `remove_gone`: another file may have
        that content now.
        """
        if not items:
            return
        with self._transaction():
            differs = any(item.vector or self._has_vector(item.path) for item in items)
            self._db.executemany(
                "INSERT OR IGNORE INTO spare SELECT hash, vector FROM item"
                " WHERE path = ? AND hash IS NOT NULL AND hash IS NOT ? AND vector IS NOT NULL",
                ((item.path, item.hash) for item in items),
            )
            self._db.executemany(
                "INSERT INTO item (path, size, mtime_ns, hash, label, error, reason, vector)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (path) DO UPDATE SET"
                " size = excluded.size, mtime_ns = excluded.mtime_ns, hash = excluded.hash,"
                " label = excluded.label, error = excluded.error, reason = excluded.reason,"
                " vector = excluded.vector",
                items,
            )
            if differs:
                self._db.execute("UPDATE run SET published = ''")

    def touch(self, files: list[Seen]) -> None:
        """Remember new times of files whose content is as before; the catalog stays as it is."""
        if not files:
            return
        with self._transaction():
            self._db.executemany(
                "UPDATE item SET size = ?, mtime_ns = ? WHERE path = ?",
                [(file.size, file.mtime_ns, file.path) for file in files],
            )

    def forget(self, paths: Iterable[bytes]) -> None:
        """Forget these files, usable or not."""
        names = [(path,) for path in paths]
        with self._transaction():
            before = self._count("SELECT count(vector) FROM item")
            self._db.executemany("DELETE FROM item WHERE path = ?", names)
            if self._count("SELECT count(vector) FROM item") != before:
                self._db.execute("UPDATE run SET published = ''")

    def forget_failures(self) -> None:
        """Forget what failed, so that it is tried again."""
        with self._transaction():
            self._db.execute("DELETE FROM item WHERE error IS NOT NULL")

    def failures(self) -> Iterator[tuple[bytes, str, str]]:
        """Path, code and reason of the seen files that failed, by path."""
        with self._explained():
            yield from self._db.execute(
                "SELECT path, error, reason FROM item"
                " WHERE error IS NOT NULL AND path IN (SELECT path FROM seen) ORDER BY path"
            )

    def count_usable(self) -> int:
        """How many files have a vector."""
        with self._explained():
            return self._count("SELECT count(vector) FROM item")

    def count_failed(self) -> int:
        """How many files are remembered as no usable pictures."""
        with self._explained():
            return self._count("SELECT count(error) FROM item")

    def paths(self) -> Iterator[tuple[bytes, bytes, bool]]:
        """Path, label and whether there is a vector, of every file, by id."""
        with self._explained():
            for path, label, usable in self._db.execute(
                "SELECT path, label, vector IS NOT NULL FROM item ORDER BY id"
            ):
                yield path, label, bool(usable)

    def items(self) -> Iterator[Item]:
        """Everything that is remembered, by id."""
        with self._explained():
            for row in self._db.execute(
                "SELECT path, size, mtime_ns, hash, label, error, reason, vector FROM item"
                " ORDER BY id"
            ):
                yield Item(*row)

    def check(self) -> str:
        """What SQLite finds wrong with the file; empty where it is sound. Cost: reads it all."""
        with self._explained():
            (said,) = self._db.execute("PRAGMA integrity_check(1)").fetchone()
        return "" if said == "ok" else str(said)

    def shrink(self) -> None:
        """Give back the room that forgotten files left in the file, and spare vectors with it.

        Needs as much free disk as the store is long.
        """
        with self._transaction():
            self._db.execute("DELETE FROM spare")
        with self._explained():
            self._db.execute("VACUUM")
            # The file itself shrinks when the log is written back into it.
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def rows(self, dim: int, parts: int = 0) -> Iterator[Row]:
        """What is to be published, by id.

        Args:
            dim: Numbers of a vector.
            parts: Codes of a picture; 0: the model gives none.

        Raises:
            MismatchError: A vector has not `dim` numbers, or not `parts` codes: the store is
                damaged.
        """
        with self._explained():
            for number, path, label, vector in self._db.execute(
                "SELECT id, path, label, vector FROM item WHERE vector IS NOT NULL ORDER BY id"
            ):
                size = 4 * dim + parts
                if len(vector) != size:
                    raise _damaged(self.file, f"a vector has {len(vector)} bytes, not {size}")
                numbers: Vectors = np.frombuffer(vector, "<f4", dim)
                codes = np.frombuffer(vector, np.uint8, offset=4 * dim) if parts else None
                yield Row(number, path, label, numbers, codes)

    def _prepare(self) -> None:
        (application,) = self._db.execute("PRAGMA application_id").fetchone()
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        (tables,) = self._db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if tables == 0:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            # One transaction: a store exists whole or not at all.
            self._db.executescript(
                f"BEGIN IMMEDIATE; {_TABLES} {_CHOICES} PRAGMA application_id = {APPLICATION_ID};"
                f"PRAGMA user_version = {VERSION}; COMMIT;"
            )
            return
        if application != APPLICATION_ID:
            raise MismatchError(
                f"{self.file} is no embedkit store",
                facts="it is a database of another program",
                hint="choose another name for the index: -o NAME.faiss",
            )
        if version == 1 and not self._read_only:
            self._db.executescript(
                f"BEGIN IMMEDIATE; {_CHOICES} PRAGMA user_version = {VERSION}; COMMIT;"
            )
        elif version == 1:
            # Only looked into: the two tables are laid over it in memory.
            self._db.executescript(_CHOICES.replace("CREATE TABLE", "CREATE TEMP TABLE"))
        elif version != VERSION:
            raise MismatchError(
                f"{self.file} was written by another embedkit",
                facts=f"it has version {version}, this embedkit reads {VERSION}",
                hint="pip install --upgrade embedkit, or run again with --rebuild",
            )
        self._db.execute("PRAGMA synchronous = FULL")

    def _has_vector(self, path: bytes) -> bool:
        row = self._db.execute(
            "SELECT 1 FROM item WHERE path = ? AND vector IS NOT NULL", (path,)
        ).fetchone()
        return row is not None

    def _count(self, query: str) -> int:
        return int(self._db.execute(query).fetchone()[0])

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        assert not self._read_only, "a store that is only read was to be written"
        with self._explained():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                # A full disk may have rolled back already.
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """SQLite's errors in a sentence with the way out."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise _unusable(self.file, error) from error
        except sqlite3.DatabaseError as error:
            raise _damaged(self.file, str(error)) from error


@contextmanager
def writer_lock(index: Path) -> Iterator[None]:
    """Held while one process writes an index; it ends with the process. Readers need none.

    Raises:
        EmbedKitError: Another process holds it, or the folder cannot be written to.
    """
    if os.name != "posix":
        raise EmbedKitError("writing an index needs a POSIX system (Linux, macOS)")
    file = index.with_name(index.name + ".lock")
    handle = _locked(file, index)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(handle)


def _locked(file: Path, index: Path) -> int:
    """A handle of the lock file, held and with this process's number in it."""
    import fcntl

    handle = -1
    try:
        while True:
            handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last holder removes the file. Who locked what it removed takes the next one.
            if os.fstat(handle).st_nlink:
                break
            os.close(handle)
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
    except BlockingIOError as error:
        holder = os.read(handle, 32).decode("ascii", "replace").strip()
        os.close(handle)
        raise EmbedKitError(
            f"another embedkit is writing {index.name}",
            facts=f"process {holder}" if holder else None,
            hint="wait until it has ended, or give this one another name: -o NAME.faiss",
        ) from error
    except OSError as error:
        if handle >= 0:
            os.close(handle)
        raise EmbedKitError(
            f"nothing can be written beside {index}",
            facts=error.strerror,
            hint="make room, or choose a folder that can be written to: -o FILE",
        ) from error
    return handle


def _unusable(file: Path, error: sqlite3.OperationalError) -> EmbedKitError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        hint = "make room on the disk and run it again: what was embedded is kept"
    elif code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        hint = "another program has it open: end that first"
    elif code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
        hint = "choose a folder that can be written to: -o FILE"
    else:
        hint = "run it again; if that does not help: --rebuild"
    return EmbedKitError(f"the store {file} cannot be used", facts=str(error), hint=hint)


def _damaged(file: Path, facts: str) -> MismatchError:
    return MismatchError(
        f"the store {file} is damaged",
        facts=facts,
        hint="build it again: the same command with --rebuild",
    )
