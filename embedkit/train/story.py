"""The story of a training as lines of text, and who is told them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from embedkit.data import PhotoSet
from embedkit.methods import learns_from, options
from embedkit.train.measure import brief
from embedkit.train.plan import Plan
from embedkit.train.recipe import Recipe
from embedkit.train.robust_labels import noise_options

__all__ = [
    "Reporter",
    "Silent",
    "describe",
    "tell_baseline",
    "tell_epoch",
    "tell_rates",
    "tell_result",
]

# Share of the time; below it, decoding is hidden behind the network's arithmetic.
_LONG_WAIT = 0.2
# Of a terminal, less the word at the beginning of the line.
_WIDTH = 80 - 10


class Reporter(Protocol):
    """Who is told; `embedkit.cli.display.Display` is one."""

    def note(self, label: str, text: str) -> None:
        """A line of the story."""
        ...

    def warn(self, text: str) -> None:
        """Something the user should know although the work goes on."""
        ...

    def progress(
        self, what: str, total: int | None
    ) -> AbstractContextManager[Callable[[int, int], None]]:
        """A bar; the block calls ``advance(done, failed)``."""
        ...


class Silent:
    """A reporter that tells nobody."""

    def note(self, label: str, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    @contextlib.contextmanager
    def progress(self, what: str, total: int | None) -> Iterator[Callable[[int, int], None]]:
        yield lambda done, failed: None


def describe(plan: Plan, tell: Reporter) -> None:
    """The lines on what a training is going to do."""
    recipe, photos = plan.recipe, plan.photos
    skipped = [f"{len(plan.failures)} unreadable files"] if plan.failures else []
    skipped += [f"{plan.lost_triplets} triplets of such files"] if plan.lost_triplets else []
    skipped += [f"{len(plan.left_out)} classes of one image"] if plan.left_out else []
    without = f"; left out: {', '.join(skipped)}" if skipped else ""
    tell.note("data", f"{_amount(photos, ', ')} in {photos.root}{without}")
    parts = {split: photos.subset(plan.rows(split)) for split in ("train", "val", "test")}
    told = [f"{split} {_amount(part, ' of ')}" for split, part in parts.items() if len(part)]
    tell.note("split", "; ".join(told))
    seen = set(parts["val"].labels) & set(plan.classes) - {""}
    if seen:
        tell.note("", f"{len(seen)} classes of val are also trained on")
    if not len(plan.measured("val")):
        why = "val has no labels" if len(parts["val"]) else "nothing held out"
        tell.note("", f"{why}: no epoch is measured, and the last weights count")
    frozen = f", first {recipe.freeze} stages frozen" if recipe.freeze else ""
    norm = ", BatchNorm frozen" if recipe.batch_norm_frozen else ""
    narrower = ", ".join(map(str, recipe.widths[:-1]))
    nested = f" (also its first {narrower})" if narrower else ""
    tell.note(
        "model",
        f"{recipe.backbone} (weights {recipe.weights}{frozen}{norm}), {recipe.pooling} pooling, "
        f"{recipe.dim}-d{nested}, {recipe.image_size} x {recipe.image_size} pixels",
    )
    told = [f"{k}={v}" for k, v in {**options(recipe.loss), **recipe.loss_options}.items()]
    told += [f"memory_bank={recipe.memory_bank}"] if recipe.memory_bank else []
    tell.note("loss", f"{recipe.loss}  {' '.join(told)}")
    if recipe.noise != "none":
        told = [f"{k}={v:g}" for k, v in noise_options(recipe.noise, recipe.noise_options).items()]
        tell.note("noise", f"{recipe.noise}  {' '.join(told)}")
        if recipe.noise in ("pencil", "proselflc") and recipe.patience:
            tell.note("", "it counts on the whole training, which may end early: --patience 0")
    if recipe.teacher is not None:
        tell.note(
            "teacher",
            f"{recipe.teacher} ({recipe.distill}, weight {recipe.distill_weight:g}, "
            f"{recipe.teacher_view} photos)",
        )
    classes_per_batch = min(recipe.classes_per_batch, len(plan.classes))
    batch = f"{classes_per_batch} classes x {recipe.images_per_class} images"
    batch += f" ({recipe.batches})" if recipe.batches != "pk" else ""
    if learns_from(recipe.loss) != "classes":
        batch = f"{recipe.batch_size} images at once"
    decay = f", {recipe.layer_decay:g} of it from stage to stage" * (recipe.layer_decay < 1)
    search = ", both to be found" * recipe.find_learning_rate
    tell.note(
        "steps",
        f"{plan.steps:,} in {plan.epochs} epochs of up to {plan.epoch_steps}; {batch}; "
        f"learning rate {recipe.backbone_learning_rate:g}{decay}, "
        f"head {recipe.head_learning_rate:g}{search}",
    )
    number = str(plan.amp or torch.float32).removeprefix("torch.")
    compiled = ", compiled" if recipe.compile else ""
    tell.note("device", f"{plan.device} ({number}{compiled}), {torch.get_num_threads()} threads")


def tell_baseline(baseline: dict[str, Any], tell: Reporter) -> None:
    """One line per measured split."""
    for split, metrics in baseline.items():
        tell.note("baseline", f"{split}: {brief(metrics)}  pooled features, untrained")
        chance = metrics.get("chance_target_distance")
        if chance is not None:
            tell.note("", f"{split}: target distance {chance:.4g} by chance")


def tell_rates(found: dict[str, Any], recipe: Recipe, tell: Reporter) -> None:
    """What the test of learning rates decided."""
    factor = found["factor"]
    told = (
        f"learning rate {recipe.backbone_learning_rate * factor:.2g}, "
        f"head {recipe.head_learning_rate * factor:.2g}, of {len(found['losses'])} tried: "
    )
    if found["reason"]:
        tell.note("rates", f"{told}unchanged, because {found['reason']}")
    else:
        tell.note("rates", f"{told}{factor:.2g} times the recipe's")


def tell_epoch(row: dict[str, Any], epochs: int, tell: Reporter) -> None:
    """One line of 80 columns: loss, retrieval on ``val``, tell-tales, time since the beginning.

    ``active 51%/34%`` are the shares of positive and negative pairs that still pull or push; all
    tell-tales of the loss are in metrics.jsonl.
    """
    loss = "-" if row["loss"] is None else f"{row['loss']:.3f}"
    parts = [f"{row['epoch']}/{epochs}", f"loss {loss}"]
    if row["val"]:
        parts.append(brief(row["val"], digits=3))
    stats = row["stats"]
    active = [name for name in ("active_positives", "active_negatives") if name in stats]
    share = row["waited"] / max(row["seconds"], 1e-9)
    slow = f", {share:.0%} of it waiting for pictures" if share > _LONG_WAIT else ""
    time = f"{row['seconds']:.0f} s{slow}"
    if active:
        parts.append("active " + "/".join(f"{stats[name]:.0%}" for name in active))
    for name in () if active else list(stats)[:2]:
        told = f"{name.replace('_', ' ')} {stats[name]:.2f}"
        if len("  ".join([*parts, told, time])) <= _WIDTH:
            parts.append(told)
    tell.note("epoch", "  ".join([*parts, time]))


def tell_result(
    best: dict[str, Any] | None,
    baseline: dict[str, Any],
    test: dict[str, Any] | None,
    tell: Reporter,
) -> None:
    """The best epoch, beside the untrained network."""
    if best is None:
        return
    tell.note("best", f"epoch {best['epoch']}")
    for split, metrics in {"val": best["val"], "test": test}.items():
        if metrics:
            tell.note(split, f"{brief(metrics)}  untrained: {brief(baseline[split])}")


def _amount(photos: PhotoSet, joint: str) -> str:
    """``1,776 images, 89 classes, 2 numbers each``."""
    text = f"{len(photos):,} images"
    if photos.labelled:
        text += f"{joint}{len(photos.classes()):,} classes"
    if photos.targets:
        width = len(photos.targets[0])
        text += f", {width} {'number' if width == 1 else 'numbers'} each"
    if photos.triplets is not None:
        text += f" in {len(photos.triplets):,} triplets"
    return text
