"""The first so many numbers of a model's vectors, where it was trained so that they stand alone."""

from __future__ import annotations

import numpy as np

from embedkit.imaging.preprocess import Pixels
from embedkit.runtime.backends.base import Backend, Vectors
from embedkit.runtime.contract import ModelContract

__all__ = ["PrefixBackend", "cut"]


class PrefixBackend:
    """Another backend's vectors, cut to a narrower width that its contract offers.

    Attributes:
        contract: That of the narrower model.

    Raises:
        UsageError: The model has no such width.
    """

    def __init__(self, whole: Backend, dim: int) -> None:
        self._whole = whole
        self.name, self.device = whole.name, whole.device
        self.contract: ModelContract = whole.contract.cut(dim)

    def run(self, pixels: Pixels) -> Vectors:
        contract = self.contract
        return cut(self._whole.run(pixels), contract.embedding_dim, normalizes=contract.normalizes)

    def close(self) -> None:
        self._whole.close()


def cut(vectors: Vectors, dim: int, *, normalizes: bool) -> Vectors:
    """``(N, D)`` -> the first `dim` columns, of unit length again where the whole rows are.

    A row of which nothing is left stays 0.
    """
    rows = np.array(vectors[:, :dim], np.float32)
    if normalizes:
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return rows
