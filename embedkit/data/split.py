"""Hold whole classes out, so that validation asks what search will: photos of things never seen."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from embedkit.data.readers import PhotoSet
from embedkit.errors import DataError

__all__ = ["hold_out_classes", "hold_out_groups"]

_LEAST = 2


def hold_out_classes(photos: PhotoSet, *, share: float = 0.2, seed: int = 0) -> PhotoSet:
    """The same photos, with ``val`` for those of the classes held out and ``train`` for the rest.

    Photos already marked ``val`` or ``test`` keep their mark. Of the classes among the others that
    have two photos or more, `share` is held out, rounded, and at least 2 on each side. A class of
    one photo has no positive and goes to ``train``. Which classes are taken depends on their names
    and the seed alone.

    Args:
        share: Of the classes, in (0, 1).
        seed: 0 or more.

    Raises:
        DataError: Fewer than 4 classes have two photos.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must lie between 0 and 1, got {share}")
    free = [name not in ("val", "test") for name in photos.split]
    sizes = Counter(label for label, is_free in zip(photos.labels, free, strict=True) if is_free)
    paired = sorted(label for label, size in sizes.items() if size >= _LEAST)
    if len(paired) < 2 * _LEAST:
        raise DataError(
            "there are too few classes to train on some and validate on others",
            facts=f"found {len(paired)} classes with two photos or more, and "
            f"{len(sizes) - len(paired)} with one; needed are {_LEAST} + {_LEAST}: a photo is "
            "compared with one of its class and one of another, on each side",
            hint="add classes, or photos to classes of one; or give a val split of your own",
        )
    count = min(max(round(share * len(paired)), _LEAST), len(paired) - _LEAST)
    order = np.random.default_rng(seed).permutation(len(paired))
    held_out = {paired[place] for place in order[:count]}
    split = tuple(
        ("val" if label in held_out else "train") if is_free else given
        for label, is_free, given in zip(photos.labels, free, photos.split, strict=True)
    )
    return dataclasses.replace(photos, split=split)


def hold_out_groups(
    photos: PhotoSet, groups: Sequence[Hashable], *, share: float = 0.2, seed: int = 0
) -> PhotoSet:
    """The same photos, with ``val`` for those of the groups held out and ``train`` for the rest.

    For photos whose classes say nothing, or not enough: what belongs together (photos of one
    portion, of one label, of one triplet) stays on one side. Photos already marked ``val`` or
    ``test`` keep their mark. Groups are drawn in an order that depends on their first photos' names
    and the seed, and taken so long as no more than `share` of the free photos is held out; at least
    one is held out, and at least one is left.

    Args:
        groups: ``(N,)``, one per photo.
        share: Of the photos without a mark, in (0, 1).
        seed: 0 or more.

    Raises:
        DataError: Fewer than 2 groups.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must lie between 0 and 1, got {share}")
    members: dict[Hashable, list[int]] = {}
    for row, (group, split) in enumerate(zip(groups, photos.split, strict=True)):
        if split not in ("val", "test"):
            members.setdefault(group, []).append(row)
    if len(members) < 2:
        raise DataError(
            "the photos cannot be parted into some to train on and others to validate on",
            facts="all of them hang together",
            hint="give a val split of your own, or train on all: --val-share 0",
        )
    ordered = sorted(members.values(), key=lambda rows: min(photos.paths[row] for row in rows))
    order = np.random.default_rng(seed).permutation(len(ordered))
    most = share * sum(map(len, ordered))
    held_out = set(ordered[order[0]])
    for place in order[1:-1]:
        if len(held_out) + len(ordered[place]) <= most:
            held_out.update(ordered[place])
    return dataclasses.replace(
        photos,
        split=tuple(
            given if given in ("val", "test") else "val" if row in held_out else "train"
            for row, given in enumerate(photos.split)
        ),
    )
