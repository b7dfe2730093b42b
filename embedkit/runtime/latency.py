"""How fast models are here: calls timed in turns, so that a busy machine favours none."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from embedkit.errors import EmbedKitError
from embedkit.runtime.embedder import Embedder
from embedkit.runtime.pipeline import Row

__all__ = ["Cell", "Timing", "draw_photos", "measure", "take_turns"]

# With fewer, a 95th percentile is only the worst one; a slow model gets them whatever it takes.
_LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Timing:
    """What was measured of one kind of call.

    Attributes:
        runs: Calls that were timed, after warm-up.
        p50_ms: Median of a call, milliseconds.
        p95_ms: 95th percentile.
        images_per_second: On pixels at the median; on files of an endless stream.
    """

    runs: int
    p50_ms: float
    p95_ms: float
    images_per_second: float


@dataclass(frozen=True)
class Cell:
    """One model at one batch size.

    Attributes:
        model: Its name, as given.
        batch: Pictures at once.
        decode: Whether the pictures came as files; else as pixels.
        timing: None where it failed.
        ratio: Images a second, in units of the first model's; None where one of the two failed.
        error: Why it failed; empty where it did not.
    """

    model: str
    batch: int
    decode: bool
    timing: Timing | None
    ratio: float | None
    error: str = ""


def measure(
    embedders: Mapping[str, Embedder],
    batches: Sequence[int],
    *,
    photos: Sequence[Path] = (),
    streaming: Mapping[str, Embedder] | None = None,
    workers: int | None = None,
    seconds: float = 2.0,
) -> Iterator[Cell]:
    """Every model at every batch size: on pixels, and on files where there are `photos`.

    On pixels a call is one batch. On files, latency is one batch from the first byte read to the
    last vector, and images a second are those of an endless stream, where the next pictures are
    decoded while the model runs, as `embedkit index` does: `streaming` are then the same models,
    loaded as it loads them, with one core for a run. Photos come round again and so from the
    system's cache, not from the disk.

    Args:
        embedders: Loaded models by name; the first is what the others are compared with.
        batches: Pictures at once, each at least 1.
        photos: Files that can be read.
        streaming: By the same names, what the streams run on; None: `embedders`.
        workers: Cores of a stream, and threads that decode; None: all.
        seconds: Per model and cell, at least three calls however long they take.

    Yields:
        The models of a cell together: batch by batch, pixels first.
    """
    for batch in batches:
        calls = {name: _on_pixels(one, batch) for name, one in embedders.items()}
        took, failed = _timed(calls, seconds)
        rates = {name: batch / float(np.median(times)) for name, times in took.items()}
        yield from _cells(batch, took, rates, failed, decode=False)
        if not photos:
            continue
        few = list(itertools.islice(itertools.cycle(photos), batch))
        calls = {name: _on_files(one, few, batch, workers) for name, one in embedders.items()}
        took, failed = _timed(calls, seconds / 2)
        able = {name: (streaming or embedders)[name] for name in took}
        rates = _stream_rates(able, photos, batch, workers, seconds / 2)
        yield from _cells(batch, took, rates, failed, decode=True)


def take_turns(calls: Sequence[Callable[[], object]], *, seconds: float) -> list[list[float]]:
    """Seconds that each call took, one list per call and as many of each.

    They run one after the other, round by round, and each round begins with another one. The first
    round warms up and is not counted; then `seconds` per call, and at least three rounds.
    """
    for call in calls:
        call()
    took: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds * len(calls)
    turn = 0
    while calls and (turn < _LEAST_ROUNDS or time.perf_counter() < end):
        for place in range(len(calls)):
            one = (place + turn) % len(calls)
            start = time.perf_counter()
            calls[one]()
            took[one].append(time.perf_counter() - start)
        turn += 1
    return took


def draw_photos(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """JPEGs of ``size = (width, height)``, heavy as real ones: soft colours and fine grain."""
    rng = np.random.default_rng(0)
    width, height = size
    paths = []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.int16)
        grain = rng.integers(-9, 10, (height, width, 1), dtype=np.int16)
        paths.append(folder / f"{number:03}.jpg")
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def _timed(
    calls: Mapping[str, Callable[[], object]], seconds: float
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each call by name, and by name why one cannot be made."""
    trouble = {name: _trouble(call) for name, call in calls.items()}
    running = [name for name in calls if not trouble[name]]
    took = take_turns([calls[name] for name in running], seconds=seconds)
    return dict(zip(running, took, strict=True)), trouble


def _cells(
    batch: int,
    took: Mapping[str, list[float]],
    rates: Mapping[str, float],
    trouble: Mapping[str, str],
    *,
    decode: bool,
) -> Iterator[Cell]:
    first = rates.get(next(iter(trouble), ""))
    for name, reason in trouble.items():
        if reason:
            yield Cell(name, batch, decode, None, None, reason)
            continue
        timing = Timing(
            runs=len(took[name]),
            p50_ms=1000 * float(np.median(took[name])),
            p95_ms=1000 * float(np.percentile(took[name], 95)),
            images_per_second=rates[name],
        )
        yield Cell(name, batch, decode, timing, rates[name] / first if first else None)


def _trouble(call: Callable[[], object]) -> str:
    """Why a call cannot be made: too large a batch for the memory, or for the engine's profile."""
    try:
        call()
    except EmbedKitError as error:
        return "; ".join(filter(None, [error.what, error.facts]))
    return ""


def _on_pixels(embedder: Embedder, batch: int) -> Callable[[], object]:
    side = embedder.contract.preprocess
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (batch, side.height, side.width, 3), dtype=np.uint8)
    return lambda: embedder.embed_pixels(pixels)


def _on_files(
    embedder: Embedder, photos: Sequence[Path], batch: int, workers: int | None
) -> Callable[[], object]:
    def call() -> None:
        with contextlib.closing(_vectors(embedder, photos, batch, workers)) as stream:
            for _ in stream:
                pass

    return call


def _stream_rates(
    embedders: Mapping[str, Embedder],
    photos: Sequence[Path],
    batch: int,
    workers: int | None,
    seconds: float,
) -> dict[str, float]:
    """Images a second of endless streams, by name; the median of three slices taken in turns."""
    rates: dict[str, list[float]] = {name: [] for name in embedders}
    for _ in range(_LEAST_ROUNDS):
        for name, embedder in embedders.items():
            endless = _vectors(embedder, itertools.cycle(photos), batch, workers)
            with contextlib.closing(endless) as stream:
                _take(stream, batch)  # the first batch fills the pipeline
                start, count = time.perf_counter(), 0
                while count == 0 or time.perf_counter() - start < seconds / _LEAST_ROUNDS:
                    _take(stream, batch)
                    count += batch
                rates[name].append(count / (time.perf_counter() - start))
    return {name: float(np.median(found)) for name, found in rates.items()}


def _take(stream: Iterator[object], count: int) -> None:
    for _ in itertools.islice(stream, count):
        pass


def _vectors(
    embedder: Embedder, photos: Iterable[Path], batch: int, workers: int | None
) -> Generator[Row, None, None]:
    results = embedder.embed_files(photos, batch=batch, workers=workers)
    with contextlib.closing(results):
        for embedded in results:
            if embedded.vector is None:
                raise embedded.error or EmbedKitError(f"{embedded.path} has no vector")
            yield embedded.vector
