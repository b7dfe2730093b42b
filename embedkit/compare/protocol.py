"""What all rows of a comparison have in common: settings, classes held out, budget, seeds.

The protocol is that of Musgrave, Belongie, Lim, "A Metric Learning Reality Check", ECCV 2020,
arXiv:2003.08505: one backbone, width, crop, optimiser and batch for all; half of the classes for
the test; cross-validation over the others; the same search budget for every loss; repeats.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedkit.data import PhotoSet, hold_out_classes
from embedkit.errors import DataError, ImageError, UsageError
from embedkit.imaging.files import hash_file
from embedkit.train import Recipe

__all__ = ["Division", "Protocol", "divide", "quick_protocol"]

# What is a row's own, what its repeats change, and what only says where to stop.
_NOT_FIXED = ("loss", "loss_options", "seed", "max_time")
_LEAST = 2
_QUICK_STEPS = 20


@dataclass(frozen=True)
class Protocol:
    """How every row is made.

    Attributes:
        recipe: All settings but the loss and its options. Its learning rates are where every
            search begins. `loss`, `loss_options` and `seed` are not looked at.
        folds: Parts of the training classes; each is the validation of one training, at least 2.
        trials: Settings tried for each row, of `folds` trainings each. The first are the defaults;
            1: nothing is searched. The paper takes 50.
        repeats: Seeds at the chosen settings, of `folds` trainings each, at least 2. The paper
            takes 10.
        dims: Widths of the embedding, a row for each loss and width; empty: the recipe's.
        ks: Of recall@k; has 1.
        seed: Of the classes held out, the folds and the search; repeats take the seeds after it.
        quick: A try that compares nothing; every output says so.
    """

    recipe: Recipe
    folds: int = 4
    trials: int = 20
    repeats: int = 5
    dims: tuple[int, ...] = ()
    ks: tuple[int, ...] = (1, 2, 4, 8)
    seed: int = 0
    quick: bool = False

    def __post_init__(self) -> None:
        for name, least in (("folds", 2), ("trials", 1), ("repeats", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(
                    f"{name} must be {least} or more", facts=f"got {getattr(self, name)}"
                )
        if self.recipe.max_time is not None:
            raise UsageError(
                "a comparison cannot be limited by time",
                facts="how far a training comes would depend on the machine's other work",
                hint="limit it by epochs or steps",
            )
        if any(dim < 1 for dim in self.dims) or len(set(self.dims)) < len(self.dims):
            raise UsageError("the widths must be different numbers from 1 up", facts=f"{self.dims}")
        if 1 not in self.ks or min(self.ks) < 1:
            raise UsageError("ks must be numbers from 1 up, 1 among them", facts=f"{self.ks}")

    def seeds(self) -> list[int]:
        """Of the repeats: the same for every row, so that rows can be compared seed by seed."""
        return [self.seed + 1 + number for number in range(self.repeats)]

    def fixed(self, photos_hash: str, device: str) -> dict[str, Any]:
        """Everything in which the rows of one table must agree, as plain JSON values.

        Args:
            photos_hash: `Division.photos_hash`.
            device: Its kind: ``cpu``, ``cuda`` or ``mps``, which compute in other precisions.
        """
        settings = self.recipe.to_json()
        for name in _NOT_FIXED:
            settings.pop(name)
        weights = Path(self.recipe.weights)
        if self.recipe.weights not in ("none", "imagenet") and weights.is_file():
            settings["weights"] = f"{weights.name} ({hash_file(weights)})"
        if self.dims:
            settings["dim"] = "one for each row"
        return {
            **settings,
            "folds": self.folds,
            "trials": self.trials,
            "repeats": self.repeats,
            "ks": list(self.ks),
            "first_seed": self.seed,
            "quick": self.quick,
            "device": device,
            "photos": photos_hash,
        }


def quick_protocol(protocol: Protocol) -> Protocol:
    """The same in its shortest form: 2 folds, 2 repeats, no search and 20 steps of training.

    A length the recipe names is kept.
    """
    recipe = protocol.recipe
    if recipe.steps is None and recipe.epochs is None:
        recipe = dataclasses.replace(recipe, steps=_QUICK_STEPS)
    return dataclasses.replace(protocol, recipe=recipe, folds=2, trials=1, repeats=2, quick=True)


@dataclass(frozen=True)
class Division:
    """Photos in their places.

    Attributes:
        folds: The training classes, once for each fold, with that fold marked ``val`` and the
            others ``train``.
        test: Photos of classes that are in no fold.
        lone: Training classes of one photo, which has no positive; left out.
        unreadable: Files that are no usable pictures, and why; left out.
    """

    folds: tuple[PhotoSet, ...]
    test: PhotoSet
    lone: tuple[str, ...]
    unreadable: tuple[tuple[Path, ImageError], ...]

    @property
    def photos_hash(self) -> str:
        """Of the names, labels and places of all photos; which fold has what follows from it."""
        return f"{self.folds[0].manifest_hash()[:16]}-{self.test.manifest_hash()[:16]}"

    def counts(self) -> dict[str, int]:
        """Images and classes for training and for the test, and what was left out."""
        return {
            "train_images": len(self.folds[0]),
            "train_classes": len(self.folds[0].classes()),
            "test_images": len(self.test),
            "test_classes": len(self.test.classes()),
            "lone_classes": len(self.lone),
            "unreadable": len(self.unreadable),
        }


def divide(
    photos: PhotoSet,
    *,
    folds: int,
    seed: int,
    failures: Sequence[tuple[Path, ImageError]] = (),
) -> Division:
    """Hold the test classes out and deal the others to the folds.

    The test is the photos marked ``test``, or where there are none those marked ``val``, or where
    nothing is marked half of the classes, drawn by `seed`. All other photos are for training,
    whatever their mark; their classes are shuffled by `seed` and dealt like cards. `failures` are
    the files that are no usable pictures, as `embedkit.train.examine` finds them.

    Raises:
        DataError: Test classes are among the training classes, or there are too few of either.
    """
    broken = {path for path, _ in failures}
    photos = photos.subset([row for row, path in enumerate(photos.paths) if path not in broken])
    photos = dataclasses.replace(photos, category=None, group=None)
    marked = next((name for name in ("test", "val") if name in photos.split), None)
    if marked is None:
        photos, marked = hold_out_classes(photos, share=0.5, seed=seed), "val"
    test = _with_split(photos, [name == marked for name in photos.split], "test")
    rest = _with_split(photos, [name != marked for name in photos.split], "train")
    _check_test(test, rest)
    sizes = Counter(rest.labels)
    lone = tuple(sorted(name for name, size in sizes.items() if size < _LEAST))
    names = sorted(name for name, size in sizes.items() if size >= _LEAST)
    if len(names) < _LEAST * folds:
        most = len(names) // _LEAST
        raise DataError(
            f"{len(names)} training classes cannot make {folds} folds",
            facts=f"every fold needs {_LEAST} classes of {_LEAST} photos or more",
            hint=f"--folds {most}" if most >= 2 else "add classes",
        )
    rest = rest.subset([row for row, name in enumerate(rest.labels) if name not in set(lone)])
    order = np.random.default_rng([seed, 1]).permutation(len(names))
    fold_of = {names[place]: number % folds for number, place in enumerate(order)}
    parts = tuple(
        dataclasses.replace(
            rest,
            split=tuple("val" if fold_of[name] == fold else "train" for name in rest.labels),
        )
        for fold in range(folds)
    )
    return Division(parts, test, lone, tuple(failures))


def _with_split(photos: PhotoSet, chosen: list[bool], split: str) -> PhotoSet:
    part = photos.subset([row for row, is_chosen in enumerate(chosen) if is_chosen])
    return dataclasses.replace(part, split=(split,) * len(part))


def _check_test(test: PhotoSet, rest: PhotoSet) -> None:
    shared = sorted(set(test.labels) & set(rest.labels))
    if shared:
        raise DataError(
            "the test classes must not be trained on",
            facts=f"{len(shared)} of {len(test.classes())} are among the training classes, "
            f"the first is {shared[0]!r}",
            hint="leave the split out of the data: half of the classes are then held out",
        )
    paired = sum(size >= _LEAST for size in Counter(test.labels).values())
    if paired < _LEAST:
        raise DataError(
            "there are too few test classes",
            facts=f"{paired} have {_LEAST} photos or more; at least {_LEAST} are needed",
        )
