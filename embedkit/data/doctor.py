"""Is this data fit for metric learning? What is wrong with it, how much, and what to do about it.

Looks at every photo once and says: unreadable files, classes too small to learn from, the same or
nearly the same photo twice, in two splits or under two labels, odd sizes and colours, imbalance,
and a verdict. Needs no model; with embeddings, `embedkit.data.doctor_csg` says how tangled the
classes are.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from embedkit.data.doctor_facts import PhotoFacts
from embedkit.data.doctor_judge import LONG, SMALL_SIDE, Finding, judge
from embedkit.data.doctor_pairs import near_pairs, pack_hashes
from embedkit.data.readers import PhotoSet
from embedkit.errors import ImageError

__all__ = ["NEAR_BITS", "Checkup", "TwinPair", "check_photos"]

NEAR_BITS = 40
"""Bits of 256 in which two perceptual hashes may differ.

Chosen by looking. Saving again as JPEG of quality 30, halving, brightness x 1.3, removing colour,
turning by 1 degree and cutting 1 % off each side stay below 40; cutting 2 % is found half the time,
5 % never. Of 5,421 grocery photos 17 pairs are flagged, all of one scene a moment apart; the
nearest pair of different juices in shop pictures on white is 42, of 400 pieces of clothing 66.
"""

# Largest distance of two 4 x 4 chroma grids, 0 to 360. The edits above stay below 28 (removing
# colour does not), and a picture with its hue turned begins at 50.
_SAME_COLOUR = 30.0
# Standard deviation of 0 to 255; below it the perceptual hash is noise.
_FLAT = 4.0
# Largest difference of the channels' means and deviations of a picture that shows no colour.
_GREY = 1.0
_KEPT = 500
_GRID_CELLS = 16  # of `PhotoFacts.chroma`

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class TwinPair:
    """Two photos that show the same, by their places in the `PhotoSet`, ``a < b``.

    Attributes:
        bits: In which their perceptual hashes differ.
        exact: The files are equal byte by byte.
        recoloured: Alike in grey and not in colour: perhaps the product in another colour.
        labels_differ: They are of two classes.
        splits_differ: One is trained on, the other is not.
    """

    a: int
    b: int
    bits: int
    exact: bool
    recoloured: bool
    labels_differ: bool
    splits_differ: bool


@dataclass(frozen=True)
class Checkup:
    """What was found in N photos.

    Attributes:
        photos: Those that were checked.
        facts: Of each of them, or why it is no usable picture.
        findings: Worst first.
        twins: Pairs that show the same; of each kind (under two labels, in two splits, neither) the
            500 nearest.
        counts: Of photos, by stable names; all of them, however many pairs are kept.
        sizes: Photos that can be read, by class.
        flat: Photos of one tone, at most 500.
    """

    photos: PhotoSet
    facts: tuple[PhotoFacts | ImageError, ...]
    findings: tuple[Finding, ...]
    twins: tuple[TwinPair, ...]
    counts: dict[str, int]
    sizes: dict[str, int]
    flat: tuple[int, ...]

    @property
    def verdict(self) -> Literal["good", "usable", "cannot work"]:
        """``cannot work`` with a finding that stops, ``usable`` with a warning, else ``good``."""
        levels = {finding.level for finding in self.findings}
        return "cannot work" if "stop" in levels else "usable" if "warn" in levels else "good"

    def failures(self) -> list[tuple[Path, ImageError]]:
        """Files that are no usable pictures, as in `PhotoSet.paths`, in order."""
        pairs = zip(self.photos.paths, self.facts, strict=True)
        return [(path, fact) for path, fact in pairs if isinstance(fact, ImageError)]

    def to_json(self) -> dict[str, Any]:
        """Everything but the single facts; paths as in `PhotoSet.paths`, pixels and 0 to 1."""
        readable = [fact for fact in self.facts if isinstance(fact, PhotoFacts)]
        return {
            "root": str(self.photos.root),
            "verdict": self.verdict,
            "counts": self.counts,
            "splits": _splits(self.photos),
            "findings": [vars(finding) for finding in self.findings],
            "failed": [
                {"path": path.as_posix(), "code": error.code, "reason": error.reason}
                for path, error in self.failures()
            ],
            "classes": self.sizes,
            "twins": [self._twin(pair) for pair in self.twins],
            "flat": [self.photos.paths[row].as_posix() for row in self.flat],
            "pixels": _pixel_statistics(readable),
            "colour": _colour_statistics(readable),
        }

    def _twin(self, pair: TwinPair) -> dict[str, Any]:
        return {
            side: {
                "path": self.photos.paths[row].as_posix(),
                "label": self.photos.labels[row],
                "split": self.photos.split[row],
            }
            for side, row in (("a", pair.a), ("b", pair.b))
        } | {
            "bits": pair.bits,
            "exact": pair.exact,
            "recoloured": pair.recoloured,
            "labels_differ": pair.labels_differ,
            "splits_differ": pair.splits_differ,
        }


def check_photos(
    photos: PhotoSet,
    facts: Sequence[PhotoFacts | ImageError],
    *,
    near_bits: int = NEAR_BITS,
    progress: Callable[[int, int], None] | None = None,
) -> Checkup:
    """Compare all photos and judge; those without a split count as trained on.

    Args:
        facts: Of every photo, as `gather_facts` of ``photos.files()`` gives them.
        near_bits: Two photos are near duplicates up to so many bits of 256, 0 to 96.
        progress: Called as ``progress(done, 0)`` while they are compared, up to their number.

    Cost: `near_pairs` of the distinct photos.
    """
    if len(facts) != len(photos):
        raise ValueError(f"{len(photos)} photos and {len(facts)} facts")
    if not 0 <= near_bits <= 96:
        raise ValueError(f"near_bits must lie in 0 to 96, got {near_bits}")
    readable = [row for row, fact in enumerate(facts) if isinstance(fact, PhotoFacts)]
    seen = {row: fact for row, fact in enumerate(facts) if isinstance(fact, PhotoFacts)}
    flat = [row for row in readable if max(seen[row].std) < _FLAT]
    twins = _Twins(photos, seen, set(flat))
    twins.compare(near_bits, progress)
    sizes = Counter(photos.labels[row] for row in readable)
    trained = _distinct_per_class(photos, seen)
    held_out: dict[str, Counter[str]] = {
        split: Counter(photos.labels[row] for row in readable if photos.split[row] == split)
        for split in ("val", "test")
        if split in photos.split
    }
    counts = {
        "photos": len(photos),
        "readable": len(readable),
        "unreadable": len(photos) - len(readable),
        "classes": len(sizes),
        "singletons": sum(1 for size in sizes.values() if size == 1),
        "learnable_classes": sum(1 for size in trained.values() if size >= 2),
        "flat": len(flat),
        "grey": sum(_is_grey(fact) for fact in seen.values()),
        "small": sum(min(fact.width, fact.height) < SMALL_SIDE for fact in seen.values()),
        "long": sum(_is_long(fact) for fact in seen.values()),
        **twins.counts(),
        "shared_classes": len(trained.keys() & set().union(*held_out.values())),
    }
    return Checkup(
        photos=photos,
        facts=tuple(facts),
        findings=judge(counts, trained, held_out),
        twins=twins.pairs(),
        counts=counts,
        sizes=dict(sorted(sizes.items())),
        flat=tuple(flat[:_KEPT]),
    )


# --- photos that show the same -------------------------------------------------------------------


class _Twins:
    """Pairs among nodes: a node is all copies of one file in one class on one side of the split."""

    def __init__(self, photos: PhotoSet, seen: dict[int, PhotoFacts], flat: set[int]) -> None:
        groups: dict[tuple[str, str, bool], list[int]] = defaultdict(list)
        for row, fact in seen.items():
            groups[fact.content, photos.labels[row], _is_trained(photos, row)].append(row)
        self._groups = list(groups.values())
        self._first = np.array([group[0] for group in self._groups], np.int64)
        self._weight = np.array([len(group) for group in self._groups], np.int64)
        keys = list(groups)
        self._content = _numbers([content for content, _, _ in keys])
        self._label = _numbers([label for _, label, _ in keys])
        self._trained = np.array([trained for _, _, trained in keys], bool)
        self._flat = np.array([group[0] in flat for group in self._groups], bool)
        first = [seen[int(row)] for row in self._first]
        self._words = pack_hashes([fact.phash for fact in first])
        chroma = np.frombuffer(bytes.fromhex("".join(fact.chroma for fact in first)), np.uint8)
        self._chroma = chroma.reshape(len(first), _GRID_CELLS, 2)
        self._has_near = np.zeros(len(first), bool)
        self._has_other_label = np.zeros(len(first), bool)
        self._has_other_side = np.zeros(len(first), bool)
        self._kept: dict[str, list[TwinPair]] = {"label": [], "split": [], "alike": []}

    def compare(self, most: int, progress: Callable[[int, int], None] | None) -> None:
        """Find all pairs, count them, and keep the nearest."""
        for group in self._groups:
            for row in group[1:][:_KEPT]:
                if len(self._kept["alike"]) < _KEPT:
                    pair = TwinPair(group[0], row, 0, True, False, False, False)
                    self._kept["alike"].append(pair)
        for i, j, bits in near_pairs(self._words, most, progress=progress):
            exact = self._content[i] == self._content[j]
            # The hash of a picture of one tone is noise, and only its bytes can be compared.
            real = exact | ~(self._flat[i] | self._flat[j])
            i, j, bits, exact = i[real], j[real], bits[real], exact[real]
            recoloured = ~exact & (self._colour_distance(i, j) > _SAME_COLOUR)
            labels_differ = self._label[i] != self._label[j]
            splits_differ = self._trained[i] != self._trained[j]
            conflict, leak = labels_differ & ~recoloured, splits_differ & ~recoloured
            for marks, which in (
                (self._has_near, ~exact),
                (self._has_other_label, conflict),
                (self._has_other_side, leak),
            ):
                marks[i[which]] = marks[j[which]] = True
            columns = (self._first[i], self._first[j], bits, exact, recoloured)
            for kind, which in (
                ("label", labels_differ),
                ("split", splits_differ),
                ("alike", ~labels_differ & ~splits_differ),
            ):
                order = np.flatnonzero(which)
                order = order[np.lexsort((bits[order], ~exact[order], recoloured[order]))][:_KEPT]
                kept = self._kept[kind]
                for place in order.tolist():
                    a, b, distance, same, other = (column[place].item() for column in columns)
                    flags = bool(labels_differ[place]), bool(splits_differ[place])
                    kept.append(TwinPair(min(a, b), max(a, b), distance, same, other, *flags))
                if len(kept) > 8 * _KEPT:
                    self._kept[kind] = sorted(kept, key=_nearest_first)[:_KEPT]

    def _colour_distance(
        self, i: npt.NDArray[np.int64], j: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        apart = self._chroma[i].astype(np.float64) - self._chroma[j]
        return np.asarray(np.sqrt((apart**2).sum(axis=2)).max(axis=1, initial=0))

    def counts(self) -> dict[str, int]:
        """Numbers of photos, not of pairs."""
        held_out = ~self._trained
        return {
            "copies": int((self._weight - 1).sum()) + self._copies_across(),
            "near_duplicates": int(self._weight[self._has_near].sum()),
            "label_conflicts": int(self._weight[self._has_other_label].sum()),
            "leaked": int(self._weight[self._has_other_side & held_out].sum()),
        }

    def _copies_across(self) -> int:
        """Nodes that hold a file another node holds as well."""
        return len(self._content) - len(set(self._content.tolist()))

    def pairs(self) -> tuple[TwinPair, ...]:
        """Under two labels first, then in two splits, then the others; the nearest first."""
        best = [
            pair
            for kind in ("label", "split", "alike")
            for pair in sorted(set(self._kept[kind]), key=_nearest_first)[:_KEPT]
        ]
        return tuple(dict.fromkeys(best))


def _nearest_first(pair: TwinPair) -> tuple[bool, bool, int, int, int]:
    return pair.recoloured, not pair.exact, pair.bits, pair.a, pair.b


def _numbers(values: list[str]) -> npt.NDArray[np.int64]:
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], np.int64)


# --- counting ------------------------------------------------------------------------------------


def _is_trained(photos: PhotoSet, row: int) -> bool:
    return photos.split[row] in ("", "train")


def _distinct_per_class(photos: PhotoSet, seen: dict[int, PhotoFacts]) -> dict[str, int]:
    """Different files of each class that is trained on: copies of one photo teach nothing."""
    contents: dict[str, set[str]] = defaultdict(set)
    for row, fact in seen.items():
        if _is_trained(photos, row):
            contents[photos.labels[row]].add(fact.content)
    return {label: len(files) for label, files in contents.items()}


def _splits(photos: PhotoSet) -> dict[str, dict[str, int]]:
    return {
        split or "unsplit": {
            "photos": sum(name == split for name in photos.split),
            "classes": len(
                {x for x, name in zip(photos.labels, photos.split, strict=True) if name == split}
            ),
        }
        for split in ("train", "val", "test", "")
        if split in photos.split
    }


def _is_grey(fact: PhotoFacts) -> bool:
    means, deviations = fact.mean, fact.std
    apart = max(max(means) - min(means), max(deviations) - min(deviations))
    return apart <= _GREY


def _is_long(fact: PhotoFacts) -> bool:
    return max(fact.width, fact.height) > LONG * min(fact.width, fact.height)


def _pixel_statistics(facts: list[PhotoFacts]) -> dict[str, dict[str, int]] | None:
    if not facts:
        return None
    values = {
        "shortest_side": [min(fact.width, fact.height) for fact in facts],
        "longest_side": [max(fact.width, fact.height) for fact in facts],
    }
    return {
        name: {
            "min": min(column),
            "p5": int(np.percentile(column, 5)),
            "median": int(np.median(column)),
            "p95": int(np.percentile(column, 95)),
            "max": max(column),
        }
        for name, column in values.items()
    }


def _colour_statistics(facts: list[PhotoFacts]) -> dict[str, list[float]] | None:
    """Mean and deviation of red, green, blue, 0 to 1, each photo with the same weight."""
    if not facts:
        return None
    mean = np.array([fact.mean for fact in facts]) / 255
    std = np.array([fact.std for fact in facts]) / 255
    centre = mean.mean(axis=0)
    spread = np.sqrt((std**2 + mean**2).mean(axis=0) - centre**2)
    return {"mean": centre.round(4).tolist(), "std": spread.round(4).tolist()}
