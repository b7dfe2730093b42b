"""A map of a catalog to look around in: every picture a point, in one HTML file that opens offline.

`atlas.js` draws and listens, `atlas.css` is its look; here are the data and the page around them.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from string import Template

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from embedkit.report.page import document
from embedkit.report.sprites import Sprites

__all__ = ["PALETTE", "atlas_page", "atlas_picture"]

PALETTE = (
    *("#2f6fb3", "#d9730d", "#17875a", "#c2352b", "#7a4fb0", "#a88a1c"),
    *("#d1579b", "#5b7f95", "#7da02a", "#0f9aa8", "#94623f", "#6a6fd6"),
)
"""Colours of the labels, the most frequent first; then they are used again. For light and dark."""

_NO_LABEL = "(no label)"
_SIZE, _MARGIN, _LEGEND = 1200, 40, 360
_LEGEND_LINES = 24


def atlas_page(
    points: npt.NDArray[np.float32],
    names: Sequence[str],
    labels: Sequence[str],
    sprites: Sprites,
    *,
    title: str,
    subtitle: str = "",
) -> str:
    """The page, as text to be written in UTF-8.

    Hover, tap or walk with the arrow keys to see a picture; wheel, pinch or ``+`` and ``-`` to come
    nearer, where points become pictures; a lasso or a search lists files, to be copied as text;
    the legend shows one label alone.

    Args:
        points: ``(N, 2)`` in 0..1.
        names: ``(N,)`` what to write and to copy, mostly paths.
        labels: ``(N,)``; all empty gives one colour and no legend.
        sprites: The thumbnails of these N.
        title: Of the page and its heading.
        subtitle: A line below it.

    Cost: about 60 bytes a picture beside its name and the thumbnails. 50,000 points are drawn in
    one go.
    """
    known, codes = _by_frequency(labels)
    content = {
        "names": list(names),
        "labels": [name or _NO_LABEL for name, _ in known],
        "counts": [count for _, count in known],
        "colours": PALETTE,
        "points": _packed(np.round(points * 65535).astype("<u2")),
        "label": _packed(codes.astype("<u4")),
        "place": _packed(sprites.places.astype("<i4")),
        "side": sprites.side,
        "columns": sprites.columns,
        "sheets": [base64.b64encode(sheet).decode("ascii") for sheet in sprites.sheets],
    }
    main = _MAIN.substitute(
        # A name must not be able to end the script element.
        data=json.dumps(content, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c"),
        script=_own("atlas.js"),
        legend="" if len(known) > 1 else " hidden",
        described=f"Map of {len(names):,} pictures. Arrow keys go from picture to picture.",
    )
    return document(title, subtitle, style=_own("atlas.css"), main=main)


def atlas_picture(
    points: npt.NDArray[np.float32], labels: Sequence[str], *, title: str
) -> Image.Image:
    """The map as one picture, 1,600 x 1,240 pixels, on white: points, a legend, the title.

    Args:
        points: ``(N, 2)`` in 0..1.
        labels: ``(N,)``.
        title: Above it. Letters that Pillow's own font lacks become boxes.
    """
    known, codes = _by_frequency(labels)
    width, height = _SIZE + (_LEGEND if len(known) > 1 else 0) + _MARGIN, _SIZE + _MARGIN
    # Drawn twice as large, so that the edges of the points come out smooth.
    image = Image.new("RGB", (2 * width, 2 * height), "white")
    draw = ImageDraw.Draw(image)
    radius = 2 * float(np.clip(220 / np.sqrt(max(len(points), 1)), 2, 9))
    inner = 2 * (_SIZE - 2 * _MARGIN)
    centres = points.astype(np.float64) * inner + 2 * _MARGIN
    # In an order of chance, so that no label lies above all others.
    for at in np.random.default_rng(0).permutation(len(points)).tolist():
        x, y = centres[at, 0], centres[at, 1] + 2 * _MARGIN
        draw.ellipse(
            (x - radius, y - radius, x + radius, y + radius),
            fill=PALETTE[codes[at] % len(PALETTE)],
            outline="white" if radius > 6 else None,
        )
    draw.text((2 * _MARGIN, _MARGIN), _plain(title, 90), "#1d1f20", ImageFont.load_default(44))
    if len(known) > 1:
        _draw_legend(draw, known, 2 * _SIZE)
    return image.resize((width, height), Image.Resampling.BOX)


def _draw_legend(draw: ImageDraw.ImageDraw, known: list[tuple[str, int]], left: int) -> None:
    font = ImageFont.load_default(32)
    rest = known[_LEGEND_LINES:]
    lines = [
        (PALETTE[place % len(PALETTE)], f"{_plain(name or _NO_LABEL, 26)}  {count:,}")
        for place, (name, count) in enumerate(known[:_LEGEND_LINES])
    ]
    if rest:
        lines.append(("white", f"{len(rest):,} more labels  {sum(n for _, n in rest):,}"))
    for place, (colour, line) in enumerate(lines):
        top = 4 * _MARGIN + 64 * place
        draw.ellipse((left, top + 8, left + 28, top + 36), fill=colour)
        draw.text((left + 48, top), line, "#1d1f20", font)


def _by_frequency(labels: Sequence[str]) -> tuple[list[tuple[str, int]], npt.NDArray[np.int64]]:
    """Labels with their counts, the most frequent first, then by name; and ``(N,)`` their codes."""
    known = sorted(Counter(labels).items(), key=lambda pair: (-pair[1], pair[0]))
    place = {name: at for at, (name, _) in enumerate(known)}
    return known, np.array([place[name] for name in labels], np.int64)


def _packed(values: npt.NDArray[np.generic]) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")


def _plain(value: str, most: int) -> str:
    clean = "".join(c if c.isprintable() else "?" for c in value)
    return clean if len(clean) <= most else clean[: most - 3] + "..."


def _own(name: str) -> str:
    return (files("embedkit.report") / name).read_text(encoding="utf-8")


_MAIN = Template("""\
<div id="stage">
<canvas id="map" tabindex="0" role="application" aria-label="$described"></canvas>
<div id="tip" role="status" hidden>
<canvas></canvas><p id="tip-label"></p><p id="tip-name"></p></div>
<div id="tools" role="group" aria-label="Map">
<button id="lasso" aria-pressed="false" title="Draw around pictures to list them">Lasso</button>
<button id="in-view" title="List what is in view">In view</button>
<button id="nearer" aria-label="Nearer">+</button>
<button id="farther" aria-label="Farther">&minus;</button>
<button id="all" title="Show the whole map">All</button>
</div>
</div>
<aside>
<label for="search">Search names and labels</label>
<input id="search" type="search" autocomplete="off" spellcheck="false">
<section id="found" hidden aria-labelledby="found-count">
<p class="bar"><strong id="found-count" role="status"></strong>
<button id="copy">Copy names</button> <button id="clear">Clear</button></p>
<ul id="files"></ul>
</section>
<section id="labels"$legend>
<p class="bar"><strong id="labels-count"></strong> <button id="every" hidden>Show all</button></p>
<ul id="legend"></ul>
</section>
<details><summary>Keys</summary>
<p>On the map: arrows go to the next picture that way, + and &minus; come nearer and back,
0 shows all, v lists what is in view, Escape clears. Shift and drag is the lasso.
Groups say what is alike; distances between groups mean little.</p></details>
</aside>
<script type="application/json" id="data">$data</script>
<script>
$script</script>""")
