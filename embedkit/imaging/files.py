"""Which files under a folder are pictures, and what is in them: the walk and the hash."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from embedkit.errors import DataError

__all__ = ["IMAGE_SUFFIXES", "find_images", "hash_file"]

IMAGE_SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
        *(".png", ".apng", ".webp", ".gif", ".avif"),
        *(".bmp", ".dib", ".ico", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
        # Not decoded, and still found: a folder of phone photos must not look empty.
        *(".heic", ".heif"),
    }
)
"""Lower-case endings of the files that count as pictures."""


def find_images(root: Path) -> Iterator[Path]:
    """Every picture under `root`, at any depth, in order of the names, folder by folder.

    A file counts by its ending (`IMAGE_SUFFIXES`, in any case); whether it can be decoded shows
    later. Links to files count, dangling ones too, so that they are reported; links to folders are
    not followed, so no loop can be entered. A folder named ``x.jpg`` is walked into like any other.
    Pipes, sockets and devices are passed over. The stream holds one folder's names at a time.

    Raises:
        DataError: `root` is no folder, or a folder cannot be read. Nothing is skipped in silence,
            because a catalog would take what is missing here for deleted.
    """
    if not root.is_dir():
        raise DataError(
            f"there is no folder {str(root)!r}",
            facts="it is a file" if root.exists() else None,
            hint="name a folder of photos",
        )
    # Walked by hand and not by recursion: a deep tree must not end in a RecursionError.
    waiting = [_listing(root)]
    while waiting:
        entry = next(waiting[-1], None)
        if entry is None:
            waiting.pop()
        elif entry.is_dir(follow_symlinks=False):
            waiting.append(_listing(Path(entry.path)))
        elif _is_picture(entry):
            yield Path(entry.path)


def hash_file(path: Path) -> str:
    """BLAKE2b-128 of the bytes, 32 hex digits; two files are the same picture when it agrees.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _listing(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return iter(sorted(entries, key=lambda entry: entry.name))
    except FileNotFoundError:
        return iter(())  # deleted since its parent was listed: there is nothing in it any more
    except OSError as error:
        raise DataError(
            f"the folder {str(folder)!r} cannot be read",
            facts=error.strerror,
            hint="make it readable, or move it out of the way",
        ) from error


def _is_picture(entry: os.DirEntry[str]) -> bool:
    if Path(entry.name).suffix.lower() not in IMAGE_SUFFIXES:
        return False
    if not entry.is_symlink():
        return entry.is_file()
    try:
        return stat.S_ISREG(entry.stat().st_mode)
    except OSError:
        return True  # dangling, a loop, or out of reach: opening it will say which
