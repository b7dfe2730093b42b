"""Files in, vectors out, overlapped: threads decode the next pictures while the model runs.

Order is kept, memory is bounded, and every input comes out exactly once, as a vector or as the
reason why there is none.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from embedkit.errors import ImageError, UsageError
from embedkit.imaging import Pixels
from embedkit.runtime.backends.base import Vectors

__all__ = ["Embedded", "Row", "embed_stream", "usable_cores"]

Row = npt.NDArray[np.float32]
"""One vector, ``(embedding_dim,)``."""

Source = TypeVar("Source")

_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class Embedded:
    """One file's outcome: a vector, or the error that says why there is none.

    Attributes:
        path: As it was given.
        vector: ``(embedding_dim,)`` float32, or None.
        error: None, or what is wrong with the file.
    """

    path: Path
    vector: Row | None
    error: ImageError | None


def embed_stream(
    sources: Iterable[Source],
    *,
    read: Callable[[Source], Pixels],
    run: Callable[[Pixels], Vectors],
    batch: int,
    workers: int | None = None,
) -> Generator[tuple[Source, Row | ImageError], None, None]:
    """Each source with its vector or its error, in order, lazily.

    `read` runs in `workers` threads, `run` in the caller's thread while the threads go on. At most
    three batches of pixels, and one decoded picture per thread, are in memory, however long
    `sources` is and however slowly the results are taken. Ending early (``close()``, an error,
    Ctrl-C) drops what was not begun, waits for the pictures being decoded, and leaves no thread.

    Args:
        sources: Any length, also none; taken as room becomes free, in the caller's thread.
        read: ``(height, width, 3)`` uint8 of one source; an `ImageError` becomes its result, any
            other exception ends the stream.
        run: ``(N, height, width, 3)`` -> ``(N, D)``, N from 1 to `batch`.
        batch: Sources per call of `run`; where pictures fail, and at the end, it gets fewer.
        workers: Threads; None takes one per core this process may use, 16 at most.

    Raises:
        UsageError: `batch` or `workers` is below 1; at the call, not at the first result.
    """
    threads = min(usable_cores(), 16) if workers is None else workers
    if batch < 1 or threads < 1:
        raise UsageError(f"batch and workers must be at least 1, got {batch} and {threads}")
    return _stream(iter(sources), read, run, batch, threads)


def usable_cores() -> int:
    """How many cores this process may use, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _stream(
    sources: Iterator[Source],
    read: Callable[[Source], Pixels],
    run: Callable[[Pixels], Vectors],
    batch: int,
    workers: int,
) -> Generator[tuple[Source, Row | ImageError], None, None]:
    waiting: deque[tuple[Source, Future[Pixels]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="embedkit-decode")
    try:
        while True:
            room = batch * (1 + _BATCHES_AHEAD) - len(waiting)
            waiting.extend((source, pool.submit(read, source)) for source in islice(sources, room))
            if not waiting:
                return
            group = [waiting.popleft() for _ in range(min(batch, len(waiting)))]
            results = _run_group([future for _, future in group], run)
            yield from zip((source for source, _ in group), results, strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _run_group(
    futures: list[Future[Pixels]], run: Callable[[Pixels], Vectors]
) -> list[Row | ImageError]:
    read = [_pixels_or_error(future) for future in futures]
    good = [pixels for pixels in read if not isinstance(pixels, ImageError)]
    vectors = iter(run(np.stack(good)) if good else ())
    return [one if isinstance(one, ImageError) else next(vectors) for one in read]


def _pixels_or_error(future: Future[Pixels]) -> Pixels | ImageError:
    try:
        return future.result()
    except ImageError as error:
        return error
