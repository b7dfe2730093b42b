"""`embedkit train ./photos --loss rll`"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedkit.cli.display import AsJson, Display, Quiet, Verbose
from embedkit.errors import UsageError

if TYPE_CHECKING:
    from embedkit.train import Plan, Recipe, Run

__all__ = ["train"]

_COMMON, _MODEL, _OPTIMISATION = "Common", "Model", "Optimisation"
_DATA, _OUTPUT = "Data", "Output"


def train(
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="DATA",
            help="Photos: a folder per class, folders train, val, test of such, or a CSV "
            "(./data/train, ./data or .).",
        ),
    ] = None,
    # --- Common
    loss: Annotated[
        str | None,
        typer.Option(rich_help_panel=_COMMON, help="Name of the loss or method (rll)."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "-s", metavar="NAME=VALUE", rich_help_panel=_COMMON, help="Option of the loss; repeat."
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(rich_help_panel=_COMMON, help="Passes over the data (by data size)."),
    ] = None,
    max_time: Annotated[
        str | None,
        typer.Option(metavar="TIME", rich_help_panel=_COMMON, help="End after 90s, 30m, 2h."),
    ] = None,
    device: Annotated[
        str,
        typer.Option(rich_help_panel=_COMMON, help="auto, cpu, cuda, cuda:N or mps."),
    ] = "auto",
    seed: Annotated[
        int | None,
        typer.Option(rich_help_panel=_COMMON, help="Repeats bit for bit on the CPU (0)."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_COMMON,
            help="A recipe, as config.toml of a run; options win.",
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="RUN", rich_help_panel=_COMMON, help="Go on with a run: runs/last."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", rich_help_panel=_COMMON, help="Show the plan and end."),
    ] = False,
    # --- Model
    backbone: Annotated[
        str | None,
        typer.Option(rich_help_panel=_MODEL, help="By torchvision's name (mobilenet_v3_small)."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(rich_help_panel=_MODEL, help="imagenet, none or a file (imagenet)."),
    ] = None,
    pooling: Annotated[
        str | None,
        typer.Option(rich_help_panel=_MODEL, help="avg, gem or second-order (avg)."),
    ] = None,
    dim: Annotated[
        int | None,
        typer.Option(rich_help_panel=_MODEL, help="Width of the embedding (128)."),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(rich_help_panel=_MODEL, help="Side of the input, pixels (224)."),
    ] = None,
    freeze: Annotated[
        int | None,
        typer.Option(rich_help_panel=_MODEL, help="First stages that do not learn (0)."),
    ] = None,
    freeze_batch_norm: Annotated[
        bool | None,
        typer.Option(
            "--freeze-batch-norm/--learn-batch-norm",
            rich_help_panel=_MODEL,
            help="Keep BatchNorm's statistics (frozen if pretrained).",
        ),
    ] = None,
    # --- Optimisation
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="CxK",
            rich_help_panel=_OPTIMISATION,
            help="Classes x images of each (16x4).",
        ),
    ] = None,
    chunk: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_OPTIMISATION, help="Images in memory at once (the whole batch)."
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(rich_help_panel=_OPTIMISATION, help="Length in steps instead of epochs."),
    ] = None,
    epoch_steps: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_OPTIMISATION, help="Steps of an epoch (all images, at least 20)."
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_OPTIMISATION,
            help="Of the backbone (1e-4, or 1e-3 from none).",
        ),
    ] = None,
    head_learning_rate: Annotated[
        float | None,
        typer.Option(rich_help_panel=_OPTIMISATION, help="Of pooling and head (1e-3)."),
    ] = None,
    proxy_learning_rate: Annotated[
        float | None,
        typer.Option(rich_help_panel=_OPTIMISATION, help="Of the loss's vectors (1e-2)."),
    ] = None,
    weight_decay: Annotated[
        float | None,
        typer.Option(rich_help_panel=_OPTIMISATION, help="Of AdamW (1e-4)."),
    ] = None,
    clip_gradient: Annotated[
        float | None,
        typer.Option(rich_help_panel=_OPTIMISATION, help="Its greatest length (none)."),
    ] = None,
    ema: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_OPTIMISATION, help="Keep averaged weights: 0.99, 0.999 (no)."
        ),
    ] = None,
    warmup: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_OPTIMISATION,
            help="Share of the steps; then a cosine (0.1).",
        ),
    ] = None,
    amp: Annotated[
        str | None,
        typer.Option(rich_help_panel=_OPTIMISATION, help="auto, off, bf16 or fp16 (auto)."),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_OPTIMISATION,
            help="Evaluations without gain; 0: no end (5).",
        ),
    ] = None,
    eval_every: Annotated[
        int | None,
        typer.Option(rich_help_panel=_OPTIMISATION, help="Epochs between evaluations (1)."),
    ] = None,
    # --- Data
    val_share: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_DATA,
            help="Classes held out if there is no val; 0: none (0.2).",
        ),
    ] = None,
    crop_ratio: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_DATA,
            help="Share of the centre that is looked at (0.875).",
        ),
    ] = None,
    augment_scale: Annotated[
        tuple[float, float] | None,
        typer.Option(rich_help_panel=_DATA, help="Least and greatest area of a crop (0.3 1)."),
    ] = None,
    augment_ratio: Annotated[
        tuple[float, float] | None,
        typer.Option(
            rich_help_panel=_DATA,
            help="Least and greatest width to height (0.75 1.33).",
        ),
    ] = None,
    augment_flip: Annotated[
        bool | None,
        typer.Option(
            "--flip/--no-flip",
            rich_help_panel=_DATA,
            help="Mirror half of the crops (flip).",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, rich_help_panel=_DATA, help="Decoding threads (one per core)."),
    ] = None,
    # --- Output
    runs: Annotated[Path, typer.Option(rich_help_panel=_OUTPUT, help="Folder of the runs.")] = Path(
        "runs"
    ),
    name: Annotated[
        str | None,
        typer.Option(rich_help_panel=_OUTPUT, help="Of the run (date-loss-backbone)."),
    ] = None,
    tensorboard: Annotated[
        bool,
        typer.Option(
            "--tensorboard", rich_help_panel=_OUTPUT, help="Also event files in the run's folder."
        ),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train an embedding on photos; measure it on classes never seen.

    Example: embedkit train ./photos --loss rll -s alpha=1.4 --max-time 30m
    """
    given = {
        "loss": loss,
        "epochs": epochs,
        "max_time": None if max_time is None else _seconds(max_time),
        "seed": seed,
        "backbone": backbone,
        "weights": weights,
        "pooling": pooling,
        "dim": dim,
        "image_size": image_size,
        "freeze": freeze,
        "freeze_batch_norm": freeze_batch_norm,
        "chunk": chunk,
        "steps": steps,
        "epoch_steps": epoch_steps,
        "learning_rate": learning_rate,
        "head_learning_rate": head_learning_rate,
        "proxy_learning_rate": proxy_learning_rate,
        "weight_decay": weight_decay,
        "clip_gradient": clip_gradient,
        "warmup": warmup,
        "ema": ema,
        "amp": amp,
        "patience": patience,
        "eval_every": eval_every,
        "val_share": val_share,
        "crop_ratio": crop_ratio,
        "augment_scale": augment_scale,
        "augment_ratio": augment_ratio,
        "augment_flip": augment_flip,
    }
    settings = {key: value for key, value in given.items() if value is not None}
    if batch is not None:
        settings["classes_per_batch"], settings["images_per_class"] = _batch(batch)
    if resume is not None and name is not None:
        raise UsageError("a resumed run keeps its name", hint="leave --name out")
    loss_options = dict(_option(text) for text in option or [])

    # Idle OpenMP threads that spin keep the cores from the threads that decode, and from every
    # other program: on a busy machine a step takes three times as long. Read when torch starts.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from embedkit import data as photo_room
    from embedkit.data.doctor_facts import default_cache
    from embedkit.methods import learns_from
    from embedkit.train import Recipe, Run, choose_device, describe, examine, make_plan, new_run_dir
    from embedkit.train import train as train_by

    display = Display(as_json=as_json, quiet=quiet)
    old = Run.load(resume) if resume is not None else None
    base = Recipe.load(config) if config is not None else old.recipe if old else Recipe()
    recipe = _override(base, settings, loss_options)
    if old is not None and data is None:
        photos = old.photos()
    else:
        labels = learns_from(recipe.loss) == "classes"
        photos = photo_room.read_photos(photo_room.resolve_source(data), labels=labels)
    if dry_run:
        place = choose_device(device)
        checkup = examine(recipe, photos, display, cache=default_cache(), workers=workers)
        plan = make_plan(recipe, photos, device=place, failures=checkup.failures())
        describe(plan, display)
        display.answer(recipe.to_toml().rstrip())
        display.document("train", {"dry_run": True, "recipe": recipe.to_json(), **_sizes(plan)})
        return
    folder = old.path if old else new_run_dir(runs, recipe, name=name)
    run = train_by(
        recipe,
        photos,
        folder,
        device=device,
        reporter=display,
        resume=old is not None,
        workers=workers,
        cache=default_cache(),
        tensorboard=tensorboard,
    )
    _finish(run, display)


def _finish(run: Run, display: Display) -> None:
    """Where the result is and what to type next; exit code 3 when files were skipped."""
    from embedkit.report import write_run_report

    record = run.record
    skipped = record["data"]["unreadable"]
    report = write_run_report(run.path)
    display.note("saved", str(run.path))
    display.note("report", str(report))
    display.note("next", f"embedkit export {run.path}")
    if skipped:
        display.warn(f"{skipped} files are no usable pictures: {run.path / 'failed.jsonl'}")
    display.answer(str(run.path))
    shown = ("stopped_because", "device", "data", "steps", "elapsed", "baseline", "best", "test")
    document = {"run": str(run.path), "report": str(report)}
    display.document("train", {**document, **{key: record[key] for key in shown}})
    if skipped:
        raise typer.Exit(3)


def _sizes(plan: Plan) -> dict[str, Any]:
    return {
        "device": str(plan.device),
        "steps": plan.steps,
        "epochs": plan.epochs,
        "epoch_steps": plan.epoch_steps,
        "splits": {split: plan.counts(split) for split in ("train", "val", "test")},
        "unreadable": len(plan.failures),
        "lone_classes": len(plan.left_out),
    }


def _override(base: Recipe, settings: dict[str, Any], loss_options: dict[str, Any]) -> Recipe:
    """`base` with the command line's settings; options of another loss do not carry over."""
    from embedkit.train import Recipe

    merged = base.to_json()
    if settings.get("loss", base.loss) != base.loss:
        merged["loss_options"] = {}
    if "epochs" in settings or "steps" in settings:
        merged["epochs"] = merged["steps"] = None
    merged["loss_options"] = {**merged["loss_options"], **loss_options}
    return Recipe.from_json({**merged, **settings})


def _option(text: str) -> tuple[str, Any]:
    """``alpha=1.4`` -> a name and a number, true, false, none or text."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise UsageError(f"-s takes NAME=VALUE, got {text!r}", hint="-s alpha=1.4")
    words = {"none": None, "true": True, "false": False}
    if value.lower() in words:
        return name, words[value.lower()]
    for number in (int, float):
        try:
            return name, number(value)
        except ValueError:
            continue
    return name, value


def _batch(text: str) -> tuple[int, int]:
    classes, times, images = text.lower().partition("x")
    if not (times and classes.isdecimal() and images.isdecimal()):
        raise UsageError(f"--batch takes classes x images, got {text!r}", hint="--batch 16x4")
    return int(classes), int(images)


def _seconds(text: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600}
    number, unit = (text[:-1], units[text[-1:]]) if text[-1:] in units else (text, 1)
    try:
        return float(number) * unit
    except ValueError as error:
        raise UsageError(f"--max-time takes a time, got {text!r}", hint="--max-time 30m") from error
