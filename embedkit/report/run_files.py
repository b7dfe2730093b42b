"""What a run's folder holds, for its report: record, recipe, epochs, photos, kept embeddings."""

from __future__ import annotations

import csv
import json
import tomllib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from embedkit.atomic import published
from embedkit.errors import MismatchError

__all__ = ["HeldOutPhoto", "KeptEmbeddings", "RunFiles", "keep_embeddings", "read_run"]

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

_EMBEDDINGS = "report.npz"
_MOST_PHOTOS, _MOST_OF_A_CLASS = 5000, 200


@dataclass(frozen=True)
class HeldOutPhoto:
    """A row of split.csv; `asks` and `found` are its flags, both true where there are none."""

    path: Path
    name: str
    label: str
    split: str
    asks: bool
    found: bool


@dataclass(frozen=True)
class KeptEmbeddings:
    """Kept embeddings as unit rows, with their photos; a stage may be absent.

    `after` is ``(M, K, D)``, unit vectors, of a network that makes K vectors per photo.
    """

    photos: list[HeldOutPhoto]
    held_out: int
    before: Floats | None
    after: Floats | None


@dataclass(frozen=True)
class RunFiles:
    """A run as its files tell it; `epochs` are the lines of metrics.jsonl."""

    folder: Path
    record: dict[str, Any]
    recipe: dict[str, Any]
    epochs: list[dict[str, Any]]
    photos: list[HeldOutPhoto]
    vectors: KeptEmbeddings | None

    @property
    def split(self) -> str:
        """What was measured at the end: test, else val, else nothing."""
        counts = self.record["data"]["splits"]
        return next((name for name in ("test", "val") if counts[name]["images"]), "")

    def result(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Metrics before and after, of the same split."""
        baseline, best = self.record["baseline"] or {}, self.record["best"] or {}
        if self.record["test"]:
            return baseline.get("test"), self.record["test"]
        return baseline.get("val"), best.get("val")

    def measured_split(self) -> str:
        return "test" if self.record["test"] else "val"


def keep_embeddings(
    run_dir: Path,
    stage: Literal["before", "after"],
    *,
    rows: npt.ArrayLike,
    labels: Sequence[str],
    embeddings: npt.ArrayLike,
) -> None:
    """Put the embeddings of held-out photos into the run's report.npz, for `write_run_report`.

    Called once with ``before`` (pooled features of the untrained network) and once with ``after``
    (embeddings by the best weights), with the same rows. At most 5,000 photos are kept, whole
    classes drawn by a fixed seed and 200 of each, as unit rows in float16. What the file already
    holds of another stage stays, when it is of the same rows.

    The file: ``rows`` ``(M,)`` int64, line numbers of split.csv without its header, from 0;
    ``before`` ``(M, F)`` and ``after`` ``(M, D)`` float16, either may be absent, ``after`` of K
    vectors per photo ``(M, K, D)``; ``held_out`` the number of photos before the draw.

    Args:
        rows: ``(N,)`` places in split.csv.
        labels: ``(N,)``.
        embeddings: ``(N, D)`` or ``(N, K, D)``, any length; rows of zeros stay zeros.

    Raises:
        ValueError: The lengths do not fit.
        EmbedKitError: It cannot be written.
    """
    places = np.asarray(rows, np.int64)
    vectors = np.asarray(embeddings, np.float32)
    if not len(places) == len(labels) == len(vectors):
        raise ValueError(f"{len(places)} rows, {len(labels)} labels, {len(vectors)} embeddings")
    chosen = _draw(labels)
    content: dict[str, npt.NDArray[Any]] = {
        "held_out": np.array(len(places)),
        "rows": places[chosen],
        stage: _unit(vectors[chosen]).astype(np.float16),
    }
    path = run_dir / _EMBEDDINGS
    other = "after" if stage == "before" else "before"
    if path.is_file():
        old = _read_arrays(path)
        if other in old and np.array_equal(old["rows"], content["rows"]):
            content[other] = old[other]
    with published(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, array in content.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def read_run(folder: Path) -> RunFiles:
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        schema = record["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MismatchError(
            f"{folder} is no run of embedkit", facts=f"run.json: {error}"
        ) from error
    if schema != "embedkit.run/1":
        raise MismatchError(
            f"the run {folder} was written by another embedkit",
            facts=f"it is {schema!r}, this embedkit reads 'embedkit.run/1'",
        )
    recipe_path, split_path = folder / "config.toml", folder / "split.csv"
    try:
        recipe = tomllib.loads(recipe_path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MismatchError(f"{recipe_path} is damaged", facts=str(error)) from error
    try:
        photos = _read_split(split_path, Path(record["photos_root"]))
    except (OSError, KeyError, csv.Error) as error:
        facts = f"{type(error).__name__}: {error}"
        raise MismatchError(f"{split_path} is damaged", facts=facts) from error
    epochs = _read_epochs(folder / "metrics.jsonl")
    return RunFiles(folder, record, recipe, epochs, photos, _read_vectors(folder, photos))


def _read_split(path: Path, root: Path) -> list[HeldOutPhoto]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    # Empty in all of a split: the data has no such column, and every photo asks and is found.
    marked = {
        (column, row["split"])
        for row in rows
        for column in ("is_query", "is_gallery")
        if row[column] == "1"
    }

    def flag(row: dict[str, str], column: str) -> bool:
        return row[column] == "1" or (column, row["split"]) not in marked

    return [
        HeldOutPhoto(
            root / row["path"],
            row["path"],
            row["label"],
            row["split"],
            flag(row, "is_query"),
            flag(row, "is_gallery"),
        )
        for row in rows
    ]


def _read_epochs(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; the last may be half written, because a run may be killed."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    epochs = []
    for number, line in enumerate(lines, start=1):
        try:
            epochs.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise MismatchError(f"{path} is damaged", facts=f"line {number}: {error}") from error
    return epochs


def _read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise MismatchError(f"{path} is damaged", facts=str(error), hint="delete it") from error


def _read_vectors(folder: Path, photos: list[HeldOutPhoto]) -> KeptEmbeddings | None:
    path = folder / _EMBEDDINGS
    if not path.is_file():
        return None
    arrays = _read_arrays(path)
    rows = arrays.get("rows", np.zeros(0, np.int64))
    stages = {name: arrays.get(name) for name in ("before", "after")}
    fits = len(rows) > 0 and rows.min() >= 0 and rows.max() < len(photos)
    for stage in stages.values():
        fits = fits and (stage is None or (stage.ndim in (2, 3) and len(stage) == len(rows)))
    if not fits:
        raise MismatchError(
            f"{path} does not belong to the split.csv beside it",
            facts=f"{len(rows)} rows for {len(photos)} photos",
            hint="delete it",
        )
    before, after = (
        None if stage is None else _unit(stage.astype(np.float32)) for stage in stages.values()
    )
    held_out = int(arrays.get("held_out", np.array(len(rows))))
    return KeptEmbeddings([photos[row] for row in rows.tolist()], held_out, before, after)


def _draw(labels: Sequence[str]) -> Indices:
    """Places of at most 5,000 photos, whole classes, the same for the same labels."""
    names = np.array(labels, dtype=str)
    generator = np.random.default_rng(0)
    chosen: list[Indices] = []
    room = _MOST_PHOTOS
    for label in generator.permutation(np.unique(names)):
        members = generator.permutation(np.flatnonzero(names == label))[:_MOST_OF_A_CLASS]
        if len(members) <= room:
            chosen.append(members)
            room -= len(members)
    return np.sort(np.concatenate([*chosen, np.zeros(0, np.int64)])).astype(np.int64)


def _unit(rows: Floats) -> Floats:
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray(rows / np.where(length > 0, length, 1), np.float32)
