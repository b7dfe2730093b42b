"""A comparison of losses as one offline page: the verdict, charts with intervals, all numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from embedkit.report.charts import Spread, interval_chart, interval_curves, short
from embedkit.report.page import page, table, text

__all__ = ["comparison_page"]

_SPELLED = {"map@r": "MAP@R", "r_precision": "R-precision", "recall@1": "P@1 (recall@1)"}
_DRAWN = ("map@r", "recall@1", "r_precision")
_KINDS = {
    "single": "single: one network alone",
    "concatenated": "concatenated: those of the folds side by side",
}


def comparison_page(content: Mapping[str, Any]) -> str:
    """The page of a compare.json; without rows that have a result it says so."""
    rows = [row for row in content["rows"] if row["single"] is not None]
    failed = [row for row in content["rows"] if row["single"] is None]
    parts = []
    if content["label"]:
        parts.append(f'<div class="banner">{text(content["label"].capitalize())}.</div>')
    if content["lead"] is not None:
        parts.append(f'<p class="verdict">{text(content["lead"]["sentence"])}</p>')
    if rows and not content["baseline_beaten"]:
        parts.append("<p>No row is better than the untrained network.</p>")
    parts += [f"<p>{text(row['row'])} has no result: {text(row['failed'])}.</p>" for row in failed]
    if rows:
        parts += ["<h2>Charts</h2>", _charts(rows, content)]
        parts += ["<h2>Numbers</h2>", _numbers(rows, content)]
        parts += ["<h2>Chosen settings</h2>", _settings(rows)]
    parts += ["<h2>The same for all rows</h2>", _fixed(content)]
    data = content["data"]
    subtitle = (
        f"{len(rows)} rows; trained on {data['train_classes']:,} classes "
        f"({data['train_images']:,} images) in {content['fixed']['folds']} folds, tested on "
        f"{data['test_classes']:,} other classes ({data['test_images']:,} images)"
    )
    return page("Losses compared", subtitle, "\n".join(parts))


def _charts(rows: Sequence[Mapping[str, Any]], content: Mapping[str, Any]) -> str:
    widths = sorted({row["dim"] for row in rows})
    charts = []
    if len(widths) > 1:
        charts += [_width_chart(rows, widths, name) for name in ("recall@1", "map@r")]
    charts += [_row_chart(rows, content["baseline"], name) for name in _DRAWN]
    return f'<div class="grid charts">{"".join(charts)}</div>'


def _row_chart(rows: Sequence[Mapping[str, Any]], baseline: Mapping[str, Any], name: str) -> str:
    series = [
        Spread(label, [_ends(row[kind][name]) if row[kind] else None for row in rows], tone)
        for tone, (kind, label) in enumerate(_KINDS.items())
    ]
    return interval_chart(
        _spell(name),
        [row["row"] for row in rows],
        series,
        key=f"rows-{name.replace('@', '-')}",
        mark=baseline["single"][name]["mean"],
        note="Mean and 95 % interval over the repeats; the dotted line is the untrained network.",
    )


def _width_chart(rows: Sequence[Mapping[str, Any]], widths: Sequence[int], name: str) -> str:
    losses = list(dict.fromkeys(row["loss"] for row in rows))
    cells = {(row["loss"], row["dim"]): _ends(row["single"][name]) for row in rows}
    lines = [
        Spread(loss, [cells.get((loss, width)) for width in widths], tone % 4)
        for tone, loss in enumerate(losses)
    ]
    return interval_curves(
        f"{_spell(name)} by width",
        [str(width) for width in widths],
        lines,
        key=f"width-{name.replace('@', '-')}",
        x_label="width of the embedding",
        note="One network alone; mean and 95 % interval over the repeats.",
    )


def _ends(value: Mapping[str, Any]) -> tuple[float, float, float]:
    """To be drawn: an interval of few repeats may reach beyond what a share can be."""
    mean = value["mean"]
    if value["low"] is None:
        return mean, mean, mean
    return mean, max(value["low"], 0.0), min(value["high"], 1.0)


def _numbers(rows: Sequence[Mapping[str, Any]], content: Mapping[str, Any]) -> str:
    names = content["metrics"]
    parts = []
    for kind, label in _KINDS.items():
        lines = [
            [row["row"], *(_cell(row[kind][name]) if row[kind] else "-" for name in names)]
            for row in rows
        ]
        if kind == "single":
            baseline = content["baseline"]["single"]
            lines.append(["untrained", *(_cell(baseline[name]) for name in names)])
        parts.append(table(["", *map(_spell, names)], lines, caption=label.capitalize()))
    return f'<div class="card stack numbers">{"".join(parts)}</div>'


def _settings(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["settings"]))
    lines = [
        [
            row["row"],
            *(short(row["settings"][name]) if name in row["settings"] else "" for name in names),
            f"{len(row['search'])} trials" if row["search"] else "not searched",
        ]
        for row in rows
    ]
    heads = [name.removeprefix("option.").replace("_", " ") for name in names]
    return f'<div class="card numbers">{table(["", *heads, "search"], lines)}</div>'


def _fixed(content: Mapping[str, Any]) -> str:
    lines = [
        [name.replace("_", " "), "automatic" if value is None else str(value)]
        for name, value in content["fixed"].items()
    ]
    lines.append(["seeds of the repeats", ", ".join(map(str, content["seeds"]))])
    return f'<div class="card">{table([], lines)}</div>'


def _cell(value: Mapping[str, Any]) -> str:
    if value["low"] is None:
        return f"{value['mean']:.4f}"
    return f"{value['mean']:.4f} ± {value['mean'] - value['low']:.4f}"


def _spell(name: str) -> str:
    return _SPELLED.get(name, name)
