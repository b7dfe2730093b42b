"""One training of a comparison in its own folder: begun, gone on with, or already there.

<cell>/  cell.json     what came of it: where it is, the cell is finished
         vectors.npy   embeddings of the test photos, until the repeat is measured
         run/          what `embedkit.train.train` left, without its weights
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedkit.atomic import published
from embedkit.compare.files import read_json, write_json
from embedkit.compare.held_out import HeldOut
from embedkit.data import PhotoSet
from embedkit.errors import MismatchError, NotFiniteError
from embedkit.train import Recipe, Reporter, Run, train

__all__ = ["VECTORS", "Cell", "train_cell"]

VECTORS = "vectors.npy"


@dataclass(frozen=True)
class Cell:
    """What came of one training.

    Attributes:
        val: Validation MAP@R of its best weights, 0 when it failed.
        steps: Optimiser steps it was trained for.
        seconds: That it took.
        failed: Why it has no result, as when its numbers were no longer finite; else empty.
        versions: Of the packages that took part.
    """

    val: float
    steps: int
    seconds: float
    failed: str
    versions: dict[str, str]


def train_cell(
    recipe: Recipe,
    photos: PhotoSet,
    folder: Path,
    *,
    test: HeldOut | None,
    device: str,
    workers: int | None,
    cache: Path | None,
    reporter: Reporter,
) -> Cell:
    """Train, or go on, or read what is there.

    Args:
        recipe: Of this training.
        photos: Marked ``train`` and ``val``.
        folder: Of the cell.
        test: Embed these with the best weights; None: they are not looked at.
        device: As for `embedkit.train.train`, with `workers`, `cache`, `reporter`.

    Raises:
        Interrupted: Ctrl-C or SIGTERM, after saving.
        EmbedKitError: What `embedkit.train.train` raises, but for numbers that are not finite:
            those are a result.
    """
    record, run_dir = folder / "cell.json", folder / "run"
    known = read_json(record)
    if known is not None:
        _drop_weights(run_dir)
        return _read(known, record)
    try:
        run = _train(recipe, photos, run_dir, device, workers, cache, reporter)
    except NotFiniteError as error:
        cell = Cell(0.0, 0, 0.0, error.what, {})
    else:
        if test is not None:
            vectors = test.embed(run.network())
            with published(folder / VECTORS) as temporary, temporary.open("wb") as file:
                np.save(file, vectors)
        best: dict[str, Any] = run.record["best"]
        cell = Cell(
            val=float(best["val"]["map@r"] or 0.0),
            steps=run.record["steps"],
            seconds=run.record["elapsed"],
            failed="",
            versions=run.record["versions"],
        )
    write_json(record, dataclasses.asdict(cell))
    _drop_weights(run_dir)
    return cell


def _train(
    recipe: Recipe,
    photos: PhotoSet,
    run_dir: Path,
    device: str,
    workers: int | None,
    cache: Path | None,
    reporter: Reporter,
) -> Run:
    begun = (run_dir / "last.safetensors").exists()
    if not begun and run_dir.exists():
        # Killed before it had saved anything.
        shutil.rmtree(run_dir)
    return train(
        recipe,
        photos,
        run_dir,
        device=device,
        reporter=reporter,
        resume=begun,
        workers=workers,
        cache=cache,
    )


def _read(known: dict[str, Any], record: Path) -> Cell:
    try:
        return Cell(**known)
    except TypeError as error:
        raise MismatchError(
            f"{record} is damaged", facts=str(error), hint="delete it: it will be made again"
        ) from error


def _drop_weights(run_dir: Path) -> None:
    """A comparison is hundreds of trainings: their weights would fill the disk."""
    for name in ("best.safetensors", "last.safetensors", "report.npz"):
        (run_dir / name).unlink(missing_ok=True)
