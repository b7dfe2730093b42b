"""The benchmark sets of the literature, read from their official archives as they unpack.

Splits and counts are those of retrieval papers: whole classes are held out, and nobody is measured
on a class that was trained on. The splits that the archives bring for classification are others
(CUB 5,994 / 5,794, Cars 8,144 / 8,041) and are not used here.
"""

from __future__ import annotations

import csv
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedkit.atomic import published
from embedkit.data.readers import PhotoSet, read_photos
from embedkit.errors import DataError, MissingExtraError, UnknownNameError
from embedkit.imaging import find_images

__all__ = ["Protocol", "protocol_names", "read_protocol", "write_manifest"]

_SHOWN = 3

# Images and classes of each part: shared figures of the papers and their code.
_COUNTS = {
    "cub": {"train": (5_864, 100), "test": (5_924, 100)},
    "cars": {"train": (8_054, 98), "test": (8_131, 98)},
    "sop": {"train": (59_551, 11_318), "test": (60_502, 11_316)},
    "inshop": {"train": (25_882, 3_997), "query": (14_218, 3_985), "gallery": (12_612, 3_985)},
    "inat": {"train": (325_846, 5_690), "test": (136_093, 2_452)},
}
_KS = {
    "cub": (1, 2, 4, 8, 16, 32),
    "cars": (1, 2, 4, 8),
    "sop": (1, 10, 100, 1000),
    "inshop": (1, 10, 20, 30, 40, 50),
    "inat": (1, 4, 16, 32),
}


@dataclass(frozen=True)
class Protocol:
    """A data set and how it is evaluated.

    Attributes:
        name: As asked for.
        photos: With split and, where queries and gallery are apart, their flags.
        ks: The k of recall@k that papers report.
        differences: Where the counts are not the official ones, one sentence each.
    """

    name: str
    photos: PhotoSet
    ks: tuple[int, ...]
    differences: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Row:
    path: str
    label: str
    part: str  # train, test, query or gallery


def protocol_names() -> list[str]:
    """All names, in reading order."""
    return [*_READERS, "folder", "csv", "query-gallery"]


def read_protocol(name: str, folder: Path, *, strict: bool = False) -> Protocol:
    """The photos of an unpacked archive, split as the papers split them.

    ``cub``, ``cars``, ``sop``, ``inshop``, ``inat``: `folder` is the archive's own folder or the
    one above it. ``folder`` and ``csv``: as `read_photos`. ``query-gallery``: two folders of class
    folders, ``query`` and ``gallery``.

    Args:
        name: One of `protocol_names`.
        folder: Where it lies; for ``csv`` the file.
        strict: Wrong counts are an error.

    Raises:
        UnknownNameError: No such protocol.
        DataError: A list is missing or damaged, photos it names are not there, or, if `strict`, the
            counts are wrong.
        MissingExtraError: ``cars`` needs scipy.
    """
    if name in ("folder", "csv"):
        return Protocol(name, read_photos(folder), (1, 2, 4, 8))
    if name == "query-gallery":
        return Protocol(name, _read_query_gallery(folder), (1, 2, 4, 8))
    if name not in _READERS:
        raise UnknownNameError("protocol", name, protocol_names())
    marks, below, read = _READERS[name]
    places = (folder, folder / below)
    root = next((one for one in places if any((one / mark).exists() for mark in marks)), None)
    if root is None:
        raise DataError(
            f"{str(folder)!r} is no unpacked archive of {name}",
            facts=f"there is no {' or '.join(marks)} in it, and none in {below}/",
            hint=f"embedkit data prepare {name} {folder}",
        )
    try:
        rows = read(root)
    except (OSError, ValueError, KeyError, IndexError, TypeError, zlib.error) as error:
        raise DataError(
            f"the lists of {name} in {str(root)!r} cannot be read",
            facts=f"{type(error).__name__}: {error}",
            hint="unpack the archive again",
        ) from error
    if not rows:
        raise DataError(f"the lists of {name} in {str(root)!r} name no photos")
    _refuse_absent(root, rows)
    differences = tuple(_differences(name, rows))
    if strict and differences:
        raise DataError(
            f"{str(root)!r} is not the whole of {name}",
            facts="\n".join(differences),
            hint="unpack the archive again, or leave --strict-counts out",
        )
    return Protocol(name, _photos(root, rows), _KS[name], differences)


def write_manifest(photos: PhotoSet, path: Path) -> None:
    """The photos as a CSV which ``train`` and ``eval`` read; paths start at its folder if they can.

    Raises:
        EmbedKitError: It cannot be written.
    """
    columns: dict[str, Iterable[Any]] = {
        "path": [_seen_from(path.parent.absolute(), one) for one in photos.files()],
        "label": photos.labels,
        "split": photos.split,
    }
    for name, flags in (("is_query", photos.is_query), ("is_gallery", photos.is_gallery)):
        if flags is not None:
            columns[name] = [int(flag) for flag in flags]
    with (
        published(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def _seen_from(folder: Path, file: Path) -> str:
    return (file.relative_to(folder) if file.is_relative_to(folder) else file).as_posix()


# --- the archives --------------------------------------------------------------------------------


def _read_cub(root: Path) -> list[_Row]:
    """``images.txt`` and ``image_class_labels.txt``: the first 100 classes train."""
    paths = {line[0]: line[1] for line in _fields(root / "images.txt", 2)}
    rows = []
    for number, class_id in _fields(root / "image_class_labels.txt", 2):
        path = paths.pop(number)
        part = "train" if int(class_id) <= 100 else "test"
        rows.append(_Row(f"images/{path}", path.split("/")[0], part))
    if paths:
        raise ValueError(f"{len(paths)} of the images have no class")
    return rows


def _read_cars(root: Path) -> list[_Row]:
    """``cars_annos.mat``, or the two lists of the devkit: the first 98 classes train."""
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as error:
        raise MissingExtraError("The protocol cars", package="scipy", extra="train") from error

    def annotations(file: Path, field: str, folder: str) -> Iterator[_Row]:
        try:
            content = loadmat(file, squeeze_me=True)["annotations"]
        except MatReadError as error:
            raise ValueError(f"{file.name}: {error}") from error
        for one in content.reshape(-1):
            class_id = int(one["class"])
            part = "train" if class_id <= 98 else "test"
            yield _Row(f"{folder}{one[field]}", f"{class_id:03}", part)

    if (root / "cars_annos.mat").exists():
        return list(annotations(root / "cars_annos.mat", "relative_im_path", ""))
    return [
        *annotations(root / "devkit/cars_train_annos.mat", "fname", "cars_train/"),
        *annotations(root / "cars_test_annos_withlabels.mat", "fname", "cars_test/"),
    ]


def _read_sop(root: Path) -> list[_Row]:
    """``Ebay_train.txt`` and ``Ebay_test.txt``: image_id class_id super_class_id path."""
    rows = []
    for part in ("train", "test"):
        lines = _fields(root / f"Ebay_{part}.txt", 4, skip=1)
        rows += [_Row(path, class_id, part) for _, class_id, _, path in lines]
    return rows


def _read_inshop(root: Path) -> list[_Row]:
    """``list_eval_partition.txt``: a count, a header, then image_name item_id status."""
    file = root / "list_eval_partition.txt"
    if not file.exists():
        file = root / "Eval/list_eval_partition.txt"
    rows = []
    for name, item, status in _fields(file, 3, skip=2):
        if status not in ("train", "query", "gallery"):
            raise ValueError(f"the status {status!r} of {name} is none of train, query, gallery")
        rows.append(_Row(_inshop_path(root, name), item, status))
    return rows


def _inshop_path(root: Path, name: str) -> str:
    return name if (root / "img").is_dir() else f"Img/{name}"


def _read_inat(root: Path) -> list[_Row]:
    """The JSON of 2018 for the classes, the lists of Smooth-AP (arXiv:2007.12163) for the split."""
    classes: dict[str, str] = {}
    for year in ("train2018.json", "val2018.json"):
        document = json.loads((root / year).read_bytes())
        names = {image["id"]: image["file_name"] for image in document["images"]}
        for one in document["annotations"]:
            classes[names[one["image_id"]]] = str(one["category_id"])
    lists = root / "Inat_dataset_splits"
    rows = []
    for part in ("train", "test"):
        file = lists / f"Inaturalist_{part}_set1.txt"
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.strip():
                rows.append(_Row(line.strip(), classes[line.strip()], part))
    return rows


# By name: a list that must be there, the folder that the archive unpacks to, the reader.
_READERS: dict[str, tuple[tuple[str, ...], str, Callable[[Path], list[_Row]]]] = {
    "cub": (("images.txt",), "CUB_200_2011", _read_cub),
    "cars": (("cars_annos.mat", "devkit/cars_train_annos.mat"), "cars196", _read_cars),
    "sop": (("Ebay_test.txt",), "Stanford_Online_Products", _read_sop),
    "inshop": (("list_eval_partition.txt", "Eval/list_eval_partition.txt"), "inshop", _read_inshop),
    "inat": (("Inat_dataset_splits",), "inat2018", _read_inat),
}


def _fields(file: Path, count: int, *, skip: int = 0) -> Iterator[Sequence[str]]:
    """The words of each line that is not empty; there must be `count`."""
    lines = file.read_text(encoding="utf-8-sig").splitlines()
    for number, line in enumerate(lines[skip:], start=skip + 1):
        words = line.split(maxsplit=count - 1)
        if words and len(words) != count:
            raise ValueError(f"line {number} of {file.name} has {len(words)} words, not {count}")
        if words:
            yield [word.strip() for word in words]


def _read_query_gallery(folder: Path) -> PhotoSet:
    parts = {}
    for name in ("query", "gallery"):
        if not (folder / name).is_dir():
            raise DataError(
                f"{str(folder)!r} has no folder {name}",
                hint="put class folders into query/ and into gallery/:\n"
                "  photos/query/blue-mug/1.jpg\n  photos/gallery/blue-mug/2.jpg",
            )
        below = (path.relative_to(folder) for path in find_images(folder / name))
        parts[name] = [path for path in below if not any(p.startswith(".") for p in path.parts)]
        loose = [path for path in parts[name] if len(path.parts) < 3]
        if loose or not parts[name]:
            raise DataError(
                f"the photos in {str(folder / name)!r} must lie in class folders",
                facts=f"{len(loose):,} of {len(parts[name]):,} do not",
            )
    paths = (*parts["query"], *parts["gallery"])
    asks = (True,) * len(parts["query"]) + (False,) * len(parts["gallery"])
    return PhotoSet(
        root=folder.absolute(),
        paths=paths,
        labels=tuple(path.parts[1] for path in paths),
        split=("test",) * len(paths),
        is_query=asks,
        is_gallery=tuple(not ask for ask in asks),
    )


# --- what was read -------------------------------------------------------------------------------


def _photos(root: Path, rows: list[_Row]) -> PhotoSet:
    apart = any(row.part in ("query", "gallery") for row in rows)
    return PhotoSet(
        root=root.absolute(),
        paths=tuple(Path(row.path) for row in rows),
        labels=tuple(row.label for row in rows),
        split=tuple("train" if row.part == "train" else "test" for row in rows),
        is_query=tuple(row.part == "query" for row in rows) if apart else None,
        is_gallery=tuple(row.part == "gallery" for row in rows) if apart else None,
    )


def _refuse_absent(root: Path, rows: list[_Row]) -> None:
    outside = [row.path for row in rows if re.search(r"^[/\\]|(^|[/\\])\.\.([/\\]|$)", row.path)]
    if outside:
        raise DataError(
            f"the lists in {str(root)!r} name files outside of it",
            facts=", ".join(outside[:_SHOWN]),
        )
    absent = [row.path for row in rows if not (root / row.path).is_file()]
    if absent:
        more = f" and {len(absent) - _SHOWN:,} more" if len(absent) > _SHOWN else ""
        raise DataError(
            f"{len(absent):,} of the {len(rows):,} photos listed in {str(root)!r} are not there",
            facts=", ".join(absent[:_SHOWN]) + more,
            hint="unpack the archive again",
        )


def _differences(name: str, rows: list[_Row]) -> Iterator[str]:
    for part, (images, classes) in _COUNTS[name].items():
        labels = [row.label for row in rows if row.part == part]
        if (len(labels), len(set(labels))) != (images, classes):
            yield (
                f"{part}: {len(labels):,} images of {len(set(labels)):,} classes, "
                f"the papers have {images:,} of {classes:,}"
            )
