"""Labelled photos from a folder per class, from train/ val/ test/ folders, or from a CSV."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from embedkit.errors import DataError
from embedkit.imaging import find_images

__all__ = ["PhotoSet", "read_photos", "resolve_source"]

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
_SHOWN = 5

_TREE = """\
put the photos into one folder per class:
  photos/blue-mug/1.jpg
  photos/blue-mug/2.jpg
  photos/desk-lamp/1.jpg
or the same inside photos/train/, photos/val/ and photos/test/,
or name a CSV file with the columns path,label"""

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class PhotoSet:
    """N labelled photos; all columns have N entries in one order.

    Attributes:
        root: The folder that was read, or the folder of the CSV; absolute.
        paths: Of the files, relative to `root`; absolute where a CSV says so.
        labels: Names of classes.
        split: ``train``, ``val``, ``test``, or empty where the data does not say.
        category: A coarser name than the label, or None.
        group: What was taken together (a shop visit, an owner), or None.
        is_query: For the evaluation, may ask; None is all.
        is_gallery: For the evaluation, may be found; None is all.
    """

    root: Path
    paths: tuple[Path, ...]
    labels: tuple[str, ...]
    split: tuple[str, ...]
    category: tuple[str, ...] | None = None
    group: tuple[str, ...] | None = None
    is_query: tuple[bool, ...] | None = None
    is_gallery: tuple[bool, ...] | None = None

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

    def subset(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> PhotoSet:
        """These photos, in this order."""
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
        )

    def classes(self) -> tuple[str, ...]:
        """The distinct labels, sorted."""
        return tuple(sorted(set(self.labels)))

    def manifest_hash(self) -> str:
        """sha256 (hex) of all columns in order, not of `root` and not of what is in the files."""
        digest = hashlib.sha256()
        columns = self._columns()
        digest.update(json.dumps([name for name, column in columns.items() if column]).encode())
        for row in zip(*(column for column in columns.values() if column), strict=True):
            cells = [cell.as_posix() if isinstance(cell, Path) else cell for cell in row]
            digest.update(json.dumps(cells).encode() + b"\n")
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
        }


def read_photos(source: Path) -> PhotoSet:
    """The photos that `source` lists, with their labels.

    - A folder of class folders: the label is the name of the first folder below `source`, and
      everything in it at any depth belongs to it.
    - A folder that holds nothing but ``train``, ``val`` (``valid``, ``validation``) and ``test``,
      in any case: the same inside each of them. One alone will do.
    - A CSV in UTF-8 with a header: ``path,label`` and any of
      ``split,category,group,is_query,is_gallery``; other columns are passed over. Relative paths
      start at the CSV's folder. Flags are 1, true, yes or 0, false, no, or empty for no.

    Folders come in order of names, those that begin with a dot passed over; a CSV comes in its own
    order. Classes of one photo are fine here.

    Raises:
        DataError: There is nothing to read, a photo has no label, or the CSV is damaged, names
            a file twice, or names files that are not there.
    """
    if source.is_dir():
        return _read_folder(source)
    if not source.exists():
        raise DataError(f"there is no folder or CSV {str(source)!r}", hint=_TREE)
    if source.suffix.lower() != ".csv":
        raise DataError(f"{str(source)!r} is neither a folder nor a CSV", hint=_TREE)
    return _read_csv(source)


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


# --- folders -------------------------------------------------------------------------------------


def _read_folder(source: Path) -> PhotoSet:
    root = source.absolute()
    below = (path.relative_to(root) for path in find_images(root))
    paths = [path for path in below if not any(part.startswith(".") for part in path.parts)]
    if not paths:
        raise DataError(f"no photos in {str(source)!r}", hint=_TREE)
    loose = [path for path in paths if len(path.parts) == 1]
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
    labels = tuple(path.parts[0] for path in paths)
    return PhotoSet(root, tuple(paths), labels, ("",) * len(paths))


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


def _read_csv(source: Path) -> PhotoSet:
    rows = list(_csv_rows(source))
    if not rows:
        raise DataError(f"{str(source)!r} lists no photos", hint=_TREE)
    root = source.parent.absolute()
    for name in ("path", "label"):
        _refuse_rows(source, f"the {name} is empty", [row for row in rows if not row.cells[name]])
    paths = tuple(Path(row.cells["path"]) for row in rows)
    _refuse_repeats(source, rows, paths)
    missing = [row for row, path in zip(rows, paths, strict=True) if not (root / path).is_file()]
    if missing:
        shown = [f"line {row.line}: {row.cells['path']}" for row in missing[:_SHOWN]]
        more = [f"and {len(missing) - _SHOWN:,} more"] if len(missing) > _SHOWN else []
        raise DataError(
            f"{len(missing):,} of the {len(rows):,} files in {str(source)!r} are not there",
            facts="\n".join([*shown, *more]),
            hint=f"relative paths start at {root}, and folders are parted by /",
        )
    columns = rows[0].cells.keys()
    return PhotoSet(
        root=root,
        paths=paths,
        labels=tuple(row.cells["label"] for row in rows),
        split=_translate(source, rows, "split", _SPLITS)
        if "split" in columns
        else ("",) * len(rows),
        category=_column(rows, "category"),
        group=_column(rows, "group"),
        is_query=_translate(source, rows, "is_query", _FLAGS) if "is_query" in columns else None,
        is_gallery=_translate(source, rows, "is_gallery", _FLAGS)
        if "is_gallery" in columns
        else None,
    )


def _csv_rows(source: Path) -> Iterator[_Row]:
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
        _check_header(source, header)
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
                name: cell if name == "path" else cell.strip()
                for name, cell in zip(header, row, strict=True)
                if name in ("path", "label", *_OPTIONAL_COLUMNS)
            }
            yield _Row(reader.line_num, cells)
    except csv.Error as error:
        raise DataError(
            f"{str(source)!r} is not a CSV that can be read",
            facts=f"line {reader.line_num}: {error}",
        ) from error


def _check_header(source: Path, header: list[str]) -> None:
    absent = [name for name in ("path", "label") if name not in header]
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
