"""The precisions of an export side by side: what a search would notice, and which was taken."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import JustifyMethod, RenderableType

    from embedkit.evaluate import Difference
    from embedkit.export import GateReport, Ladder, Rung

__all__ = ["rungs_table"]

_WIDTH = 80
_NAMED = 5


def rungs_table(ladder: Ladder) -> RenderableType:
    """One line per rung, 80 columns, and a sentence for each why it was taken or not."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=0)
    for name in ("", "cosine", "nearest", "recall@1", "MAP@R", "MB", "img/s", "verdict"):
        justify: JustifyMethod = "left" if name in ("", "verdict") else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    for rung in _all(ladder):
        if rung.report is not None:
            table.add_row(*_cells(rung, rung.report))
    return Group(table, *(Text(line) for line in _below(ladder)))


def _all(ladder: Ladder) -> list[Rung]:
    extra = ladder.engine
    return [*ladder.rungs, *([extra] if extra and extra.path not in _paths(ladder) else [])]


def _paths(ladder: Ladder) -> set[object]:
    return {rung.path for rung in ladder.rungs}


def _cells(rung: Rung, report: GateReport) -> list[str]:
    cosine, kept = report.min_cosine, report.neighbour_overlap
    return [
        rung.name,
        f"{cosine:.5f}" if math.isfinite(cosine) else "no number",
        "" if kept is None else f"{kept:.1%}",
        _figure(rung, report.recall_at_1),
        _figure(rung, report.map_at_r),
        "" if rung.size is None else f"{rung.size / 1e6:.1f}",
        "" if rung.speed is None else f"{rung.speed.images_per_second[-1]:,.0f}",
        rung.verdict,
    ]


def _figure(rung: Rung, figure: Difference | None) -> str:
    """The figure itself for fp32; the change and its interval, in points, for the others."""
    if figure is None:
        return ""
    if rung.precision == "fp32":
        return f"{figure.after:.4f}"
    change = 100 * (figure.after - figure.before)
    low, high = 100 * figure.interval.low, 100 * figure.interval.high
    # Adding 0 makes a rounded -0 a plain one.
    return f"{round(change, 2) + 0:+.2f}\n{round(low, 1) + 0:+.1f}..{round(high, 1) + 0:+.1f}"


def _below(ladder: Ladder) -> list[str]:
    lines = []
    if len(ladder.rungs) > 1:
        lines.append("cosine: the least with torch; nearest: share of the 10 nearest that stay;")
        lines.append("recall@1 and MAP@R: change in points, its 95 % interval beneath")
    for rung in ladder.rungs:
        if rung.precision != "fp32" or rung.verdict == "taken":
            lines += _wrapped(f"{rung.name}: {rung.reason}")
        if rung.errors:
            worst = ", ".join(f"{one.layer.name} {one.error:.2g}" for one in rung.errors[:_NAMED])
            lines += _wrapped(f"  hurts most (1 - cosine, this layer alone): {worst}")
    shares = [
        f"{rung.name} {rung.report.equal_codes:.1%}"
        for rung in _all(ladder)
        if rung.report is not None and rung.report.equal_codes is not None
    ]
    if shares:
        lines += _wrapped(f"codes: the network's own are {', '.join(shares)}")
    if ladder.engine and ladder.engine.path != ladder.taken.path:
        lines += _wrapped(f"engine: built from {ladder.engine.name}, which {ladder.engine.reason}")
    return lines


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, subsequent_indent="  ")
