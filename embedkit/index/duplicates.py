"""Pictures that are the same or nearly so, in groups: all vectors against all, in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from embedkit.errors import UsageError
from embedkit.imaging.files import hash_file

__all__ = ["Progress", "linked_groups", "same_content"]

Vectors = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
Progress = Callable[[int], None]

_ROWS, _COLUMNS = 1024, 4096


def linked_groups(
    read: Callable[[Indices], Vectors] | None,
    count: int,
    least: float,
    *,
    metric: str = "cosine",
    links: Iterable[tuple[Indices, Indices]] = (),
    progress: Progress | None = None,
) -> Indices:
    """Which rows hang together: ``(N,)``, for each the lowest row of its group.

    Two rows are linked where their score is at least `least`; a group is what can be reached over
    links, so that its ends may be less alike than `least`. A row that is linked to none is its own
    group.

    Args:
        read: Vectors ``(M, D)`` of row numbers ``(M,)``: `Catalog.vectors`. None: only `links`.
        count: N, may be 0.
        least: For ``cosine`` the cosine, for ``l2`` minus the distance.
        metric: ``cosine`` (unit rows) or ``l2``.
        links: More links to take in, as pairs of equally long lists of rows.
        progress: Called as ``progress(rows done)``.

    Raises:
        UsageError: `least` is no number.

    Cost: O(N^2 D / 2) in float32, pairs that come closer to `least` than that can tell once more in
    float64; memory of two blocks of rows and one of scores, about 40 MB at D = 512, beside the
    links found in one block.
    """
    if not np.isfinite(least):
        raise UsageError(f"the least score must be a number, got {least}")
    groups = _Groups(count)
    for left, right in links:
        groups.join(left, right)
    if read is None:
        return groups.roots()
    for start in range(0, count, _ROWS):
        rows = np.arange(start, min(start + _ROWS, count))
        ask = read(rows)
        for low in range(start, count, _COLUMNS):
            columns = np.arange(low, min(low + _COLUMNS, count))
            left, right = _linked(ask, read(columns), least, metric)
            later = columns[right] > rows[left]
            groups.join(rows[left[later]], columns[right[later]])
        if progress:
            progress(len(rows))
    return groups.roots()


def _linked(ask: Vectors, find: Vectors, least: float, metric: str) -> tuple[Indices, Indices]:
    near = ask @ find.T
    if metric == "l2":
        near = 2 * near - (find**2).sum(axis=1) - (ask**2).sum(axis=1)[:, None]
        cut = -(least**2) if least <= 0 else np.inf
        size = float((find**2).sum(axis=1).max() + (ask**2).sum(axis=1).max())
    else:
        cut, size = least, 1.0
    blur = 1e-5 * size
    left, right = np.nonzero(near >= cut - blur)
    unsure = np.flatnonzero(near[left, right] < cut + blur)
    keep = np.ones(len(left), bool)
    for at in range(0, len(unsure), _COLUMNS):
        part = unsure[at : at + _COLUMNS]
        a, b = ask[left[part]].astype(np.float64), find[right[part]].astype(np.float64)
        exact = (a * b).sum(axis=1) if metric == "cosine" else -np.sqrt(((a - b) ** 2).sum(axis=1))
        keep[part] = exact.astype(np.float32) >= np.float32(least)
    return left[keep], right[keep]


class _Groups:
    """Union-find over whole arrays of links; a root is the lowest row of its group."""

    def __init__(self, count: int) -> None:
        self._parent = np.arange(count)

    def join(self, left: Indices, right: Indices) -> None:
        while len(left):
            left, right = self._find(left), self._find(right)
            apart = left != right
            left, right = left[apart], right[apart]
            low, high = np.minimum(left, right), np.maximum(left, right)
            # Where several want the same row, the lowest gets it; the next round joins the others.
            np.minimum.at(self._parent, high, low)

    def roots(self) -> Indices:
        return self._find(np.arange(len(self._parent)))

    def _find(self, rows: Indices) -> Indices:
        while True:
            above: Indices = self._parent[rows]
            if (above == rows).all():
                return rows
            # Halve the way up for the next ones too.
            self._parent[rows] = self._parent[above]
            rows = above


def same_content(files: Sequence[Path | None]) -> tuple[list[list[int]], list[int]]:
    """Files with the same bytes, and files that cannot be read.

    Args:
        files: None stands for a file without a name.

    Returns:
        Numbers of the files of each group of two or more, in order; and of those that are gone.

    Cost: a look at each file; those that share their size with another are read once.
    """
    by_size: dict[int, list[int]] = {}
    gone: list[int] = []
    for number, file in enumerate(files):
        try:
            by_size.setdefault(_size(file), []).append(number)
        except OSError:
            gone.append(number)
    groups: dict[str, list[int]] = {}
    for size, numbers in by_size.items():
        for number in numbers if len(numbers) > 1 else ():
            try:
                content = f"{size} {hash_file(_named(files[number]))}"
            except OSError:
                gone.append(number)
            else:
                groups.setdefault(content, []).append(number)
    return [numbers for numbers in groups.values() if len(numbers) > 1], sorted(gone)


def _size(file: Path | None) -> int:
    return _named(file).stat().st_size


def _named(file: Path | None) -> Path:
    if file is None:
        raise FileNotFoundError
    return file
