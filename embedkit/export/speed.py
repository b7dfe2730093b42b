"""How many pictures a second: several files in turns, so that a busy machine slows all alike."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embedkit.runtime.backends.onnxruntime import OnnxRuntimeBackend

__all__ = ["BATCH", "Speed", "measure_speed"]

BATCH = 8
_ROUNDS = 5, 40
_SECONDS = 6.0


@dataclass(frozen=True)
class Speed:
    """Medians of one comparison.

    Attributes:
        images_per_second: Of each file.
        rounds: How often each ran.
    """

    images_per_second: tuple[float, ...]
    rounds: int

    @property
    def ratio(self) -> float:
        """Of the last file to the first."""
        return self.images_per_second[-1] / self.images_per_second[0]


def measure_speed(models: Sequence[Path]) -> Speed:
    """Run 8 noise pictures through each file on the CPU, in turns.

    At least 5 rounds and at most 40, as many as fit into 6 seconds; one more to warm up. The model
    alone: no decoding.
    """
    backends = [OnnxRuntimeBackend(path, device="cpu") for path in models]
    side = backends[0].contract.preprocess
    shape = BATCH, side.height, side.width, 3
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for backend in backends:
        backend.run(pixels)
    taken: list[list[float]] = []
    began = time.perf_counter()
    while len(taken) < _ROUNDS[0] or (
        len(taken) < _ROUNDS[1] and time.perf_counter() - began < _SECONDS
    ):
        seconds = []
        for backend in backends:
            start = time.perf_counter()
            backend.run(pixels)
            seconds.append(time.perf_counter() - start)
        taken.append(seconds)
    for backend in backends:
        backend.close()
    medians = np.median(np.array(taken), axis=0)
    return Speed(tuple(float(BATCH / median) for median in medians), len(taken))
