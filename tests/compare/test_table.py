"""Means, intervals and the verdict, against formulas and scipy's own paired test."""

from __future__ import annotations

import csv
import io
from typing import Any

import numpy as np
import pytest
from scipy import stats

from embedkit.compare.table import csv_text, estimate, lead, summary


def row(name: str, values: list[float], *, failed: str = "") -> dict[str, Any]:
    """What row.json would hold, seen by `summary`."""
    repeats = [
        {"seed": seed, "single": {"map@r": value}, "concatenated": {"map@r": value + 0.1}}
        for seed, value in enumerate(values)
    ]
    return summary({"row": name, "loss": name, "dim": 8, "failed": failed, "repeats": repeats})


def test_an_interval_is_students() -> None:
    values = [0.31, 0.35, 0.33, 0.30, 0.36]
    mean = sum(values) / 5
    deviation = (sum((value - mean) ** 2 for value in values) / 4) ** 0.5
    found = estimate(values)
    assert found["mean"] == pytest.approx(mean)
    # 2.776 is the 97.5 % point of t with 4 degrees of freedom in every table.
    assert found["high"] - mean == pytest.approx(2.776 * deviation / 5**0.5, rel=1e-3)
    assert mean - found["low"] == pytest.approx(found["high"] - mean)
    assert found["values"] == values


def test_one_value_has_no_interval() -> None:
    assert estimate([0.5]) == {"mean": 0.5, "low": None, "high": None, "values": [0.5]}


@pytest.mark.parametrize("seed", range(20))
def test_of_two_rows_the_verdict_is_that_of_the_paired_t_test(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shared = rng.normal(0.4, 0.05, 5)
    first = shared + rng.normal(0.012, 0.01, 5)
    second = shared + rng.normal(0, 0.01, 5)
    verdict = lead([row("first", first.tolist()), row("second", second.tolist())])
    assert verdict is not None
    p = stats.ttest_rel(first, second).pvalue
    assert verdict["beyond_noise"] == (p < 0.05)
    assert verdict["winner"] == ("first" if first.mean() > second.mean() else "second")
    assert verdict["by"] == pytest.approx(abs(first.mean() - second.mean()))
    words = "larger than the noise" if p < 0.05 else "within the noise"
    assert words in verdict["sentence"]


def test_every_further_row_makes_the_interval_wider() -> None:
    rows = [row("a", [0.5, 0.52, 0.51]), row("b", [0.4, 0.43, 0.41]), row("c", [0.1, 0.1, 0.1])]
    two, three = lead(rows[:2]), lead(rows)
    assert two is not None
    assert three is not None
    assert two["level"] == pytest.approx(0.95)
    assert three["level"] == pytest.approx(0.975)
    differences = [0.1, 0.09, 0.1]
    half = stats.t.ppf(0.9875, 2) * np.std(differences, ddof=1) / 3**0.5
    assert three["interval"] == pytest.approx([np.mean(differences) - half, 0.29 / 3 + half])
    assert three["interval"][0] < two["interval"][0]


def test_those_that_are_as_good_are_named() -> None:
    rows = [row("a", [0.50, 0.52]), row("b", [0.49, 0.53]), row("c", [0.1, 0.12])]
    verdict = lead(rows)
    assert verdict is not None
    assert not verdict["beyond_noise"]
    assert verdict["as_good"] == ["b"]
    assert verdict["sentence"].endswith("within the noise.")


def test_a_row_that_varies_much_may_be_as_good_though_it_is_not_the_second() -> None:
    rows = [row("a", [0.50, 0.52]), row("b", [0.4, 0.42]), row("c", [0.2, 0.55])]
    verdict = lead(rows)
    assert verdict is not None
    assert verdict["beyond_noise"]
    assert verdict["as_good"] == ["c"]
    assert verdict["sentence"].endswith("larger than the noise, but not its lead over c.")


def test_equal_rows_are_noise_and_a_lone_row_has_no_lead() -> None:
    verdict = lead([row("a", [0.5, 0.5]), row("b", [0.5, 0.5])])
    assert verdict is not None
    assert not verdict["beyond_noise"]
    assert lead([row("a", [0.5, 0.6])]) is None
    assert lead([row("a", [0.5, 0.6]), row("b", [], failed="not finite")]) is None
    assert lead([]) is None


def test_the_csv_has_a_line_for_each_kind_and_none_for_a_failed_row() -> None:
    rows = [row("a", [0.5, 0.6]), row("b", [], failed="not finite")]
    lines = list(csv.DictReader(io.StringIO(csv_text(rows, ["map@r"], comparable=False))))
    assert [(line["row"], line["embedding"]) for line in lines] == [
        ("a", "single"),
        ("a", "concatenated"),
    ]
    assert float(lines[0]["map@r"]) == pytest.approx(0.55)
    assert float(lines[1]["map@r"]) == pytest.approx(0.65)
    assert {line["comparable"] for line in lines} == {"no"}
    assert lines[0]["repeats"] == "2"
