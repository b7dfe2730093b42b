"""The pictures in a tar file, one after the other: nothing is extracted, nothing is sought.

So a tar may come from a disk, a pipe or an object store, and what its names say (``../../x``,
links, devices) has no effect. Damage ends the stream with a failure that names the tar; what came
before counts.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, Literal

from embedkit.errors import ImageError
from embedkit.imaging import IMAGE_SUFFIXES, Limits
from embedkit.scale.source import Source, label_of

__all__ = ["is_tar", "tar_sources"]

# Long names and attributes stand in headers of their own, which tarfile reads whole.
_HEADER_BYTES = 1 << 20
_LABEL_BYTES = 1 << 10
_LONG_HEADERS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)


def is_tar(name: str) -> bool:
    """Whether a name is that of a tar file, compressed or not."""
    return name.lower().endswith((".tar", ".tar.gz", ".tgz"))


def tar_sources(file: IO[bytes], address: str, *, limits: Limits | None = None) -> Iterator[Source]:
    """Every picture in a tar, in its order, each to be `held` before the next is asked for.

    A picture's label is the text of the ``.cls`` file that precedes it under the same name, as
    WebDataset writes them, else its first folder.

    Args:
        file: Read from where it stands, forwards only; not closed.
        address: Of the tar, for the names of what is in it: ``photos.tar/cats/1.jpg``. Its ending
            says whether it is compressed: ``.tar``, else gzip.
        limits: What is refused; a longer picture is passed over without being held.
    """
    limits = limits or Limits()
    label_key = label = ""
    met = 0
    try:
        # By the name and not by what is found: other compressions can ask for much memory.
        mode: Literal["r|", "r|gz"] = "r|" if address.lower().endswith(".tar") else "r|gz"
        with tarfile.open(fileobj=file, mode=mode, tarinfo=_Header) as archive:
            while (member := archive.next()) is not None:
                vars(archive)["members"].clear()  # or every name would be kept to the end
                if not member.isreg():
                    continue
                path = PurePosixPath(member.name)
                key = str(path.parent / path.name.partition(".")[0])
                if path.suffix == ".cls" and member.size <= _LABEL_BYTES:
                    label_key, label = key, _read(archive, member).decode("utf-8", "replace")
                if path.suffix.lower() not in IMAGE_SUFFIXES:
                    continue
                met += 1
                yield Source(
                    f"{address}/{member.name}",
                    label.strip() if key == label_key else label_of(member.name),
                    f"{member.size} {member.mtime}",
                    _Member(archive, member, limits),
                    passing=True,
                )
    except (tarfile.TarError, _Damaged, *_BROKEN) as error:
        reason = f"the tar file is damaged after {met:,} pictures: {error}"
        yield Source(address, "", "", ImageError("truncated", reason))


class _Damaged(Exception):
    """A header is not one. Not a `tarfile.TarError`, which tarfile would take for the end."""


class _Header(tarfile.TarInfo):
    """A header that says what is wrong with it, and that cannot ask for much memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        if not buf:
            raise _Damaged("it has no end mark")
        if not any(buf):
            return super().frombuf(buf, encoding, errors)  # the end mark, which is told by raising
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            raise _Damaged(str(error)) from error
        if header.type in _LONG_HEADERS and header.size > _HEADER_BYTES:
            raise _Damaged(f"a header of {header.size:,} bytes")
        return header


class _Member:
    """Reads one picture's bytes while the stream stands at it."""

    def __init__(self, archive: tarfile.TarFile, member: tarfile.TarInfo, limits: Limits) -> None:
        self._archive, self._member, self._limits = archive, member, limits

    def __call__(self) -> bytes:
        if self._member.size > self._limits.max_bytes:
            raise ImageError("too-large", f"it has more than {self._limits.max_bytes:,} bytes")
        try:
            return _read(self._archive, self._member)
        except (tarfile.TarError, *_BROKEN) as error:
            raise ImageError("truncated", "the tar file ends or is damaged inside it") from error


# What the decompressor and the file itself raise.
_BROKEN = (OSError, EOFError, zlib.error)


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = archive.extractfile(member)
    assert content is not None, "asked of regular files only"
    data = content.read()
    if len(data) != member.size:
        raise tarfile.ReadError("unexpected end of data")
    return data
