"""From what was counted in the photos to sentences: what is wrong, how bad, what to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

__all__ = ["LONG", "SMALL_SIDE", "Finding", "judge"]

SMALL_SIDE = 64
"""Pixels; a photo with a side below it counts as small."""

LONG = 3.0
"""A photo more than so many times as long as wide counts as long."""

_FEW_CLASSES, _FEW_PHOTOS = 10, 4
_UNEVEN = 20.0

Level = Literal["stop", "warn", "note"]


@dataclass(frozen=True)
class Finding:
    """One sentence about the data.

    Attributes:
        code: A stable short word: ``unreadable``, ``leak``, ``label-conflict``, ...
        level: ``stop`` (metric learning cannot work), ``warn`` (look at it), ``note``.
        what: What was found.
        advice: What to do.
    """

    code: str
    level: Level
    what: str
    advice: str


def judge(
    counts: Mapping[str, int],
    trained: Mapping[str, int],
    held_out: Mapping[str, Mapping[str, int]],
) -> tuple[Finding, ...]:
    """What the numbers mean, worst first.

    Args:
        counts: As in `embedkit.data.doctor.Checkup`.
        trained: Different readable photos of each class that is trained on; may be empty.
        held_out: For ``val`` and ``test``, where there is such a split: photos of each class.
    """
    found = [
        *_can_it_work(counts, trained),
        *_are_labels_right(counts),
        *_is_the_split_fair(counts, held_out),
        *_are_classes_large_enough(counts, trained),
        *_are_files_fine(counts),
    ]
    order = {"stop": 0, "warn": 1, "note": 2}
    return tuple(sorted(found, key=lambda finding: order[finding.level]))


def _can_it_work(counts: Mapping[str, int], trained: Mapping[str, int]) -> list[Finding]:
    usable = counts["learnable_classes"]
    if usable >= 2:
        return []
    if not trained:
        what = "no photo to train on can be read"
        advice = "put readable photos into the classes, or into train/"
    elif len(trained) == 1:
        what = f"all photos to train on are of one class, {min(trained)!r}"
        advice = "metric learning compares classes: add at least one more"
    else:
        what = (
            f"{_number(usable, 'class', 'classes')} of {len(trained):,} to train on "
            f"{'has' if usable == 1 else 'have'} two different photos, and at least two must"
        )
        advice = "two photos of one class are what it learns from: take more photos of each class"
    return [Finding("too-few-classes", "stop", what, advice)]


def _are_labels_right(counts: Mapping[str, int]) -> list[Finding]:
    number = counts["label_conflicts"]
    if not number:
        return []
    return [
        Finding(
            "label-conflict",
            "warn",
            f"{_number(number, 'photo has', 'photos have')} a twin under another label",
            "one of the two labels is wrong, or two classes are one: look at the pairs and move "
            "or delete the wrong ones",
        )
    ]


def _is_the_split_fair(
    counts: Mapping[str, int], held_out: Mapping[str, Mapping[str, int]]
) -> list[Finding]:
    found = []
    if counts["leaked"]:
        found.append(
            Finding(
                "leak",
                "warn",
                f"{_number(counts['leaked'], 'photo', 'photos')} of val or test "
                f"{'has' if counts['leaked'] == 1 else 'have'} a twin in train",
                "the measured quality is too good to be true: delete one of each pair, or keep "
                "both on one side",
            )
        )
    shared, classes = counts["shared_classes"], len(set().union(*held_out.values()))
    if shared:
        found.append(
            Finding(
                "shared-classes",
                "note" if shared == classes else "warn",
                f"{shared:,} of {_number(classes, 'class', 'classes')} of val and test are also "
                "trained on",
                "the numbers then speak of known classes; to know how new ones will do, hold "
                "whole classes out",
            )
        )
    for split, sizes in held_out.items():
        if max(sizes.values(), default=0) < 2:
            found.append(
                Finding(
                    f"{split}-without-pairs",
                    "warn",
                    f"no class of {split} has two photos, so nothing can be measured on it",
                    f"take more photos of the classes of {split}",
                )
            )
    return found


def _are_classes_large_enough(
    counts: Mapping[str, int], trained: Mapping[str, int]
) -> list[Finding]:
    found = []
    alone = sum(1 for size in trained.values() if size == 1)
    if alone and counts["learnable_classes"] >= 2:
        names = sorted(label for label, size in trained.items() if size == 1)
        found.append(
            Finding(
                "singletons",
                "warn" if alone > len(trained) / 10 else "note",
                f"{_number(alone, 'class', 'classes')} to train on "
                f"{'has' if alone == 1 else 'have'} one photo only: {_some(names)}",
                "training leaves them out; a second photo brings each of them in",
            )
        )
    large = [size for size in trained.values() if size >= 2]
    if 2 <= len(large) < _FEW_CLASSES:
        found.append(
            Finding(
                "few-classes",
                "warn",
                f"only {len(large)} classes have two photos to learn from",
                "an embedding for classes it has never seen wants dozens of them, better hundreds; "
                "more classes help more than more photos of each",
            )
        )
    if len(large) >= 2 and np.median(large) < _FEW_PHOTOS:
        found.append(
            Finding(
                "few-photos",
                "warn",
                f"half of the classes have {int(np.median(large))} photos or fewer",
                "a batch draws 4 of each class: take more, from other sides and in other light, "
                "or train with --batch 32x2",
            )
        )
    if len(large) >= 2 and max(large) > _UNEVEN * np.median(large):
        label, size = max(trained.items(), key=lambda item: item[1])
        found.append(
            Finding(
                "imbalance",
                "note",
                f"{label!r} has {size:,} photos, half of the classes {int(np.median(large))} "
                "or fewer",
                "batches draw classes evenly, so nothing breaks; check that the large class is "
                "one thing and not a heap of leftovers",
            )
        )
    return found


def _are_files_fine(counts: Mapping[str, int]) -> list[Finding]:
    readable = max(counts["readable"], 1)
    notes: list[tuple[str, Level, str, str]] = []
    if counts["unreadable"]:
        notes.append(
            (
                "unreadable",
                "warn" if counts["unreadable"] > counts["photos"] / 100 else "note",
                f"{_number(counts['unreadable'], 'file is', 'files are')} no usable pictures",
                "training skips them; save them again or delete them",
            )
        )
    if counts["copies"]:
        notes.append(
            (
                "copies",
                "warn" if counts["copies"] > readable / 100 else "note",
                f"{_number(counts['copies'], 'file repeats', 'files repeat')} another byte by byte",
                "a copy teaches nothing and flatters recall@1: delete it",
            )
        )
    if counts["near_duplicates"]:
        notes.append(
            (
                "near-duplicates",
                "warn" if counts["near_duplicates"] > readable / 10 else "note",
                f"{_number(counts['near_duplicates'], 'photo is', 'photos are')} nearly the same "
                "as another",
                "bursts flatter recall@1: judge by MAP@R, or keep one of each burst",
            )
        )
    if counts["flat"]:
        notes.append(
            (
                "flat",
                "warn" if counts["flat"] > readable / 100 else "note",
                f"{_number(counts['flat'], 'photo is', 'photos are')} of one tone",
                "they show nothing: delete them",
            )
        )
    if counts["small"]:
        notes.append(
            (
                "small",
                "warn" if counts["small"] > readable / 2 else "note",
                f"{_number(counts['small'], 'photo has', 'photos have')} a side below "
                f"{SMALL_SIDE} pixels",
                "the network sees them enlarged and blurred; find larger ones, or train with a "
                "smaller --image-size",
            )
        )
    if counts["long"]:
        notes.append(
            (
                "long",
                "note",
                f"{_number(counts['long'], 'photo is', 'photos are')} more than "
                f"{LONG:g} times as long as wide",
                "only the middle is looked at: cut them to what matters",
            )
        )
    if 0 < counts["grey"] < counts["readable"]:
        notes.append(
            (
                "mixed-colour",
                "note",
                f"{counts['grey']:,} of {counts['readable']:,} photos are without colour",
                "colour may become a hint of where a photo comes from; fine where both kinds are "
                "in every class",
            )
        )
    return [Finding(code, level, what, advice) for code, level, what, advice in notes]


def _number(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
