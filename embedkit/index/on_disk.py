"""An index larger than memory: built in a file a block at a time, and searched where it lies.

Lists of 8-bit codes lead to candidates, which are then looked at in 16 bits a number; both stay in
the file, mapped. FAISS searches such an index but cannot build it without holding it, and its own
lists on the disk (`faiss.OnDiskInvertedLists`) are a second file, which one rename cannot publish.
So an empty index is trained on a sample, and the file that FAISS would write of a full one is laid
out here: the lists in their places, then the vectors. FAISS opens it; from then on it is an index
like any other, and what is published is what FAISS writes of it.
"""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from embedkit.errors import EmbedKitError
from embedkit.index.file import map_index
from embedkit.index.kinds import base_of

__all__ = ["DISK", "DiskBuilder", "new_disk_index", "resident_bytes"]

DISK = "ivf-disk"
"""The kind's name."""

# Notes sorted into their lists at a time.
_SORTED_AT_ONCE = 64 << 20
# Rows for each of the 256 centroids of a code, and rounds: more take longer and find no more.
_ROWS_PER_WORD, _ROUNDS = 64, 10
_NUMBER = struct.Struct("<Q")
_COUNT = slice(8, 16)  # where a header says how many vectors there are


def new_disk_index(dim: int, factory: str, metric: int) -> Any:
    """An index to be trained and then filled by a `DiskBuilder`."""
    index: Any = faiss.index_factory(dim, factory, metric)
    base = base_of(index)
    base.do_polysemous_training = False  # minutes, for a search that is not made
    base.use_precomputed_table = -1  # as large as all the lists
    base.pq.cp.niter = _ROUNDS
    base.pq.cp.min_points_per_centroid = 1  # a small index needs no warning
    base.pq.cp.max_points_per_centroid = _ROWS_PER_WORD
    return index


def resident_bytes(factory: str, dim: int) -> int:
    """What such an index takes of the memory when it is open: centres, words, and 64 a list."""
    lists = int(factory.split(",")[0].removeprefix("IVF"))
    return lists * (4 * dim + 64) + 4 * 256 * dim


class DiskBuilder:
    """Fills a trained, empty index on the disk; its files have no names and leave nothing behind.

    Args:
        index: From `new_disk_index`, trained.
        count: Vectors that will come.
        folder: Where there is room: for a moment as much as the index and its codes once more.

    Memory: a block, and 64 MB.
    """

    def __init__(self, index: Any, count: int, folder: Path | None) -> None:
        self._index = index
        self._base = base_of(index)
        self._fine: Any = faiss.downcast_index(index.refine_index)
        self._count, self._added = count, 0
        self._sizes = np.zeros(self._base.nlist, np.int64)
        layout = _Layout(index, self._base, self._fine)
        self._layout = layout
        self._lists_at = len(layout.before) + self._sizes.nbytes
        codes = self._lists_at + count * (self._base.code_size + 8) + len(layout.between) + 8
        self._vectors_at = codes
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open until it is mapped
        self._notes = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - list and code of each

    def __enter__(self) -> DiskBuilder:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._notes.close()

    def add(self, block: npt.NDArray[np.float32]) -> None:
        """Take in the next vectors ``(n, D)``."""
        notes = np.asarray(self._base.sa_encode(block))
        self._sizes += np.bincount(self._lists(notes), minlength=len(self._sizes))
        self._notes.write(notes.tobytes())
        vectors = np.asarray(self._fine.sa_encode(block))
        self._write(self._vectors_at + self._added * self._fine.code_size, vectors.tobytes())
        self._added += len(block)

    def finish(self) -> Any:
        """The index, full and mapped."""
        assert self._added == self._count, f"{self._count} vectors, then {self._added}"
        layout, count = self._layout, self._count
        self._sort()
        self._write(0, _counted(layout.start, count) + _counted(layout.lists, count))
        self._write(len(layout.before), self._sizes.astype("<u8").tobytes())
        stored = _NUMBER.pack(count * self._fine.code_size)
        between = _counted(layout.between, count) + stored
        self._write(self._vectors_at - len(between), between)
        self._write(self._vectors_at + count * self._fine.code_size, layout.end)
        self._file.flush()
        return map_index(self._file, Path("the index that is being built"))

    def _sort(self) -> None:
        """Put every note's code and number into its list, in the order they came."""
        code = self._base.code_size
        starts = self._lists_at + (np.cumsum(self._sizes) - self._sizes) * (code + 8)
        filled = np.zeros_like(self._sizes)
        width = self._base.sa_code_size()
        self._notes.seek(0)
        first = 0
        while data := self._notes.read(max(1, _SORTED_AT_ONCE // width) * width):
            notes = np.frombuffer(data, np.uint8).reshape(-1, width)
            lists = self._lists(notes)
            order = np.argsort(lists, kind="stable")
            numbers, begins = np.unique(lists[order], return_index=True)
            groups = np.split(order, begins[1:])
            for number, rows in zip(numbers.tolist(), groups, strict=True):
                at, had = int(starts[number]), int(filled[number])
                self._write(at + had * code, notes[rows, width - code :].tobytes())
                ids_at = at + int(self._sizes[number]) * code
                self._write(ids_at + 8 * had, (rows + first).astype("<i8").tobytes())
                filled[number] += len(rows)
            first += len(notes)

    def _lists(self, notes: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """The list of each note: its first bytes, the lowest first."""
        wide = np.zeros((len(notes), 8), np.uint8)
        own = self._base.coarse_code_size()
        wide[:, :own] = notes[:, :own]
        numbers: npt.NDArray[np.int64] = wide.view("<i8")[:, 0]
        return numbers

    def _write(self, at: int, content: bytes) -> None:
        self._file.seek(at)
        self._file.write(content)


class _Layout:
    """The file of an empty index, taken apart where a full one holds more."""

    def __init__(self, index: Any, base: Any, fine: Any) -> None:
        whole, lists, vectors = (bytes(faiss.serialize_index(one)) for one in (index, base, fine))
        self.start, self.end = whole[: -4 - len(lists) - len(vectors)], whole[-4:]
        shape = b"ilar" + _NUMBER.pack(base.nlist) + _NUMBER.pack(base.code_size)
        none = _NUMBER.pack(0)
        empty = shape + b"sprs" + none  # how FAISS writes lists of which few are filled
        known = whole == self.start + lists + vectors + self.end
        if not known or not lists.endswith(empty) or not vectors.endswith(none):
            raise EmbedKitError(
                "this faiss writes its files in a way that embedkit does not know",
                facts=f"faiss {faiss.__version__}",
                hint="--type ivf",
            )
        self.lists = lists.removesuffix(empty) + shape + b"full" + _NUMBER.pack(base.nlist)
        self.before = self.start + self.lists
        self.between = vectors.removesuffix(none)


def _counted(header: bytes, count: int) -> bytes:
    """The same for that many vectors."""
    return header[: _COUNT.start] + _NUMBER.pack(count) + header[_COUNT.stop :]
