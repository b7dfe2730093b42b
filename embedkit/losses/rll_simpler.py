"""Ranked List Loss, simpler: only a margin and a temperature are left to choose.

Paper: Wang, Hua, Kodirov, Robertson, "Ranked List Loss for Deep Metric Learning", the longer
version, arXiv:1903.03238, there called RLL-Simpler.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from embedkit.losses._base import MetricLoss, check_number
from embedkit.losses._pairs import Memory
from embedkit.losses.rll import ranked_list

__all__ = ["SimplerRankedListLoss"]


class SimplerRankedListLoss(MetricLoss):
    """`RankedListLoss` with ``alpha = 1 + margin / 2`` and both parts weighted 0.5.

    So negatives are pushed past ``1 + margin / 2`` and positives pulled inside ``1 - margin / 2``.
    As there, row i alone moves in query i's terms, and the weights are constants in backward.

    Args:
        margin: Gap between the two boundaries, 0 to 2.
        temperature: How sharply near negatives dominate, at least 0.

    Shape: ``(B, D)`` rows, scaled to length 1 here, and ``(B,)`` labels -> scalar. Cost: O(B^2 D)
    time, O(B^2) memory.
    """

    takes_memory = True

    def __init__(self, *, margin: float = 0.4, temperature: float = 10.0) -> None:
        super().__init__()
        self.margin = check_number("margin", margin, least=0, most=2)
        self.temperature = check_number("temperature", temperature, least=0)

    def compute(
        self, rows: Tensor, labels: Tensor, memory: Memory | None = None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        return ranked_list(
            rows,
            labels,
            memory,
            alpha=1 + self.margin / 2,
            margin=self.margin,
            temperature=self.temperature,
            pull=0.5,
            push=0.5,
            query_only=True,
        )
