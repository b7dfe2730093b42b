"""`embedkit train ./photos --loss rll`"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedkit.cli.display import AsJson, Display, Quiet, Verbose
from embedkit.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from embedkit.train import Plan, Recipe, Run, Teacher

__all__ = ["train"]

_COMMON, _MODEL = "Common", "Model"
_BATCHES, _OPTIMISATION = "Batches and steps", "Optimisation"
_DATA, _OUTPUT = "Data", "Output"
_HELP = "Wrong labels, and a teacher"


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
            metavar="RECIPE",
            rich_help_panel=_COMMON,
            help="A name of `embedkit list recipes`, or a config.toml; options win.",
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
    nested: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            rich_help_panel=_MODEL,
            help="Also learn its first N numbers as embeddings (none).",
        ),
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
    # --- Batches and steps
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="CxK",
            rich_help_panel=_BATCHES,
            help="Classes x images of each (16x4).",
        ),
    ] = None,
    batches: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            rich_help_panel=_BATCHES,
            help="pk, varied or hard-classes (pk).",
        ),
    ] = None,
    memory_bank: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            rich_help_panel=_BATCHES,
            help="Compare with N earlier images too (0).",
        ),
    ] = None,
    chunk: Annotated[
        int | None,
        typer.Option(rich_help_panel=_BATCHES, help="Images in memory at once (the whole batch)."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(rich_help_panel=_BATCHES, help="Length in steps instead of epochs."),
    ] = None,
    epoch_steps: Annotated[
        int | None,
        typer.Option(rich_help_panel=_BATCHES, help="Steps of an epoch (all images, at least 20)."),
    ] = None,
    # --- Optimisation
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
    find_lr: Annotated[
        bool | None,
        typer.Option(
            "--find-lr/--no-find-lr",
            rich_help_panel=_OPTIMISATION,
            help="Try 0.01 to 100 times these rates first (no).",
        ),
    ] = None,
    layer_decay: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_OPTIMISATION,
            help="Of the rate, per stage towards the picture (1).",
        ),
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
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            rich_help_panel=_OPTIMISATION,
            help="Compile the backbone, for CUDA (no).",
        ),
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
        typer.Option(
            "--workers", "-j", min=1, rich_help_panel=_DATA, help="Decoding threads (one per core)."
        ),
    ] = None,
    # --- Wrong labels, and a teacher
    noise: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_HELP,
            help="label-smoothing, confidence-penalty, boot-soft, proselflc, imae, dm, "
            "disturblabel or pencil; names suspicious labels (none).",
        ),
    ] = None,
    noise_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", rich_help_panel=_HELP, help="Option of --noise; repeat."
        ),
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", rich_help_panel=_HELP, help="Exported model to learn from (none)."
        ),
    ] = None,
    distill: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT",
            rich_help_panel=_HELP,
            help="Its relative distances, absolute places or both (relative).",
        ),
    ] = None,
    distill_weight: Annotated[
        float | None,
        typer.Option(rich_help_panel=_HELP, help="Of the teacher beside the loss (1)."),
    ] = None,
    teacher_view: Annotated[
        str | None,
        typer.Option(
            metavar="VIEW",
            rich_help_panel=_HELP,
            help="It is shown augmented photos in every step, or plain ones once (augmented).",
        ),
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
        "nested": None if nested is None else _widths(nested),
        "image_size": image_size,
        "freeze": freeze,
        "freeze_batch_norm": freeze_batch_norm,
        "chunk": chunk,
        "batches": batches,
        "memory_bank": memory_bank,
        "steps": steps,
        "epoch_steps": epoch_steps,
        "learning_rate": learning_rate,
        "head_learning_rate": head_learning_rate,
        "proxy_learning_rate": proxy_learning_rate,
        "find_learning_rate": find_lr,
        "layer_decay": layer_decay,
        "weight_decay": weight_decay,
        "clip_gradient": clip_gradient,
        "warmup": warmup,
        "ema": ema,
        "amp": amp,
        "compile": compile,
        "patience": patience,
        "eval_every": eval_every,
        "val_share": val_share,
        "crop_ratio": crop_ratio,
        "augment_scale": augment_scale,
        "augment_ratio": augment_ratio,
        "augment_flip": augment_flip,
        "noise": noise,
        "teacher": None if teacher is None else str(teacher.absolute()),
        "distill": distill,
        "distill_weight": distill_weight,
        "teacher_view": teacher_view,
    }
    settings = {key: value for key, value in given.items() if value is not None}
    if batch is not None:
        settings["classes_per_batch"], settings["images_per_class"] = _batch(batch)
    if resume is not None and name is not None:
        raise UsageError("a resumed run keeps its name", hint="leave --name out")
    loss_options = dict(_option(text) for text in option or [])
    noise_options = dict(_option(text, "--noise-option") for text in noise_option or [])

    # Idle OpenMP threads that spin keep the cores from the threads that decode, and from every
    # other program: on a busy machine a step takes three times as long. Read when torch starts.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from embedkit import data as photo_room
    from embedkit.cli.recipes import find_recipe
    from embedkit.data.doctor_facts import default_cache
    from embedkit.methods import learns_from
    from embedkit.train import Recipe, Run, choose_device, describe, examine, make_plan, new_run_dir
    from embedkit.train import train as train_by
    from embedkit.train.distributed import World
    from embedkit.train.run import create_untrained

    leads = World.told().leads
    display = Display(as_json=as_json, quiet=quiet or not leads)
    old = Run.load(resume) if resume is not None else None
    config = find_recipe(config) if config is not None else None
    base = Recipe.load(config) if config is not None else old.recipe if old else Recipe()
    recipe = _override(base, settings, loss_options, noise_options)
    if old is not None and data is None:
        photos = old.photos()
    else:
        labels = learns_from(recipe.loss) == "classes"
        photos = photo_room.read_photos(photo_room.resolve_source(data), labels=labels)
    if dry_run and leads:
        place = choose_device(device)
        # What cannot be made is refused as by a real run. ImageNet weights are not fetched for it.
        learned = old is None and recipe.weights != "imagenet"
        create_untrained(recipe, weights=recipe.weights if learned else "none")
        checkup = examine(recipe, photos, display, cache=default_cache(), workers=workers)
        plan = make_plan(recipe, photos, device=place, failures=checkup.failures())
        describe(plan, display)
        display.answer(recipe.to_toml().rstrip())
        display.document("train", {"dry_run": True, "recipe": recipe.to_json(), **_sizes(plan)})
    if dry_run:
        return
    folder = old.path if old else new_run_dir(runs, recipe, name=name)
    try:
        with _teacher(recipe, device, display) as loaded:
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
                teacher=loaded,
            )
    except Interrupted as error:
        if leads:
            raise
        raise typer.Exit(error.exit_code) from error
    if leads:
        _finish(run, display)


@contextlib.contextmanager
def _teacher(recipe: Recipe, device: str, display: Display) -> Iterator[Teacher | None]:
    """The recipe's teacher, loaded by the runtime; PyTorch does not see it."""
    if recipe.teacher is None:
        yield None
        return
    from embedkit.runtime import Embedder
    from embedkit.train import Teacher

    # Where the runtime knows no such device, a teacher on the CPU is slower and as good.
    with Embedder.load(recipe.teacher, device="cpu" if device == "cpu" else "auto") as embedder:
        contract = embedder.contract
        if contract.vectors > 1:
            raise UsageError(
                "a teacher must give one vector per picture",
                facts=f"{contract.name!r} gives {contract.vectors} of each",
                hint="--teacher with another model",
            )
        display.note("teacher", f"{contract.name}, {embedder.embedding_dim}-d, {embedder.device}")
        yield Teacher(
            embed=embedder.embed_pixels,
            dim=embedder.embedding_dim,
            height=contract.preprocess.height,
            width=contract.preprocess.width,
            fingerprint=contract.fingerprint,
        )


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
    shown = ["stopped_because", "device", "data", "steps", "elapsed", "baseline", "best", "test"]
    shown += ["nested", "rate_test"]
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


def _override(
    base: Recipe,
    settings: dict[str, Any],
    loss_options: dict[str, Any],
    noise_options: dict[str, Any],
) -> Recipe:
    """`base` with the command line's settings; options of another loss do not carry over."""
    from embedkit.train import Recipe

    merged = base.to_json()
    if settings.get("loss", base.loss) != base.loss:
        merged["loss_options"] = {}
    if settings.get("noise", base.noise) != base.noise:
        merged["noise_options"] = {}
    if "epochs" in settings or "steps" in settings:
        merged["epochs"] = merged["steps"] = None
    merged["loss_options"] = {**merged["loss_options"], **loss_options}
    merged["noise_options"] = {**merged["noise_options"], **noise_options}
    return Recipe.from_json({**merged, **settings})


def _option(text: str, flag: str = "-s") -> tuple[str, Any]:
    """``alpha=1.4`` -> a name and a number, true, false, none or text."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise UsageError(f"{flag} takes NAME=VALUE, got {text!r}", hint=f"{flag} alpha=1.4")
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


def _widths(text: str) -> list[int]:
    """``32,64,128``, in any order; ``none`` is none."""
    if text.lower() == "none":
        return []
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UsageError(f"--nested takes widths, got {text!r}", hint="--nested 32,64,128")
    return sorted({int(part) for part in parts})


def _seconds(text: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600}
    number, unit = (text[:-1], units[text[-1:]]) if text[-1:] in units else (text, 1)
    try:
        return float(number) * unit
    except ValueError as error:
        raise UsageError(f"--max-time takes a time, got {text!r}", hint="--max-time 30m") from error
