"""What `embedkit check` found, as one page: the verdict, what to do, and the pairs to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embedkit.report.charts import Bars, histogram
from embedkit.report.page import Thumbnails, page, path_text, table, text

__all__ = ["check_page"]

_SHOWN = 40
_BINS = 24
_VERDICTS = {
    "good": ("fine", "Good", "nothing stands in the way of training"),
    "usable": ("look", "Usable", "training works; first look at what is marked"),
    "cannot work": ("bad", "Cannot work", "metric learning cannot work on these photos"),
}
_LEVELS = {"stop": ("bad", "must change"), "warn": ("look", "look at it"), "note": ("calm", "note")}


def check_page(document: Mapping[str, Any], *, title: str) -> str:
    """The page, as text to be written in UTF-8.

    Of each kind of suspicious pairs the 40 nearest are shown, so the page stays under 5 MB.

    Args:
        document: What ``embedkit check --json`` prints; its paths start at its ``root``.
        title: Of the page.

    Cost: a scaled decode per picture shown, at most 280.
    """
    counts = document["counts"]
    body = "\n".join(
        [
            _verdict(document["verdict"]),
            _tiles(counts),
            _findings(document["findings"]),
            *_pairs(document),
            _sizes(document),
            _complexity(document.get("complexity")),
            _failed(document["failed"]),
        ]
    )
    subtitle = f"{counts['photos']:,} photos of {counts['classes']:,} classes in {document['root']}"
    return page(title, subtitle, body)


def _verdict(verdict: str) -> str:
    kind, word, meaning = _VERDICTS[verdict]
    return f'<p class="verdict"><span class="tag {kind}">{word}</span> {text(meaning)}</p>'


def _tiles(counts: Mapping[str, int]) -> str:
    shown = [
        ("photos", counts["readable"], f"{counts['unreadable']:,} more cannot be read"),
        ("classes", counts["classes"], f"{counts['singletons']:,} of one photo only"),
        ("copies", counts["copies"], "files that repeat another byte by byte"),
        ("near duplicates", counts["near_duplicates"], "photos nearly the same as another"),
        ("label conflicts", counts["label_conflicts"], "photos with a twin under another label"),
        ("leaks", counts["leaked"], "held-out photos with a twin in train"),
    ]
    tiles = "".join(
        f'<div class="card tile"><div class="name">{name}</div><div class="value">{number:,}</div>'
        f'<div class="small soft">{text(meaning)}</div></div>'
        for name, number, meaning in shown
    )
    return f'<div class="grid tiles">{tiles}</div>'


def _findings(findings: Sequence[Mapping[str, str]]) -> str:
    if not findings:
        return ""
    items = "".join(
        f'<li><div><span class="tag {_LEVELS[found["level"]][0]}">{_LEVELS[found["level"]][1]}'
        f"</span></div><div><strong>{text(_sentence(found['what']))}</strong>"
        f'<p class="soft">{text(_sentence(found["advice"]))}</p></div></li>'
        for found in findings
    )
    return f'<h2>What was found</h2><ul class="findings card">{items}</ul>'


def _sentence(said: str) -> str:
    return f"{said[:1].upper()}{said[1:]}."


def _pairs(document: Mapping[str, Any]) -> list[str]:
    """The suspicious pairs in the order in which they should be looked at."""
    twins = document["twins"]
    plain = [pair for pair in twins if not pair["recoloured"]]
    kinds = [
        (
            "Two labels for one picture",
            "Nearly the same photo under two labels: one of them is likely wrong.",
            [pair for pair in plain if pair["labels_differ"]],
        ),
        (
            "On both sides of the split",
            "Trained on and measured on: the measured quality is then too good to be true.",
            [pair for pair in plain if pair["splits_differ"] and not pair["labels_differ"]],
        ),
        (
            "Twice in one class",
            "Copies and bursts. They teach little and flatter recall@1.",
            [pair for pair in plain if not pair["splits_differ"] and not pair["labels_differ"]],
        ),
        (
            "The same in another colour",
            "Alike in grey, not in colour: perhaps one product in two colours. Not counted above.",
            [pair for pair in twins if pair["recoloured"]],
        ),
    ]
    thumbnails = Thumbnails()
    root = Path(document["root"])
    return [_kind(title, lead, pairs, root, thumbnails) for title, lead, pairs in kinds if pairs]


def _kind(
    title: str,
    lead: str,
    pairs: Sequence[Mapping[str, Any]],
    root: Path,
    thumbnails: Thumbnails,
) -> str:
    cards = "".join(_pair(pair, root, thumbnails) for pair in pairs[:_SHOWN])
    more = f" The nearest {_SHOWN} of at least {len(pairs):,}." if len(pairs) > _SHOWN else ""
    return f'<h2>{title}</h2><p class="lead">{lead}{more}</p><div class="grid cards">{cards}</div>'


def _pair(pair: Mapping[str, Any], root: Path, thumbnails: Thumbnails) -> str:
    same = "the same file" if pair["exact"] else f"{pair['bits']} of 256 bits differ"
    sides = "".join(_side(side, root, thumbnails) for side in (pair["a"], pair["b"]))
    return f'<section class="card"><span class="soft small">{same}</span>' + (
        f'<div class="pair">{sides}</div></section>'
    )


def _side(side: Mapping[str, str], root: Path, thumbnails: Thumbnails) -> str:
    split = f' <span class="tag calm">{text(side["split"])}</span>' if side["split"] else ""
    return (
        f'<figure><div class="frame">{thumbnails.image(root / side["path"], side["label"])}</div>'
        f'<figcaption class="small"><strong>{text(side["label"])}</strong>{split}<br>'
        f'<span class="soft">{path_text(side["path"])}</span></figcaption></figure>'
    )


def _sizes(document: Mapping[str, Any]) -> str:
    sizes = np.array(list(document["classes"].values()), np.int64)
    if not len(sizes):
        return ""
    most = int(sizes.max())
    step = max(1, -(-most // _BINS))
    edges = np.arange(0.5, most + step + 0.5, step)
    counts = np.histogram(sizes, edges)[0]
    chart = histogram(
        "Photos per class",
        edges.tolist(),
        [Bars("classes", counts.tolist())],
        key="sizes",
        x_label="photos of a class",
        note=f"from {int(sizes.min()):,} to {most:,}, half have {int(np.median(sizes)):,} or fewer",
    )
    pixels, colour = document["pixels"], document["colour"]
    columns = ("min", "p5", "median", "p95", "max")
    rows = [
        (name.replace("_", " "), *(f"{values[column]:,}" for column in columns))
        for name, values in pixels.items()
    ]
    about_pixels = table(
        ("pixels", "least", "5 %", "half", "95 %", "most"), rows, caption="Size of the photos"
    )
    about_colour = table(
        ("0 to 1", "red", "green", "blue"),
        [(name, *(f"{value:.3f}" for value in values)) for name, values in colour.items()],
        caption="Colour",
    )
    ordered = sorted(document["classes"].items(), key=lambda item: (item[1], item[0]))
    few = ordered if len(ordered) <= 10 else [*ordered[:5], *ordered[-5:]]
    extremes = table(
        ("class", "photos"),
        [(label, f"{size:,}") for label, size in few],
        caption="Classes" if few is ordered else "Smallest and largest classes",
    )
    splits = table(
        ("split", "photos", "classes"),
        [
            ("not split" if name == "unsplit" else name, f"{n['photos']:,}", f"{n['classes']:,}")
            for name, n in document["splits"].items()
        ],
    )
    cards = "".join(
        f'<div class="card">{content}</div>'
        for content in (splits + about_pixels + about_colour, extremes)
    )
    return f'<h2>The data in numbers</h2><div class="grid charts">{chart}{cards}</div>'


def _complexity(csg: Mapping[str, Any] | None) -> str:
    if csg is None:
        return ""
    rows = [
        (f"{pair['a']} and {pair['b']}", f"{pair['similarity']:.2f}",
         f"{pair['a_in_b']:.0%}", f"{pair['b_in_a']:.0%}")
        for pair in csg["confusions"]
    ]  # fmt: skip
    return (
        "<h2>How tangled the classes are</h2>"
        f'<p class="lead">CSG {csg["csg"]:.3f} (95 % interval {csg["low"]:.3f} to '
        f"{csg['high']:.3f}, {csg['draws']} draws of up to {csg['samples']} photos a class, "
        f"{csg['neighbours']} neighbours). 0 is separable; compare it only with the same model. "
        f"{csg['own']:.0%} of a photo's neighbours are of its own class.</p>"
        f'<div class="card">'
        + table(
            ("most confusable classes", "similarity", "of the first in the second", "reverse"),
            rows,
        )
        + "</div>"
    )


def _failed(failed: Sequence[Mapping[str, str]]) -> str:
    if not failed:
        return ""
    rows = [(entry["path"], entry["reason"]) for entry in failed[:500]]
    more = f" The first 500 of {len(failed):,}." if len(failed) > 500 else ""
    return (
        f'<h2>Files that cannot be read</h2><p class="lead">Training skips them.{more}</p>'
        f'<div class="card">{table(("file", "why"), rows)}</div>'
    )
