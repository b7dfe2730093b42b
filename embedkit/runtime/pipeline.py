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
from embedkit.runtime.codebooks import Codes

__all__ = ["Embedded", "Row", "embed_stream", "usable_cores"]

Row = npt.NDArray[np.float32]
"""One vector, ``(embedding_dim,)``."""

Source = TypeVar("Source")
Result = TypeVar("Result")

_BATCHES = 3  # that are under way at once: one runs, one is ready, one is being decoded
# A core takes no longer for pictures one by one than for many at once (measured: MobileNetV2 7.2 ms
# each by 4, 7.8 by 32; ResNet-18 31.9 and 31.6), and short runs leave less to wait for at the end.
_PER_CORE = 4


@dataclass(frozen=True)
class Embedded:
    """One file's outcome: a vector, or the error that says why there is none.

    Attributes:
        path: As it was given.
        vector: ``(embedding_dim,)`` float32, or None.
        error: None, or what is wrong with the file.
        codes: ``(parts,)`` uint8 of a model that gives codes; else None.
    """

    path: Path
    vector: Row | None
    error: ImageError | None
    codes: Codes | None = None


def embed_stream(
    sources: Iterable[Source],
    *,
    read: Callable[[Source], Pixels],
    run: Callable[[Pixels], Iterable[Result]],
    batch: int,
    workers: int | None = None,
    runs: int = 1,
) -> Generator[tuple[Source, Result | ImageError], None, None]:
    """Each source with its result or its error, in order, lazily.

    `read` and `run` have threads of their own, so that decoding, the model and what the caller does
    with the results overlap. At most three batches of pixels, and one decoded picture per thread,
    are in memory, however long `sources` is and however slowly the results are taken. Ending early
    (``close()``, an error, Ctrl-C) drops what was not begun, waits for the pictures being decoded
    and the runs under way, and leaves no thread.

    Args:
        sources: Any length, also none; taken as room becomes free, in the caller's thread.
        read: ``(height, width, 3)`` uint8 of one source; an `ImageError` becomes its result, any
            other exception ends the stream.
        run: ``(N, height, width, 3)`` -> N results, as the rows of ``(N, D)``; N is from 1 to
            `batch`, and to 4 where `runs` is above 1.
        batch: Sources in the model at once, at most; where pictures fail, and at the end, it gets
            fewer.
        workers: Threads that read; None takes one per core this process may use, 16 at most.
        runs: Calls of `run` at once. For a model that takes one core a run, one per core: cores
            that share one run wait for each other after every layer.

    Raises:
        UsageError: `batch`, `workers` or `runs` is below 1; at the call, not at the first result.
    """
    threads = min(usable_cores(), 16) if workers is None else workers
    if min(batch, threads, runs) < 1:
        raise UsageError(
            f"batch, workers and runs must be at least 1, got {batch}, {threads} and {runs}"
        )
    size = batch if runs == 1 else max(1, min(batch // runs, _PER_CORE))
    return _stream(iter(sources), read, run, size, _BATCHES * batch // size, threads, runs)


def usable_cores() -> int:
    """How many cores this process may use, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _stream(
    sources: Iterator[Source],
    read: Callable[[Source], Pixels],
    run: Callable[[Pixels], Iterable[Result]],
    size: int,
    most: int,
    workers: int,
    runs: int,
) -> Generator[tuple[Source, Result | ImageError], None, None]:
    groups: deque[tuple[list[Source], Future[list[Result | ImageError]]]] = deque()
    readers = ThreadPoolExecutor(workers, thread_name_prefix="embedkit-decode")
    runners = ThreadPoolExecutor(runs, thread_name_prefix="embedkit-run")
    try:
        while True:
            while len(groups) < most and (group := list(islice(sources, size))):
                pixels = [readers.submit(read, source) for source in group]
                groups.append((group, runners.submit(_run_group, pixels, run)))
            if not groups:
                return
            group, results = groups.popleft()
            yield from zip(group, results.result(), strict=True)
    finally:
        # The readers first: a run waits for its pictures, and learns that they will not come.
        readers.shutdown(cancel_futures=True)
        runners.shutdown(cancel_futures=True)


def _run_group(
    futures: list[Future[Pixels]], run: Callable[[Pixels], Iterable[Result]]
) -> list[Result | ImageError]:
    read = [_pixels_or_error(future) for future in futures]
    good = [pixels for pixels in read if not isinstance(pixels, ImageError)]
    vectors = iter(run(np.stack(good)) if good else ())
    return [one if isinstance(one, ImageError) else next(vectors) for one in read]


def _pixels_or_error(future: Future[Pixels]) -> Pixels | ImageError:
    try:
        return future.result()
    except ImageError as error:
        return error
