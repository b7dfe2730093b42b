"""Wrong labels on purpose: so that an experiment knows which labels are wrong."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from embedkit.atomic import published
from embedkit.data.readers import PhotoSet
from embedkit.data.split import hold_out_classes
from embedkit.errors import DataError, UsageError

__all__ = ["inject_noise", "write_noisy"]

_KINDS = ("symmetric", "asymmetric")


def inject_noise(
    photos: PhotoSet, *, rate: float, kind: str = "symmetric", seed: int = 0
) -> tuple[PhotoSet, npt.NDArray[np.int64]]:
    """The photos with some labels of the training split flipped, and the places of those.

    What is measured must be clean: photos marked ``val`` or ``test`` keep their labels, and where
    no ``val`` is, whole classes are held out for it first, by the same seed. `rate` of the others,
    rounded, is flipped; which ones is the same for both kinds.

    Args:
        rate: Above 0 and at most 1. From 0.5 on, asymmetric, most photos of a name may be wrong.
        kind: ``"symmetric"``: to any other training class, all with the same chance.
            ``"asymmetric"``: every class to one other, that which it could be mistaken for: the
            next by name in its category, round and round, as is usual for CIFAR-100; without
            categories, or alone in one, the next of all.
        seed: 0 or more.

    Raises:
        UsageError: A rate out of range, or no such kind.
        DataError: No labels, or too few classes.
    """
    if kind not in _KINDS:
        raise UsageError(
            f"wrong labels are {' or '.join(_KINDS)}, not {kind!r}",
            hint="--noise-kind asymmetric",
        )
    if not (0 < rate <= 1 and math.isfinite(rate)):
        raise UsageError(
            f"the share of wrong labels must lie above 0 and up to 1, got {rate:g}",
            hint="--inject-noise 0.2",
        )
    if not photos.labelled:
        raise DataError("these photos have no labels that could be flipped")
    if "val" not in photos.split:
        photos = hold_out_classes(photos, seed=seed)
    split = tuple(name or "train" for name in photos.split)
    rows = [row for row, name in enumerate(split) if name == "train"]
    classes = sorted({photos.labels[row] for row in rows})
    if len(classes) < 2:
        raise DataError(
            "a wrong label takes two training classes", facts=f"there are {len(classes)}"
        )
    place = {name: number for number, name in enumerate(classes)}
    rng = np.random.default_rng([seed, 1])
    flipped = np.sort(rng.permutation(rows)[: round(rate * len(rows))])
    labels = list(photos.labels)
    similar = _next_classes(photos, rows)
    for row in flipped.tolist():
        if kind == "asymmetric":
            labels[row] = similar[labels[row]]
        else:
            further = int(rng.integers(1, len(classes)))
            labels[row] = classes[(place[labels[row]] + further) % len(classes)]
    return dataclasses.replace(photos, labels=tuple(labels), split=split), flipped


def _next_classes(photos: PhotoSet, rows: Sequence[int]) -> dict[str, str]:
    """Of each class of these rows the next by name in its category, or of all; two or more."""
    categories: dict[str, Counter[str]] = {}
    for row in rows:
        name = "" if photos.category is None else photos.category[row]
        categories.setdefault(photos.labels[row], Counter())[name] += 1
    # A class of several categories counts to the one that most of its photos are of.
    members: dict[str, list[str]] = {}
    for label in sorted(categories):
        (main, _), *_ = categories[label].most_common(1)
        members.setdefault(main, []).append(label)
    everyone = [label for main in sorted(members) for label in members[main]]
    following = _rounds(everyone)
    for group in members.values():
        if len(group) > 1:
            following |= _rounds(group)
    return following


def _rounds(names: Sequence[str]) -> dict[str, str]:
    return dict(zip(names, [*names[1:], *names[:1]], strict=True))


def write_noisy(path: Path, noisy: PhotoSet, true_labels: Sequence[str]) -> None:
    """A CSV that `read_photos` reads, with ``true_label`` and ``flipped`` (0 or 1) in addition.

    Paths below the CSV's folder are relative to it, others absolute.

    Raises:
        EmbedKitError: It cannot be written.
    """
    home = path.parent.absolute()
    files = [file.absolute() for file in noisy.files()]
    columns: dict[str, Sequence[str]] = {
        "path": [_seen_from(home, file) for file in files],
        "label": noisy.labels,
        "split": noisy.split,
    }
    for name, given in (("category", noisy.category), ("group", noisy.group)):
        if given is not None:
            columns[name] = given
    for name, flags in (("is_query", noisy.is_query), ("is_gallery", noisy.is_gallery)):
        if flags is not None:
            columns[name] = [str(int(flag)) for flag in flags]
    columns["true_label"] = true_labels
    pairs = zip(noisy.labels, true_labels, strict=True)
    columns["flipped"] = [str(int(label != true)) for label, true in pairs]
    with (
        published(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def _seen_from(home: Path, file: Path) -> str:
    return (file.relative_to(home) if file.is_relative_to(home) else file).as_posix()
