"""Photos from a folder per class, from train/ val/ test/ folders, or from a CSV.

What is known of them: the class, as a rule; or numbers; or who of three is the odd one.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from embedkit.errors import DataError
from embedkit.imaging import find_images

__all__ = ["PhotoSet", "Triplet", "read_photos", "resolve_source"]

_SPLITS = {
    "": "",
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
_FLAGS = {
    **dict.fromkeys(("1", "true", "yes"), True),
    **dict.fromkeys(("", "0", "false", "no"), False),
}
_OPTIONAL_COLUMNS = ("split", "category", "group", "is_query", "is_gallery")
_TARGET = re.compile(r"target(_\d+)?")
_TRIPLET = ("image_a", "image_b", "image_c")
_KNOWN_COLUMNS = ("path", "label", *_OPTIONAL_COLUMNS, *_TRIPLET, "odd", "margin")
_ODD = {"a": 0, "b": 1, "c": 2, **{name: place for place, name in enumerate(_TRIPLET)}}
_SHOWN = 5

_TREE = """\
put the photos into one folder per class:
  photos/blue-mug/1.jpg
  photos/blue-mug/2.jpg
  photos/desk-lamp/1.jpg
or the same inside photos/train/, photos/val/ and photos/test/,
or name a CSV file with the columns path,label"""

_Value = TypeVar("_Value")


class Triplet(NamedTuple):
    """Three places in a `PhotoSet`: `a` and `b` were called alike, and `odd` differs from both.

    `margin` is this triplet's own; None is the loss's.
    """

    a: int
    b: int
    odd: int
    margin: float | None = None


@dataclass(frozen=True)
class PhotoSet:
    """N photos; all columns have N entries in one order.

    Attributes:
        root: The folder that was read, or the folder of the CSV; absolute.
        paths: Of the files, relative to `root`; absolute where a CSV says so.
        labels: Names of classes; all empty where the data has none.
        split: ``train``, ``val``, ``test``, or empty where the data does not say.
        category: A coarser name than the label, or None.
        group: What was taken together (a shop visit, an owner), or None.
        is_query: For the evaluation, may ask; None is all.
        is_gallery: For the evaluation, may be found; None is all.
        targets: A row of finite numbers each, all as long; near numbers mean alike. Or None.
        triplets: Any number of judgements about three of the photos, or None; no column.
    """

    root: Path
    paths: tuple[Path, ...]
    labels: tuple[str, ...]
    split: tuple[str, ...]
    category: tuple[str, ...] | None = None
    group: tuple[str, ...] | None = None
    is_query: tuple[bool, ...] | None = None
    is_gallery: tuple[bool, ...] | None = None
    targets: tuple[tuple[float, ...], ...] | None = None
    triplets: tuple[Triplet, ...] | None = None

    def __post_init__(self) -> None:
        for name, column in self._columns().items():
            if column is not None and len(column) != len(self.paths):
                raise ValueError(f"{len(self.paths)} paths and {len(column)} of {name}")
        unknown = set(self.split) - set(_SPLITS.values())
        if unknown:
            raise ValueError(f"split must be train, val, test or empty, got {sorted(unknown)}")

    def __len__(self) -> int:
        return len(self.paths)

    def files(self) -> list[Path]:
        """`paths` as they can be opened from anywhere."""
        return [self.root / path for path in self.paths]

    @property
    def labelled(self) -> bool:
        """Whether there are classes at all."""
        return any(self.labels)

    def subset(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> PhotoSet:
        """These photos, in this order, and the triplets all of whose photos are among them."""
        rows = [int(index) for index in indices]
        return PhotoSet(
            root=self.root,
            paths=_pick(self.paths, rows),
            labels=_pick(self.labels, rows),
            split=_pick(self.split, rows),
            category=None if self.category is None else _pick(self.category, rows),
            group=None if self.group is None else _pick(self.group, rows),
            is_query=None if self.is_query is None else _pick(self.is_query, rows),
            is_gallery=None if self.is_gallery is None else _pick(self.is_gallery, rows),
            targets=None if self.targets is None else _pick(self.targets, rows),
            triplets=None if self.triplets is None else _pick_triplets(self.triplets, rows),
        )

    def classes(self) -> tuple[str, ...]:
        """The distinct labels, sorted."""
        return tuple(sorted(set(self.labels)))

    def manifest_hash(self) -> str:
        """sha256 (hex) of columns and triplets, not of `root` and not of what is in the files."""
        digest = hashlib.sha256()
        columns = self._columns()
        digest.update(json.dumps([name for name, column in columns.items() if column]).encode())
        for row in zip(*(column for column in columns.values() if column), strict=True):
            cells = [cell.as_posix() if isinstance(cell, Path) else cell for cell in row]
            digest.update(json.dumps(cells).encode() + b"\n")
        if self.triplets is not None:
            digest.update(json.dumps(self.triplets).encode())
        return digest.hexdigest()

    def _columns(self) -> dict[str, tuple[Any, ...] | None]:
        return {
            "paths": self.paths,
            "labels": self.labels,
            "split": self.split,
            "category": self.category,
            "group": self.group,
            "is_query": self.is_query,
            "is_gallery": self.is_gallery,
            "targets": self.targets,
        }


def read_photos(source: Path, *, labels: bool = True) -> PhotoSet:
    """The photos that `source` lists, with what is known of them.

    - A folder of class folders: the label is the name of the first folder below `source`, and
      everything in it at any depth belongs to it.
    - A folder that holds nothing but ``train``, ``val`` (``valid``, ``validation``) and ``test``,
      in any case: the same inside each of them. One alone will do.
    - A CSV in UTF-8 with a header: ``path,label`` and any of
      ``split,category,group,is_query,is_gallery``; other columns are passed over. Relative paths
      start at the CSV's folder. Flags are 1, true, yes or 0, false, no, or empty for no.
    - A CSV with a column ``target``, or ``target_0``, ``target_1``, ... for several numbers, all
      filled: photos with continuous labels. Their distance is Euclidean in the units of the file.
      ``label`` may be left out.
    - A CSV of triplets: ``image_a,image_b,image_c``, the paths of three different photos, of which
      two were called alike, and any of ``odd,margin,split``. ``odd`` is a, b or c, the one that
      differs (c when left out); ``margin`` the triplet's own. The photos come in order of their
      first mention, without labels, each in the split of its triplets.

    Folders come in order of names, those that begin with a dot passed over; a CSV comes in its own
    order. Classes of one photo are fine here.

    Args:
        labels: Without, a folder of photos and a CSV of paths alone will do.

    Raises:
        DataError: There is nothing to read, a photo has no label, or the CSV is damaged, names
            a file twice, or names files that are not there.
    """
    if source.is_dir():
        return _read_folder(source, labels)
    if not source.exists():
        raise DataError(f"there is no folder or CSV {str(source)!r}", hint=_TREE)
    if source.suffix.lower() != ".csv":
        raise DataError(f"{str(source)!r} is neither a folder nor a CSV", hint=_TREE)
    return _read_csv(source, labels)


def resolve_source(source: Path | None) -> Path:
    """`source`, or where photos are usually kept: ./data/train, ./data, then the working folder.

    Where ./data has a ``val`` or ``test`` beside ``train``, it is ./data, so that they are used.
    """
    if source is not None:
        return source
    data, train = Path("data"), Path("data/train")
    has_parts = any((data / name).is_dir() for name in ("val", "valid", "validation", "test"))
    if _has_images(train) and not has_parts:
        return train
    return data if _has_images(data) else Path()


def _has_images(folder: Path) -> bool:
    return folder.is_dir() and next(find_images(folder), None) is not None


def _pick(column: Sequence[_Value], rows: list[int]) -> tuple[_Value, ...]:
    return tuple(column[row] for row in rows)


def _pick_triplets(triplets: Iterable[Triplet], rows: list[int]) -> tuple[Triplet, ...]:
    place = {row: number for number, row in enumerate(rows)}
    return tuple(
        Triplet(place[one.a], place[one.b], place[one.odd], one.margin)
        for one in triplets
        if one.a in place and one.b in place and one.odd in place
    )


# --- folders -------------------------------------------------------------------------------------


def _read_folder(source: Path, labels: bool) -> PhotoSet:
    root = source.absolute()
    below = (path.relative_to(root) for path in find_images(root))
    paths = [path for path in below if not any(part.startswith(".") for part in path.parts)]
    if not paths:
        raise DataError(f"no photos in {str(source)!r}", hint=_TREE)
    loose = [path for path in paths if len(path.parts) == 1]
    if len(loose) == len(paths) and not labels:
        return PhotoSet(root, tuple(paths), ("",) * len(paths), ("",) * len(paths))
    if len(loose) == len(paths):
        raise DataError(
            f"the photos in {str(source)!r} have no labels",
            facts=f"{len(paths):,} photos, and no folders that name their classes",
            hint=_TREE,
        )
    _refuse_loose(loose, source)
    tops = {path.parts[0] for path in paths}
    direct = {path.parts[0] for path in paths if len(path.parts) == 2}
    parts = {top for top in tops if top.casefold() in _SPLITS}
    if parts == tops:
        _refuse_loose([path for path in paths if len(path.parts) == 2], source)
        split = tuple(_SPLITS[path.parts[0].casefold()] for path in paths)
        return PhotoSet(root, tuple(paths), tuple(path.parts[1] for path in paths), split)
    if parts - direct:
        raise DataError(
            f"{str(source)!r} may be class folders or train, val and test folders",
            facts=f"{_some(sorted(parts - direct))} beside {_some(sorted(tops - parts))}",
            hint=f"move the others out, or name one: {source / min(parts - direct)}",
        )
    if len(tops) == 1 and not direct:
        raise DataError(
            f"there is only one folder in {str(source)!r}",
            facts=f"so all {len(paths):,} photos would be of one class, {min(tops)!r}",
            hint=f"name that folder: {source / min(tops)}",
        )
    names = tuple(path.parts[0] for path in paths)
    return PhotoSet(root, tuple(paths), names, ("",) * len(paths))


def _refuse_loose(loose: list[Path], source: Path) -> None:
    if loose:
        raise DataError(
            f"some photos in {str(source)!r} lie in no class folder",
            facts=f"{len(loose):,} of them: {_some(str(path) for path in loose)}",
            hint="move them out of the data, or " + _TREE,
        )


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _SHOWN:,} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


# --- CSV -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    line: int
    cells: dict[str, str]


def _read_csv(source: Path, labels: bool) -> PhotoSet:
    rows = list(_csv_rows(source, labels))
    if not rows:
        raise DataError(f"{str(source)!r} lists no photos", hint=_TREE)
    columns = rows[0].cells.keys()
    if "image_a" in columns:
        return _read_triplets(source, rows)
    for name in ("path", "label"):
        if name in columns and (labels or name == "path"):
            _refuse_rows(
                source, f"the {name} is empty", [row for row in rows if not row.cells[name]]
            )
    paths = tuple(Path(row.cells["path"]) for row in rows)
    _refuse_repeats(source, rows, paths)
    _refuse_missing(source, {path: row.line for path, row in zip(paths, rows, strict=True)})
    return PhotoSet(
        root=source.parent.absolute(),
        paths=paths,
        labels=_column(rows, "label") or ("",) * len(rows),
        split=_translate(source, rows, "split", _SPLITS)
        if "split" in columns
        else ("",) * len(rows),
        category=_column(rows, "category"),
        group=_column(rows, "group"),
        is_query=_translate(source, rows, "is_query", _FLAGS) if "is_query" in columns else None,
        is_gallery=_translate(source, rows, "is_gallery", _FLAGS)
        if "is_gallery" in columns
        else None,
        targets=_read_targets(source, rows),
    )


def _read_targets(source: Path, rows: list[_Row]) -> tuple[tuple[float, ...], ...] | None:
    """A row of numbers each, by the numbers in the columns' names."""
    names = sorted((name for name in rows[0].cells if _TARGET.fullmatch(name)), key=_target_number)
    if not names:
        return None
    if names != ["target"] and names != [f"target_{place}" for place in range(len(names))]:
        raise DataError(
            f"the numbers of {str(source)!r} are not counted from 0 up",
            facts=f"its columns: {', '.join(names)}",
            hint="one column target, or target_0, target_1, ...",
        )
    for name in names:
        bad = [row for row in rows if _finite(row.cells[name]) is None]
        _refuse_rows(source, f"{name} is no finite number", bad)
    return tuple(tuple(_finite(row.cells[name]) or 0.0 for name in names) for row in rows)


def _target_number(name: str) -> int:
    return int(name.partition("_")[2] or -1)


def _finite(cell: str) -> float | None:
    try:
        number = float(cell)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _read_triplets(source: Path, rows: list[_Row]) -> PhotoSet:
    """The photos that triplets speak of, in order of their first mention, and the triplets."""
    columns = rows[0].cells.keys()
    odd = _translate(source, rows, "odd", {**_ODD, "": 2}) if "odd" in columns else (2,) * len(rows)
    splits = _translate(source, rows, "split", _SPLITS) if "split" in columns else ("",) * len(rows)
    margins: list[float | None] = [None] * len(rows)
    if "margin" in columns:
        margins = [_finite(row.cells["margin"]) for row in rows]
        wrong = [
            row
            for row, number in zip(rows, margins, strict=True)
            if row.cells["margin"] and (number is None or number < 0)
        ]
        _refuse_rows(source, "margin is no number of 0 or more", wrong)
    first: dict[Path, int] = {}
    in_split: dict[Path, str] = {}
    triplets = []
    unfit, torn = [], []
    for row, third, split, margin in zip(rows, odd, splits, margins, strict=True):
        three = [Path(os.path.normpath(row.cells[name])) for name in _TRIPLET]
        if len(set(three)) < 3 or not all(row.cells[name] for name in _TRIPLET):
            unfit.append(row)
        for path in three:
            first.setdefault(path, row.line)
            if in_split.setdefault(path, split) != split:
                torn.append(row)
        alike = [path for place, path in enumerate(three) if place != third]
        triplets.append((alike[0], alike[1], three[third], margin))
    _refuse_rows(source, "a triplet does not name three different photos", unfit)
    _refuse_rows(source, "a photo of one split is in a triplet of another", torn)
    _refuse_missing(source, first)
    place = {path: number for number, path in enumerate(first)}
    return PhotoSet(
        root=source.parent.absolute(),
        paths=tuple(first),
        labels=("",) * len(first),
        split=tuple(in_split[path] for path in first),
        triplets=tuple(
            Triplet(place[a], place[b], place[other], margin) for a, b, other, margin in triplets
        ),
    )


def _csv_rows(source: Path, labels: bool) -> Iterator[_Row]:
    """The rows that are not blank, with the columns that are known."""
    data = source.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{str(source)!r} is not UTF-8 text",
            facts=f"byte {data[error.start]:#04x} in line {line}",
            hint="save it again as CSV UTF-8",
        ) from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        _check_header(source, header, labels)
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != len(header):
                raise DataError(
                    f"line {reader.line_num} of {str(source)!r} does not fit its header",
                    facts=f"{len(row)} values for the {len(header)} columns {','.join(header)}",
                    hint="put quotes around a value that holds a comma",
                )
            cells = {
                # Only a path may begin or end with a blank that counts.
                name: cell if name in ("path", *_TRIPLET) else cell.strip()
                for name, cell in zip(header, row, strict=True)
                if name in _KNOWN_COLUMNS or _TARGET.fullmatch(name)
            }
            yield _Row(reader.line_num, cells)
    except csv.Error as error:
        raise DataError(
            f"{str(source)!r} is not a CSV that can be read",
            facts=f"line {reader.line_num}: {error}",
        ) from error


def _check_header(source: Path, header: list[str], labels: bool) -> None:
    if any(name in header for name in _TRIPLET):
        needed: tuple[str, ...] = _TRIPLET
    elif labels and not any(map(_TARGET.fullmatch, header)):
        needed = ("path", "label")
    else:
        needed = ("path",)
    absent = [name for name in needed if name not in header]
    twice = sorted({name for name in header if header.count(name) > 1 and name})
    if not absent and not twice:
        return
    if absent:
        what = f"{str(source)!r} has no column {' and no column '.join(absent)}"
    else:
        what = f"{str(source)!r} has two columns {twice[0]}"
    raise DataError(
        what,
        facts=f"its first line: {','.join(header)!r}",
        hint=f"begin with path,label and, if you like, {','.join(_OPTIONAL_COLUMNS)}; "
        "columns are parted by commas",
    )


def _refuse_rows(source: Path, what: str, rows: list[_Row]) -> None:
    if rows:
        raise DataError(
            f"{what} in {len(rows):,} lines of {str(source)!r}",
            facts=f"line {_some(str(row.line) for row in rows)}",
        )


def _refuse_missing(source: Path, lines: dict[Path, int]) -> None:
    """Where one of these files, by the line that names it, is not there."""
    root = source.parent.absolute()
    missing = [(path, line) for path, line in lines.items() if not (root / path).is_file()]
    if missing:
        shown = [f"line {line}: {path}" for path, line in missing[:_SHOWN]]
        more = [f"and {len(missing) - _SHOWN:,} more"] if len(missing) > _SHOWN else []
        raise DataError(
            f"{len(missing):,} of the {len(lines):,} files in {str(source)!r} are not there",
            facts="\n".join([*shown, *more]),
            hint=f"relative paths start at {root}, and folders are parted by /",
        )


def _refuse_repeats(source: Path, rows: list[_Row], paths: tuple[Path, ...]) -> None:
    seen: set[str] = set()
    again = []
    for row, path in zip(rows, paths, strict=True):
        name = os.path.normpath(path)
        if name in seen:
            again.append(row)
        seen.add(name)
    _refuse_rows(source, "a file that was listed before", again)


def _translate(
    source: Path, rows: list[_Row], column: str, meanings: dict[str, _Value]
) -> tuple[_Value, ...]:
    _refuse_rows(
        source,
        f"{column} is none of {', '.join(filter(None, meanings))} or empty",
        [row for row in rows if row.cells[column].casefold() not in meanings],
    )
    return tuple(meanings[row.cells[column].casefold()] for row in rows)


def _column(rows: list[_Row], column: str) -> tuple[str, ...] | None:
    if column not in rows[0].cells:
        return None
    return tuple(row.cells[column] for row in rows)
