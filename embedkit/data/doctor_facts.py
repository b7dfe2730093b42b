"""What one look at a photo tells the doctor: its content hash, its perceptual hash, size, colours.

The looks are kept in a small SQLite cache, so that a second check reads only what has changed and
a killed one goes on where it was.
"""

from __future__ import annotations

import io
import json
import os
import sqlite3
import stat
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from PIL import Image, ImageStat

from embedkit.errors import EmbedKitError, ImageError, MismatchError, MissingExtraError
from embedkit.imaging import Limits, decode

__all__ = ["HASH_BITS", "FactCache", "PhotoFacts", "default_cache", "gather_facts"]

HASH_SIDE = 16
HASH_BITS = HASH_SIDE * HASH_SIDE
# `imagehash.phash` resizes to four times the side of the hash, so no more pixels are needed.
_DECODED_SIDE = 4 * HASH_SIDE
_GRID = 4
_AT_ONCE = 256
# Raised whenever the meaning of a stored look changes; an older cache is then begun anew.
_CACHE_VERSION = 1
# "ekck", so that the database of another program is never taken for ours and emptied.
_APPLICATION = 0x656B636B


@dataclass(frozen=True)
class PhotoFacts:
    """One readable photo.

    Attributes:
        content: BLAKE2b-128 of the file, hex; as `embedkit.imaging.hash_file`.
        phash: Perceptual hash of the upright picture in grey, 256 bits as 64 hex digits.
        width: Of the stored picture, pixels, before EXIF turns it.
        height: The same.
        mean: Of red, green and blue, 0 to 255.
        std: Of red, green and blue, over the pixels of this photo.
        chroma: Cb and Cr of 4 x 4 parts, 32 values of 0 to 255 as hex: tells a picture from the
            same picture in another colour.
    """

    content: str
    phash: str
    width: int
    height: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    chroma: str


class FactCache:
    """Looks by path, size and time of change, in one SQLite file; a context manager.

    Photos that could not be read are not kept: the next check looks at them again. Nothing is
    removed for photos that are gone; about 450 bytes each. The file may be deleted at any time.

    Raises:
        EmbedKitError: The file cannot be written.
        MismatchError: It is no such cache.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=30)
        except (OSError, sqlite3.Error) as error:
            raise self._not_writable(error) from error
        try:
            with self._explained():
                self._prepare()
        except BaseException:
            self._database.close()
            raise

    def __enter__(self) -> FactCache:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def find(self, path: Path, size: int, changed: int) -> PhotoFacts | None:
        """The look at a file that has not changed since; `changed` in nanoseconds."""
        with self._explained():
            row = self._database.execute(
                "SELECT facts FROM looks WHERE path = ? AND size = ? AND changed = ?",
                (os.fsencode(path), size, changed),
            ).fetchone()
        if row is None:
            return None
        facts = json.loads(row[0])
        return PhotoFacts(**{**facts, "mean": tuple(facts["mean"]), "std": tuple(facts["std"])})

    def keep(self, looks: Sequence[tuple[Path, int, int, PhotoFacts]]) -> None:
        """Add looks with path, size and time of change; on the disk when this returns."""
        rows = [
            (os.fsencode(path), size, changed, json.dumps(asdict(facts)))
            for path, size, changed, facts in looks
        ]
        with self._explained(), self._database:
            self._database.executemany("INSERT OR REPLACE INTO looks VALUES (?, ?, ?, ?)", rows)

    def _prepare(self) -> None:
        run = self._database.execute
        (tables,) = run("SELECT count(*) FROM sqlite_master").fetchone()
        (application,) = run("PRAGMA application_id").fetchone()
        (version,) = run("PRAGMA user_version").fetchone()
        if tables and application != _APPLICATION:
            raise self._foreign("another program's database")
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = NORMAL")
        with self._database:
            if version != _CACHE_VERSION:
                run("DROP TABLE IF EXISTS looks")
            run(
                "CREATE TABLE IF NOT EXISTS looks "
                "(path BLOB PRIMARY KEY, size INTEGER, changed INTEGER, facts TEXT) WITHOUT ROWID"
            )
            run(f"PRAGMA application_id = {_APPLICATION}")
            run(f"PRAGMA user_version = {_CACHE_VERSION}")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise self._not_writable(error) from error
        except sqlite3.DatabaseError as error:
            raise self._foreign(str(error)) from error

    def _not_writable(self, error: Exception) -> EmbedKitError:
        return EmbedKitError(
            f"the cache {self.path} cannot be written", facts=str(error), hint="--cache FILE"
        )

    def _foreign(self, why: str) -> MismatchError:
        return MismatchError(
            f"{self.path} is no cache of `embedkit check`",
            facts=why,
            hint="another --cache FILE, or delete it",
        )


def default_cache() -> Path:
    """``check.sqlite`` in the user's cache folder, which the system or XDG_CACHE_HOME names."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "embedkit" / "check.sqlite"


def gather_facts(
    files: Sequence[Path],
    *,
    cache: FactCache | None = None,
    workers: int | None = None,
    near: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[PhotoFacts | ImageError]:
    """Look at every file once: the facts, or why it is no usable picture, in the order of `files`.

    Args:
        cache: Looked into first and added to every 256 files; None looks at all of them.
        workers: Decoding threads, at least 1; None is one per core.
        near: False needs no imagehash: `PhotoFacts.phash` then is the content's hash twice, so that
            only equal files look alike, and the looks are not added to the cache.
        progress: Called as ``progress(done, failed)`` with the files just looked at.

    Raises:
        MissingExtraError: imagehash is not installed, and `near`.

    Cost, measured, of one core: 0.8 ms for a JPEG of 0.05 megapixels, 3 ms for 1, 26 ms for 12;
    other formats are decoded at full size. Memory: one file per thread, 1 KB of facts per photo.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    perceptual_hash = _import_phash() if near else None
    facts: list[PhotoFacts | ImageError] = []
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        for start in range(0, len(files), _AT_ONCE):
            part = files[start : start + _AT_ONCE]
            stamps = [_stamp(path) for path in part]
            known = [
                cache.find(path.absolute(), *stamp) if cache and stamp else None
                for path, stamp in zip(part, stamps, strict=True)
            ]
            unknown = [path for path, fact in zip(part, known, strict=True) if fact is None]
            looks = pool.map(lambda path: _look(path, perceptual_hash), unknown)
            fresh = []
            for path, stamp, fact in zip(part, stamps, known, strict=True):
                seen = next(looks) if fact is None else fact
                facts.append(seen)
                if near and fact is None and stamp and isinstance(seen, PhotoFacts):
                    fresh.append((path.absolute(), *stamp, seen))
                if progress is not None:
                    progress(1, int(isinstance(seen, ImageError)))
            if cache and fresh:
                cache.keep(fresh)
    return facts


def _import_phash() -> Callable[[Image.Image], str]:
    try:
        import imagehash
    except ModuleNotFoundError as error:
        raise MissingExtraError("the check", package="imagehash", extra="train") from error

    def perceptual_hash(image: Image.Image) -> str:
        bits = imagehash.phash(image, hash_size=HASH_SIDE).hash
        return np.packbits(bits).tobytes().hex()

    return perceptual_hash


def _stamp(path: Path) -> tuple[int, int] | None:
    """Size and time of change of a regular file; of anything else, None."""
    try:
        status = path.stat()
    except OSError:
        return None  # the look itself will say what is wrong
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


def _look(
    path: Path, perceptual_hash: Callable[[Image.Image], str] | None
) -> PhotoFacts | ImageError:
    try:
        stamp = _stamp(path)
        if stamp is None or stamp[0] > Limits().max_bytes:
            decode(path)  # says why
            return ImageError("unreadable", "it changed while it was read")
        data = path.read_bytes()
        image = decode(data, shortest_side=_DECODED_SIDE)
    except ImageError as error:
        return error
    except OSError as error:
        return ImageError("unreadable", error.strerror or "it cannot be read")
    # A JPEG was decoded at a reduced size; anything else as it is.
    width, height = _jpeg_size(data) or image.size
    if max(image.size) > 8 * _DECODED_SIDE:
        image = image.reduce(max(1, min(image.size) // (2 * _DECODED_SIDE)))
    # By histograms in C: a tenth of the time of numpy's mean and deviation over pixels.
    statistics = ImageStat.Stat(image)
    grid = image.resize((_GRID, _GRID), Image.Resampling.BOX).convert("YCbCr")
    red, green, blue = (round(value, 2) for value in statistics.mean)
    red_std, green_std, blue_std = (round(value, 2) for value in statistics.stddev)
    content = blake2b(data, digest_size=16).hexdigest()
    return PhotoFacts(
        content=content,
        phash=perceptual_hash(image) if perceptual_hash else 2 * content,
        width=width,
        height=height,
        mean=(red, green, blue),
        std=(red_std, green_std, blue_std),
        chroma=np.asarray(grid)[..., 1:].tobytes().hex(),
    )


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height from a JPEG's frame header; None for what is no JPEG.

    Markers are FF and a byte; C0 to CF, but for C4, C8 and CC, begin the frame (ITU T.81, B.1.1).
    """
    if not data.startswith(b"\xff\xd8"):
        return None
    file = io.BytesIO(data)
    file.seek(2)
    while len(marker := file.read(2)) == 2:
        if marker[0] != 0xFF or marker[1] == 0xFF:
            file.seek(-1, io.SEEK_CUR)  # filling between segments
            continue
        if marker[1] == 0x01 or 0xD0 <= marker[1] <= 0xD9:
            continue  # stands alone, without a length
        header = file.read(7)
        if len(header) < 7:
            return None
        if 0xC0 <= marker[1] <= 0xCF and marker[1] not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", header[3:7])
            return (width, height) if width and height else None
        file.seek(int.from_bytes(header[:2], "big") - 7, io.SEEK_CUR)
    return None
