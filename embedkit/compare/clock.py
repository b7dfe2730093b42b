"""How far a comparison is, and how long it may still take."""

from __future__ import annotations

import time

from embedkit.compare.cell import Cell
from embedkit.train import Reporter

__all__ = ["Clock"]


class Clock:
    """Counts trainings; says once, after the first new one, how long the others may take.

    Args:
        cells: Trainings in all.
        reporter: Who is told.
    """

    def __init__(self, cells: int, reporter: Reporter) -> None:
        self.cells, self.done = cells, 0
        self._reporter, self._told, self._began = reporter, False, time.monotonic()

    @property
    def left(self) -> int:
        """Trainings to come."""
        return self.cells - self.done

    def skip(self, cells: int) -> None:
        """So many were there already."""
        self.done += cells

    def count(self, cell: Cell, is_new: bool) -> None:
        """One more is there."""
        self.done += 1
        took, self._began = time.monotonic() - self._began, time.monotonic()
        if is_new and not self._told and not cell.failed and self.left:
            self._told = True
            self._reporter.note(
                "time", f"about {_span(took * self.left)} for the {self.left:,} trainings to come"
            )


def _span(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{max(seconds, 1):.0f} seconds"
