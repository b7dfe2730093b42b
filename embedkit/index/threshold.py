"""match, unsure or none: what a score is worth, by the thresholds a model carries."""

from __future__ import annotations

import math
from dataclasses import dataclass

from embedkit.errors import MismatchError
from embedkit.runtime.contract import ModelContract

__all__ = ["MATCH", "NONE", "UNSURE", "Thresholds"]

MATCH, UNSURE, NONE = "match", "unsure", "none"


@dataclass(frozen=True)
class Thresholds:
    """Two scores that cut all others in three; `embedkit.evaluate.calibrate` says how they are set.

    Attributes:
        match: From here up: ``match``.
        unsure: From here up to `match`: ``unsure``; below: ``none``.
        match_false: Share of strangers (or of different pairs) that are called a match.
        unsure_false: Share of them that are called a match or unsure.
        queries: Pictures it was measured on; 0 where that was not told.
    """

    match: float
    unsure: float
    match_false: float
    unsure_false: float
    queries: int = 0

    @classmethod
    def for_search(cls, contract: ModelContract) -> Thresholds | None:
        """For the nearest pictures of a catalog; None where the model was not calibrated.

        Raises:
            MismatchError: What the model carries are no thresholds.
        """
        return _read(contract, "")

    @classmethod
    def for_pairs(cls, contract: ModelContract) -> Thresholds | None:
        """For two pictures held against each other; as `for_search`."""
        return _read(contract, "pair_")

    def verdict(self, score: float) -> str:
        """``match``, ``unsure`` or ``none``."""
        if score >= self.match:
            return MATCH
        return UNSURE if score >= self.unsure else NONE


def _read(contract: ModelContract, prefix: str) -> Thresholds | None:
    known = contract.thresholds
    names = [prefix + name for name in ("match", "unsure", "match_false", "unsure_false")]
    if any(name not in known for name in names):
        return None
    values = [known[name] for name in names]
    queries = known.get("queries", 0)
    numbers = all(
        isinstance(value, int | float) and math.isfinite(value) for value in (*values, queries)
    )
    if not numbers or values[0] < values[1]:
        raise MismatchError(
            f"the thresholds of the model {contract.name!r} are damaged",
            facts=", ".join(f"{name} {known[name]!r}" for name in names),
            hint="export it again with: embedkit export",
        )
    match, unsure, match_false, unsure_false = map(float, values)
    return Thresholds(match, unsure, match_false, unsure_false, int(queries))
