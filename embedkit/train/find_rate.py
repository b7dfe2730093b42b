"""A range test: take steps at ever higher learning rates, and see where the loss falls fastest.

Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017, arXiv:1506.01186, with
rates that rise exponentially. The rates of backbone, head and loss rise together, from 0.01 to 100
times what the recipe says of each, so that they keep their proportions.

The rule: the losses are smoothed, and the factor is taken at which they are least; beyond it steps
hurt more than they help. Where they are least at an end of the range, or nowhere clearly below the
first ones, the test says nothing, and the recipe's rates stay.

It is a rule of thumb, made of sixty steps. Fine-tuning MobileNetV2 on photos of groceries it came
to 0.6 (rll) and 2.8 (proxy-anchor) times the defaults, which are good there; for a network that
starts from random numbers it came to a tenth of what was best for rll in 120 steps, because what
destroys nothing can begin faster than it goes on here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["STEPS", "RangeTest", "range_test", "smoothed"]

STEPS = 60
_LOWEST, _HIGHEST = 1e-2, 1e2
_EACH_SIDE = 5


@dataclass(frozen=True)
class RangeTest:
    """What was tried, and what is made of it.

    Attributes:
        factors: Of all learning rates, rising, one a step.
        losses: Of the batch before each step; shorter than `STEPS` when it was no number any more.
        factor: To multiply the recipe's rates by.
        reason: Why that is 1 and they stay as they are; empty where the test has decided.
    """

    factors: tuple[float, ...]
    losses: tuple[float, ...]
    factor: float
    reason: str = ""

    def to_json(self) -> dict[str, object]:
        """Plain JSON values."""
        return {
            "factors": list(self.factors),
            "losses": list(self.losses),
            "factor": self.factor,
            "reason": self.reason,
        }


def range_test(step: Callable[[int, float], float]) -> RangeTest:
    """Try all factors in turn.

    Args:
        step: ``step(number, factor)`` learns from one batch with all rates times `factor` and
            returns its loss before that; one that is not finite ends the test.
    """
    factors = [float(factor) for factor in np.geomspace(_LOWEST, _HIGHEST, STEPS)]
    losses: list[float] = []
    for number, factor in enumerate(factors):
        loss = step(number, factor)
        if not np.isfinite(loss):
            break
        losses.append(loss)
    factor, reason = _decide(factors, losses)
    return RangeTest(tuple(factors[: len(losses)]), tuple(losses), factor, reason)


def smoothed(losses: Sequence[float]) -> npt.NDArray[np.float64]:
    """The mean of each loss and up to five on either side, as many on one as on the other."""
    sums = np.concatenate([[0.0], np.cumsum(losses, dtype=np.float64)])
    places = np.arange(len(losses))
    reach = np.minimum(_EACH_SIDE, np.minimum(places, len(losses) - 1 - places))
    means: npt.NDArray[np.float64] = (sums[places + reach + 1] - sums[places - reach]) / (
        2 * reach + 1
    )
    return means


def _decide(factors: Sequence[float], losses: Sequence[float]) -> tuple[float, str]:
    """The factor, and why it is 1 where the test has not decided."""
    inside = slice(_EACH_SIDE, len(losses) - _EACH_SIDE)
    means = smoothed(losses)[inside]
    if len(means) < _EACH_SIDE:
        return 1.0, f"the loss was no number any more after {len(losses)} steps"
    place = int(means.argmin())
    # Neighbouring losses differ by what batches differ by, and a mean of eleven by a third of it.
    noise = float(np.abs(np.diff(losses)).mean()) / np.sqrt(2 * _EACH_SIDE + 1)
    if means[0] - means[place] <= noise:
        return 1.0, "the loss did not fall"
    if place == len(means) - 1:
        return 1.0, "the loss was still falling at the greatest"
    return factors[inside][place], ""
