"""The stream keeps order, loses nothing, holds little, and leaves no thread behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from embedkit.errors import ImageError, UsageError
from embedkit.imaging import Pixels
from embedkit.runtime import Vectors
from embedkit.runtime.pipeline import embed_stream, usable_cores


def _read(number: int) -> Pixels:
    """A picture that says its own number."""
    return np.full((2, 2, 3), number % 256, np.uint8)


def _run(pixels: Pixels) -> Vectors:
    return pixels[:, 0, 0].astype(np.float32)


def _fail_every_third(number: int) -> Pixels:
    if number % 3 == 0:
        raise ImageError("unreadable", f"number {number}")
    return _read(number)


def _threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if "embedkit" in thread.name}


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert _threads() == set()


@pytest.mark.parametrize("count", [0, 1, 2, 5, 6, 7, 31, 100])
@pytest.mark.parametrize(("batch", "workers"), [(1, 1), (3, 2), (7, 4), (1000, 3), (6, None)])
def test_every_source_comes_out_once_in_order(count: int, batch: int, workers: int | None) -> None:
    sizes: list[int] = []

    def run(pixels: Pixels) -> Vectors:
        sizes.append(len(pixels))
        return _run(pixels)

    results = list(embed_stream(range(count), read=_read, run=run, batch=batch, workers=workers))
    assert [source for source, _ in results] == list(range(count))
    assert [int(vector[0]) for _, vector in results] == list(range(count))
    assert sizes == [batch] * (count // batch) + [count % batch] * (count % batch > 0)


def test_order_holds_when_later_pictures_are_done_first() -> None:
    def read(number: int) -> Pixels:
        time.sleep(0.002 * (7 - number % 8))
        return _read(number)

    results = embed_stream(range(50), read=read, run=_run, batch=4, workers=8)
    assert [int(vector[0]) for _, vector in results] == list(range(50))


def test_a_failed_picture_takes_its_own_place_and_counts_add_up() -> None:
    results = list(embed_stream(range(20), read=_fail_every_third, run=_run, batch=4))
    assert [source for source, _ in results] == list(range(20))
    for number, result in results:
        if number % 3 == 0:
            assert isinstance(result, ImageError)
            assert result.reason == f"number {number}"
        else:
            assert int(result[0]) == number


def test_the_model_is_not_run_where_every_picture_failed() -> None:
    def run(pixels: Pixels) -> Vectors:
        raise AssertionError("run on nothing")

    results = embed_stream([0, 3, 6, 9], read=_fail_every_third, run=run, batch=2)
    assert all(isinstance(result, ImageError) for _, result in results)


def test_no_more_than_three_batches_are_ever_under_way() -> None:
    taken = 0

    def sources() -> Iterator[int]:
        nonlocal taken
        for number in range(200):
            taken += 1
            yield number

    worst = 0
    for done, _ in enumerate(embed_stream(sources(), read=_read, run=_run, batch=5, workers=4)):
        worst = max(worst, taken - done)
    assert taken == 200
    assert worst <= 15


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 50])
@pytest.mark.parametrize(("batch", "runs"), [(8, 2), (2, 3), (32, 4), (1, 2)])
def test_runs_side_by_side_give_the_same_in_the_same_order(
    count: int, batch: int, runs: int
) -> None:
    sizes: list[int] = []

    def run(pixels: Pixels) -> Vectors:
        sizes.append(len(pixels))
        time.sleep(0.002 * (int(pixels[0, 0, 0, 0]) % 3))  # later ones are done first
        return _run(pixels)

    results = list(embed_stream(range(count), read=_read, run=run, batch=batch, runs=runs))
    assert [source for source, _ in results] == list(range(count))
    assert [int(vector[0]) for _, vector in results] == list(range(count))
    assert sum(sizes) == count
    assert max(sizes, default=0) <= max(1, batch // runs)


def test_as_many_runs_as_asked_are_inside_the_model_at_once() -> None:
    together = threading.Barrier(3, timeout=20)

    def run(pixels: Pixels) -> Vectors:
        together.wait()  # breaks unless three runs are inside at once
        return _run(pixels)

    assert len(list(embed_stream(range(18), read=_read, run=run, batch=6, runs=3))) == 18


def test_side_by_side_runs_hold_no_more_pictures_than_one() -> None:
    taken = 0

    def sources() -> Iterator[int]:
        nonlocal taken
        for number in range(300):
            taken += 1
            yield number

    worst = 0
    stream = embed_stream(sources(), read=_read, run=_run, batch=16, workers=4, runs=4)
    for done, _ in enumerate(stream):
        worst = max(worst, taken - done)
    assert taken == 300
    assert worst <= 48


def test_the_model_runs_on_while_the_results_are_used() -> None:
    begun: list[int] = []

    def run(pixels: Pixels) -> Vectors:
        begun.append(int(pixels[0, 0, 0, 0]))
        return _run(pixels)

    stream = embed_stream(range(6), read=_read, run=run, batch=2)
    next(stream)
    until = time.monotonic() + 20
    while len(begun) < 3 and time.monotonic() < until:
        time.sleep(0.001)
    assert begun == [0, 2, 4]
    stream.close()


def test_nothing_happens_before_the_first_result_is_asked_for() -> None:
    def sources() -> Iterator[int]:
        raise AssertionError("taken too early")
        yield 0

    embed_stream(sources(), read=_read, run=_run, batch=2)
    assert _threads() == set()


def test_pictures_are_decoded_while_the_model_runs() -> None:
    later = threading.Event()

    def read(number: int) -> Pixels:
        if number >= 2:
            later.set()
        return _read(number)

    def run(pixels: Pixels) -> Vectors:
        # The first batch is 0 and 1; while it runs, the next must already be decoding.
        assert later.wait(20)
        return _run(pixels)

    assert len(list(embed_stream(range(6), read=read, run=run, batch=2, workers=2))) == 6


def test_pictures_are_decoded_side_by_side() -> None:
    together = threading.Barrier(3, timeout=20)

    def read(number: int) -> Pixels:
        together.wait()  # breaks unless three threads are inside at once
        return _read(number)

    assert len(list(embed_stream(range(9), read=read, run=_run, batch=9, workers=3))) == 9


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("where", ["sources", "read", "run", "consumer"])
@pytest.mark.parametrize("runs", [1, 3])
def test_an_error_comes_through_from_anywhere_and_no_thread_stays(
    where: str, error: type[BaseException], runs: int
) -> None:
    def sources() -> Iterator[int]:
        for number in range(40):
            if where == "sources" and number == 20:
                raise error("here")
            yield number

    def read(number: int) -> Pixels:
        if where == "read" and number == 20:
            raise error("here")
        return _read(number)

    def run(pixels: Pixels) -> Vectors:
        if where == "run" and (pixels == 20).any():
            raise error("here")
        return _run(pixels)

    def consume() -> None:
        stream = embed_stream(sources(), read=read, run=run, batch=4, workers=3, runs=runs)
        for number, _ in stream:
            if where == "consumer" and number == 20:
                raise error("here")

    with pytest.raises(error, match="here"):
        consume()


def test_closing_early_drops_what_was_not_begun() -> None:
    begun: list[int] = []

    def read(number: int) -> Pixels:
        begun.append(number)
        time.sleep(0.01)
        return _read(number)

    stream = embed_stream(range(10_000), read=read, run=_run, batch=4, workers=2)
    next(stream)
    assert _threads() != set()
    stream.close()
    assert _threads() == set()
    assert len(begun) <= 12


@pytest.mark.parametrize(
    ("batch", "workers", "runs"), [(0, 1, 1), (-1, 1, 1), (1, 0, 1), (1, -2, 1), (1, 1, 0)]
)
def test_sizes_below_one_are_refused_at_the_call(batch: int, workers: int, runs: int) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        embed_stream([], read=_read, run=_run, batch=batch, workers=workers, runs=runs)


def test_there_is_at_least_one_core() -> None:
    assert usable_cores() >= 1
