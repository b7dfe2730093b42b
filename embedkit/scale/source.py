"""One picture to embed, wherever it lies: its name, its label, and how to get at its bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from embedkit.errors import ImageError
from embedkit.imaging import Pixels, Preprocess, read_pixels

__all__ = ["Content", "Source", "label_of"]

Content = Path | bytes | Callable[[], bytes] | ImageError
"""A file, its bytes, what reads them (`ImageError` where it cannot), or why there are none."""


@dataclass(frozen=True)
class Source:
    """One picture.

    Attributes:
        path: How it is called in what is written: a path or an address.
        label: Of its class; empty where nothing says it.
        stamp: Differs when the content may have changed; empty where that cannot be told.
        content: Where its bytes come from.
        passing: The bytes have to be fetched before the next source is asked for (`held`).
    """

    path: str
    label: str
    stamp: str
    content: Content
    passing: bool = False

    def held(self) -> Source:
        """The same, independent of the stream it came from."""
        if not self.passing or not callable(self.content):
            return self
        try:
            return replace(self, content=self.content(), passing=False)
        except ImageError as error:
            return replace(self, content=error, passing=False)

    def pixels(self, preprocess: Preprocess) -> Pixels:
        """What the network sees; threads may call this together.

        Raises:
            ImageError: It is no usable picture, or cannot be fetched.
        """
        content = self.content
        if isinstance(content, ImageError):
            raise content
        return read_pixels(content() if callable(content) else content, preprocess)


def label_of(name: str) -> str:
    """The first folder of a name; empty at the top."""
    parts = PurePosixPath(name).parts
    return parts[0] if len(parts) > 1 else ""
