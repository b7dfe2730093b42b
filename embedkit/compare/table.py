"""Means, intervals, and whether the best row is better than chance would make it.

All intervals are Student's t over the repeats, at 95 %. They say how much another seed would
change, with these photos and folds; other photos would change more.

The winner is the row of the highest mean MAP@R of single networks on the test classes. Repeats of
two rows with the same seed have the same folds, batches and first weights as far as the losses
allow, so they are compared as pairs: the lead is larger than the noise when the t interval of the
paired differences leaves out 0. The winner is compared with every other row, so each of these K - 1
intervals is at 1 - 0.05 / (K - 1) (Bonferroni), which keeps all of them right together at 95 %.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

__all__ = ["KINDS", "UNTRAINED", "csv_text", "estimate", "lead", "summary"]

KINDS = ("single", "concatenated")
"""Each fold's network alone, or the folds' embeddings side by side."""

UNTRAINED = "untrained"

_LEVEL = 0.95
_BY = "map@r"


def estimate(values: Sequence[float], level: float = _LEVEL) -> dict[str, Any]:
    """``mean``, ``low``, ``high`` and the ``values``; without spread or alone, no interval.

    Args:
        values: One per repeat, at least one.
        level: Of the t interval, in (0, 1).
    """
    mean = float(np.mean(values))
    half = None
    if len(values) > 1:
        error = float(np.std(values, ddof=1)) / len(values) ** 0.5
        half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * error
    return {
        "mean": mean,
        "low": None if half is None else mean - half,
        "high": None if half is None else mean + half,
        "values": list(values),
    }


def summary(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table: row.json with ``single`` and ``concatenated`` in place of its repeats.

    Both are None for a row that failed, the second also where a network gives several vectors.
    """
    repeats = row["repeats"]
    kept = {name: value for name, value in row.items() if name != "repeats"}
    return {
        **kept,
        **{
            kind: {
                name: estimate([repeat[kind][name] for repeat in repeats])
                for name in repeats[0][kind]
            }
            if repeats and repeats[0][kind] is not None
            else None
            for kind in KINDS
        },
    }


def lead(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The winner among `summary` rows, and whether its lead is larger than the noise.

    ``winner``, ``runner_up``, ``by`` (the mean difference in MAP@R), ``interval`` (two numbers),
    ``level``, ``repeats``, ``beyond_noise``, ``as_good`` (rows that cannot be told apart from the
    winner) and ``sentence``. None when fewer than two rows have a result.
    """
    known = [row for row in rows if row["single"] is not None]
    if len(known) < 2:
        return None
    ranked = sorted(known, key=lambda row: (-_mean(row), row["row"]))
    winner, level = ranked[0], 1 - (1 - _LEVEL) / (len(known) - 1)
    differences = {
        row["row"]: estimate(np.subtract(_values(winner), _values(row)).tolist(), level)
        for row in ranked[1:]
    }
    runner_up = ranked[1]["row"]
    one = differences[runner_up]
    as_good = [name for name, other in differences.items() if other["low"] <= 0]
    beyond = one["low"] > 0
    interval = f"[{one['low']:+.4f}, {one['high']:+.4f}]"
    verdict = "larger than the noise" if beyond else "within the noise"
    sentence = (
        f"The lead of {winner['row']} over {runner_up}, {one['mean']:.4f} MAP@R {interval} in "
        f"{len(one['values'])} paired repeats, is {verdict}"
    )
    others = ", ".join(name for name in as_good if name != runner_up)
    if others:
        sentence += f", {'but not' if beyond else 'as is'} its lead over {others}"
    return {
        "winner": winner["row"],
        "runner_up": runner_up,
        "by": one["mean"],
        "interval": [one["low"], one["high"]],
        "level": level,
        "repeats": len(one["values"]),
        "beyond_noise": beyond,
        "as_good": as_good,
        "sentence": f"{sentence}.",
    }


def csv_text(rows: Sequence[Mapping[str, Any]], names: Sequence[str], comparable: bool) -> str:
    """The table as CSV: a line for each row and kind, three columns for each metric.

    The untrained network is a row of one value without an interval.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
    writer.writerow(["row", "loss", "dim", "embedding", "repeats", "comparable", *columns])
    for row in rows:
        for kind in KINDS:
            if row[kind] is None:
                continue
            cells = [row[kind][name][key] for name in names for key in ("mean", "low", "high")]
            writer.writerow(
                [
                    row["row"],
                    row["loss"],
                    row["dim"],
                    kind,
                    len(row[kind][names[0]]["values"]),
                    "yes" if comparable else "no",
                    *("" if cell is None else f"{cell:.6f}" for cell in cells),
                ]
            )
    return out.getvalue()


def _values(row: Mapping[str, Any]) -> list[float]:
    values: list[float] = row["single"][_BY]["values"]
    return values


def _mean(row: Mapping[str, Any]) -> float:
    return float(row["single"][_BY]["mean"])
