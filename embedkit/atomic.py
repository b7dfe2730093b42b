"""A file appears under its name whole and on the disk, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from embedkit.errors import EmbedKitError

__all__ = ["published", "sync_folder"]


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """Yield an empty file beside `path` to write to; at the end of the block it becomes `path`.

    When the block is left by any exception, nothing is left behind and what stood at `path` stands.
    The folder is made when it is missing. One writer at a time: what a killed one left is written
    over.

    Raises:
        EmbedKitError: It cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.unlink(missing_ok=True)
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            # Some writers make a file that only its owner may read; the mode is the user's choice.
            temporary.chmod(mode)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise EmbedKitError(
            f"{path} could not be written", facts=f"{error}; what stood there before still stands"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the system lets a folder be opened."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
