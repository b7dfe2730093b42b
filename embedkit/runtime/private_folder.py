"""A folder for caches that may hold compiled code: the user's own, closed to everybody else."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from embedkit.errors import MissingError

__all__ = ["private_folder"]


def private_folder(name: str) -> Path:
    """``embedkit/<name>`` in the user's cache folder (``XDG_CACHE_HOME``), made when missing.

    Raises:
        MissingError: It cannot be made, or others could have written to it.
    """
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "embedkit" / name
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise MissingError(
            f"the cache folder {folder} cannot be made",
            facts=str(error),
            hint="name another one in the environment: XDG_CACHE_HOME=/some/folder",
        ) from error
    if sys.platform != "win32" and (
        found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & (stat.S_IWGRP | stat.S_IWOTH)
    ):
        raise MissingError(
            f"the cache folder {folder} is not yours alone",
            facts="others could put compiled code into it, which would then be run",
            hint=f"chmod 700 {folder}, or remove it",
        )
    return folder
