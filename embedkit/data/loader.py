"""Batches of pixels, decoded and augmented in threads, the same whatever the number of threads."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from embedkit.data.augment import Augment, Cut
from embedkit.errors import DataError, ImageError
from embedkit.imaging import Pixels, Preprocess, decode, read_pixels

__all__ = ["PhotoLoader"]

Rows = Sequence[int] | npt.NDArray[np.integer[Any]]

_PREFETCHED_BATCHES = 2

_Result = TypeVar("_Result")


class PhotoLoader:
    """Reads photos for training (`batches`) and for measuring (`plain`).

    Photos are decoded once and kept as uint8, for training shrunk to what the crops need (see
    `Augment.decode_size`), until `cache_bytes` are full; the others are decoded each time. Kept or
    not, the pixels are the same.

    Args:
        paths: The files.
        preprocess: Size and filter of the network's input.
        augment: None gives `batches` the pixels of `plain`.
        seed: 0 or more.
        workers: Threads, at least 1; None is one per core.
        cache_bytes: For kept pixels; 0 keeps nothing.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        preprocess: Preprocess,
        *,
        augment: Augment | None,
        seed: int,
        workers: int | None = None,
        cache_bytes: int = 2 << 30,
    ) -> None:
        self._paths = tuple(paths)
        self._preprocess = preprocess
        self._augment = augment
        self._seed = seed
        self._workers = _count_workers(workers)
        self._large: dict[int, Pixels] = {}
        self._small: dict[int, Pixels] = {}
        self._bytes_left = cache_bytes
        self._lock = threading.Lock()

    def batches(
        self,
        index_lists: Sequence[Rows],
        *,
        epoch: int,
        start: int = 0,
        part: Callable[[int], slice] = slice,
    ) -> Iterator[Pixels]:
        """For each list of places in `paths`, in order: ``(B, height, width, 3)`` uint8.

        Of a list of B places only ``part(B)`` is made, the same as in the whole.

        The noise on a photo follows from (seed, epoch, number of its list, its place in the list)
        alone, so a run taken up at list `start` sees what it would have seen. While one batch is in
        use, the next two are being made.

        Raises:
            DataError: A photo can no longer be read; names it.
        """

        augment = self._augment

        def noisy(key: list[int], row: int) -> Pixels:
            if augment is None:
                return self._small_of(row)
            return augment(self._large_of(row), self._preprocess, np.random.default_rng(key))

        keyed = self._keyed(noisy, index_lists, epoch=epoch, start=start, part=part)
        return (self._stack(pictures) for pictures in self._in_threads(keyed))

    def cuts(
        self,
        index_lists: Sequence[Rows],
        *,
        epoch: int,
        start: int = 0,
        part: Callable[[int], slice] = slice,
    ) -> Iterator[list[Cut]]:
        """As `batches`, but the crops as they are cut, for `resample_on`.

        Raises:
            DataError: A photo can no longer be read; names it.
            ValueError: There is no augmentation.
        """
        augment = self._augment
        if augment is None:
            raise ValueError("photos are cut by the augmentation, and there is none")

        def noisy(key: list[int], row: int) -> Cut:
            return augment.cut(self._large_of(row), self._preprocess, np.random.default_rng(key))

        return self._in_threads(
            self._keyed(noisy, index_lists, epoch=epoch, start=start, part=part)
        )

    def plain(self, indices: Rows, batch: int) -> Iterator[Pixels]:
        """`read_pixels` of the photos at these places, `batch` at a time, in order.

        Raises:
            DataError: A photo can no longer be read; names it.
        """
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        made = self._in_threads(
            [partial(self._small_of, int(row)) for row in indices[start : start + batch]]
            for start in range(0, len(indices), batch)
        )
        return (self._stack(pictures) for pictures in made)

    def _keyed(
        self,
        make: Callable[[list[int], int], _Result],
        index_lists: Sequence[Rows],
        *,
        epoch: int,
        start: int,
        part: Callable[[int], slice],
    ) -> Iterator[list[Callable[[], _Result]]]:
        """A job for each photo of a list; it is called with what its noise follows from."""
        for step in range(start, len(index_lists)):
            rows = index_lists[step]
            yield [
                partial(make, [self._seed, epoch, step, place], int(rows[place]))
                for place in range(len(rows))[part(len(rows))]
            ]

    def _small_of(self, row: int) -> Pixels:
        return self._kept(self._small, row, self._read_plain)

    def _large_of(self, row: int) -> Pixels:
        return self._kept(self._large, row, self._read_large)

    def _in_threads(
        self, jobs: Iterable[list[Callable[[], _Result]]]
    ) -> Generator[list[_Result], None, None]:
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="embedkit-photos")
        try:
            waiting: deque[list[Future[_Result]]] = deque()
            for job in jobs:
                waiting.append([pool.submit(make) for make in job])
                if len(waiting) > _PREFETCHED_BATCHES:
                    yield [made.result() for made in waiting.popleft()]
            while waiting:
                yield [made.result() for made in waiting.popleft()]
        finally:
            # Also when the caller has left early: what has not begun is not begun.
            pool.shutdown(cancel_futures=True)

    def _stack(self, pictures: list[Pixels]) -> Pixels:
        shape = (len(pictures), self._preprocess.height, self._preprocess.width, 3)
        return np.stack(pictures) if pictures else np.empty(shape, np.uint8)

    def _kept(self, shelf: dict[int, Pixels], row: int, read: Callable[[int], Pixels]) -> Pixels:
        if row in shelf:
            return shelf[row]
        try:
            pixels = read(row)
        except ImageError as error:
            raise DataError(
                f"the photo {str(self._paths[row])!r} can no longer be read",
                facts=error.reason,
                hint="bring it back, or begin a new run without it",
            ) from error
        with self._lock:
            if row not in shelf and pixels.nbytes <= self._bytes_left:
                shelf[row] = pixels
                self._bytes_left -= pixels.nbytes
        return pixels

    def _read_plain(self, row: int) -> Pixels:
        return read_pixels(self._paths[row], self._preprocess)

    def _read_large(self, row: int) -> Pixels:
        assert self._augment is not None
        least = self._augment.decode_size(self._preprocess)
        image = decode(self._paths[row], shortest_side=least)
        shrunk = least / min(image.size)
        if shrunk < 1:
            size = round(image.width * shrunk), round(image.height * shrunk)
            resample = Image.Resampling[self._preprocess.filter.upper()]
            image = image.resize(size, resample, reducing_gap=2.0)
        return np.asarray(image)


def _count_workers(workers: int | None) -> int:
    if workers is None:
        return os.cpu_count() or 1
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    return workers
