"""Ids, paths and labels of a catalog that is being written, as its tail stores them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from embedkit.errors import MismatchError
from embedkit.index.file import IDS, LABEL_OFFSETS, LABELS, PATH_OFFSETS, PATHS

if TYPE_CHECKING:
    from embedkit.index.catalog import Row

__all__ = ["Names"]

_IN_MEMORY = 16 << 20  # bytes of a column; what goes beyond is on the disk


class Names:
    """Takes rows in; a context manager.

    Args:
        folder: Where what is too long for memory goes, in files without a name.

    Attributes:
        count: Rows so far.
    """

    def __init__(self, folder: Path) -> None:
        self.count = 0
        self._last = -1
        self._ends = {PATHS: 0, LABELS: 0}
        self._open = ExitStack()
        self._columns: dict[str, IO[bytes]] = {
            name: self._open.enter_context(
                tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY, dir=str(folder))  # noqa: SIM115
            )
            for name in (IDS, PATH_OFFSETS, PATHS, LABEL_OFFSETS, LABELS)
        }
        for name in (PATH_OFFSETS, LABEL_OFFSETS):
            self._columns[name].write(bytes(8))

    def __enter__(self) -> Names:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def size(self) -> int:
        """Bytes they take when the catalog is open."""
        return sum(self._ends.values()) + 24 * self.count

    def add(self, rows: list[Row]) -> None:
        """Take in the next.

        Raises:
            MismatchError: An id is not above the one before.
            OSError: The disk is full.
        """
        for row in rows:
            if row.id <= self._last:
                raise MismatchError(f"rows must come in ascending order of id, got {row.id} late")
            self._last = row.id
        self._columns[IDS].write(np.array([row.id for row in rows], "<i8").tobytes())
        self._write(PATHS, PATH_OFFSETS, [row.path for row in rows])
        self._write(LABELS, LABEL_OFFSETS, [row.label for row in rows])
        self.count += len(rows)

    def columns(self) -> Mapping[str, IO[bytes]]:
        """By the name each has in the tail."""
        return self._columns

    def _write(self, name: str, offsets: str, texts: list[bytes]) -> None:
        ends = self._ends[name] + np.cumsum([len(text) for text in texts])
        self._columns[name].write(b"".join(texts))
        self._columns[offsets].write(ends.astype("<u8").tobytes())
        self._ends[name] = int(ends[-1])
