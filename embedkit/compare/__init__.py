"""The fair comparison of losses on your own photos: one protocol for all, intervals, a verdict."""

from embedkit.compare.comparison import (
    DEFAULT_LOSSES,
    NOT_COMPARABLE,
    Plan,
    compare,
    describe_plan,
    plan_comparison,
)
from embedkit.compare.protocol import Division, Protocol, divide, quick_protocol

__all__ = [
    "DEFAULT_LOSSES",
    "NOT_COMPARABLE",
    "Division",
    "Plan",
    "Protocol",
    "compare",
    "describe_plan",
    "divide",
    "plan_comparison",
    "quick_protocol",
]
