"""Curves and histograms as inline SVG: pure functions from numbers to text, no script, no library.

Every chart is a ``<figure>`` with a caption, a title and a description for those who do not see it,
and its numbers as a table. Colours come from the page (classes ``tone-0`` to ``tone-3``), so a
chart follows light and dark; lines differ by dashes as well as by colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from embedkit.report.page import table, text

__all__ = [
    "Bars",
    "Line",
    "Spread",
    "histogram",
    "interval_chart",
    "interval_curves",
    "line_chart",
    "short",
    "ticks",
]

Scale = Callable[[float], float]

_WIDTH, _HEIGHT = 440, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 10, 38


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: For legend and table.
        values: One for each x; None and numbers that are not finite leave a gap.
        tone: Which of the page's four colours, 0 to 3.
        dashed: Drawn in dashes, without points: something to compare with.
    """

    name: str
    values: Sequence[float | None]
    tone: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Bars:
    """One distribution: a value of 0 or more for each bin."""

    name: str
    values: Sequence[float]
    tone: int = 0


@dataclass(frozen=True)
class Spread:
    """One series of values with intervals: middle, low end and high end, or None for a gap."""

    name: str
    points: Sequence[tuple[float, float, float] | None]
    tone: int = 0


def line_chart(
    title: str,
    x: Sequence[float],
    lines: Sequence[Line],
    *,
    key: str,
    x_label: str,
    low: float | None = None,
    high: float | None = None,
    mark: float | None = None,
    note: str = "",
) -> str:
    """Curves over one axis.

    Args:
        x: Positions, rising, the same for all lines; none gives a chart that says so.
        key: Unique in the page, for the ids inside.
        low: Where the upright axis begins; None is by the numbers.
        high: Where it ends.
        mark: An x to point out with a thin upright line, explained in `note`.
        note: A line below the title.
    """
    values = [v for line in lines for v in line.values if v is not None and math.isfinite(v)]
    if not values:
        return _figure(title, note, "", '<p class="note">No numbers yet.</p>', "")
    steps = ticks(min(values) if low is None else low, max(values) if high is None else high)
    bottom, top = min(steps[0], *values), max(steps[-1], *values)
    first, last = min(x), max(x)

    def across(position: float) -> float:
        share = (position - first) / (last - first) if last > first else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def up(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - bottom) / (top - bottom) * (_HEIGHT - _TOP - _BOTTOM)

    drawn = [_upright_axis(steps, up), _level_axis(_whole_ticks(first, last), across, x_label)]
    if mark is not None:
        drawn.append(
            f'<line class="best" x1="{across(mark):.1f}" x2="{across(mark):.1f}" '
            f'y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
        )
    # What is compared with lies below what is looked at.
    for line in sorted(lines, key=lambda line: not line.dashed):
        drawn.append(_curve(line, x, across, up))
    described = "; ".join(_course(line) for line in lines)
    numbers = table(
        [x_label, *(line.name for line in lines)],
        [
            [short(position), *("" if v is None else short(v) for v in row)]
            for position, *row in zip(x, *(line.values for line in lines), strict=True)
        ],
    )
    legend = _legend([(line.name, line.tone, line.dashed) for line in lines])
    return _figure(title, note, legend, _svg(key, title, described, drawn), numbers)


def histogram(
    title: str,
    edges: Sequence[float],
    series: Sequence[Bars],
    *,
    key: str,
    x_label: str,
    high: float | None = None,
    note: str = "",
) -> str:
    """Distributions over the same bins, laid over each other.

    Args:
        edges: One more than there are bins, rising.
        high: Where the upright axis ends, so that two charts can be compared.
        key: Unique in the page.
    """
    if any(len(bars.values) != len(edges) - 1 for bars in series):
        raise ValueError("every series needs a value for each bin")
    steps = ticks(0, max([high or 0, *(v for bars in series for v in bars.values)]))
    top, first, last = steps[-1], edges[0], edges[-1]

    def across(position: float) -> float:
        return _LEFT + (position - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)

    def up(value: float) -> float:
        return _HEIGHT - _BOTTOM - value / top * (_HEIGHT - _TOP - _BOTTOM)

    drawn = [_upright_axis(steps, up), _level_axis(ticks(first, last), across, x_label, last)]
    for bars in series:
        corners = [f"M{across(first):.1f},{up(0):.1f}"]
        for place, value in enumerate(bars.values):
            corners.append(f"V{up(value):.1f}H{across(edges[place + 1]):.1f}")
        shape = "".join([*corners, f"V{up(0):.1f}Z"])
        drawn.append(f'<path class="area tone-{bars.tone}" d="{shape}"/>')
    numbers = table(
        [x_label, *(bars.name for bars in series)],
        [
            [f"{short(edges[place])} to {short(edges[place + 1])}", *(short(v) for v in row)]
            for place, row in enumerate(zip(*(bars.values for bars in series), strict=True))
        ],
    )
    described = "; ".join(f"{bars.name}: {_middle(bars, edges)}" for bars in series)
    legend = _legend([(bars.name, bars.tone, False) for bars in series])
    return _figure(title, note, legend, _svg(key, title, described, drawn), numbers)


def interval_chart(
    title: str,
    names: Sequence[str],
    series: Sequence[Spread],
    *,
    key: str,
    mark: float | None = None,
    note: str = "",
) -> str:
    """A line for each name, with a dot and its interval for each series.

    Args:
        names: At least one; every series has a point or a gap for each.
        key: Unique in the page, for the ids inside.
        mark: A value to compare with, as a dotted line, explained in `note`.
        note: A line below the title.
    """
    steps = _enclosing(series, mark)
    line, gap, left = 15, 27, 10
    height = _TOP + len(names) * (gap + line * len(series)) + _BOTTOM - 14

    def across(value: float) -> float:
        return left + (value - steps[0]) / (steps[-1] - steps[0]) * (_WIDTH - 2 * left - 10)

    floor = height - _BOTTOM + 14
    drawn = [
        f'<line class="grid-line" x1="{across(step):.1f}" x2="{across(step):.1f}" y1="{_TOP}" '
        f'y2="{floor}"/><text x="{across(step):.1f}" y="{floor + 16}" text-anchor="middle">'
        f"{short(step)}</text>"
        for step in steps
    ]
    if mark is not None:
        drawn.append(
            f'<line class="best" x1="{across(mark):.1f}" x2="{across(mark):.1f}" '
            f'y1="{_TOP}" y2="{floor}"/>'
        )
    for row, name in enumerate(names):
        top = _TOP + row * (gap + line * len(series)) + 14
        drawn.append(f'<text x="{left}" y="{top}">{text(name)}</text>')
        for place, one in enumerate(series):
            point = one.points[row]
            if point is not None:
                y = top + 12 + line * place
                middle, low, high = (across(value) for value in point)
                told = f"{name}, {_told(one.name, point)}"
                bar = f"M{low:.1f},{y}H{high:.1f}"
                drawn.append(_dot(one.tone, middle, y, bar, told))
    return _spread_figure(title, note, names, series, key, drawn, height)


def interval_curves(
    title: str,
    names: Sequence[str],
    series: Sequence[Spread],
    *,
    key: str,
    x_label: str,
    note: str = "",
) -> str:
    """Curves over evenly spaced names, with an interval at each point.

    Args:
        names: Along the level axis, at least one; every series has a point or a gap for each.
        key: Unique in the page, for the ids inside.
        x_label: What the names are.
        note: A line below the title.
    """
    steps = _enclosing(series, None)

    def up(value: float) -> float:
        share = (value - steps[0]) / (steps[-1] - steps[0])
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def across(place: float) -> float:
        return _LEFT + (place + 0.5) / len(names) * (_WIDTH - _LEFT - _RIGHT)

    drawn = [_upright_axis(steps, up), _level_axis([], across, x_label)]
    drawn += [
        f'<text x="{across(place):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">'
        f"{text(name)}</text>"
        for place, name in enumerate(names)
    ]
    for number, one in enumerate(series):
        # Beside each other, so that intervals of the same place can be told apart.
        aside = 5 * (number - (len(series) - 1) / 2)
        points = [
            (across(place) + aside, point, names[place])
            for place, point in enumerate(one.points)
            if point is not None
        ]
        path = "L".join(f"{x:.1f},{up(point[0]):.1f}" for x, point, _ in points)
        if path:
            drawn.append(f'<path class="curve tone-{one.tone}" d="M{path}"/>')
        for x, point, name in points:
            bar = f"M{x:.1f},{up(point[1]):.1f}V{up(point[2]):.1f}"
            told = f"{name}, {_told(one.name, point)}"
            drawn.append(_dot(one.tone, x, up(point[0]), bar, told))
    return _spread_figure(title, note, names, series, key, drawn, _HEIGHT)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers that enclose `low` to `high`: steps of 1, 2 or 5 times a power of ten.

    At least two, at most `most` + 2. Equal or reversed ends give a span around `low`.
    """
    if not high > low:
        spread = abs(low) * 0.1 or 1.0
        low, high = low - spread, low + spread
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    begin, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(place * step, 12) for place in range(begin, end + 1)]


def short(value: float) -> str:
    """A number as one reads it: about four digits, no needless zeros."""
    if not math.isfinite(value):
        return "-"
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.4g}"


def _whole_ticks(first: float, last: float) -> list[float]:
    """Ticks of epochs: within the range, whole numbers, at most seven."""
    if last <= first:
        return [first]
    step = max(1, math.ceil(ticks(0, last - first, 6)[1]))
    inside = [float(step * n) for n in range(math.ceil(first / step), math.floor(last / step) + 1)]
    return inside if inside and inside[0] - first < step / 2 else [first, *inside]


def _upright_axis(steps: Sequence[float], up: Scale) -> str:
    lines = []
    for step in steps:
        y = up(step)
        lines.append(
            f'<line class="grid-line" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" '
            f'y2="{y:.1f}"/><text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">'
            f"{short(step)}</text>"
        )
    return "".join(lines)


def _level_axis(steps: Sequence[float], across: Scale, label: str, last: float = math.inf) -> str:
    floor = _HEIGHT - _BOTTOM
    marks = "".join(
        f'<text x="{across(step):.1f}" y="{floor + 16}" text-anchor="middle">{short(step)}</text>'
        for step in steps
        if step <= last
    )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    return (
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{floor}" y2="{floor}"/>'
        f'{marks}<text x="{middle:.0f}" y="{_HEIGHT - 4}" text-anchor="middle">{text(label)}</text>'
    )


def _curve(line: Line, x: Sequence[float], across: Scale, up: Scale) -> str:
    runs: list[list[tuple[float, float, str]]] = [[]]
    for position, value in zip(x, line.values, strict=True):
        if value is None or not math.isfinite(value):
            runs.append([])
        else:
            told = f"{line.name}: {short(value)} at {short(position)}"
            runs[-1].append((across(position), up(value), told))
    kind = f"curve tone-{line.tone}" + (" dashed" if line.dashed else "")
    parts = []
    for run in filter(None, runs):
        if line.dashed and len(x) == 1:
            # One epoch: the level to compare with is still a line.
            run = [(_LEFT, run[0][1], run[0][2]), (_WIDTH - _RIGHT, run[0][1], run[0][2])]
        points = "L".join(f"{a:.1f},{b:.1f}" for a, b, _ in run)
        parts.append(f'<path class="{kind}" d="M{points}"/>')
        if not line.dashed:
            radius = 3 if len(x) <= 40 else 1.5
            parts += [
                f'<circle class="tone-{line.tone}" cx="{a:.1f}" cy="{b:.1f}" r="{radius}">'
                f"<title>{text(told)}</title></circle>"
                for a, b, told in run
            ]
    return "".join(parts)


def _course(line: Line) -> str:
    """A curve in words."""
    values = [v for v in line.values if v is not None and math.isfinite(v)]
    if not values:
        return f"{line.name}: no numbers"
    if line.dashed or len(values) == 1:
        return f"{line.name}: {short(values[-1])}"
    return (
        f"{line.name}: from {short(values[0])} to {short(values[-1])}, "
        f"least {short(min(values))}, most {short(max(values))}"
    )


def _middle(bars: Bars, edges: Sequence[float]) -> str:
    total = sum(bars.values)
    if total <= 0:
        return "nothing"
    reached = 0.0
    for place, value in enumerate(bars.values):
        reached += value
        if reached >= total / 2:
            return f"half lies below {short(edges[place + 1])}"
    return f"half lies below {short(edges[-1])}"


def _legend(entries: Sequence[tuple[str, int, bool]]) -> str:
    items = "".join(
        '<li><svg viewBox="0 0 22 10" aria-hidden="true">'
        f'<path class="curve tone-{tone}{" dashed" if dashed else ""}" d="M1,5H21"/></svg>'
        f"{text(name)}</li>"
        for name, tone, dashed in entries
    )
    return f'<ul class="legend">{items}</ul>'


def _enclosing(series: Sequence[Spread], mark: float | None) -> list[float]:
    """Ticks around all intervals."""
    values = [value for one in series for point in one.points if point for value in point]
    values += [] if mark is None else [mark]
    return ticks(min(values, default=0.0), max(values, default=0.0))


def _told(name: str, point: tuple[float, float, float]) -> str:
    middle, low, high = (short(value) for value in point)
    return f"{name}: {middle} ({low} to {high})"


def _dot(tone: int, x: float, y: float, bar: str, told: str) -> str:
    return (
        f'<path class="curve tone-{tone}" d="{bar}"/>'
        f'<circle class="tone-{tone}" cx="{x:.1f}" cy="{y:.1f}" r="4">'
        f"<title>{text(told)}</title></circle>"
    )


def _spread_figure(
    title: str,
    note: str,
    names: Sequence[str],
    series: Sequence[Spread],
    key: str,
    drawn: Sequence[str],
    height: int,
) -> str:
    described = "; ".join(
        f"{names[place]}, {_told(one.name, point)}"
        for one in series
        for place, point in enumerate(one.points)
        if point is not None
    )
    numbers = table(
        ["", *(one.name for one in series)],
        [
            [
                name,
                *(
                    "" if (point := one.points[place]) is None else _told("", point)[2:]
                    for one in series
                ),
            ]
            for place, name in enumerate(names)
        ],
    )
    legend = _legend([(one.name, one.tone, False) for one in series])
    return _figure(title, note, legend, _svg(key, title, described, drawn, height), numbers)


def _svg(key: str, title: str, described: str, drawn: Sequence[str], height: int = _HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-labelledby="{key}-title {key}-desc"><title id="{key}-title">{text(title)}</title>'
        f'<desc id="{key}-desc">{text(described)}</desc>{"".join(drawn)}</svg>'
    )


def _figure(title: str, note: str, legend: str, drawing: str, numbers: str) -> str:
    below = f'<p class="note">{text(note)}</p>' if note else ""
    fallback = f"<details><summary>As a table</summary>{numbers}</details>" if numbers else ""
    return (
        f'<figure class="chart card"><figcaption><h3>{text(title)}</h3>{below}{legend}'
        f"</figcaption>{drawing}{fallback}</figure>"
    )
