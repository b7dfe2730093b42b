"""What a training is going to do, decided before it begins: device, splits, lengths."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from embedkit import losses, models
from embedkit.data import PhotoSet, PKSampler, check_readable, hold_out_classes
from embedkit.errors import ImageError, MissingError, UnknownNameError, UsageError
from embedkit.train.recipe import Recipe

__all__ = ["Plan", "check_names", "choose_device", "create_loss", "make_plan"]

_LEAST_EPOCH_STEPS = 20


@dataclass(frozen=True)
class Plan:
    """A training with everything automatic decided.

    Attributes:
        recipe: What was asked for.
        device: Where it runs.
        amp: Number format of the network's arithmetic; None is float32.
        photos: Those in use, every one with its split: ``train``, ``val`` or ``test``.
        classes: Names of the training classes, sorted; a label's number is its place.
        epoch_steps: Optimiser steps of an epoch.
        steps: Of the whole training.
        failures: Unreadable files and why; they are not in `photos`.
        left_out: Training classes with a single image, which has no positive; not in `photos`.
    """

    recipe: Recipe
    device: torch.device
    amp: torch.dtype | None
    photos: PhotoSet
    classes: tuple[str, ...]
    epoch_steps: int
    steps: int
    failures: tuple[tuple[Path, ImageError], ...]
    left_out: tuple[str, ...]

    @property
    def epochs(self) -> int:
        """The last may be shorter than `epoch_steps`."""
        return math.ceil(self.steps / self.epoch_steps)

    def steps_of(self, epoch: int) -> int:
        """Steps of epoch 0, 1, ..."""
        return min(self.epoch_steps, self.steps - epoch * self.epoch_steps)

    def rows(self, split: str) -> npt.NDArray[np.int64]:
        """Places in `photos` of one split; may be empty for ``val`` and ``test``."""
        return np.flatnonzero(np.array(self.photos.split) == split)

    def sampler(self) -> PKSampler:
        """The training batches; their places count along `rows`."""
        return _sampler(self.recipe, self.labels(), self.epoch_steps)

    def labels(self) -> npt.NDArray[np.int64]:
        """``(train images,)`` numbers of the training images' classes, in the order of `rows`."""
        number = {name: place for place, name in enumerate(self.classes)}
        return np.array([number[self.photos.labels[row]] for row in self.rows("train")])

    def counts(self, split: str) -> dict[str, int]:
        """Images and classes of one split."""
        rows = self.rows(split)
        return {
            "images": len(rows),
            "classes": len({self.photos.labels[row] for row in rows}),
        }


def make_plan(
    recipe: Recipe,
    photos: PhotoSet,
    *,
    device: torch.device,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Decide everything; every photo is decoded once to see whether it can be.

    Rows without a split count as ``train`` when others have one. Where there is no ``val``, whole
    classes are held out of ``train``. `progress` hears of every photo decoded, as in
    `check_readable`.

    Raises:
        UnknownNameError: No such loss, option, backbone or pooling.
        DataError: Too few classes with two images.
    """
    check_names(recipe)
    failures = check_readable(photos, workers, progress=progress)
    broken = {path for path, _ in failures}
    usable = [row for row, path in enumerate(photos.paths) if path not in broken]
    photos, left_out = _split(photos.subset(usable), recipe)
    plan = Plan(
        recipe=recipe,
        device=device,
        amp=_number_format(recipe.amp, device),
        photos=photos,
        classes=tuple(sorted({photos.labels[row] for row in _rows(photos, "train")})),
        epoch_steps=1,
        steps=1,
        failures=tuple(failures),
        left_out=left_out,
    )
    whole = _sampler(recipe, plan.labels(), None).steps
    epoch_steps = recipe.epoch_steps or max(_LEAST_EPOCH_STEPS, whole)
    epochs = recipe.epochs or recipe.automatic_epochs(epoch_steps)
    return dataclasses.replace(
        plan, epoch_steps=epoch_steps, steps=recipe.steps or epochs * epoch_steps
    )


def choose_device(name: str) -> torch.device:
    """The device behind ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Raises:
        UsageError: Another word.
        MissingError: Asked for and not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    kind, colon, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (
        colon and not (kind == "cuda" and number.isdecimal())
    ):
        raise UsageError(
            f"there is no device {name!r}", hint="--device auto, cpu, cuda, cuda:0 or mps"
        )
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(number or 0) >= count:
            built = torch.version.cuda or "no CUDA"
            raise MissingError(
                f"the device {name} is not here",
                facts=f"{count} CUDA devices are usable; this torch was built for {built}",
                hint="--device cpu",
            )
        return torch.device("cuda", int(number or 0))
    if kind == "mps" and not torch.backends.mps.is_available():
        raise MissingError(
            "the device mps is not here",
            facts="it is the GPU of an Apple machine",
            hint="--device cpu",
        )
    return torch.device(kind)


def create_loss(recipe: Recipe, classes: int) -> losses.MetricLoss:
    """The recipe's loss for so many training classes; errors as `losses.create` raises them."""
    sizes = (classes, recipe.dim) if losses.needs_classes(recipe.loss) else (None, None)
    return losses.create(
        recipe.loss, num_classes=sizes[0], embedding_dim=sizes[1], **recipe.loss_options
    )


def _sampler(recipe: Recipe, labels: npt.NDArray[np.int64], steps: int | None) -> PKSampler:
    return PKSampler(
        labels,
        classes_per_batch=recipe.classes_per_batch,
        images_per_class=recipe.images_per_class,
        seed=recipe.seed,
        steps=steps,
    )


def check_names(recipe: Recipe) -> None:
    """Refuse a typing error before anything slow begins.

    Raises:
        UnknownNameError: No such loss, option, backbone or pooling.
        UsageError: The loss is no use with batches drawn by class.
    """
    special = losses.special_batch(recipe.loss)
    if special:
        raise UsageError(
            f"the loss {recipe.loss} cannot be trained by this command",
            facts=f"it needs batches of {special}; train draws its batches by class",
            hint=f"--loss rll; in Python: embedkit.losses.create({recipe.loss!r})",
        )
    known = losses.options(recipe.loss)
    for name in recipe.loss_options:
        if name not in known:
            raise UnknownNameError(f"option of {recipe.loss}", name, known)
    models.backbone_entry(recipe.backbone)
    if recipe.pooling not in models.pooling_names():
        raise UnknownNameError("pooling", recipe.pooling, models.pooling_names())


def _number_format(amp: str, device: torch.device) -> torch.dtype | None:
    on_cuda = device.type == "cuda"
    if amp == "auto":
        if not on_cuda:
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if amp == "fp16" and not on_cuda:
        raise UsageError(f"fp16 training needs a CUDA device, this is {device}", hint="--amp off")
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def _split(photos: PhotoSet, recipe: Recipe) -> tuple[PhotoSet, tuple[str, ...]]:
    """`photos` with every split filled in, and the training classes left out of it."""
    split = [name or "train" for name in photos.split]
    pool = [row for row, name in enumerate(split) if name == "train"]
    sizes = Counter(photos.labels[row] for row in pool)
    left_out = tuple(sorted(name for name, size in sizes.items() if size == 1))
    pool = [row for row in pool if sizes[photos.labels[row]] > 1]
    given = [row for row, name in enumerate(split) if name in ("val", "test")]
    if "val" not in split and recipe.val_share > 0:
        held_out = hold_out_classes(photos.subset(pool), share=recipe.val_share, seed=recipe.seed)
        for row, name in zip(pool, held_out.split, strict=True):
            split[row] = name
    rows = sorted([*pool, *given])
    # Category and group decide nothing here, and a resumed run reads its photos without them.
    chosen = dataclasses.replace(photos.subset(rows), category=None, group=None)
    return dataclasses.replace(chosen, split=tuple(split[row] for row in rows)), left_out


def _rows(photos: PhotoSet, split: str) -> list[int]:
    return [row for row, name in enumerate(photos.split) if name == split]
