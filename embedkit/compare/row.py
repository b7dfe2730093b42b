"""One row of the table: settings are searched on the folds, then repeated and measured.

<row>/  trials/<number>/settings.json, fold-<f>/    the search; see `embedkit.compare.cell`
        repeats/<number>/fold-<f>/, repeat.json     the chosen settings with other seeds
        row.json, recipe.toml                       where they are, the row is finished
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.atomic import published
from embedkit.compare.cell import VECTORS, Cell, train_cell
from embedkit.compare.clock import Clock
from embedkit.compare.files import read_json, write_json
from embedkit.compare.held_out import HeldOut, Metrics
from embedkit.compare.protocol import Division, Protocol
from embedkit.compare.search import Settings, Trial, apply, propose, space_of
from embedkit.train import Recipe, Reporter

__all__ = ["Bench", "Entry", "cells_of_row", "make_row"]


@dataclass(frozen=True)
class Entry:
    """What a row is of.

    Attributes:
        loss: Name of the loss.
        dim: Width of the embedding.
        name: Of the row.
    """

    loss: str
    dim: int
    name: str

    def recipe(self, protocol: Protocol) -> Recipe:
        """The protocol's, with this loss and width; the search's seed."""
        return dataclasses.replace(
            protocol.recipe, loss=self.loss, loss_options={}, dim=self.dim, seed=protocol.seed
        )


@dataclass(frozen=True)
class Bench:
    """What all rows are made on.

    Attributes:
        protocol: What they have in common.
        division: The photos.
        test: Its test photos.
        device: As for `embedkit.train.train`.
        workers: Likewise.
        cache: Likewise.
        reporter: Who is told.
        clock: Counts the trainings.
    """

    protocol: Protocol
    division: Division
    test: HeldOut
    device: str
    workers: int | None
    cache: Path | None
    reporter: Reporter
    clock: Clock


def cells_of_row(protocol: Protocol) -> int:
    """Trainings of one row."""
    trials = protocol.trials if protocol.trials > 1 else 0
    return (trials + protocol.repeats) * protocol.folds


def make_row(entry: Entry, bench: Bench, folder: Path) -> dict[str, Any]:
    """Search, repeat and measure; what is finished in `folder` is not done again.

    Returns the content of row.json: ``row``, ``loss``, ``dim``, ``searched`` (names), ``settings``
    (chosen), ``search`` (a list of settings with their validation ``map@r``), ``repeats`` (a list
    of ``seed``, ``single``, ``concatenated``, the last None where a network gives several vectors
    per photo), ``failed`` (why there are too few of them, else empty), ``steps`` of one training of
    the repeats, and ``versions``.
    """
    record = folder / "row.json"
    known = read_json(record)
    if known is not None:
        bench.clock.skip(cells_of_row(bench.protocol))
        return known
    recipe = entry.recipe(bench.protocol)
    trials = _search(recipe, entry, bench, folder / "trials")
    best = max(trials, key=lambda trial: trial.value)
    chosen = apply(recipe, best.settings)
    cells: list[Cell] = []
    repeats = []
    for number, seed in enumerate(bench.protocol.seeds()):
        seeded = dataclasses.replace(chosen, seed=seed)
        repeat = _repeat(seeded, entry, bench, folder / "repeats" / f"{number:02d}", cells)
        if repeat is None:
            break
        repeats.append(repeat)
    failed = next((cell.failed for cell in cells if cell.failed), "")
    row = {
        "row": entry.name,
        "loss": entry.loss,
        "dim": entry.dim,
        "searched": sorted(space_of(recipe)) if bench.protocol.trials > 1 else [],
        "settings": best.settings,
        "search": [
            {"settings": trial.settings, "map@r": trial.value}
            for trial in (trials if bench.protocol.trials > 1 else [])
        ],
        "repeats": [] if failed else repeats,
        "failed": failed,
        "steps": [cell.steps for cell in cells],
        "versions": cells[0].versions,
    }
    with published(folder / "recipe.toml") as temporary:
        temporary.write_text(chosen.to_toml(), encoding="utf-8")
    write_json(record, row)
    return row


def _search(recipe: Recipe, entry: Entry, bench: Bench, folder: Path) -> list[Trial]:
    """All trials in their order; a single one, the defaults, is not tried."""
    protocol = bench.protocol
    if protocol.trials == 1:
        return [Trial(propose(recipe, [], trials=1, seed=protocol.seed), 0.0)]
    done: list[Trial] = []
    while len(done) < protocol.trials:
        place = folder / f"{len(done):03d}"
        settings = _settings(recipe, done, protocol, place / "settings.json")
        cells = [
            _cell(apply(recipe, settings), fold, bench, place, tested=False)
            for fold in range(protocol.folds)
        ]
        done.append(Trial(settings, float(np.mean([cell.val for cell in cells]))))
        best = max(trial.value for trial in done)
        diverged = ", diverged" if any(cell.failed for cell in cells) else ""
        bench.reporter.note(
            "trial",
            f"{entry.name} {len(done)}/{protocol.trials}: validation MAP@R {done[-1].value:.4f}, "
            f"best {best:.4f}{diverged}  ({bench.clock.done}/{bench.clock.cells})",
        )
    return done


def _settings(recipe: Recipe, done: list[Trial], protocol: Protocol, path: Path) -> Settings:
    """As proposed when the trial was begun, which another optuna might see otherwise."""
    known = read_json(path)
    if known is None:
        known = propose(recipe, done, trials=protocol.trials, seed=protocol.seed)
        write_json(path, known)
    return known


def _repeat(
    recipe: Recipe, entry: Entry, bench: Bench, folder: Path, cells: list[Cell]
) -> dict[str, Any] | None:
    """The folds' networks on the test photos, alone and side by side; None when one failed."""
    folds = range(bench.protocol.folds)
    new = [_cell(recipe, fold, bench, folder, tested=True) for fold in folds]
    cells += new
    record = folder / "repeat.json"
    repeat = read_json(record)
    files = [_fold(folder, fold) / VECTORS for fold in folds]
    if repeat is None and not any(cell.failed for cell in new):
        vectors = [np.load(file) for file in files]
        alone = [bench.test.measure(part) for part in vectors]
        repeat = {
            "seed": recipe.seed,
            "single": _mean(alone),
            "folds": alone,
            "concatenated": _side_by_side(vectors, bench),
        }
        write_json(record, repeat)
    for file in files:
        file.unlink(missing_ok=True)
    if repeat is None:
        return None
    together = repeat["concatenated"]
    bench.reporter.note(
        "repeat",
        f"{entry.name} seed {recipe.seed}: test MAP@R {repeat['single']['map@r']:.4f}, "
        f"concatenated {'-' if together is None else format(together['map@r'], '.4f')}  "
        f"({bench.clock.done}/{bench.clock.cells})",
    )
    return repeat


def _side_by_side(vectors: list[npt.NDArray[np.float32]], bench: Bench) -> Metrics | None:
    """Of the folds' embeddings in one row; None of several vectors per photo.

    Which of one network's vectors belongs beside which of another's, nobody knows.
    """
    if vectors[0].ndim == 3:
        return None
    return bench.test.measure(np.concatenate(vectors, axis=1))


def _cell(recipe: Recipe, fold: int, bench: Bench, folder: Path, *, tested: bool) -> Cell:
    place = _fold(folder, fold)
    is_new = not (place / "cell.json").exists()
    name = f"{recipe.loss}, seed {recipe.seed}, fold {fold + 1}"
    cell = train_cell(
        recipe,
        bench.division.folds[fold],
        place,
        test=bench.test if tested else None,
        device=bench.device,
        workers=bench.workers,
        cache=bench.cache,
        reporter=_Brief(bench.reporter, name, warns=tested),
    )
    bench.clock.count(cell, is_new)
    return cell


def _fold(folder: Path, fold: int) -> Path:
    return folder / f"fold-{fold + 1}"


def _mean(parts: list[Metrics]) -> Metrics:
    return {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}


class _Brief:
    """Of a training's story only bars and warnings; in a search no warnings, as bad settings are
    tried there, and none before its first note: those are of the photos, and have been told."""

    def __init__(self, reporter: Reporter, name: str, *, warns: bool) -> None:
        self._reporter, self._name, self._warns = reporter, name, warns
        self._begun = False

    def note(self, label: str, text: str) -> None:
        self._begun = self._begun or label == "data"

    def warn(self, text: str) -> None:
        if self._warns and self._begun:
            self._reporter.warn(f"{self._name}: {text}")

    def progress(
        self, what: str, total: int | None
    ) -> AbstractContextManager[Callable[[int, int], None]]:
        return self._reporter.progress(f"{self._name}, {what}", total)
