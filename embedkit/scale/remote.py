"""Pictures in object stores: ``s3://``, ``gs://``, ``az://`` and, when asked for, the web.

Through fsspec. Only these kinds of addresses are taken and none that chains several (``a::b``): a
list of addresses may come from anyone, and other kinds reach files, shells and hosts of this
machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from embedkit.errors import (
    DataError,
    EmbedKitError,
    ImageError,
    MissingError,
    MissingExtraError,
    UsageError,
)
from embedkit.imaging import IMAGE_SUFFIXES, Limits, Shard
from embedkit.scale.source import Source, label_of
from embedkit.scale.tar import is_tar, tar_sources

__all__ = ["check_address", "is_address", "remote_sources"]

_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "memory")
_WEB = ("http", "https")
_DRIVERS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs"}
_CHANGES = ("ETag", "etag", "LastModified", "last_modified", "updated", "mtime", "created")


def is_address(text: str) -> bool:
    """Whether this names something elsewhere: ``s3://bucket/photos``."""
    return "://" in text


def check_address(address: str, *, web: bool) -> None:
    """Refuse what is not taken, or cannot be for want of a package.

    Raises:
        UsageError: It is of another kind, or of the web and that was not asked for.
        MissingExtraError: fsspec is not installed.
        MissingError: What fsspec needs for this kind is not installed.
    """
    protocol = _protocol(address)
    if protocol in _WEB and not web:
        raise UsageError(
            f"{address} is on the web, and nothing is fetched from there unasked",
            hint="--web, to take http:// and https:// addresses",
        )
    if protocol not in _STORES + _WEB or "::" in address:
        raise UsageError(
            f"{address} is of a kind that is not taken",
            facts=f"taken are: {', '.join(f'{name}://' for name in _STORES[:-1] + _WEB)}",
            hint="for files of this machine give their path",
        )
    _open(address)


def remote_sources(address: str, shard: Shard, *, limits: Limits | None = None) -> Iterator[Source]:
    """The pictures at an address: a file, a tar, a folder at any depth, a pattern (``*.tar``).

    A folder is listed piece by piece, in order of the names; tar files in it are passed over, as in
    a folder of this machine. A tar is one file: it is in one shard.

    Args:
        address: Passed by `check_address`.
        shard: Which of the names are wanted; names are below the folder, or the whole address.
        limits: What is refused; a longer file is not fetched.

    Raises:
        DataError: There is nothing at the address, or it cannot be listed.
    """
    limits = limits or Limits()
    files, root = _open(address)
    try:
        for name, info in _listed(files, root, address):
            if shard.has(name):
                yield from _sources(files, name, info, limits)
    except EmbedKitError:
        raise
    except Exception as error:  # drivers answer with whatever their network library raises
        raise DataError(
            f"{address} cannot be read", facts=f"{type(error).__name__}: {error}"
        ) from error


def _open(address: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ModuleNotFoundError as error:
        raise MissingExtraError(address, package="fsspec", extra="scale") from error
    protocol = _protocol(address)
    try:
        files, root = url_to_fs(address)
    except ImportError as error:
        raise MissingError(
            f"{protocol}:// addresses need a driver that is not installed",
            facts=str(error),
            hint=f"pip install {_DRIVERS.get(protocol, 'aiohttp')}",
        ) from error
    return files, root


def _protocol(address: str) -> str:
    return address.partition("://")[0].lower()


def _listed(files: Any, root: str, address: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name, by which shards are made, and what the store says of each file that is wanted."""
    web = _protocol(address) in _WEB
    if not web and any(sign in root for sign in "*?["):
        found = files.glob(root, detail=True)
        if not found:
            raise DataError(f"nothing matches {address}")
        for path, info in sorted(found.items()):
            if info["type"] == "file" and _is_wanted(path):
                yield files.unstrip_protocol(path), info
        return
    if web or _is_wanted(root):
        # Not asked about, so that a long list does not wait for an answer to each.
        yield address, {"name": root}
        return
    if files.info(root)["type"] == "file":
        raise DataError(f"{address} is no picture and no tar file, by its ending")
    for _, below, inside in files.walk(root, detail=True, on_error="raise"):
        for name in sorted(below):
            below[name] = below.pop(name)  # they are walked in this order
        for name in sorted(inside):
            if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES:
                info = inside[name]
                yield info["name"].removeprefix(root).lstrip("/"), info


def _is_wanted(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES or is_tar(name)


def _sources(files: Any, name: str, info: dict[str, Any], limits: Limits) -> Iterator[Source]:
    path = info["name"]
    address = files.unstrip_protocol(path)
    if is_tar(path):
        with files.open(path, "rb") as file:
            yield from tar_sources(file, address, limits=limits)
        return
    size = info.get("size")
    changed = next((info[key] for key in _CHANGES if info.get(key)), "")
    label = PurePosixPath(path).parent.name if "://" in name else label_of(name)
    yield Source(address, label, f"{size} {changed}", _Remote(files, path, size, limits))


class _Remote:
    """Fetches one file, in whichever thread asks for it."""

    def __init__(self, files: Any, path: str, size: int | None, limits: Limits) -> None:
        self._files, self._path, self._size, self._limits = files, path, size, limits

    def __call__(self) -> bytes:
        most = self._limits.max_bytes
        if self._size is not None and self._size > most:
            raise ImageError("too-large", f"the file has more than {most:,} bytes")
        try:
            with self._files.open(self._path, "rb") as file:
                data: bytes = file.read(most + 1)
                return data
        except Exception as error:  # see `remote_sources`
            raise ImageError("unreadable", f"{type(error).__name__}: {error}"[:200]) from error
