"""Fetch a benchmark set from its official address, check it, unpack it, write its manifest.

What cannot be fetched (no network, or an address that asks for a form) ends in the address and the
place to put the file by hand; run again, and the work goes on from there.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import stat
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from embedkit.atomic import published
from embedkit.data.protocols import Protocol, read_protocol, write_manifest
from embedkit.errors import DataError, EmbedKitError, MismatchError, MissingError, UnknownNameError

__all__ = ["Download", "downloads", "prepare"]

_CHUNK = 1 << 20
_TIMEOUT = 60.0

Progress = Callable[[str, int, int | None], None]
"""``progress(file, bytes so far, bytes of all of it or None)``"""


@dataclass(frozen=True)
class Download:
    """One file of a set.

    Attributes:
        file: Its name below the folder.
        url: Where it is given out; None where that takes a browser.
        page: What to read about it.
        members: Pattern of what is unpacked of it; None: it is no archive.
        md5: As its publishers or torchvision state it; None where nobody does.
        size: In bytes, where known.
    """

    file: str
    url: str | None
    page: str
    members: str | None = None
    md5: str | None = None
    size: int | None = None


_INAT = "https://ml-inat-competition-datasets.s3.amazonaws.com/2018"
_INAT_PAGE = "https://github.com/visipedia/inat_comp/tree/master/2018"
_INSHOP_PAGE = "https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html"
_CARS_PAGE = "https://ai.stanford.edu/~jkrause/cars/car_dataset.html"

_DOWNLOADS: dict[str, tuple[Download, ...]] = {
    "cub": (
        Download(
            "CUB_200_2011.tgz",
            "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
            "https://www.vision.caltech.edu/datasets/cub_200_2011/",
            r"CUB_200_2011/(images/[^/]+/[^/]+\.jpg|[a-z_]+\.txt)",
            md5="97eceeb196236b17998738112f37df78",
        ),
    ),
    "cars": (
        Download(
            "cars_annos.mat",
            "http://imagenet.stanford.edu/internal/car196/cars_annos.mat",
            _CARS_PAGE,
        ),
        Download(
            "car_ims.tgz",
            "http://imagenet.stanford.edu/internal/car196/car_ims.tgz",
            _CARS_PAGE,
            r"car_ims/\d+\.jpg",
        ),
    ),
    "sop": (
        Download(
            "Stanford_Online_Products.zip",
            "http://ftp.cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip",
            "https://cvgl.stanford.edu/projects/lifted_struct/",
            r"Stanford_Online_Products/([a-z_]+_final/[^/]+\.JPG|Ebay_[a-z]+\.txt)",
            md5="7f73d41a2f44250d4779881525aea32e",
        ),
    ),
    "inshop": (
        Download("list_eval_partition.txt", None, _INSHOP_PAGE),
        Download("img.zip", None, _INSHOP_PAGE, r"img/[^/]+/[^/]+/[^/]+/[^/]+\.jpg"),
    ),
    "inat": (
        Download(
            "Inat_dataset_splits.zip",
            "https://drive.usercontent.google.com/download"
            "?id=1sXfkBTFDrRU3__-NUs1qBP3sf_0uMB98&export=download&confirm=t",
            "https://github.com/Andrew-Brown1/Smooth_AP",
            r"Inat_dataset_splits/Inaturalist_[a-z_0-9]+\.txt",
        ),
        Download(
            "train2018.json.tar.gz",
            f"{_INAT}/train2018.json.tar.gz",
            _INAT_PAGE,
            r"train2018\.json",
            md5="bfa29d89d629cbf04d826a720c0a68b0",
        ),
        Download(
            "val2018.json.tar.gz",
            f"{_INAT}/val2018.json.tar.gz",
            _INAT_PAGE,
            r"val2018\.json",
        ),
        Download(
            "train_val2018.tar.gz",
            f"{_INAT}/train_val2018.tar.gz",
            _INAT_PAGE,
            r"train_val2018/[^/]+/[^/]+/[^/]+\.jpg",
            md5="b1c6952ce38f31868cc50ea72d066cc3",
        ),
    ),
}


def downloads(name: str) -> tuple[Download, ...]:
    """The files of a set.

    Raises:
        UnknownNameError: No such set.
    """
    if name not in _DOWNLOADS:
        raise UnknownNameError("data set", name, _DOWNLOADS)
    return _DOWNLOADS[name]


def prepare(
    name: str, folder: Path, *, strict: bool = False, progress: Progress | None = None
) -> tuple[Protocol, Path]:
    """Fetch what is missing, unpack it, and write ``folder/manifest.csv``.

    What is there already is used: a file put there by hand, a download that broke off, an archive
    that was unpacked. Archives are kept.

    Args:
        name: ``cub``, ``cars``, ``sop``, ``inshop`` or ``inat``.
        folder: Made when it is missing.
        strict: Wrong counts are an error.
        progress: Hears of every megabyte.

    Raises:
        UnknownNameError: No such set.
        MissingError: A file cannot be fetched; says from where and to where to bring it.
        MismatchError: A file is not the one its publishers describe.
        DataError: What was unpacked cannot be read, or, if `strict`, is not complete.
    """
    tell = progress or (lambda file, done, total: None)
    files = downloads(name)
    for file in files:
        done = folder / f".{file.file}.unpacked"
        if done.exists() or (file.members is None and (folder / file.file).exists()):
            continue
        archive = folder / file.file
        if not archive.exists():
            _fetch(file, archive, tell)
        _check(file, archive)
        if file.members is not None:
            _unpack(archive, folder, re.compile(file.members), tell)
            with published(done):
                pass
    protocol = read_protocol(name, folder, strict=strict)
    manifest = folder / "manifest.csv"
    write_manifest(protocol.photos, manifest)
    return protocol, manifest


# --- fetching ------------------------------------------------------------------------------------


def _fetch(file: Download, target: Path, tell: Progress) -> None:
    """Download to ``target.part``, going on where it broke off, then give it its name."""
    if file.url is None:
        raise MissingError(
            f"{file.file} is given out by hand only",
            facts=f"its page: {file.page}",
            hint=f"put it at {target}, then run this again",
        )
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _download(file.url, part, file.file, tell)
        part.replace(target)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise MissingError(
            f"{file.file} cannot be downloaded",
            facts=f"from {file.url}: {getattr(error, 'reason', error)}\nits page: {file.page}",
            hint=f"run this again to go on, or fetch it by hand and put it at {target}",
        ) from error
    except OSError as error:
        raise EmbedKitError(f"{target} cannot be written", facts=str(error)) from error


def _download(url: str, part: Path, name: str, tell: Progress) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "embedkit"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        answer = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is left to send: all of it is there, or too much
            part.unlink()
            _download(url, part, name, tell)
            return
        raise
    with closing(answer):
        goes_on = answer.status == 206
        have = have if goes_on else 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        with part.open("ab" if goes_on else "wb") as output:
            while chunk := answer.read(_CHUNK):
                output.write(chunk)
                have += len(chunk)
                tell(name, have, total)
    if total is not None and have != total:
        raise urllib.error.URLError(f"it ended after {have:,} of {total:,} bytes")


def _check(file: Download, path: Path) -> None:
    wrong = None
    if file.size is not None and path.stat().st_size != file.size:
        wrong = f"{path.stat().st_size:,} bytes, its publishers say {file.size:,}"
    elif file.md5 is not None:
        with path.open("rb") as opened:
            found = hashlib.file_digest(opened, lambda: hashlib.md5(usedforsecurity=False))
        if found.hexdigest() != file.md5:
            wrong = f"md5 {found.hexdigest()}, it should be {file.md5}"
    if wrong is not None:
        raise MismatchError(
            f"{path} is not the file it should be",
            facts=wrong,
            hint=f"delete it and run this again, or fetch it by hand: {file.page}",
        )


# --- unpacking -----------------------------------------------------------------------------------


def _unpack(archive: Path, folder: Path, wanted: re.Pattern[str], tell: Progress) -> None:
    """Write the regular files whose whole name matches, and nothing else, below `folder`."""
    members = _zip_members if archive.suffix == ".zip" else _tar_members
    count = 0
    try:
        for name, size, source in members(archive):
            if _is_wanted(name, wanted):
                count += 1
                tell(f"unpacking {archive.name}", count, None)
                _write(folder / name, size, source)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise DataError(
            f"{archive} cannot be unpacked",
            facts=f"{type(error).__name__}: {error}",
            hint="delete it and run this again",
        ) from error
    if not count:
        raise MismatchError(
            f"{archive} holds none of the files it should",
            facts=f"looked for {wanted.pattern}",
            hint="delete it and run this again",
        )


def _is_wanted(name: str, wanted: re.Pattern[str]) -> bool:
    parts = PurePosixPath(name).parts
    # macOS leaves files called ._x.jpg beside x.jpg; they are no pictures.
    plain = not any(part in ("..", "/") or part.startswith("._") for part in parts)
    return plain and "\\" not in name and wanted.fullmatch(name) is not None


def _tar_members(archive: Path) -> Iterator[tuple[str, int, Callable[[], IO[bytes]]]]:
    with tarfile.open(archive, "r|*") as tar:
        for member in tar:
            if member.isreg():

                def source(member: tarfile.TarInfo = member) -> IO[bytes]:
                    opened = tar.extractfile(member)
                    assert opened is not None  # it is a regular file
                    return opened

                yield member.name.removeprefix("./"), member.size, source


def _zip_members(archive: Path) -> Iterator[tuple[str, int, Callable[[], IO[bytes]]]]:
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            mode = member.external_attr >> 16
            if not member.is_dir() and not stat.S_ISLNK(mode):
                yield (
                    member.filename,
                    member.file_size,
                    lambda member=member: opened.open(member),  # type: ignore[misc]
                )


def _write(target: Path, size: int, source: Callable[[], IO[bytes]]) -> None:
    if target.is_file() and not target.is_symlink() and target.stat().st_size == size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    with source() as read, temporary.open("wb") as write:
        shutil.copyfileobj(read, write, _CHUNK)
    temporary.replace(target)
