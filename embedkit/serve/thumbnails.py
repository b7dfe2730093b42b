"""Small JPEGs of the catalog's pictures: made once, kept on the disk, never more than agreed."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

from PIL import Image

from embedkit.errors import ImageError, MissingError
from embedkit.imaging import Limits, decode
from embedkit.runtime.private_folder import private_folder

__all__ = ["LARGE", "SMALL", "Thumbnails"]

SMALL, LARGE = 320, 1280
"""Pixels of the longer side: for the grid, and for a closer look."""

_END = b"\xff\xd9"  # of a JPEG


class Thumbnails:
    """A folder of small pictures; several threads and several servers may share one.

    A picture that changed is made again: its name holds the file's size and time.

    Args:
        folder: Made when missing; None takes the user's cache folder, or a temporary one where that
            cannot be had.
        max_bytes: When the folder holds more, those that were not used for longest leave.
        limits: What a picture may ask for.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        max_bytes: int = 512_000_000,
        limits: Limits | None = None,
    ) -> None:
        self._own: tempfile.TemporaryDirectory[str] | None = None
        if folder is None:
            try:
                folder = private_folder("thumbnails")
            except MissingError:
                self._own = tempfile.TemporaryDirectory(prefix="embedkit-")
                folder = Path(self._own.name)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._max_bytes = max_bytes
        self._limits = limits or Limits()
        self._lock = threading.Lock()
        self._bytes = sum(size for _, size, _ in self._kept())

    def jpeg(self, file: Path, side: int) -> bytes:
        """The picture upright, its longer side at most `side` pixels, without any metadata.

        Raises:
            ImageError: It is gone, or no usable picture.

        Cost: a read when it is kept already, else a scaled decode.
        """
        place = self.folder / f"{self._key(file, side)}.jpg"
        with suppress(OSError):
            data = place.read_bytes()
            # Nothing here is worth a flush to the disk: after a power cut the end may be missing.
            if data.endswith(_END):
                os.utime(place)
                return data
        image = decode(file, shortest_side=side, limits=self._limits)
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        out = io.BytesIO()
        image.info = {}  # a JPEG would carry a comment or a profile along
        image.save(out, "JPEG", quality=82)
        self._keep(place, out.getvalue())
        return out.getvalue()

    def close(self) -> None:
        """Remove the folder if it was a temporary one."""
        if self._own is not None:
            self._own.cleanup()

    def _key(self, file: Path, side: int) -> str:
        try:
            found = file.stat()
        except (OSError, ValueError) as error:
            raise ImageError("unreadable", "the file is gone") from error
        facts = f"{found.st_size} {found.st_mtime_ns} {side}"
        return hashlib.blake2b(
            os.fsencode(file) + b"\0" + facts.encode(), digest_size=16
        ).hexdigest()

    def _keep(self, place: Path, data: bytes) -> None:
        """Whole or not at all; a full or lost disk costs only the cache."""
        with suppress(OSError):
            handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                Path(temporary).replace(place)
            except OSError:
                Path(temporary).unlink(missing_ok=True)
                raise
            with self._lock:
                self._bytes += len(data)
                if self._bytes > self._max_bytes:
                    self._make_room()

    def _make_room(self) -> None:
        """Down to nine tenths, so that this is done seldom."""
        kept = sorted(self._kept())
        self._bytes = sum(size for _, size, _ in kept)
        for _, size, place in kept:
            if self._bytes <= 0.9 * self._max_bytes:
                break
            with suppress(OSError):
                place.unlink(missing_ok=True)
            self._bytes -= size

    def _kept(self) -> list[tuple[int, int, Path]]:
        """When each was used last, its size, where it is."""
        found = []
        for place in self.folder.glob("*.jpg"):
            with suppress(OSError):
                facts = place.stat()
                found.append((facts.st_mtime_ns, facts.st_size, place))
        return found
