"""What is done so far, on the disk: killed anywhere, the same command goes on from there.

One SQLite file beside the output, removed when the output is whole. Nothing is held in memory, so a
run over a hundred million pictures takes as little of it as one over a hundred.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from embedkit.errors import EmbedKitError, ImageError, MismatchError
from embedkit.runtime.pipeline import Row
from embedkit.scale.source import Source

__all__ = ["Journal", "Line"]

_APPLICATION_ID = 0x656D6B6A  # "emkj"
_TABLES = """
CREATE TABLE IF NOT EXISTS model (fingerprint TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS done (
    path BLOB PRIMARY KEY, stamp BLOB NOT NULL, code TEXT, reason TEXT, vector BLOB
);
CREATE TABLE IF NOT EXISTS seen (position INTEGER PRIMARY KEY, path BLOB NOT NULL, label BLOB);
DELETE FROM seen;
"""


class Line(NamedTuple):
    """One picture of the output."""

    path: str
    label: str
    vector: Row


class Journal:
    """The work of one output under way; used by one thread. Use it in a ``with``.

    Args:
        file: Made when it is not there.
        fingerprint: Of the model.

    Raises:
        MismatchError: The file holds unfinished work of another model, or is damaged.
        EmbedKitError: Another process is at it, or it cannot be written.
    """

    def __init__(self, file: Path, fingerprint: str) -> None:
        self._file = file
        self._seen: list[tuple[bytes, bytes]] = []
        self._done: list[tuple[bytes, bytes, str | None, str | None, bytes | None]] = []
        with self._explained():
            self._db = sqlite3.connect(file, timeout=1, isolation_level=None)
            try:
                self._begin(fingerprint)
            except BaseException:
                self._db.close()
                raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def remove(self) -> None:
        """Take the file away; the output is whole."""
        self._db.close()
        for end in ("", "-wal", "-shm"):
            self._file.with_name(self._file.name + end).unlink(missing_ok=True)

    def see(self, source: Source) -> ImageError | bool | None:
        """Take one more source into the output, in this order.

        Returns:
            What is known of it: True for a vector, its error, or None: it is to be done. What could
            not be fetched is to be done again.
        """
        path = os.fsencode(source.path)
        self._seen.append((path, os.fsencode(source.label)))
        if not source.stamp:
            return None
        with self._explained():
            row = self._db.execute(
                "SELECT code, reason FROM done WHERE path = ? AND stamp = ?"
                " AND code IS NOT 'unreadable'",
                (path, os.fsencode(source.stamp)),
            ).fetchone()
        if row is None:
            return None
        return True if row[0] is None else ImageError(*row)

    def put(self, source: Source, result: Row | ImageError) -> None:
        """Remember what came of a source; lasting after `commit`."""
        path, stamp = os.fsencode(source.path), os.fsencode(source.stamp)
        if isinstance(result, ImageError):
            self._done.append((path, stamp, result.code, result.reason, None))
        else:
            vector = np.ascontiguousarray(result, "<f4").tobytes()
            self._done.append((path, stamp, None, None, vector))

    def commit(self) -> None:
        """Make all of it outlast this process."""
        with self._explained():
            # One transaction, rolled back when it is left by an error.
            self._db.execute("BEGIN")
            with self._db:
                self._db.executemany("INSERT INTO seen (path, label) VALUES (?, ?)", self._seen)
                self._db.executemany(
                    "INSERT OR REPLACE INTO done VALUES (?, ?, ?, ?, ?)", self._done
                )
        self._seen.clear()
        self._done.clear()

    def count(self) -> int:
        """Lines of the output."""
        with self._explained():
            (count,) = self._db.execute(
                "SELECT count(*) FROM seen JOIN done USING (path) WHERE vector IS NOT NULL"
            ).fetchone()
        return int(count)

    def lines(self) -> Iterator[Line]:
        """The output, in order."""
        with self._explained():
            for path, label, vector in self._db.execute(
                "SELECT path, label, vector FROM seen JOIN done USING (path)"
                " WHERE vector IS NOT NULL ORDER BY position"
            ):
                yield Line(os.fsdecode(path), os.fsdecode(label), np.frombuffer(vector, "<f4"))

    def failures(self) -> Iterator[tuple[str, ImageError]]:
        """Every source that gave no vector, and why, in order."""
        with self._explained():
            for path, code, reason in self._db.execute(
                "SELECT path, code, reason FROM seen JOIN done USING (path)"
                " WHERE code IS NOT NULL ORDER BY position"
            ):
                yield os.fsdecode(path), ImageError(code, reason)

    def _begin(self, fingerprint: str) -> None:
        (application,) = self._db.execute("PRAGMA application_id").fetchone()
        (tables,) = self._db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if tables and application != _APPLICATION_ID:
            raise sqlite3.DatabaseError("it is a database of another program")
        # Held until the file is closed: a second process is told, not let in.
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        # Several vectors fit a page; of the usual size one of 512 numbers would fill one alone.
        self._db.execute("PRAGMA page_size = 16384")
        self._db.execute("PRAGMA journal_mode = WAL")
        # A power cut may take the last commits; those pictures are embedded again.
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.executescript(f"BEGIN IMMEDIATE; {_TABLES} COMMIT;")
        self._db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        row = self._db.execute("SELECT fingerprint FROM model").fetchone()
        if row is None:
            self._db.execute("INSERT INTO model VALUES (?)", (fingerprint,))
        elif row[0] != fingerprint:
            raise MismatchError(
                f"{self._file} holds unfinished work of another model",
                facts=f"its fingerprint is {row[0][:16]}, this one's {fingerprint[:16]}",
                hint="finish it with that model, delete it, or name another output: -o FILE",
            )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """SQLite's errors in a sentence with the way out."""
        try:
            yield
        except sqlite3.OperationalError as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise EmbedKitError(
                    f"another embedkit is writing {self._file}",
                    hint="wait until it has ended, or name another output: -o FILE",
                ) from error
            raise EmbedKitError(
                f"{self._file} cannot be written",
                facts=str(error),
                hint="make room or name another output, -o FILE; what was done is kept",
            ) from error
        except sqlite3.DatabaseError as error:
            raise MismatchError(
                f"{self._file}, the work so far, cannot be used",
                facts=str(error),
                hint="delete it and run the command again",
            ) from error
