"""Batches and the gate: everyone gets their own answer, whatever ran together."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest

from embedkit.errors import EmbedKitError
from embedkit.imaging import Pixels
from embedkit.serve.batching import Batcher, Gate, Vector


def pixels(value: int) -> Pixels:
    return np.full((2, 2, 3), value, np.uint8)


def first_values(stack: Pixels) -> Vector:
    return stack[:, 0, 0, :1].astype(np.float32)


def test_everyone_gets_the_vector_of_their_own_picture() -> None:
    sizes: list[int] = []
    batcher = Batcher(first_values, max_batch=7, max_wait=0.01, on_batch=sizes.append)
    with ThreadPoolExecutor(8) as pool:
        futures = list(pool.map(lambda n: batcher.submit(pixels(n)), range(200)))
    assert [int(future.result(30)[0]) for future in futures] == list(range(200))
    batcher.close()
    assert sum(sizes) == 200
    assert max(sizes) <= 7
    assert len(sizes) < 200


def test_what_waits_while_the_model_runs_goes_together() -> None:
    started, go = threading.Event(), threading.Event()
    sizes: list[int] = []

    def run(stack: Pixels) -> Vector:
        started.set()
        assert go.wait(30)
        return first_values(stack)

    batcher = Batcher(run, max_batch=16, max_wait=0.0, on_batch=sizes.append)
    futures = [batcher.submit(pixels(0))]
    assert started.wait(30)
    futures += [batcher.submit(pixels(n)) for n in range(1, 6)]
    go.set()
    assert [int(future.result(30)[0]) for future in futures] == list(range(6))
    batcher.close()
    assert sizes == [1, 5]


def test_who_is_alone_does_not_wait_and_who_is_not_does() -> None:
    coming = 1
    sizes: list[int] = []
    batcher = Batcher(first_values, max_wait=30.0, coming=lambda: coming, on_batch=sizes.append)
    began = time.monotonic()
    batcher.submit(pixels(1)).result(30)
    coming = 3
    futures = [batcher.submit(pixels(n)) for n in range(3)]
    assert [int(future.result(30)[0]) for future in futures] == [0, 1, 2]
    assert time.monotonic() - began < 30
    assert sizes == [1, 3]
    batcher.close()


def test_a_failing_model_fails_those_who_asked_and_the_next_are_served() -> None:
    def run(stack: Pixels) -> Vector:
        if stack.max() == 13:
            raise EmbedKitError("the engine failed")
        return first_values(stack)

    batcher = Batcher(run, max_wait=0.0)
    with pytest.raises(EmbedKitError, match="the engine failed"):
        batcher.submit(pixels(13)).result(30)
    assert batcher.submit(pixels(1)).result(30)[0] == 1
    batcher.close()


def test_who_has_left_is_not_computed() -> None:
    started, go = threading.Event(), threading.Event()
    seen: list[int] = []

    def run(stack: Pixels) -> Vector:
        started.set()
        assert go.wait(30)
        seen.extend(stack[:, 0, 0, 0].tolist())
        return first_values(stack)

    batcher = Batcher(run, max_wait=0.0)
    first = batcher.submit(pixels(1))
    assert started.wait(30)
    gone, stays = batcher.submit(pixels(2)), batcher.submit(pixels(3))
    assert gone.cancel()
    go.set()
    assert stays.result(30)[0] == 3
    assert first.result(30)[0] == 1
    batcher.close()
    assert seen == [1, 3]


def test_closing_finishes_what_waits_and_refuses_what_comes() -> None:
    batcher = Batcher(first_values, max_batch=2, max_wait=0.0)
    futures: list[Future[Vector]] = [batcher.submit(pixels(n)) for n in range(9)]
    batcher.close()
    batcher.close()
    assert [int(future.result(0)[0]) for future in futures] == list(range(9))
    with pytest.raises(EmbedKitError, match="stopping"):
        batcher.submit(pixels(0))


def test_a_gate_lets_in_as_many_as_there_is_room_for() -> None:
    gate = Gate(2)
    assert [gate.enter() for _ in range(4)] == [True, True, False, False]
    gate.leave()
    assert gate.enter()
    assert gate.inside == 2
