"""The fair comparison as one call: every loss by the same protocol, one table, one verdict.

compare/<name>/  protocol.json   what all rows have in common; other rows are refused
                 baseline.json   the untrained network
                 rows/<row>/     see `embedkit.compare.row`
                 compare.json    the result; compare.csv and compare.html say the same

Nothing in these files depends on the time or on how often the work was stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from embedkit import methods, models
from embedkit.atomic import published
from embedkit.compare.clock import Clock
from embedkit.compare.files import read_json, write_json
from embedkit.compare.held_out import HeldOut, metric_names
from embedkit.compare.protocol import Division, Protocol, divide
from embedkit.compare.row import Bench, Entry, cells_of_row, make_row
from embedkit.compare.search import SPACES
from embedkit.compare.table import UNTRAINED, csv_text, lead, summary
from embedkit.data import PhotoSet
from embedkit.errors import Interrupted, MismatchError, UsageError
from embedkit.report.comparison_page import comparison_page
from embedkit.train import Reporter, Run, Silent, choose_device, examine, make_plan
from embedkit.train.guards import reproducible, seed_of
from embedkit.train.plan import check_names

__all__ = [
    "DEFAULT_LOSSES",
    "NOT_COMPARABLE",
    "Plan",
    "compare",
    "describe_plan",
    "plan_comparison",
]

DEFAULT_LOSSES = ("rll", "multi-similarity", "proxy-anchor", "triplet", "contrastive")

NOT_COMPARABLE = "not comparable: a quick try with too few folds, steps and repeats"

_SCHEMA = "embedkit.protocol/1"


@dataclass(frozen=True)
class Plan:
    """What a comparison would do.

    Attributes:
        rows: In the order they are made.
        division: The photos in their places.
        cells: Trainings in all.
        steps: Optimiser steps of the first training, at most; others differ by their fold's size.
        unsearched: Losses of which only the learning rates are searched.
    """

    rows: tuple[Entry, ...]
    division: Division
    cells: int
    steps: int
    unsearched: tuple[str, ...]


def plan_comparison(
    losses: Sequence[str],
    photos: PhotoSet,
    protocol: Protocol,
    *,
    device: str = "auto",
    workers: int | None = None,
    cache: Path | None = None,
    reporter: Reporter | None = None,
) -> Plan:
    """Check everything that can be known beforehand; nothing is written.

    Raises:
        As `compare`.
    """
    reporter = reporter or Silent()
    place = choose_device(device)
    rows = _entries(losses, protocol)
    recipe = rows[0].recipe(protocol)
    failures = examine(recipe, photos, reporter, cache=cache, workers=workers).failures()
    division = divide(photos, folds=protocol.folds, seed=protocol.seed, failures=failures)
    first = make_plan(recipe, division.folds[0], device=place)
    return Plan(
        rows=rows,
        division=division,
        cells=len(rows) * cells_of_row(protocol),
        steps=first.steps,
        unsearched=tuple(name for name in dict.fromkeys(losses) if name not in SPACES),
    )


def describe_plan(plan: Plan, protocol: Protocol) -> list[tuple[str, str]]:
    """The plan in lines for people, each with its label."""
    counts = plan.division.counts()
    skipped = [f"{counts['unreadable']} unreadable files"] if counts["unreadable"] else []
    skipped += [f"{counts['lone_classes']} classes of one image"] if counts["lone_classes"] else []
    without = f"; left out: {', '.join(skipped)}" if skipped else ""
    training = (
        f"{counts['train_images']:,} images of {counts['train_classes']:,} classes in "
        f"{protocol.folds} folds{without}"
    )
    trials = f"{protocol.trials} trials" if protocol.trials > 1 else "no search"
    trainings = (
        f"{len(plan.rows)} rows x ({trials} + {protocol.repeats} repeats) x {protocol.folds} "
        f"folds = {plan.cells:,} trainings"
    )
    lines = [
        ("training", training),
        ("test", f"{counts['test_images']:,} images of {counts['test_classes']:,} other classes"),
        ("rows", ", ".join(entry.name for entry in plan.rows)),
        ("plan", trainings),
        ("steps", f"about {plan.steps:,} of a training, fewer where it stops early"),
    ]
    if plan.unsearched and protocol.trials > 1:
        lines.append(("search", f"of learning rates alone for {', '.join(plan.unsearched)}"))
    return lines


def compare(
    losses: Sequence[str],
    photos: PhotoSet,
    folder: Path,
    protocol: Protocol,
    *,
    device: str = "auto",
    workers: int | None = None,
    cache: Path | None = None,
    reporter: Reporter | None = None,
    add: Sequence[Path] = (),
) -> dict[str, Any]:
    """Make the rows that are not there yet, and the table of all that are in `folder`.

    Killed anywhere and called again, the files come out the same (on the CPU bit for bit, with the
    same number of threads). Rows of earlier calls by the same protocol stay in the table.

    Args:
        losses: Names as for `embedkit.losses.create`; none twice.
        photos: With or without splits; see `divide`.
        folder: Of this comparison; absent, empty, or of an earlier call.
        protocol: What all rows have in common.
        device: As for `embedkit.train.train`.
        workers: Decoding threads; None: one per core.
        cache: Remembers what was seen of photos; see `embedkit.train.examine`.
        reporter: Who is told the story; None: nobody.
        add: Folders of other comparisons by the same protocol, whose finished rows are taken over.

    Returns:
        The content of compare.json.

    Raises:
        UnknownNameError: No such loss or backbone.
        UsageError: A folder that holds something else, a loss that cannot be trained by classes.
        DataError: The photos cannot be divided.
        MismatchError: `folder` or one of `add` was made with other settings or photos.
        Interrupted: Ctrl-C or SIGTERM, after saving.

    Cost: rows x (trials + repeats) x folds trainings.
    """
    reporter = reporter or Silent()
    plan = plan_comparison(
        losses, photos, protocol, device=device, workers=workers, cache=cache, reporter=reporter
    )
    place = choose_device(device)
    # Before anything is written: the weights may not be there.
    network = _untrained(protocol)
    fixed = protocol.fixed(plan.division.photos_hash, place.type)
    _claim(folder, fixed)
    for other in add:
        _take_over(other, folder, fixed)
    for label, line in describe_plan(plan, protocol):
        reporter.note(label, line)
    if protocol.quick:
        reporter.warn(NOT_COMPARABLE)
    test = HeldOut(
        plan.division.test, protocol.recipe, ks=protocol.ks, device=place, workers=workers
    )
    clock = Clock(plan.cells, reporter)
    bench = Bench(protocol, plan.division, test, device, workers, cache, reporter, clock)
    try:
        baseline = _baseline(network, bench, folder / "baseline.json", place)
        for entry in plan.rows:
            row = make_row(entry, bench, _row_folder(folder, entry.name))
            if row["failed"]:
                reporter.warn(f"{entry.name} has no result: {row['failed']}")
    except (Interrupted, KeyboardInterrupt):
        raise Interrupted(
            f"interrupted with {clock.left:,} of {plan.cells:,} trainings to come, and saved",
            facts=f"in {folder}",
            hint="the same command again: it goes on from here",
        ) from None
    return _publish(folder, fixed, baseline, plan.division, protocol)


def _entries(losses: Sequence[str], protocol: Protocol) -> tuple[Entry, ...]:
    if not losses:
        raise UsageError("no loss is named", hint=f"--losses {','.join(DEFAULT_LOSSES)}")
    if len(set(losses)) < len(losses):
        raise UsageError("a loss is named twice", facts=", ".join(losses))
    dims = protocol.dims or (protocol.recipe.dim,)
    rows = tuple(
        Entry(loss, dim, f"{loss}-{dim}" if protocol.dims else loss)
        for loss in losses
        for dim in dims
    )
    for entry in rows:
        check_names(entry.recipe(protocol))
        if methods.learns_from(entry.loss) not in ("classes", "images"):
            raise UsageError(
                f"{entry.loss} cannot be compared on held-out classes",
                facts=f"it learns from {methods.learns_from(entry.loss)}, not from classes",
            )
    return rows


def _row_folder(folder: Path, name: str) -> Path:
    return folder / "rows" / name.replace(":", "-").replace("/", "-")


# --- rows that belong together -------------------------------------------------------------------


def _claim(folder: Path, fixed: dict[str, Any]) -> None:
    """Begin a comparison here, or go on with one that has the same fixed fields."""
    path = folder / "protocol.json"
    known = read_json(path)
    if known is not None:
        _refuse_other(folder, known.get("fixed", {}), fixed, hint="another -o, or these settings")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"{folder} is in use", facts="it is no folder of a comparison", hint="another -o"
        )
    write_json(path, {"schema": _SCHEMA, "fixed": fixed})


def _take_over(other: Path, folder: Path, fixed: dict[str, Any]) -> None:
    """Copy the finished rows of another comparison."""
    if not other.exists():
        raise UsageError(f"there is no comparison {other}")
    known = read_json(other / "protocol.json")
    if known is None:
        theirs = Run.load(other).recipe.to_json() if (other / "run.json").exists() else None
        if theirs is None:
            raise MismatchError(f"{other} is no comparison", facts="it has no protocol.json")
        # A single training: it has no folds, no budget and no repeats.
        known = {"fixed": {name: theirs.get(name) for name in fixed}}
    hint = "only what was made by the same protocol can stand in one table"
    _refuse_other(other, known.get("fixed", {}), fixed, hint=hint)
    for record in sorted((other / "rows").glob("*/row.json")):
        row = read_json(record)
        mine = folder / "rows" / record.parent.name / "row.json"
        if mine.exists() and read_json(mine) != row:
            raise MismatchError(
                f"{other} has another row {record.parent.name} than {folder}",
                facts="the same protocol gave other numbers, as on another machine",
                hint="remove one of the two",
            )
        if row is not None and not mine.exists():
            write_json(mine, row)


def _refuse_other(folder: Path, theirs: dict[str, Any], ours: dict[str, Any], *, hint: str) -> None:
    differing = [
        f"{name}: {_brief(theirs.get(name))} there, {_brief(value)} here"
        for name, value in ours.items()
        if theirs.get(name) != value
    ]
    if differing:
        raise MismatchError(
            f"the rows of {folder} cannot be compared with these",
            facts="\n".join(differing),
            hint=hint,
        )


def _brief(value: object) -> str:
    return "none" if value is None else str(value)


# --- what is not a training ----------------------------------------------------------------------


def _baseline(
    network: models.EmbeddingNet, bench: Bench, path: Path, device: torch.device
) -> dict[str, Any]:
    """The untrained network's pooled features on the test photos, as a row of one value."""
    known = read_json(path)
    if known is not None:
        return known
    with reproducible(device):
        vectors = bench.test.features(network)
    measured = bench.test.measure(vectors)
    single = {
        name: {"mean": value, "low": None, "high": None, "values": [value]}
        for name, value in measured.items()
    }
    row = {
        "row": UNTRAINED,
        "loss": "",
        "dim": vectors.shape[1],
        "single": single,
        "concatenated": None,
    }
    write_json(path, row)
    bench.reporter.note("baseline", f"test MAP@R {measured['map@r']:.4f}, pooled features")
    return row


def _untrained(protocol: Protocol) -> models.EmbeddingNet:
    recipe = protocol.recipe
    preprocess = recipe.preprocess()
    named = recipe.weights in ("none", "imagenet")
    with reproducible(torch.device("cpu")):
        torch.manual_seed(seed_of(protocol.seed, "network"))
        return models.create_network(
            backbone=recipe.backbone,
            weights=recipe.weights if named else Path(recipe.weights),
            pooling=recipe.pooling,
            dim=recipe.dim,
            image_size=(preprocess.height, preprocess.width),
            mean=preprocess.mean,
            std=preprocess.std,
        )


def _publish(
    folder: Path,
    fixed: dict[str, Any],
    baseline: dict[str, Any],
    division: Division,
    protocol: Protocol,
) -> dict[str, Any]:
    """The table of all finished rows, in three files."""
    found = [read_json(path) for path in sorted((folder / "rows").glob("*/row.json"))]
    rows = [summary(row) for row in found if row is not None]
    rows.sort(key=lambda row: (row["loss"], row["dim"]) if protocol.dims else _rank(row))
    verdict = lead(rows)
    best = max(
        (row for row in rows if row["single"]),
        key=lambda row: row["single"]["map@r"]["mean"],
        default=None,
    )
    beaten = best is not None and (
        best["single"]["map@r"]["mean"] > baseline["single"]["map@r"]["mean"]
    )
    content = {
        "comparable": not protocol.quick,
        "label": NOT_COMPARABLE if protocol.quick else "",
        "metrics": metric_names(protocol.ks),
        "rows": rows,
        "baseline": baseline,
        "lead": verdict,
        "baseline_beaten": beaten,
        "fixed": fixed,
        "seeds": protocol.seeds(),
        "data": division.counts(),
    }
    write_json(folder / "compare.json", {"schema": "embedkit.compare/1", **content})
    with published(folder / "compare.csv") as temporary:
        table = csv_text([*rows, baseline], metric_names(protocol.ks), not protocol.quick)
        temporary.write_text(table, encoding="utf-8")
    with published(folder / "compare.html") as temporary:
        temporary.write_text(comparison_page(content), encoding="utf-8")
    return content


def _rank(row: dict[str, Any]) -> tuple[float, str]:
    """Best first; rows without a result last."""
    value = row["single"]["map@r"]["mean"] if row["single"] else -1.0
    return -value, row["row"]
