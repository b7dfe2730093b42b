"""The bytes of `catalog.faiss`: how they are checked when read, and published so that none is half.

The file is a genuine FAISS file with a stored ZIP appended::

    [FAISS payload][ZIP: embedkit/manifest.json, embedkit/ids.i64,
                    embedkit/path_offsets.u64, embedkit/paths.bin,
                    embedkit/label_offsets.u64, embedkit/labels.bin]

``faiss.read_index`` opens it and ``python -m zipfile -l`` lists it. One rename publishes both
halves, so vectors and names cannot part. FAISS has no checksum of its own: the manifest holds the
payload's length and CRC-32, and every member of the ZIP has its own.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import shutil
import struct
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import faiss
import numpy as np
import numpy.typing as npt

from embedkit.atomic import sync_folder
from embedkit.errors import EmbedKitError, MismatchError
from embedkit.floors import require

__all__ = [
    "IDS",
    "LABELS",
    "LABEL_OFFSETS",
    "MANIFEST",
    "PATHS",
    "PATH_OFFSETS",
    "SCHEMA",
    "Header",
    "Tail",
    "damaged",
    "is_faiss",
    "manifest_digest",
    "map_index",
    "publish",
    "read_header",
    "read_payload",
    "read_tail",
    "stays_on_disk",
    "write_payload",
    "write_tail",
    "writing",
]

require("faiss", faiss.__version__)

SCHEMA = "embedkit.catalog/1"

MANIFEST = "embedkit/manifest.json"
IDS = "embedkit/ids.i64"
PATH_OFFSETS, PATHS = "embedkit/path_offsets.u64", "embedkit/paths.bin"
LABEL_OFFSETS, LABELS = "embedkit/label_offsets.u64", "embedkit/labels.bin"
_MEMBERS = (MANIFEST, IDS, PATH_OFFSETS, PATHS, LABEL_OFFSETS, LABELS)

# The allow-list: first four bytes of the payload -> type. Nothing else reaches FAISS's reader, and
# what comes out of it is looked at part by part (`kinds.factory_of`).
_TYPES = {
    b"IxFI": "IndexFlatIP",
    b"IxF2": "IndexFlatL2",
    b"IxSQ": "IndexScalarQuantizer",
    b"IxPq": "IndexPQ",
    b"IPfs": "IndexPQFastScan",
    b"IHNs": "IndexHNSWSQ",
    b"IxRF": "IndexRefine",
}
_FLAT = (b"IxFI", b"IxF2")
_FLAT_TYPES = tuple(_TYPES[name] for name in _FLAT)
# What an IndexRefine may stand on; it follows the header.
_REFINED = (b"IPfs", b"IwPf", b"IwPQ")
# Every payload: name, D, N, two fillers, trained, metric.
_HEADER = struct.Struct("<4siqqq?i")
# Then, in a flat one: number of floats, and the floats.
_FLOATS = struct.Struct("<Q")
# What stands before each member of the ZIP: 26 bytes, the lengths of its name and of the rest.
_MEMBER = struct.Struct("<26sHH")
# Part of that rest: a filler, under the number that tools which align files use for theirs.
_FILLER, _FILLER_ID = struct.Struct("<HH"), 0xD935

_CODE, _ODD = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()
_CHUNK = 1 << 20  # bytes handed to and from FAISS at a time
# FAISS keeps its reading limits in process-wide variables.
_LIMITS = threading.Lock()


def is_faiss(path: Path) -> bool:
    """Whether a file begins as FAISS files of the kinds embedkit writes do."""
    with path.open("rb") as file:
        return file.read(4) in _TYPES


def manifest_digest(path: Path) -> str:
    """A hash that tells one catalog from another; empty where the file is missing or damaged.

    Cost: one pass over the file, which compares every checksum.
    """
    try:
        with path.open("rb") as file:
            header = read_header(file, path)
            tail = read_tail(file, path, header, mapped=True)
            if tail is None or _crc(file, header.length) != tail.payload_crc:
                return ""
    except (OSError, MismatchError):
        return ""
    return hashlib.sha256(json.dumps(tail.manifest, sort_keys=True).encode()).hexdigest()


class Header(NamedTuple):
    """What the payload's first bytes say."""

    type: str
    metric: str
    dim: int
    rows: int
    length: int  # of the whole payload, bytes


@dataclass(frozen=True)
class Tail:
    """The names, read once and whole, or mapped; looked up without copying."""

    manifest: dict[str, Any]
    payload_crc: int
    ids: npt.NDArray[np.int64]
    path_offsets: npt.NDArray[np.uint64]
    paths: bytes | memoryview
    label_offsets: npt.NDArray[np.uint64]
    labels: bytes | memoryview

    def names(self, positions: npt.NDArray[np.int64]) -> tuple[list[int], list[str], list[str]]:
        """Ids, labels and paths of several at once."""
        found = []
        for offsets, blob in ((self.label_offsets, self.labels), (self.path_offsets, self.paths)):
            starts, ends = offsets[positions].tolist(), offsets[positions + 1].tolist()
            found.append(
                # As os.fsdecode does it, in a third of the time.
                [str(blob[a:b], _CODE, _ODD) for a, b in zip(starts, ends, strict=True)]
            )
        return self.ids[positions].tolist(), *found

    def label(self, position: int) -> bytes:
        start, end = self.label_offsets[position : position + 2].tolist()
        return bytes(self.labels[start:end])


def read_header(file: BinaryIO, path: Path) -> Header:
    """What stands before the vectors, checked against the file's length and the allow-list.

    Raises:
        MismatchError: No FAISS file of the kinds embedkit writes, or cut short.
    """
    size = os.fstat(file.fileno()).st_size
    start = file.read(_HEADER.size + _FLOATS.size)
    name = start[:4]
    if name not in _TYPES:
        raise MismatchError(
            f"{path} is no embedkit index",
            facts="it does not begin as one of the FAISS files embedkit writes"
            if start
            else "the file is empty",
            hint="embedkit index FOLDER -o NAME.faiss makes one",
        )
    if len(start) < _HEADER.size + _FLOATS.size:
        raise damaged(path, f"it is cut short: {size} bytes")
    _, dim, count, _, _, trained, metric = _HEADER.unpack_from(start)
    metrics = {faiss.METRIC_L2: "l2", faiss.METRIC_INNER_PRODUCT: "cosine"}
    fits = dim >= 1 and count >= 0 and trained and metric in metrics
    if name in _FLAT:
        (floats,) = _FLOATS.unpack_from(start, _HEADER.size)
        l2 = metric == faiss.METRIC_L2
        if not fits or floats != dim * count or l2 != (name == b"IxF2"):
            raise damaged(path, "its first bytes contradict each other")
        length = _HEADER.size + _FLOATS.size + 4 * dim * count
        if length > size:
            raise damaged(
                path, f"it is cut short: {size:,} bytes of at least {length:,} for its vectors"
            )
    else:
        base = start[_HEADER.size : _HEADER.size + 4]
        if not fits or (name == b"IxRF" and base not in _REFINED):
            raise damaged(path, "its first bytes contradict each other")
        # Only FAISS knows how long these are: `read_payload` sees that it reads up to the tail.
        length = _tail_start(file, size)
        # A vector has at least one byte of codes for eight numbers, of a learned code one byte and
        # two words: no count that cannot be.
        least = count + 8 * dim if name == b"IxPq" else -(-dim * count // 8)
        if least > length:
            raise damaged(path, "it is too short for as many vectors as it says")
    return Header(_TYPES[name], metrics[metric], dim, count, length)


def stays_on_disk(file: BinaryIO) -> bool:
    """Whether the index in a file is of the kind that is always mapped: larger than memory."""
    file.seek(0)
    start = file.read(_HEADER.size + 4)
    return start[:4] == b"IxRF" and start[_HEADER.size :] == b"IwPQ"


def _tail_start(file: BinaryIO, size: int) -> int:
    """Where the ZIP begins; the file's end where there is none, or none that can be read."""
    try:
        with zipfile.ZipFile(file) as archive:
            return min((entry.header_offset for entry in archive.infolist()), default=size)
    except Exception:
        # zipfile meets damage with a dozen kinds of exception. Whatever stands behind the vectors
        # is then more than FAISS reads, and refused for that.
        return size


def read_tail(file: BinaryIO, path: Path, header: Header, *, mapped: bool = False) -> Tail | None:
    """The names behind the payload, each checksum compared; None where there are only vectors.

    Mapped, paths and labels stay in the file: to compare their checksums is a third of the cost.

    Raises:
        MismatchError: Damaged, of another version, or not of these vectors.
    """
    if os.fstat(file.fileno()).st_size == header.length:
        return None
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            if set(entries) != set(_MEMBERS) or len(archive.infolist()) != len(_MEMBERS):
                raise damaged(path, "the list of names in its tail is not the expected one")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
                raise damaged(path, "its tail is compressed")
            if min(entry.header_offset for entry in entries.values()) != header.length:
                raise damaged(path, "its tail does not begin where its vectors end")
            read = _mapped(file) if mapped else archive.read  # both compare the CRC-32
            content = {name: read(entry) for name, entry in entries.items()}
        manifest = json.loads(bytes(content[MANIFEST]))
        return _checked_tail(manifest, content, path, header)
    except (OSError, MismatchError):
        raise
    except Exception as error:
        # zipfile and json meet damage with a dozen kinds of exception; all of them mean the same
        # here.
        raise damaged(path, f"its tail cannot be read: {type(error).__name__}: {error}") from error


def _mapped(file: BinaryIO) -> Callable[[zipfile.ZipInfo], memoryview]:
    """Gives the bytes of a stored member where they stand."""
    view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def read(entry: zipfile.ZipInfo) -> memoryview:
        _, name, extra = _MEMBER.unpack_from(view, entry.header_offset)
        start = entry.header_offset + _MEMBER.size + name + extra
        content = view[start : start + entry.file_size]
        if len(content) < entry.file_size or zlib.crc32(content) != entry.CRC:
            raise zipfile.BadZipFile(f"bad checksum of {entry.filename}")
        return content

    return read


def _checked_tail(
    manifest: dict[str, Any], content: Mapping[str, bytes | memoryview], path: Path, header: Header
) -> Tail:
    if manifest["schema"] != SCHEMA:
        raise MismatchError(
            f"{path} was written by another embedkit",
            facts=f"it is {manifest['schema']!r}, this embedkit reads {SCHEMA!r}",
            hint="pip install --upgrade embedkit",
        )
    index = manifest["index"]
    said = (index["type"], index["metric"], index["dim"], index["count"], index["payload_bytes"])
    if said != tuple(header):
        raise damaged(path, f"its tail describes {said}, its vectors are {tuple(header)}")
    model = manifest["model"]
    texts = (manifest["root"], model["fingerprint"], model["file"] or "")
    if not all(isinstance(text, str) for text in texts) or not isinstance(model["contract"], dict):
        raise damaged(path, "its manifest is incomplete")
    tail = Tail(
        manifest=manifest,
        payload_crc=int(index["payload_crc32"]),
        ids=_numbers(content[IDS], "<i8"),
        path_offsets=_numbers(content[PATH_OFFSETS], "<u8"),
        paths=content[PATHS],
        label_offsets=_numbers(content[LABEL_OFFSETS], "<u8"),
        labels=content[LABELS],
    )
    if len(tail.ids) != header.rows or (tail.ids[1:] <= tail.ids[:-1]).any():
        raise damaged(path, "its ids do not fit its vectors")
    for offsets, blob in ((tail.path_offsets, tail.paths), (tail.label_offsets, tail.labels)):
        fits = len(offsets) == header.rows + 1 and offsets[0] == 0 and offsets[-1] == len(blob)
        if not fits or (offsets[1:] < offsets[:-1]).any():
            raise damaged(path, "its names do not fit its vectors")
    return tail


def _numbers(content: bytes | memoryview, kind: str) -> npt.NDArray[Any]:
    """An array of them, copied where they stand at an offset at which numpy is slow."""
    found = np.frombuffer(content, kind)
    return found if found.flags.aligned else found.copy()


def read_payload(
    file: BinaryIO, path: Path, header: Header, *, mapped: bool, verify: bool
) -> tuple[Any, int]:
    """The FAISS index and, where wanted, the CRC-32 of its bytes."""
    crc = 0
    # Without its names, only reading tells where the vectors end.
    if mapped and (header.type in _FLAT_TYPES or header.length < os.fstat(file.fileno()).st_size):
        if verify:
            crc = _crc(file, header.length)
        with _read_limits(header.length):
            index = map_index(file, path)
    else:
        file.seek(0)
        left = header.length

        def read(count: int) -> bytes:
            nonlocal crc, left
            data = file.read(min(count, left))
            left -= len(data)
            if verify:
                crc = zlib.crc32(data, crc)
            return data

        with _read_limits(header.length):
            reader = faiss.PyCallbackIOReader(read, _CHUNK)  # type: ignore[attr-defined]
            index = _read_index(reader, path)
        if left:
            raise damaged(path, "its tail is unreadable, or its vectors end too early")
    if (type(index).__name__, index.d, index.ntotal) != (header.type, header.dim, header.rows):
        raise damaged(path, "FAISS reads something else from it than its first bytes say")
    return index, crc


def map_index(file: BinaryIO, path: Path) -> Any:
    """The FAISS index a file begins with, its vectors and lists left where they are.

    Raises:
        MismatchError: FAISS refuses it.
    """
    # FAISS maps by name. This name is the file that is open, even when another has taken its place
    # since; and it is plain ASCII, whatever the file is called.
    opened = f"/dev/fd/{file.fileno()}"
    name = opened if os.path.lexists(opened) else str(path)
    return _read_index(name, path, faiss.IO_FLAG_MMAP_IFC)


def _read_index(source: Any, path: Path, flags: int = 0) -> Any:
    try:
        # Tables that save some time, and take as much as the lists of an index on the disk.
        return faiss.read_index(source, flags | faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)
    except RuntimeError as error:
        raise damaged(path, f"FAISS refuses it: {str(error).rsplit(': ', 1)[-1]}") from error
    except MemoryError as error:
        raise EmbedKitError(
            f"there is not enough memory to read {path}", hint="map it instead: --mmap"
        ) from error


@contextmanager
def _read_limits(length: int) -> Iterator[None]:
    """No list in the file may be longer than the file, and no loop may be endless."""
    with _LIMITS:
        before = faiss.get_deserialization_vector_byte_limit()
        loops = faiss.get_deserialization_loop_limit()
        faiss.set_deserialization_vector_byte_limit(4 * length + 64)
        faiss.set_deserialization_loop_limit(1 << 20)
        try:
            yield
        finally:
            faiss.set_deserialization_vector_byte_limit(before)
            faiss.set_deserialization_loop_limit(loops)


def _crc(file: BinaryIO, length: int) -> int:
    file.seek(0)
    crc = 0
    while length > 0 and (data := file.read(min(_CHUNK, length))):
        crc = zlib.crc32(data, crc)
        length -= len(data)
    return crc


def damaged(path: Path, facts: str) -> MismatchError:
    """The error for a catalog that is not what was written."""
    return MismatchError(
        f"{path} is damaged",
        facts=facts,
        hint=f"write it again from its store: embedkit index FOLDER -o {path.name}\n"
        "(with --rebuild where the store is gone)",
    )


def write_payload(file: BinaryIO, index: Any) -> tuple[int, int]:
    """Length and CRC-32 of what FAISS wrote.

    FAISS hands its bytes over instead of writing the file itself: its own writer reports no error
    when the disk turns out to be full only at the close.
    """
    length = crc = 0

    def write(data: bytes) -> None:
        nonlocal length, crc
        file.write(data)
        length += len(data)
        crc = zlib.crc32(data, crc)

    writer = faiss.PyCallbackIOWriter(write, _CHUNK)  # type: ignore[attr-defined]
    faiss.write_index(index, writer)
    return length, crc


def write_tail(file: BinaryIO, manifest: bytes, columns: Mapping[str, IO[bytes]]) -> None:
    """Append the names, by member, behind the vectors that were just written."""
    # Mode "w" on a file that stands behind the payload appends there; "a" would first search the
    # vectors for a ZIP.
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_entry(file, MANIFEST, len(manifest)), manifest)
        for name, column in columns.items():
            entry = _entry(file, name, column.seek(0, os.SEEK_END))
            column.seek(0)
            with archive.open(entry, "w") as member:
                shutil.copyfileobj(column, member, _CHUNK)


def _entry(file: BinaryIO, name: str, size: int) -> zipfile.ZipInfo:
    """A member that begins at a multiple of 8, so that its numbers can be used where they are."""
    # A fixed date: the same rows give the same bytes.
    entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    entry.file_size = size
    start = file.tell() + _MEMBER.size + len(name) + _FILLER.size
    entry.extra = _FILLER.pack(_FILLER_ID, -start % 8) + bytes(-start % 8)
    return entry


def publish(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Let `write` fill a new file, prove it on the disk, and put it in the place of the old one.

    Raises:
        EmbedKitError: The system refused; the old file stands, nothing is left over.
    """
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    replaced = False
    try:
        with temporary.open("w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            length = file.tell()
        _check_written(temporary, length)
        temporary.replace(path)
        replaced = True
        sync_folder(path.parent)
    except OSError as error:
        raise _not_written(path, error, replaced=replaced) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses meanwhile is told as `publish` tells it."""
    try:
        yield
    except OSError as error:
        raise _not_written(path, error) from error


def _not_written(path: Path, error: OSError, *, replaced: bool = False) -> EmbedKitError:
    """The error for a catalog that the system does not let be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return EmbedKitError(
        f"the index {path} is written but may not outlast a power cut"
        if replaced
        else f"the index {path} cannot be written",
        facts=f"{error.strerror or error}"
        + ("" if replaced else "; what was there before still stands"),
        hint="make room on the disk and run it again: nothing has to be embedded twice"
        if full
        else "choose a folder that can be written to: -o FILE",
    )


def _check_written(path: Path, length: int) -> None:
    """Read back what is about to be published: length, header and every byte of the tail."""
    size = path.stat().st_size
    if size != length:
        raise OSError(errno.EIO, f"wrote {length:,} bytes, the disk holds {size:,}")
    try:
        with path.open("rb") as file:
            read_tail(file, path, read_header(file, path), mapped=True)
    except MismatchError as error:
        raise OSError(errno.EIO, f"read back, it differs: {error.facts}") from error
