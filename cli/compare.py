"""`embedkit compare ./photos --losses rll,multi-similarity`"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedkit.cli.display import AsJson, Display, Quiet, Verbose
from embedkit.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Group

    from embedkit.compare import Plan, Protocol
    from embedkit.train import Recipe

__all__ = ["compare"]

_PROTOCOL, _MODEL, _OUTPUT = "Protocol", "The same for all rows", "Output"


def compare(
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="DATA",
            help="Photos, as for embedkit train; photos marked test are the test, or half of the "
            "classes.",
        ),
    ] = None,
    losses: Annotated[
        str | None,
        typer.Option(
            "--losses",
            metavar="NAME,NAME,...",
            help="Losses (rll, multi-similarity, proxy-anchor, triplet, contrastive).",
        ),
    ] = None,
    dims: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Widths: a row for each loss and width."),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A short try of all of it; not comparable."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and end.")] = False,
    # --- Protocol
    folds: Annotated[
        int | None,
        typer.Option(
            metavar="N", rich_help_panel=_PROTOCOL, help="Parts of the training classes (4)."
        ),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            rich_help_panel=_PROTOCOL,
            help="Settings tried for each row; 1: defaults (20).",
        ),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(
            metavar="N", rich_help_panel=_PROTOCOL, help="Seeds at the chosen settings (5)."
        ),
    ] = None,
    ks: Annotated[
        str | None,
        typer.Option(metavar="K,K,...", rich_help_panel=_PROTOCOL, help="Of recall@k (1,2,4,8)."),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(metavar="N", rich_help_panel=_PROTOCOL, help="Of classes, folds, search."),
    ] = 0,
    add: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER",
            rich_help_panel=_PROTOCOL,
            help="Take over the rows of another comparison; repeat.",
        ),
    ] = None,
    # --- The same for all rows
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_MODEL,
            help="A recipe, as config.toml of a run; options win.",
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(metavar="NAME", rich_help_panel=_MODEL, help="By torchvision's name."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", rich_help_panel=_MODEL, help="imagenet, none or a file (imagenet)."
        ),
    ] = None,
    dim: Annotated[
        int | None,
        typer.Option(metavar="N", rich_help_panel=_MODEL, help="Width of the embedding (128)."),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(metavar="N", rich_help_panel=_MODEL, help="Side of the input, pixels (224)."),
    ] = None,
    freeze: Annotated[
        int | None,
        typer.Option(
            metavar="N", rich_help_panel=_MODEL, help="First stages that do not learn (0)."
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="CxK", rich_help_panel=_MODEL, help="Classes x images of each (16x4)."
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(metavar="N", rich_help_panel=_MODEL, help="Of one training (by data size)."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N", rich_help_panel=_MODEL, help="Length in steps instead of epochs."
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME", rich_help_panel=_MODEL, help="auto, cpu, cuda, cuda:N or mps."
        ),
    ] = "auto",
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            "-j",
            min=1,
            metavar="N",
            rich_help_panel=_MODEL,
            help="Decoding threads (one per core).",
        ),
    ] = None,
    # --- Output
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FOLDER",
            rich_help_panel=_OUTPUT,
            help="Where it is kept, and gone on with (compare/NAME OF DATA).",
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compare losses fairly: same folds, search budget and seeds.

    Example: embedkit compare ./photos --losses rll,multi-similarity,pml:CircleLoss
    """
    given = {
        "backbone": backbone,
        "weights": weights,
        "dim": dim,
        "image_size": image_size,
        "freeze": freeze,
        "epochs": epochs,
        "steps": steps,
    }
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if batch is not None:
        settings["classes_per_batch"], settings["images_per_class"] = _batch(batch)
    if dims is not None and dim is not None:
        raise UsageError("--dim and --dims both say how wide", hint="one of the two")
    budget: dict[str, Any] = {"folds": folds, "trials": trials, "repeats": repeats}
    budget = {name: value for name, value in budget.items() if value is not None}
    if quick and budget:
        raise UsageError(
            f"--quick brings its own {' and '.join(budget)}", hint="leave one of them out"
        )
    if dims is not None:
        budget["dims"] = _numbers("--dims", dims)
    if ks is not None:
        budget["ks"] = _numbers("--ks", ks)

    # As in `embedkit train`: idle threads that spin would keep the cores from those that decode.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from embedkit import compare as room
    from embedkit.data import read_photos, resolve_source
    from embedkit.data.doctor_facts import default_cache

    display = Display(as_json=as_json, quiet=quiet)
    protocol = room.Protocol(_recipe(config, settings), seed=seed, **budget)
    if quick:
        protocol = room.quick_protocol(protocol)
    names = room.DEFAULT_LOSSES if losses is None else tuple(map(str.strip, losses.split(",")))
    photos = read_photos(resolve_source(data))
    if dry_run:
        plan = room.plan_comparison(
            names,
            photos,
            protocol,
            device=device,
            workers=workers,
            cache=default_cache(),
            reporter=display,
        )
        _show_plan(plan, protocol, display)
        return
    folder = out or Path("compare") / ((photos.root.name or "photos") + ("-quick" if quick else ""))
    content = room.compare(
        names,
        photos,
        folder,
        protocol,
        device=device,
        workers=workers,
        cache=default_cache(),
        reporter=display,
        add=add or (),
    )
    display.answer(_page(content))
    display.document("compare", {"folder": str(folder), **content})
    display.note("saved", f"{folder / 'compare.json'}, compare.csv, compare.html")
    if content["lead"] is not None:
        winner = content["lead"]["winner"].replace(":", "-").replace("/", "-")
        recipe = folder / "rows" / winner / "recipe.toml"
        display.note("next", f"embedkit train {data or ''} --config {recipe}".replace("  ", " "))
    if content["data"]["unreadable"]:
        display.warn(
            f"{content['data']['unreadable']} files are no usable pictures: embedkit check"
        )
        raise typer.Exit(3)


def _recipe(config: Path | None, settings: dict[str, Any]) -> Recipe:
    from embedkit.train import Recipe

    base = {} if config is None else Recipe.load(config).to_json()
    if "epochs" in settings or "steps" in settings:
        base |= {"epochs": None, "steps": None}
    # Of the recipe's own loss; here every row has its own.
    base.pop("loss_options", None)
    return Recipe.from_json({**base, **settings})


def _show_plan(plan: Plan, protocol: Protocol, display: Display) -> None:
    from rich.console import Group
    from rich.text import Text

    from embedkit.compare import describe_plan

    lines = describe_plan(plan, protocol)
    display.answer(Group(*(Text(f"{label:<9} {line}") for label, line in lines)))
    display.document(
        "compare",
        {
            "dry_run": True,
            "comparable": not protocol.quick,
            "rows": [{"row": row.name, "loss": row.loss, "dim": row.dim} for row in plan.rows],
            "folds": protocol.folds,
            "trials": protocol.trials,
            "repeats": protocol.repeats,
            "trainings": plan.cells,
            "steps_of_a_training": plan.steps,
            "learning_rates_only": list(plan.unsearched),
            "data": plan.division.counts(),
        },
    )


_SHOWN = {"recall@1": "P@1", "r_precision": "R-precision", "map@r": "MAP@R"}
_HEADS = {
    "single": "single: one network alone",
    "concatenated": "concatenated: those of the folds side by side",
}


def _page(content: dict[str, Any]) -> Group:
    """Both tables and the verdict; 80 columns with names of up to 20 letters."""
    from rich.console import Group
    from rich.text import Text

    parts = []
    label = content["label"]
    last = content["metrics"][-1]
    names = {**_SHOWN, **({} if last in _SHOWN else {last: last})}
    rows = content["rows"]
    width = max([12, *(len(row["row"]) for row in rows)])
    for kind, head in _HEADS.items():
        title = head + (f" ({label.split(':')[0]})" if label else "")
        parts.append(Text(title, style="bold"))
        parts.append(Text(" " * width + "".join(f"{name:>15}" for name in names.values())))
        shown = [*rows, content["baseline"]] if kind == "single" else rows
        for row in shown:
            cells = (
                ["-"] * len(names)
                if row[kind] is None
                else [_cell(row[kind][name]) for name in names]
            )
            parts.append(Text(f"{row['row']:<{width}}" + "".join(f"{cell:>15}" for cell in cells)))
        parts.append(Text(""))
    parts.append(
        Text(
            f"on classes never seen; mean ± 95 % interval (t) over {len(content['seeds'])} repeats"
        )
    )
    if content["lead"] is not None:
        parts.append(Text(content["lead"]["sentence"]))
    if rows and not content["baseline_beaten"]:
        parts.append(Text("No row is better than the untrained network."))
    if label:
        parts.append(Text(f"{label}.".capitalize(), style="bold"))
    return Group(*parts)


def _cell(value: dict[str, Any]) -> str:
    if value["low"] is None:
        return f"{value['mean']:.4f}        "
    return f"{value['mean']:.4f} ±{value['mean'] - value['low']:.4f}"


def _batch(words: str) -> tuple[int, int]:
    classes, times, images = words.lower().partition("x")
    if not (times and classes.isdecimal() and images.isdecimal()):
        raise UsageError(f"--batch takes classes x images, got {words!r}", hint="--batch 16x4")
    return int(classes), int(images)


def _numbers(name: str, words: str) -> tuple[int, ...]:
    parts = [part.strip() for part in words.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"{name} takes numbers from 1 up, got {words!r}", hint=f"{name} 1,2,4")
    return tuple(dict.fromkeys(map(int, parts)))
