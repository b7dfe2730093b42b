"""What a training is going to do, decided before it begins: device, splits, lengths."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from embedkit import methods, models
from embedkit.data import PhotoSet, hold_out_classes, hold_out_groups
from embedkit.errors import DataError, ImageError, MissingError, UnknownNameError, UsageError
from embedkit.methods import LearnsFrom, Setting
from embedkit.train.recipe import Recipe

__all__ = ["Plan", "check_data", "check_names", "choose_device", "make_plan"]

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
        lost_triplets: Triplets that name an unreadable file; not in `photos`.
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
    lost_triplets: int = 0

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

    def measured_by(self) -> LearnsFrom | None:
        """What tells good from bad: ``classes``, ``numbers`` or ``triplets``; None: nothing."""
        if self.photos.triplets is not None:
            return "triplets"
        if methods.learns_from(self.recipe.loss) == "numbers":
            return "numbers"
        return "classes" if self.photos.labelled else None

    def measured(self, split: str) -> npt.NDArray[np.int64]:
        """`rows` of one split, where they can be measured by anything."""
        return self.rows(split) if self.measured_by() else np.zeros(0, np.int64)

    def setting(self) -> Setting:
        """What a method is told; its places count along `rows`."""
        return _setting(
            self.recipe, self.photos, self.classes, epoch_steps=self.epoch_steps, epochs=self.epochs
        )

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
    failures: Sequence[tuple[Path, ImageError]] = (),
) -> Plan:
    """Decide everything; no photo is opened.

    Rows without a split count as ``train`` when others have one. Where there is no ``val``, whole
    classes are held out of ``train``; of photos with numbers, all of one label, group or target; of
    triplets, all that hang together; of photos without labels, any. `failures` are the files that
    are no usable pictures, as `examine` finds them; they are left out.

    Raises:
        UnknownNameError: No such loss, option, backbone or pooling.
        DataError: Too few classes with two images, or none of what the loss learns from.
    """
    check_names(recipe)
    check_data(recipe, photos)
    method = methods.create(recipe.loss, **recipe.loss_options)
    broken = {path for path, _ in failures}
    usable = [row for row, path in enumerate(photos.paths) if path not in broken]
    given = photos.triplets or ()
    photos = photos.subset(usable)
    lost_triplets = len(given) - len(photos.triplets or ())
    photos, left_out = _split(photos, recipe, method.learns_from)
    classes = tuple(sorted({photos.labels[row] for row in _rows(photos, "train")}))
    whole = method.sampler(_setting(recipe, photos, classes), None).steps
    epoch_steps = recipe.epoch_steps or max(_LEAST_EPOCH_STEPS, whole)
    epochs = recipe.epochs or recipe.automatic_epochs(epoch_steps)
    return Plan(
        recipe=recipe,
        device=device,
        amp=_number_format(recipe.amp, device),
        photos=photos,
        classes=classes,
        epoch_steps=epoch_steps,
        steps=recipe.steps or epochs * epoch_steps,
        failures=tuple(failures),
        left_out=left_out,
        lost_triplets=lost_triplets,
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


def check_names(recipe: Recipe) -> None:
    """Refuse a typing error before anything slow begins.

    Raises:
        UnknownNameError: No such loss, option, backbone or pooling.
        UsageError: The loss cannot be trained by itself, in such batches, with a memory or at
            several widths.
    """
    methods.create(recipe.loss, **recipe.loss_options)
    if recipe.batches != "pk" and methods.is_method(recipe.loss):
        raise UsageError(
            f"the method {recipe.loss} makes its own batches",
            facts=f"they cannot be {recipe.batches}",
            hint="leave --batches out",
        )
    if recipe.memory_bank and not methods.takes_memory(recipe.loss):
        able = [name for name in methods.names() if methods.takes_memory(name)]
        raise UsageError(
            f"the loss {recipe.loss} cannot use the embeddings of earlier batches",
            facts=f"these losses can: {', '.join(able)}",
            hint="leave --memory-bank out",
        )
    if recipe.widths[:-1] and not methods.nests(recipe.loss):
        raise UsageError(
            f"the method {recipe.loss} cannot be trained at several widths",
            facts="what it makes of an embedding is no matter of its first numbers alone",
            hint="leave --nested out, or a plain loss: --loss rll",
        )
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


def check_data(recipe: Recipe, photos: PhotoSet) -> None:
    """Refuse photos that have not what the loss learns from.

    Raises:
        DataError: They have not; says what the data should look like.
    """
    kind = methods.learns_from(recipe.loss)
    has = {
        "classes": photos.labelled,
        "images": True,
        "numbers": photos.targets is not None,
        "triplets": photos.triplets is not None,
    }
    if has[kind]:
        return
    there = [name for name, is_there in has.items() if is_there and name != "images"]
    fitting = {"triplets": "expression-triplet", "numbers": "log-ratio", "classes": "rll"}
    raise DataError(
        f"the loss {recipe.loss} learns from {kind}, and these photos have none",
        facts=f"they have {' and '.join(there) or 'no labels of any kind'}",
        hint=f"{_SHAPES[kind]}\nor --loss {fitting[there[0]] if there else 'isif'}",
    )


_SHAPES = {
    "classes": "a folder per class, or a CSV path,label",
    "numbers": "a CSV path,target or path,target_0,target_1,...",
    "triplets": "a CSV image_a,image_b,image_c[,odd][,margin][,split]",
}


def _split(
    photos: PhotoSet, recipe: Recipe, learns_from: LearnsFrom
) -> tuple[PhotoSet, tuple[str, ...]]:
    """`photos` with every split filled in, and the training classes left out of it."""
    split = [name or "train" for name in photos.split]
    pool = [row for row, name in enumerate(split) if name == "train"]
    left_out: tuple[str, ...] = ()
    if learns_from == "classes":
        sizes = Counter(photos.labels[row] for row in pool)
        left_out = tuple(sorted(name for name, size in sizes.items() if size == 1))
        pool = [row for row in pool if sizes[photos.labels[row]] > 1]
    given = [row for row, name in enumerate(split) if name in ("val", "test")]
    if "val" not in split and recipe.val_share > 0:
        held_out = _hold_out(photos.subset(pool), recipe, learns_from)
        for row, name in zip(pool, held_out.split, strict=True):
            split[row] = name or "train"
    rows = sorted([*pool, *given])
    # What was taken together has decided who is held out, and a resumed run reads without it.
    chosen = dataclasses.replace(photos.subset(rows), group=None)
    return dataclasses.replace(chosen, split=tuple(split[row] for row in rows)), left_out


def _hold_out(photos: PhotoSet, recipe: Recipe, learns_from: LearnsFrom) -> PhotoSet:
    """The training photos with some of them marked ``val``."""
    share, seed = recipe.val_share, recipe.seed
    if learns_from == "triplets":
        return hold_out_groups(photos, _hanging_together(photos), share=share, seed=seed)
    if learns_from == "numbers":
        groups = photos.labels if photos.labelled else photos.group or photos.targets or ()
        return hold_out_groups(photos, groups, share=share, seed=seed)
    if learns_from == "images" and not photos.labelled:
        # Nothing to measure them by, but an exported model is checked with them.
        return hold_out_groups(photos, photos.group or photos.paths, share=share, seed=seed)
    return hold_out_classes(photos, share=share, seed=seed)


def _hanging_together(photos: PhotoSet) -> list[int]:
    """Of each photo the first one that triplets lead to, from one to the next."""
    leader = list(range(len(photos)))

    def find(row: int) -> int:
        while leader[row] != row:
            leader[row] = leader[leader[row]]
            row = leader[row]
        return row

    for one in photos.triplets or ():
        first, *others = sorted(find(row) for row in (one.a, one.b, one.odd))
        for other in others:
            leader[other] = first
    return [find(row) for row in range(len(photos))]


def _setting(
    recipe: Recipe,
    photos: PhotoSet,
    classes: tuple[str, ...],
    *,
    epoch_steps: int = 0,
    epochs: int = 0,
) -> Setting:
    train = photos.subset(_rows(photos, "train"))
    number = {name: place for place, name in enumerate(classes)}
    labels = np.array([number[name] for name in train.labels], dtype=np.int64)
    return Setting(recipe, train, labels, classes, epoch_steps, epochs)


def _rows(photos: PhotoSet, split: str) -> list[int]:
    return [row for row, name in enumerate(photos.split) if name == split]
