"""From what a person types to pictures: files, folders, tar files, addresses, a list on stdin."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from embedkit.errors import DataError, EmbedKitError, ImageError, UsageError
from embedkit.imaging import Shard, find_images
from embedkit.scale.remote import check_address, is_address, remote_sources
from embedkit.scale.source import Source, label_of
from embedkit.scale.tar import is_tar, tar_sources

__all__ = ["count_files", "find_sources"]

LIST = "-"
"""Stands for a list on stdin."""


def find_sources(
    arguments: Sequence[str],
    *,
    listed: Iterable[str] = (),
    shard: Shard | None = None,
    web: bool = False,
) -> Iterator[Source]:
    """Every picture of a shard, lazily, in the order of the arguments and then of the names.

    Shards are made by a picture's name: below the folder that was given, else as it was written. A
    tar file is one name: it is in one shard, whole.

    Args:
        arguments: Paths of files, folders and tar files, addresses, and ``-`` for `listed`.
        listed: More of them. What is not there is a failure of its own here, not an error.
        shard: None: everything.
        web: Addresses of the web are taken.

    Raises:
        UsageError: Something that was typed is not there, or of no kind that is taken; at the call.
        MissingError: A package that an address needs is not installed; at the call.
        DataError: A folder or address cannot be read; as it is come to.
    """
    for argument in arguments:
        if is_address(argument):
            check_address(argument, web=web)
        elif argument != LIST and not Path(argument).exists():
            raise UsageError(f"there is no {argument!r}", hint="name files, folders or addresses")
    return _find(arguments, listed, shard or Shard(), web)


def count_files(arguments: Sequence[str], shard: Shard | None = None) -> int | None:
    """How many pictures `find_sources` will find; None where only doing it tells.

    Cost: a walk of the folders.
    """
    shard = shard or Shard()
    if any(argument == LIST or is_address(argument) or is_tar(argument) for argument in arguments):
        return None
    return sum(shard.has(name) for argument in arguments for _, name in _files(Path(argument)))


def _find(
    arguments: Sequence[str], listed: Iterable[str], shard: Shard, web: bool
) -> Iterator[Source]:
    for argument in arguments:
        if argument == LIST:
            for line in listed:
                yield from _listed(line, shard, web)
        else:
            yield from _sources(argument, shard)


def _listed(line: str, shard: Shard, web: bool) -> Iterator[Source]:
    """What a line of a list stands for; one that stands for nothing must not end the work."""
    try:
        if is_address(line):
            check_address(line, web=web)
        yield from _sources(line, shard)
    except DataError as error:
        yield Source(line, "", "", ImageError("unreadable", _reason(error)))
    except UsageError as error:
        yield Source(line, "", "", ImageError("unsupported", _reason(error)))


def _reason(error: EmbedKitError) -> str:
    return ": ".join(part for part in (error.what, error.facts) if part)


def _sources(argument: str, shard: Shard) -> Iterator[Source]:
    if is_address(argument):
        yield from remote_sources(argument, shard)
    elif is_tar(argument) and not Path(argument).is_dir():
        if shard.has(argument):
            yield from _tar(argument)
    else:
        folder = Path(argument).is_dir()
        for path, name in _files(Path(argument)):
            if shard.has(name):
                label = label_of(name) if folder else path.parent.name
                yield Source(str(path), label, _stamp(path), path)


def _files(path: Path) -> Iterator[tuple[Path, str]]:
    """Each file with the name that shards are made by."""
    if not path.is_dir():
        yield path, str(path)
        return
    for file in find_images(path):
        yield file, file.relative_to(path).as_posix()


def _tar(name: str) -> Iterator[Source]:
    try:
        file = open(name, "rb")  # noqa: SIM115, PTH123 - closed below; the try is for opening alone
    except OSError as error:
        yield Source(name, "", "", ImageError("unreadable", error.strerror or str(error)))
        return
    with file:
        yield from tar_sources(file, name)


def _stamp(path: Path) -> str:
    """Size and time of a file; empty where it has none."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"
