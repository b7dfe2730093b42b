"""What an engine has to offer to embed: one method and an end."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from embedkit.imaging.preprocess import Pixels
from embedkit.runtime.codebooks import Codes
from embedkit.runtime.contract import ModelContract

__all__ = ["Backend", "CodingBackend", "Vectors"]

Vectors = npt.NDArray[np.float32]


class Backend(Protocol):
    """Runs one model. Called by `embedkit.runtime.Embedder`; safe to call from several threads.

    Attributes:
        name: As typed: ``onnxruntime``, ``tensorrt``.
        device: Where it really runs: ``cpu``, ``cuda:0``.
        contract: What the loaded file says about itself.
    """

    name: str
    device: str
    contract: ModelContract

    def run(self, pixels: Pixels) -> Vectors:
        """``(N, height, width, 3)`` uint8, N >= 1 -> ``(N, embedding_dim)`` float32."""
        ...

    def close(self) -> None:
        """Give back what the engine holds; calling it twice is harmless."""
        ...


@runtime_checkable
class CodingBackend(Backend, Protocol):
    """One that also gives codes, where the contract has codebooks."""

    def run_coded(self, pixels: Pixels) -> tuple[Vectors, Codes]:
        """As `run`, and ``(N, parts)`` uint8."""
        ...
