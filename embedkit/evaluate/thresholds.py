"""Which score means "yes": thresholds set on classes that nobody trained on, at a stated error.

A stranger is a query whose class is not in the catalog. Its nearest picture is always a wrong one,
and how near that comes is what a threshold has to be above. So every held-out picture asks once
without its class (a stranger's best score) and once with it (what a threshold must still let
through): the false and true positive identification rates of ISO/IEC 19795-1.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from embedkit.evaluate.open_set import open_set
from embedkit.evaluate.ranking import Floats, Indices, Space
from embedkit.evaluate.retrieval import Labels, class_codes

__all__ = ["LEAST_QUERIES", "MATCH_RATE", "PAIR_MATCH_RATE", "PAIR_UNSURE_RATE", "UNSURE_RATE"]
__all__ += ["calibrate"]

MATCH_RATE, UNSURE_RATE = 0.01, 0.10
PAIR_MATCH_RATE, PAIR_UNSURE_RATE = 0.001, 0.01
LEAST_QUERIES = 100

_BLOCK = 256
_RESAMPLES = 1000


def calibrate(
    embeddings: npt.ArrayLike, labels: Labels, *, metric: str = "cosine"
) -> dict[str, float]:
    """Thresholds of a model, for its contract; empty where the pictures are too few to tell.

    A score is the cosine, or minus the distance; a threshold accepts what is not below it.

    * ``match``: the lowest score at which at most `MATCH_RATE` of the strangers are accepted;
      ``unsure``: the same for `UNSURE_RATE`. With each: ``_false``, that rate; ``_found``, the
      share of the pictures with a second one of their class whose nearest picture is of it and is
      accepted; ``_low`` and ``_high``, where 95 % of the thresholds lie when whole classes are
      drawn again (1000 bootstrap samples, seeded).
    * ``pair_match`` and ``pair_unsure``: for two pictures alone, at most `PAIR_MATCH_RATE` and
      `PAIR_UNSURE_RATE` of the pairs of two classes accepted, from `open_set`; with ``_false`` and
      ``_found``. Left out where there are too few pairs to see such a rate.
    * ``queries``, ``classes``: what was measured. Strangers come nearer in a larger catalog.

    Args:
        embeddings: ``(N, D)``, held-out pictures; or ``(N, K, D)`` as for `query_results`.
        labels: ``(N,)``.
        metric: ``cosine`` or ``l2``.

    Returns:
        Nothing below `LEAST_QUERIES` pictures (1 % could not be seen), with a single class, or
        with a number that is not finite.

    Cost: O(N^2 D), memory O(N).
    """
    codes = class_codes(labels, len(np.asarray(embeddings)))
    classes = int(codes.max(initial=-1)) + 1
    if len(codes) < LEAST_QUERIES or classes < 2 or not np.isfinite(embeddings).all():
        return {}
    same, other = _best_scores(embeddings, codes, metric)
    figures = {"queries": float(len(codes)), "classes": float(classes)}
    for name, rate in (("match", MATCH_RATE), ("unsure", UNSURE_RATE)):
        threshold = _above(other, rate)
        low, high = _interval(other, codes, rate)
        figures |= {name: threshold, f"{name}_low": low, f"{name}_high": high}
        figures[f"{name}_false"] = rate
        mated = np.isfinite(same)
        if mated.any():
            found = (same >= threshold) & (same > other)
            figures[f"{name}_found"] = float(found[mated].mean())
    pairs = open_set(embeddings, labels, metric=metric, rates=(PAIR_MATCH_RATE, PAIR_UNSURE_RATE))
    for name, rate in (("pair_match", PAIR_MATCH_RATE), ("pair_unsure", PAIR_UNSURE_RATE)):
        if math.isfinite(pairs.threshold[rate]) and math.isfinite(pairs.tpr[rate]):
            cut = pairs.threshold[rate] if metric == "cosine" else -pairs.threshold[rate]
            figures |= {name: _next_above(cut), f"{name}_false": rate}
            figures[f"{name}_found"] = pairs.tpr[rate]
    return figures


def _best_scores(embeddings: npt.ArrayLike, codes: Indices, metric: str) -> tuple[Floats, Floats]:
    """``(N,)`` and ``(N,)``: best score in the own class (-infinity: alone in it), and beyond."""
    space = Space(embeddings, None, metric)
    same, other = np.empty(len(codes), np.float32), np.empty(len(codes), np.float32)
    for start in range(0, len(codes), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(codes)))
        costs = space.costs(rows)
        if metric == "l2":
            costs = np.sqrt(costs) * np.float32(space.unit)
        own = codes[rows][:, None] == codes
        same[rows] = -np.where(own, costs, np.inf).min(axis=1)
        other[rows] = -np.where(own, np.inf, costs).min(axis=1)
    return same, other


def _above(scores: Floats, rate: float) -> float:
    """The lowest threshold that at most `rate` of the scores reach; ties never let more through."""
    may_pass = int(rate * len(scores) * (1 + 1e-12))
    return _next_above(float(np.sort(scores)[::-1][may_pass]))


def _next_above(cut: float) -> float:
    """A little above, so that the rounding of a distance does not let its pair through."""
    return float(np.nextafter(np.float32(cut + 1e-6 * abs(cut)), np.float32(np.inf)))


def _interval(scores: Floats, codes: Indices, rate: float) -> tuple[float, float]:
    rng = np.random.default_rng(0)
    members = [scores[codes == code] for code in range(int(codes.max()) + 1)]
    drawn = [
        _above(
            np.concatenate([members[at] for at in rng.integers(len(members), size=len(members))]),
            rate,
        )
        for _ in range(_RESAMPLES)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)
