"""Same or not, from a score alone: how many true pairs pass when few false ones may."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.evaluate.ranking import Floats, Indices, Space
from embedkit.evaluate.retrieval import Labels, class_codes, row_mask

__all__ = ["OpenSet", "open_set"]


@dataclass(frozen=True)
class OpenSet:
    """Pairs of a query and a gallery row, accepted when they are more alike than a threshold.

    Attributes:
        same: Pairs of one class that were compared.
        different: Pairs of two classes that were compared.
        sampled: Whether they were drawn at random; else they are all there are.
        tpr: Share of the same pairs accepted, by the share of different pairs that may be (FPR).
            NaN where there are no same pairs, or fewer than 1 / FPR different ones.
        threshold: By FPR: cosine that an accepted pair is above, or distance it is below.
    """

    same: int
    different: int
    sampled: bool
    tpr: dict[float, float]
    threshold: dict[float, float]

    def to_json(self) -> dict[str, Any]:
        """``tpr@fpr=0.1``, ..., ``threshold@fpr=0.1``, ..., and what was compared."""
        figures = {f"tpr@fpr={rate:g}": value for rate, value in self.tpr.items()}
        figures |= {f"threshold@fpr={rate:g}": value for rate, value in self.threshold.items()}
        return {
            **{name: None if np.isnan(value) else value for name, value in figures.items()},
            "pairs": "sampled" if self.sampled else "all",
            "same_pairs": self.same,
            "different_pairs": self.different,
        }


def open_set(
    embeddings: npt.ArrayLike,
    labels: Labels,
    *,
    query: npt.ArrayLike | None = None,
    gallery: npt.ArrayLike | None = None,
    metric: str = "cosine",
    rates: Sequence[float] = (1e-1, 1e-2, 1e-3),
    most: int = 500_000,
    seed: int = 0,
) -> OpenSet:
    """Compare pairs of a query and another gallery row: all when there are at most `most`.

    Else up to `most` of one class and `most` of two are drawn with return, seeded, every pair as
    likely as any other of its kind; a TPR is then good to about a hundredth at an FPR of 0.001.

    Args:
        rates: FPRs, each in (0, 1).
        most: Pairs of either kind.
        seed: Of the draw.

    The other arguments and the errors are those of `query_results`. Cost: O(most x D).
    """
    codes = class_codes(labels, len(np.asarray(embeddings)))
    space = Space(embeddings, row_mask("gallery", gallery, len(codes)), metric)
    rows = np.flatnonzero(row_mask("query", query, len(codes)))
    everything = len(rows) * len(space.gallery)
    if everything <= most:
        ask, place = np.divmod(np.arange(everything), max(len(space.gallery), 1))
        other = space.position[rows[ask]] != place
        ask, place = rows[ask][other], place[other]
        is_same = codes[ask] == codes[space.gallery[place]]
        costs = space.pair_costs(ask, place)
        return _measure(costs[is_same], costs[~is_same], space, rates, sampled=False)
    rng = np.random.default_rng(seed)
    same = space.pair_costs(*_draw_same(space, codes, rows, most, rng))
    different = space.pair_costs(*_draw_different(space, codes, rows, most, rng))
    return _measure(same, different, space, rates, sampled=True)


def _draw_same(
    space: Space, codes: Indices, rows: Indices, most: int, rng: np.random.Generator
) -> tuple[Indices, Indices]:
    gallery_codes = codes[space.gallery]
    by_class = np.argsort(gallery_codes, kind="stable")
    sizes = np.bincount(gallery_codes, minlength=int(codes.max(initial=0)) + 1)
    begins = np.cumsum(sizes) - sizes
    ends = np.cumsum(sizes[codes[rows]])
    total = int(ends[-1])
    drawn = np.arange(total) if total <= most else rng.integers(total, size=most)
    ask = np.searchsorted(ends, drawn, side="right")
    within = drawn - (ends[ask] - sizes[codes[rows[ask]]])
    ask = rows[ask]
    place = by_class[begins[codes[ask]] + within] if total else np.empty(0, dtype=np.int64)
    other = space.position[ask] != place
    return ask[other], place[other]


def _draw_different(
    space: Space, codes: Indices, rows: Indices, most: int, rng: np.random.Generator
) -> tuple[Indices, Indices]:
    ask = rows[rng.integers(len(rows), size=most)]
    place = rng.integers(len(space.gallery), size=most)
    differs = codes[ask] != codes[space.gallery[place]]
    return ask[differs], place[differs]


def _measure(
    same: Floats, different: Floats, space: Space, rates: Sequence[float], *, sampled: bool
) -> OpenSet:
    different = np.sort(different)
    tpr, threshold = {}, {}
    for rate in rates:
        may_pass = int(rate * len(different) * (1 + 1e-12))
        known = len(same) > 0 and 1 <= may_pass < len(different)
        cut = float(different[may_pass]) if known else float("nan")
        # Strictly below the first different pair that may not pass: ties never let more through.
        tpr[rate] = float((same < cut).mean()) if known else float("nan")
        threshold[rate] = -cut if space.metric == "cosine" else float(np.sqrt(cut)) * space.unit
    return OpenSet(len(same), len(different), sampled, tpr, threshold)
