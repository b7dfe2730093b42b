"""The page of a comparison: what it says, and charts whose dots lie where the numbers are."""

from __future__ import annotations

import re
from typing import Any

import pytest

from embedkit.report.charts import Spread, interval_chart, interval_curves
from embedkit.report.comparison_page import comparison_page
from tests.report.pages import ReadPage

METRICS = ["recall@1", "r_precision", "map@r", "recall@2"]


def value(mean: float, half: float | None = 0.01) -> dict[str, Any]:
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return {"mean": mean, "low": low, "high": high, "values": [mean]}


def row(loss: str, dim: int, mean: float) -> dict[str, Any]:
    return {
        "row": f"{loss}-{dim}",
        "loss": loss,
        "dim": dim,
        "searched": ["learning_rate"],
        "settings": {"learning_rate": 1e-4, f"option.of-{loss}": 0.5},
        "search": [{"settings": {}, "map@r": 0.1}] * 3,
        "failed": "",
        "single": {name: value(mean) for name in METRICS},
        "concatenated": {name: value(mean + 0.1, 0.3) for name in METRICS},
    }


def content(rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    whole = {
        "comparable": True,
        "label": "",
        "metrics": METRICS,
        "rows": rows,
        "baseline": {"single": {name: value(0.2, None) for name in METRICS}},
        "lead": {"sentence": "The lead of <one> is within the noise."},
        "baseline_beaten": True,
        "fixed": {"dim": 8, "folds": 4, "steps": None},
        "seeds": [1, 2, 3],
        "data": {
            "train_images": 1234,
            "train_classes": 40,
            "test_images": 999,
            "test_classes": 41,
        },
    }
    return {**whole, **changes}


def test_it_says_the_verdict_the_numbers_the_settings_and_what_was_fixed() -> None:
    source = comparison_page(content([row("rll", 8, 0.51), row("<script>", 8, 0.43)]))
    read = ReadPage(source)
    for said in (
        "The lead of <one> is within the noise.",
        "0.5100 ± 0.0100",
        "<script>-8",
        "1,234 images",
        "41 other classes",
        "3 trials",
        "of-rll",
        "1, 2, 3",
        "automatic",
        "untrained",
    ):
        assert said in read.text, said
    assert "ot comparable" not in read.text
    assert "No row is better" not in read.text


def test_a_quick_try_and_a_useless_result_are_said_so() -> None:
    source = comparison_page(
        content([row("rll", 8, 0.1)], label="not comparable: a try", baseline_beaten=False)
    )
    read = ReadPage(source)
    assert "Not comparable: a try." in read.text
    assert "No row is better than the untrained network." in read.text


def test_rows_without_a_result_are_named_and_no_rows_are_no_error() -> None:
    failed = {**row("rll", 8, 0.1), "single": None, "concatenated": None, "failed": "it broke"}
    assert "rll-8 has no result: it broke." in ReadPage(comparison_page(content([failed]))).text
    ReadPage(comparison_page(content([], lead=None, baseline_beaten=False)))


def test_several_widths_bring_curves_over_the_width() -> None:
    one = [row("rll", dim, 0.3) for dim in (8, 16, 32)]
    read = ReadPage(comparison_page(content([*one, row("triplet", 16, 0.4)])))
    assert "P@1 (recall@1) by width" in read.text
    assert "MAP@R by width" in read.text
    assert "by width" not in ReadPage(comparison_page(content(one[:1]))).text


def dots(drawing: str) -> list[tuple[float, float]]:
    found = re.findall(r'<circle[^>]* cx="([-\d.]+)" cy="([-\d.]+)"', drawing)
    return [(float(x), float(y)) for x, y in found]


def bars(drawing: str, letter: str) -> list[tuple[float, float]]:
    """The two ends of each interval, along its direction."""
    chart = drawing.split("</figcaption>")[1]  # without the legend
    found = re.findall(rf'd="M([-\d.]+),([-\d.]+){letter}([-\d.]+)"', chart)
    first = 0 if letter == "H" else 1
    return [(float(one[first]), float(one[2])) for one in found]


def test_dots_lie_where_the_numbers_are_and_bars_reach_to_their_ends() -> None:
    points = [(0.5, 0.4, 0.6), (0.3, 0.2, 0.4), None]
    drawing = interval_chart("x", ["a", "b", "c"], [Spread("s", points)], key="k", mark=0.4)
    (x1, y1), (x2, y2) = dots(drawing)
    assert x1 > x2
    assert y1 < y2
    (low, high), (low2, high2) = bars(drawing, "H")
    assert (low + high) / 2 == pytest.approx(x1, abs=0.1)
    assert high - low == pytest.approx(high2 - low2, abs=0.2) == pytest.approx(x1 - x2, abs=0.2)
    mark = re.search(r'class="best" x1="([\d.]+)"', drawing)
    assert mark is not None
    assert float(mark[1]) == pytest.approx(low, abs=0.1) == pytest.approx(high2, abs=0.1)
    assert "0.5 (0.4 to 0.6)" in ReadPage(drawing).text


def test_curves_go_up_with_the_numbers_and_leave_gaps_out() -> None:
    series = [
        Spread("one", [(0.1, 0.0, 0.2), (0.3, 0.2, 0.4), (0.2, 0.1, 0.3)]),
        Spread("two", [None, None, None], tone=1),
    ]
    drawing = interval_curves("x", ["8", "16", "32"], series, key="k", x_label="width")
    (x1, y1), (x2, y2), (x3, y3) = dots(drawing)
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)
    assert y2 < y3 < y1
    assert y1 - y3 == pytest.approx(y3 - y2, abs=0.2)
    assert all(low > high for low, high in bars(drawing, "V"))
    ReadPage(drawing)


def test_equal_numbers_and_a_single_name_are_drawn() -> None:
    drawing = interval_chart("x", ["only"], [Spread("s", [(0.0, 0.0, 0.0)])], key="k")
    assert len(dots(drawing)) == 1
    ReadPage(drawing)
