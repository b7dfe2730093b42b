"""The words that a model's codes stand for, as its contract carries them: an index needs no torch.

A vector is cut into M equal parts, and part m is one of the K words of codebook m. A code is the
word's number, a byte; M codes are a picture. The model tells which (the graph's output ``codes``):
a word need not be the nearest, so codes cannot be made from vectors.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Codebooks", "Codes"]

Codes = npt.NDArray[np.uint8]
"""``(N, M)``, each below K."""

_MOST_WORDS = 256


@dataclass(frozen=True)
class Codebooks:
    """M codebooks of K words.

    Attributes:
        parts: M, at least 1.
        words: K, 2 to 256.
        width: Numbers of a word, D / M.
        numbers: The words, ``(M, K, D / M)`` little-endian float32, in base64.
    """

    parts: int
    words: int
    width: int
    numbers: str

    def __post_init__(self) -> None:
        sizes = (self.parts, self.words, self.width)
        if any(isinstance(size, bool) or not isinstance(size, int) for size in sizes):
            raise ValueError(f"codebooks of {sizes}")
        if self.parts < 1 or not 2 <= self.words <= _MOST_WORDS or self.width < 1:
            raise ValueError(f"{self.parts} codebooks of {self.words} words of {self.width}")
        try:
            content = base64.b64decode(self.numbers, validate=True)
        except (binascii.Error, TypeError, ValueError) as error:
            raise ValueError(f"its codebooks cannot be read: {error}") from error
        if len(content) != 4 * self.parts * self.words * self.width:
            raise ValueError(f"its codebooks have {len(content)} bytes")
        if not np.isfinite(np.frombuffer(content, "<f4")).all():
            raise ValueError("its codebooks hold numbers that are not finite")

    @classmethod
    def of(cls, words: npt.NDArray[np.float32]) -> Codebooks:
        """From ``(M, K, D / M)``."""
        parts, count, width = words.shape
        text = base64.b64encode(np.ascontiguousarray(words, "<f4").tobytes()).decode("ascii")
        return cls(parts, count, width, text)

    @classmethod
    def from_json(cls, document: Any) -> Codebooks:
        """From what `dataclasses.asdict` gives.

        Raises:
            ValueError: It is something else.
        """
        if not isinstance(document, dict):
            raise ValueError(f"codebooks that are {type(document).__name__}")
        return cls(**document)

    @property
    def dim(self) -> int:
        """D."""
        return self.parts * self.width

    def array(self) -> npt.NDArray[np.float32]:
        """``(M, K, D / M)``, read-only."""
        flat = np.frombuffer(base64.b64decode(self.numbers), np.dtype("<f4"))
        return flat.reshape(self.parts, self.words, self.width)

    def vectors(self, codes: Codes) -> npt.NDArray[np.float32]:
        """The words of codes ``(N, M)`` in a row, ``(N, D)``."""
        found: npt.NDArray[np.float32] = self.array()[np.arange(self.parts), codes]
        return found.reshape(len(codes), self.dim)

    def fingerprint(self) -> str:
        """16 hex digits of the words and their shape."""
        text = f"{self.parts}|{self.words}|{self.width}|{self.numbers}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]
