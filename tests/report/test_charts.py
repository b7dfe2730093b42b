"""Charts: the drawing says what the numbers say, in a picture, in words and as a table."""

from __future__ import annotations

import math
import re

import pytest

from embedkit.report.charts import Bars, Line, histogram, line_chart, short, ticks
from tests.report.pages import ReadPage


def points(drawing: str) -> list[tuple[float, float]]:
    found = re.findall(r'<circle[^>]* cx="([-\d.]+)" cy="([-\d.]+)"', drawing)
    return [(float(x), float(y)) for x, y in found]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 0.47, [0, 0.1, 0.2, 0.3, 0.4, 0.5]),
        (-3, 12, [-5, 0, 5, 10, 15]),
        (1e-9, 5e-9, [1e-9, 2e-9, 3e-9, 4e-9, 5e-9]),
        (0, 123456, [0, 50000, 100000, 150000]),
    ],
)
def test_ticks_are_round_and_enclose_the_numbers(
    low: float, high: float, expected: list[float]
) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("value", [0, 1, -7.5, 1e12])
def test_ticks_of_one_number_span_it(value: float) -> None:
    steps = ticks(value, value)
    assert steps[0] < value < steps[-1]
    assert 2 <= len(steps) <= 7


def test_points_lie_where_the_numbers_are() -> None:
    drawing = line_chart("x", [1, 2, 3], [Line("a", [0.0, 1.0, 0.5])], key="k", x_label="epoch")
    ReadPage(drawing)
    (x1, y1), (x2, y2), (x3, y3) = points(drawing)
    assert x2 - x1 == pytest.approx(x3 - x2)
    assert x1 < x2
    assert y2 < y3 < y1  # upwards is a smaller y
    assert y3 == pytest.approx((y1 + y2) / 2, abs=0.1)


def test_gaps_break_the_curve_and_never_reach_the_page() -> None:
    values = [0.1, None, math.nan, 0.4, 0.5]
    line = Line("a", values)
    drawing = line_chart("x", [1, 2, 3, 4, 5], [line], key="k", x_label="epoch")
    page = ReadPage(drawing)
    assert len(points(drawing)) == 3
    assert drawing.count('class="curve') == 2 + 1  # two runs and the legend
    assert "nan" not in drawing.lower()
    assert page.text.count("0.4") >= 1


def test_a_chart_without_numbers_says_so() -> None:
    for lines in ([], [Line("a", [None])], [Line("a", [math.inf])]):
        assert "No numbers yet" in line_chart("x", [1], lines, key="k", x_label="epoch")
    assert "No numbers yet" in line_chart("x", [], [Line("a", [])], key="k", x_label="epoch")


def test_one_epoch_and_equal_numbers_are_drawn() -> None:
    lines = [Line("a", [0.5]), Line("b", [0.5], tone=1, dashed=True)]
    drawing = line_chart("x", [1], lines, key="k", x_label="epoch", mark=1)
    assert len(points(drawing)) == 1
    assert 'class="best"' in drawing
    assert "dashed" in drawing


def test_it_is_told_in_words_and_as_a_table() -> None:
    lines = [Line("val", [0.25, 0.75]), Line("before", [0.1, 0.1], dashed=True)]
    page = ReadPage(line_chart("MAP@R", [1, 2], lines, key="k", x_label="epoch"))
    assert "val: from 0.25 to 0.75, least 0.25, most 0.75; before: 0.1" in page.text
    assert page.tags.count("tr") == 3
    assert page.tags.count("desc") == page.tags.count("svg") - 2  # all but the legend's


def test_names_cannot_break_out_of_the_page() -> None:
    name = '<script>alert("x")</script>'
    drawing = line_chart(name, [1], [Line(name, [1.0])], key="k", x_label=name, note=name)
    assert "<script" not in drawing
    ReadPage(drawing)


def test_bars_are_as_high_as_their_share_of_the_axis() -> None:
    drawing = histogram("x", [0, 1, 2], [Bars("a", [1.0, 4.0])], key="k", x_label="d", high=5)
    ReadPage(drawing)
    (shape,) = re.findall(r'class="area[^>]* d="([^"]+)"', drawing)
    floor = float(re.findall(r"M[\d.]+,([\d.]+)", shape)[0])
    first, second, back = map(float, re.findall(r"V([\d.]+)", shape))
    assert back == floor
    assert (floor - second) == pytest.approx(4 * (floor - first), abs=0.5)
    assert "half lies below 2" in drawing
    with pytest.raises(ValueError, match="bin"):
        histogram("x", [0, 1], [Bars("a", [1.0, 2.0])], key="k", x_label="d")


def test_an_empty_histogram_stands() -> None:
    ReadPage(histogram("x", [0, 1], [Bars("a", [0.0])], key="k", x_label="d"))


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (12, "12"), (1234.0, "1,234"), (0.123456, "0.1235"), (math.nan, "-"), (-2, "-2")],
)
def test_numbers_are_short(value: float, expected: str) -> None:
    assert short(value) == expected
