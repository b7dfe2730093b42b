"""Many requests, one model: pictures that wait at the same time run through it together."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import numpy.typing as npt

from embedkit.errors import EmbedKitError
from embedkit.imaging import Pixels

__all__ = ["Batcher", "Gate"]

Vector = npt.NDArray[np.float32]
_Waiting = tuple[Pixels, "Future[Vector]"]


class Gate:
    """How much work is taken on at once; more is refused, so that nobody waits for long.

    Belongs to one event loop: only its thread may use it.

    Attributes:
        capacity: How many may be inside.
        inside: How many are.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.inside = 0

    def enter(self) -> bool:
        """Whether there was room; then `leave` must follow."""
        if self.inside >= self.capacity:
            return False
        self.inside += 1
        return True

    def leave(self) -> None:
        """Make room."""
        self.inside -= 1


class Batcher:
    """One thread that runs the model on whatever waits.

    The first picture waits at most `max_wait` for others that are on their way, and not at all for
    none; while the model runs, the next ones gather by themselves.

    Args:
        run: Pixels ``(N, height, width, 3)`` to vectors ``(N, D)``: `Embedder.embed_pixels`.
        max_batch: The most pictures of one run, at least 1.
        max_wait: Seconds.
        coming: How many requests are under way, the waiting ones among them; may be too many.
        on_batch: Told the size of every batch.
    """

    def __init__(
        self,
        run: Callable[[Pixels], Vector],
        *,
        max_batch: int = 16,
        max_wait: float = 0.004,
        coming: Callable[[], int] = lambda: sys.maxsize,
        on_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._run, self._max_batch, self._max_wait = run, max_batch, max_wait
        self._coming, self._on_batch = coming, on_batch
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="embedkit-model", daemon=True)
        self._thread.start()

    def submit(self, pixels: Pixels) -> Future[Vector]:
        """The vector ``(D,)`` of one picture ``(height, width, 3)``, when it is there.

        The future carries what `run` raised; cancelling it takes the picture out of the queue.

        Raises:
            EmbedKitError: The batcher was closed.
        """
        future: Future[Vector] = Future()
        with self._lock:
            if self._closed:
                raise EmbedKitError("the server is stopping")
            self._queue.put((pixels, future))
        return future

    def close(self) -> None:
        """Finish what waits, then end; calling it twice is harmless."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        more = True
        while more:
            batch, more = self._gather()
            # A request whose client has left need not be computed.
            batch = [one for one in batch if one[1].set_running_or_notify_cancel()]
            if not batch:
                continue
            self._on_batch(len(batch))
            try:
                vectors = self._run(np.stack([pixels for pixels, _ in batch]))
            except Exception as error:
                for _, future in batch:
                    future.set_exception(error)
            else:
                for (_, future), vector in zip(batch, vectors, strict=True):
                    future.set_result(vector)

    def _gather(self) -> tuple[list[_Waiting], bool]:
        """The next batch, and whether another may follow."""
        first = self._queue.get()
        if first is None:
            return [], False
        batch = [first]
        end = time.monotonic() + self._max_wait
        while len(batch) < self._max_batch:
            wait = end - time.monotonic() if len(batch) < self._coming() else 0.0
            try:
                one = self._queue.get(timeout=max(wait, 0.0))
            except queue.Empty:
                break
            if one is None:
                return batch, False
            batch.append(one)
        return batch, True
