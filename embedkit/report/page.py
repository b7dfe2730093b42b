"""The paper all reports are written on: one offline HTML page, its look, safe text, thumbnails."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from embedkit.errors import ImageError
from embedkit.imaging import decode

__all__ = ["Thumbnails", "document", "page", "path_text", "table", "text"]


class Thumbnails:
    """Pictures as ``<img>`` with the pixels inside; each file is decoded once.

    4 to 12 KB of text each. A file that cannot be shown becomes a placeholder that says why.

    Args:
        side: Pixels of the longer side.
        quality: Of the JPEG.
    """

    def __init__(self, *, side: int = 128, quality: int = 74) -> None:
        self._side, self._quality = side, quality
        self._known: dict[Path, str] = {}

    def image(self, path: Path, alt: str) -> str:
        """The picture; `alt` says what it is to those who do not see it."""
        try:
            if path not in self._known:
                self._known[path] = self._data_url(path)
        except ImageError as error:
            reason = error.reason if path.exists() else "the picture is gone"
            return f'<span class="gone">{text(reason)}</span>'
        return f'<img src="{self._known[path]}" alt="{text(alt)}" loading="lazy">'

    def _data_url(self, path: Path) -> str:
        image = decode(path, shortest_side=self._side)
        image.thumbnail((self._side, self._side), Image.Resampling.LANCZOS)
        out = io.BytesIO()
        image.save(out, "JPEG", quality=self._quality, optimize=True)
        return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def text(value: object) -> str:
    """Text safe in HTML and in UTF-8: odd names show as escapes."""
    clean = str(value).encode("utf-8", "backslashreplace").decode("utf-8")
    return html.escape("".join(c if c.isprintable() else repr(c)[1:-1] for c in clean))


def path_text(name: str) -> str:
    """A path, safe, that may break after slashes and underscores."""
    return text(name).replace("/", "/<wbr>").replace("_", "_<wbr>")


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, caption: str = "") -> str:
    """A table whose first column names the row; cells are made safe; numbers come as texts."""
    lines = [
        "<tr>"
        + "".join(
            f'<th scope="row">{text(cell)}</th>' if place == 0 else f"<td>{text(cell)}</td>"
            for place, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    ]
    title = f"<caption>{text(caption)}</caption>" if caption else ""
    top = "".join(f'<th scope="col">{text(name)}</th>' for name in head)
    opening = f"<thead><tr>{top}</tr></thead>" if head else ""
    return (
        f'<div class="scroll" tabindex="0"><table>{title}{opening}'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def page(title: str, subtitle: str, body: str) -> str:
    """A report, to be written in UTF-8; `body` is HTML, the others are plain texts."""
    return document(title, subtitle, style=_STYLE, main=body)


def document(title: str, subtitle: str, *, style: str, main: str, header: str = "") -> str:
    """The whole document on the house's colours, in light and dark.

    Nothing is loaded from anywhere: no script, no font, no picture but those inside.

    Args:
        title: Of the page and its heading; plain text, as is `subtitle` below it.
        style: CSS of this kind of page.
        main: HTML of the content.
        header: HTML below the subtitle.
    """
    below = f'<p class="sub">{text(subtitle)}</p>' if subtitle else ""
    return f"""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="embedkit">
<title>{text(title)}</title>
<style>
{_COLOURS}{style}</style>
</head>
<body>
<header><h1>{text(title)}</h1>
{below}
{header}</header>
<main>
{main}
</main>
</body>
</html>
"""


_COLOURS = """\
:root {
  color-scheme: light dark;
  --ground: #f5f5f2; --card: #ffffff; --well: #ecece7; --line: #dddcd5; --grid: #e9e8e2;
  --text: #1d1f20; --soft: #5d6265; --right: #17794a; --wrong: #c2352b; --warn: #94590a;
  --tone-0: #2f6fb3; --tone-1: #c05f12; --tone-2: #17794a; --tone-3: #7a4fb0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #141618; --card: #1e2123; --well: #292d30; --line: #33383b; --grid: #2b3033;
    --text: #eceeee; --soft: #a2a9ad; --right: #43c383; --wrong: #ff7a6e; --warn: #eab04f;
    --tone-0: #7db3f5; --tone-1: #f2a15c; --tone-2: #43c383; --tone-3: #c39df0;
  }
}
* { box-sizing: border-box; }
"""

_STYLE = """\
body {
  margin: 0 auto; padding: 2rem clamp(0.75rem, 3vw, 2.5rem) 4rem; max-width: 76rem;
  background: var(--ground); color: var(--text);
  font: 0.9375rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
h1 {
  margin: 0; font-size: 1.625rem; line-height: 1.2; font-weight: 650; letter-spacing: -0.01em;
  overflow-wrap: anywhere;
}
h2 { margin: 2.5rem 0 0.25rem; font-size: 1.1875rem; font-weight: 650; letter-spacing: -0.005em; }
h3 { margin: 0; font-size: 0.9375rem; font-weight: 600; }
p { margin: 0.35rem 0 0; max-width: 44rem; }
.sub, .lead, .soft { color: var(--soft); }
.sub { overflow-wrap: anywhere; max-width: none; }
code { font: 0.875em ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace; }
.banner {
  margin: 1rem 0 0; padding: 0.75rem 1rem; max-width: none; background: var(--card);
  border: 1px solid var(--line); border-left: 4px solid var(--warn); border-radius: 0.625rem;
}
.card {
  background: var(--card); border: 1px solid var(--line); border-radius: 0.875rem;
  padding: 1.125rem;
}
.grid { display: grid; gap: 1rem; margin-top: 0.875rem; }
p + .card { margin-top: 0.875rem; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(23rem, 100%), 1fr)); }
.tile .name { color: var(--soft); }
.tile .value {
  font-size: 2rem; line-height: 1.2; font-weight: 650; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere;
}
.tile .was { color: var(--soft); font-variant-numeric: tabular-nums; }
.up { color: var(--right); font-weight: 600; } .down { color: var(--wrong); font-weight: 600; }
figure { margin: 0; }
figure.chart { display: flex; flex-direction: column; min-width: 0; }
figure.chart .note { color: var(--soft); font-size: 0.8125rem; margin: 0.1rem 0 0; }
svg { display: block; width: 100%; height: auto; margin-top: 0.375rem; overflow: visible; }
svg text { fill: var(--soft); font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; }
svg .grid-line { stroke: var(--grid); stroke-width: 1; }
svg .axis { stroke: var(--line); stroke-width: 1; }
svg .best { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 1 3; }
svg .curve { fill: none; stroke-width: 2.25; stroke-linejoin: round; stroke-linecap: round; }
svg .dashed { stroke-dasharray: 6 5; stroke-width: 1.75; opacity: 0.85; }
svg .area { stroke-width: 1.75; stroke-linejoin: round; fill-opacity: 0.22; }
.tone-0 { stroke: var(--tone-0); } .tone-1 { stroke: var(--tone-1); }
.tone-2 { stroke: var(--tone-2); } .tone-3 { stroke: var(--tone-3); }
svg .area.tone-0, svg circle.tone-0, svg rect.tone-0 { fill: var(--tone-0); }
svg .area.tone-1, svg circle.tone-1, svg rect.tone-1 { fill: var(--tone-1); }
svg .area.tone-2, svg circle.tone-2, svg rect.tone-2 { fill: var(--tone-2); }
svg .area.tone-3, svg circle.tone-3, svg rect.tone-3 { fill: var(--tone-3); }
svg circle, svg rect { stroke: none; }
.legend {
  display: flex; flex-wrap: wrap; gap: 0.15rem 1rem; margin: 0.25rem 0 0; padding: 0;
  list-style: none; color: var(--soft); font-size: 0.8125rem;
}
.legend li { display: inline-flex; align-items: center; gap: 0.4rem; }
.legend svg { width: 1.375rem; height: 0.625rem; margin: 0; flex: none; }
details { margin-top: auto; padding-top: 0.5rem; font-size: 0.8125rem; }
summary { color: var(--soft); cursor: pointer; width: max-content; max-width: 100%; }
.scroll { overflow: auto; max-height: 26rem; margin-top: 0.5rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: 0.25rem; }
th, td { padding: 0.3rem 0.75rem 0.3rem 0; text-align: left; vertical-align: top; }
tbody tr { border-top: 1px solid var(--grid); }
thead th { color: var(--soft); font-weight: 500; white-space: nowrap; }
tbody th { font-weight: 500; overflow-wrap: anywhere; }
td { overflow-wrap: anywhere; }
.numbers th, .numbers td { white-space: nowrap; overflow-wrap: normal; }
.pictures {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(6.75rem, 1fr)); gap: 0.75rem;
  margin: 0; padding: 0; list-style: none;
}
.stack > * + * { margin-top: 1rem; }
.stack { margin-top: 0.875rem; }
.row { display: grid; grid-template-columns: 8.5rem minmax(0, 1fr); gap: 1.125rem; }
.row > figure { padding-right: 1.125rem; border-right: 1px solid var(--line); }
.frame {
  position: relative; display: flex; aspect-ratio: 1; overflow: hidden;
  background: var(--well); border-radius: 0.5rem;
}
.frame img { width: 100%; height: 100%; object-fit: contain; }
.right .frame { box-shadow: 0 0 0 3px var(--right); }
.wrong .frame { box-shadow: 0 0 0 3px var(--wrong); }
.mark {
  position: absolute; top: 0.35rem; right: 0.35rem; display: grid; place-items: center;
  width: 1.2rem; height: 1.2rem; border-radius: 50%; color: var(--card);
  font-size: 0.75rem; font-weight: 700; line-height: 1;
}
.right .mark { background: var(--right); } .wrong .mark { background: var(--wrong); }
.gone {
  margin: auto; padding: 0.4rem; color: var(--soft); font-size: 0.75rem; text-align: center;
  overflow-wrap: anywhere;
}
figcaption { overflow-wrap: anywhere; }
.small, .pictures figcaption { font-size: 0.8125rem; line-height: 1.35; margin-top: 0.35rem; }
.name-line { display: flex; flex-wrap: wrap; gap: 0.1rem 1rem; align-items: baseline; }
.name-line .soft { font-size: 0.8125rem; }
.cards { grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 0.75rem; margin-top: 0.625rem; }
.tag {
  display: inline-block; padding: 0 0.45rem; border: 1px solid currentColor;
  border-radius: 1rem; font-size: 0.75rem; font-weight: 600; line-height: 1.4;
}
.verdict { margin-top: 0.75rem; font-size: 1.0625rem; }
.verdict .tag { font-size: 0.9375rem; padding: 0.05rem 0.7rem; margin-right: 0.25rem; }
.tag.bad { color: var(--wrong); } .tag.look { color: var(--warn); }
.tag.calm { color: var(--soft); } .tag.fine { color: var(--right); }
.findings, .commands { margin: 0.875rem 0 0; list-style: none; }
.findings li {
  display: grid; grid-template-columns: 5.5rem minmax(0, 1fr); gap: 0.25rem 1rem;
  padding: 0.7rem 0; border-top: 1px solid var(--grid);
}
.findings li:first-child { border-top: 0; padding-top: 0; }
.findings li:last-child { padding-bottom: 0; }
.findings p { margin: 0.1rem 0 0; }
.commands li + li { margin-top: 0.75rem; }
.commands code {
  display: block; margin-top: 0.25rem; padding: 0.5rem 0.75rem; overflow-x: auto;
  background: var(--well); border-radius: 0.5rem; white-space: pre;
}
@media (max-width: 40rem) {
  body { padding-top: 1.25rem; }
  .card { padding: 0.875rem; }
  p + .card { margin-top: 0.875rem; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .tile .value { font-size: 1.625rem; }
  .tile:last-child:nth-child(odd) { grid-column: 1 / -1; }
  svg text { font-size: 15px; }
  .row { grid-template-columns: minmax(0, 1fr); gap: 0.875rem; }
  .row > figure {
    display: grid; grid-template-columns: 6rem minmax(0, 1fr); gap: 0.875rem;
    padding: 0 0 0.875rem; border-right: 0; border-bottom: 1px solid var(--line);
  }
  .row > figure figcaption { margin: 0; align-self: center; }
  .pictures { grid-template-columns: repeat(auto-fill, minmax(5.25rem, 1fr)); gap: 0.6rem; }
  .findings li { grid-template-columns: minmax(0, 1fr); }
}
@media print {
  body { background: none; padding: 0; }
  .card { break-inside: avoid; }
  .scroll { max-height: none; overflow: visible; }
}
"""
