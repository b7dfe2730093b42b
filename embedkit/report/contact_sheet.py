"""What a search found, as one page to look at: each query beside its hits, in a single HTML file.

The page needs no network, no script and no other file: pictures are inside as small JPEGs. It is
readable in light and dark, on a phone, and aloud; about 6 KB a picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from embedkit.report.page import Thumbnails, document, path_text, text

__all__ = ["Picture", "SheetRow", "contact_sheet"]


@dataclass(frozen=True)
class Picture:
    """One picture of the sheet.

    Attributes:
        path: Its file; None or a file that is gone gives a placeholder.
        name: What to write under it, mostly the path as the user knows it.
        label: Its class; empty where that is not known.
        score: Higher is nearer; None for a query.
        verdict: What the score is worth: match, unsure or none; of a query, its best hit's. Empty
            where the model gives none.
    """

    path: Path | None
    name: str
    label: str = ""
    score: float | None = None
    verdict: str = ""


@dataclass(frozen=True)
class SheetRow:
    """A query and its hits, nearest first; marked right or wrong where the query has a label."""

    query: Picture
    hits: Sequence[Picture]


def contact_sheet(rows: Iterable[SheetRow], *, title: str, subtitle: str = "") -> str:
    """The page, as text to be written in UTF-8.

    Pictures that cannot be decoded, or are not there any more, are shown as placeholders that say
    so. No rows give a page that says that nothing was found.

    Args:
        rows: Taken one by one; each picture is decoded once.
        title: Of the page and its heading.
        subtitle: A line below it.

    Cost: a scaled decode per picture; about 8 KB of text each.
    """
    thumbnails = Thumbnails(side=160, quality=80)
    sections: list[str] = []
    judged = right = 0
    for row in rows:
        sections.append(_section(row, len(sections) + 1, thumbnails))
        if row.query.label and row.hits:
            judged += 1
            right += row.hits[0].label == row.query.label
    legend = ""
    if judged:
        legend = _LEGEND.substitute(
            right=f"{right:,}", judged=f"{judged:,}", share=f"{right / judged:.0%}"
        )
    main = "\n".join(sections) or '<p class="none">No results.</p>'
    return document(title, subtitle, style=_STYLE, main=main, header=legend)


def _section(row: SheetRow, number: int, thumbnails: Thumbnails) -> str:
    query = row.query
    label = f'<span class="label">{text(query.label)}</span>' if query.label else ""
    hits = [
        _HIT.substitute(
            judged=_judged(query.label, hit.label),
            image=_image(hit, f"Hit {rank}: {hit.label or hit.name}", thumbnails),
            rank=rank,
            score="" if hit.score is None else f"{hit.score:.4f}",
            mark=_mark(query.label, hit.label),
            verdict=_verdict(hit),
            label=text(hit.label),
            name=path_text(hit.name),
        )
        for rank, hit in enumerate(row.hits, start=1)
    ]
    return _ROW.substitute(
        number=number,
        name=path_text(query.name),
        label=label,
        verdict=_verdict(query),
        image=_image(query, f"Query: {query.name}", thumbnails),
        hits="\n".join(hits) or '<li class="none">No hits.</li>',
    )


def _judged(wanted: str, found: str) -> str:
    if not wanted:
        return ""
    return " right" if wanted == found else " wrong"


def _verdict(picture: Picture) -> str:
    if not picture.verdict:
        return ""
    return f'<span class="worth {text(picture.verdict)}">{text(picture.verdict)}</span>'


def _mark(wanted: str, found: str) -> str:
    """The border's colour in words and in a sign, for those who do not see it."""
    if not wanted:
        return ""
    if wanted == found:
        return '<span class="mark" role="img" aria-label="same label">&#10003;</span>'
    return '<span class="mark" role="img" aria-label="another label">&#10007;</span>'


def _image(picture: Picture, alt: str, thumbnails: Thumbnails) -> str:
    if picture.path is None:
        return '<span class="gone">no file is known</span>'
    return thumbnails.image(picture.path, alt)


_LEGEND = Template(
    '<p class="legend"><span class="key right"><span class="mark">&#10003;</span> same label</span>'
    '<span class="key wrong"><span class="mark">&#10007;</span> another label</span>'
    "<span>nearest hit right for <strong>$right of $judged</strong> ($share)</span></p>"
)

_HIT = Template("""\
<li class="hit$judged"><figure><div class="frame">$image$mark</div>
<figcaption>
<span class="line"><span class="rank">$rank</span><span class="score">$score</span>$verdict</span>
<span class="label">$label</span><span class="path">$name</span></figcaption></figure></li>""")

_ROW = Template("""\
<section aria-labelledby="q$number">
<div class="query"><figure><div class="frame">$image</div>
<figcaption><h2 id="q$number"><span class="tag">query</span> $verdict $label
<span class="path">$name</span></h2></figcaption></figure></div>
<ol class="hits">
$hits
</ol>
</section>""")

_STYLE = """\
:root { --tag: #2f5fa8; }
@media (prefers-color-scheme: dark) { :root { --tag: #8db4f5; } }
body {
  margin: 0 auto; padding: 2rem clamp(0.75rem, 3vw, 2.5rem) 4rem; max-width: 90rem;
  background: var(--ground); color: var(--text);
  font: 0.9375rem/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
h1 { margin: 0; font-size: 1.625rem; line-height: 1.2; font-weight: 650; letter-spacing: -0.01em; }
.sub { margin: 0.35rem 0 0; color: var(--soft); overflow-wrap: anywhere; }
.legend {
  display: flex; flex-wrap: wrap; gap: 0.35rem 1.25rem; margin: 0.9rem 0 0; color: var(--soft);
}
.legend strong { color: var(--text); font-weight: 600; }
.key { display: inline-flex; align-items: center; gap: 0.4rem; }
section {
  display: grid; grid-template-columns: 11.5rem minmax(0, 1fr); gap: 1.25rem;
  margin-top: 1.25rem; padding: 1.25rem;
  background: var(--card); border: 1px solid var(--line); border-radius: 0.875rem;
}
figure { margin: 0; }
.query { padding-right: 1.25rem; border-right: 1px solid var(--line); }
.hits {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr));
  gap: 1rem; margin: 0; padding: 0; list-style: none;
}
.frame {
  position: relative; display: flex; aspect-ratio: 1; overflow: hidden;
  background: var(--well); border-radius: 0.5rem;
}
.frame img { width: 100%; height: 100%; object-fit: contain; }
.right .frame { box-shadow: 0 0 0 3px var(--right); }
.wrong .frame { box-shadow: 0 0 0 3px var(--wrong); }
.mark {
  display: grid; place-items: center; width: 1.25rem; height: 1.25rem; border-radius: 50%;
  color: var(--card); font-size: 0.75rem; font-weight: 700; line-height: 1;
}
.frame .mark { position: absolute; top: 0.4rem; right: 0.4rem; }
.right .mark { background: var(--right); }
.wrong .mark { background: var(--wrong); }
.gone {
  margin: auto; padding: 0.5rem; color: var(--soft); font-size: 0.8125rem; text-align: center;
  overflow-wrap: anywhere;
}
figcaption { margin-top: 0.5rem; }
.line { display: flex; gap: 0.5rem; font-variant-numeric: tabular-nums; }
.score { font-weight: 600; }
.rank, .path { color: var(--soft); }
.label { display: block; overflow-wrap: anywhere; }
.path {
  display: block; font-size: 0.75rem; line-height: 1.35; overflow-wrap: anywhere;
}
h2 { margin: 0; font-size: inherit; font-weight: inherit; }
.tag {
  color: var(--tag); font-size: 0.6875rem; font-weight: 650; letter-spacing: 0.08em;
  text-transform: uppercase;
}
.worth {
  padding: 0 0.45rem; border: 1px solid currentColor; border-radius: 1rem;
  font-size: 0.75rem; font-weight: 600; line-height: 1.4;
}
.line .worth { margin-left: auto; }
.worth.match { color: var(--right); } .worth.unsure { color: var(--warn); }
.none { color: var(--soft); }
@media (max-width: 40rem) {
  body { padding-top: 1.25rem; }
  section { grid-template-columns: minmax(0, 1fr); gap: 1rem; padding: 0.875rem; }
  .query { padding: 0 0 1rem; border-right: 0; border-bottom: 1px solid var(--line); }
  .query figure { display: grid; grid-template-columns: 6.5rem minmax(0, 1fr); gap: 0.875rem; }
  .query figcaption { margin: 0; align-self: center; }
  .hits { grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); gap: 0.75rem; }
}
@media print {
  body { background: none; padding: 0; }
  section { break-inside: avoid; }
}
"""
