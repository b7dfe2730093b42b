"""What a search found, as one picture: the contact sheet for where a page cannot be opened.

Drawn with Pillow alone, in its own font; letters that the font lacks become boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from embedkit.errors import ImageError
from embedkit.imaging import decode
from embedkit.report.contact_sheet import Picture, SheetRow

__all__ = ["contact_picture", "contact_strip"]

_SIDE, _GAP, _MARGIN, _CAPTION = 200, 20, 40, 80
_COLUMNS = 5  # of hits, beside the query
_STEP = _SIDE + _GAP
_WIDTH = 2 * _MARGIN + (_COLUMNS + 1) * _STEP
_LINE = _SIDE + _CAPTION + _GAP
_MOST_LINES = 50  # a picture much higher than 16,000 pixels is opened by few programs

_GROUND, _WELL, _RULE = "#ffffff", "#ecece7", "#dddcd5"
_STRIP_GROUND = "#202325"  # as most terminals
_TEXT, _SOFT, _ACCENT = "#1d1f20", "#5d6265", "#2f6fd0"
_RIGHT, _WRONG, _WARN = "#17794a", "#c2352b", "#94590a"
_VERDICTS = {"match": _RIGHT, "unsure": _WARN, "none": _SOFT}


def contact_picture(rows: Sequence[SheetRow], *, title: str, subtitle: str = "") -> Image.Image:
    """The sheet: each query, and to its right the hits in order, with score, verdict and name.

    Hits are framed green and ticked, or red and crossed, where both labels are known. Pictures that
    cannot be shown are placeholders that say why. Of very many, what there is no room for is
    counted in the last line. No rows give a sheet that says so.

    Args:
        rows: Queries and hits.
        title: Above it.
        subtitle: A line below the title.

    Cost: a scaled decode per picture; 1.3 MB of memory for each line of five hits, 50 at most.
    """
    plan = _planned(rows)
    height = 2 * _MARGIN + 100 + max(_LINE * len(plan), 60) + 30
    image = Image.new("RGB", (_WIDTH, height), _GROUND)
    draw = ImageDraw.Draw(image)
    room = _WIDTH - 2 * _MARGIN
    draw.text((_MARGIN, _MARGIN), _cut(title, room, 32), _TEXT, _font(32))
    draw.text((_MARGIN, _MARGIN + 46), _cut(subtitle, room, 18), _SOFT, _font(18))
    top = _MARGIN + 100
    left = _MARGIN + _STEP + _GAP
    if not plan:
        draw.text((_MARGIN, top), "No results.", _SOFT, _font(18))
    for number, first in plan:
        row = rows[number]
        if not first:
            draw.line((_MARGIN, top - 16, _WIDTH - _MARGIN, top - 16), _RULE)
            _draw(image, row.query, (_MARGIN, top), ("query", _ACCENT))
        if not row.hits:
            draw.text((left, top), "No hits.", _SOFT, _font(18))
        for column, hit in enumerate(row.hits[first : first + _COLUMNS]):
            score = "" if hit.score is None else f"{hit.score:.4f}"
            place = (left + column * _STEP, top)
            _draw(image, hit, place, (f"{first + column + 1}  {score}", _TEXT))
            _judge(draw, row.query.label, hit.label, place)
        top += _LINE
    draw.text((_MARGIN, height - _MARGIN - 18), _left_out(rows, plan), _SOFT, _font(18))
    return image


def contact_strip(row: SheetRow) -> Image.Image:
    """Only the pictures, for a terminal: the query, framed, and to its right its hits in order,
    five in a line.

    Cost: as `contact_picture`.
    """
    lines = len(_planned([row]))
    image = Image.new("RGB", ((_COLUMNS + 1) * _STEP, lines * _STEP), _STRIP_GROUND)
    draw = ImageDraw.Draw(image)
    corner = (_GAP // 2, _GAP // 2)
    _paste(image, row.query, corner)
    _frame(draw, corner, _ACCENT)
    for place, hit in enumerate(row.hits[: lines * _COLUMNS]):
        line, column = divmod(place, _COLUMNS)
        corner = ((column + 1) * _STEP + _GAP // 2, line * _STEP + _GAP // 2)
        _paste(image, hit, corner)
        _judge(draw, row.query.label, hit.label, corner)
    return image


def _planned(rows: Sequence[SheetRow]) -> list[tuple[int, int]]:
    """The lines: which row, and from which of its hits on."""
    lines = [
        (number, first)
        for number, row in enumerate(rows)
        for first in range(0, max(len(row.hits), 1), _COLUMNS)
    ]
    return lines[:_MOST_LINES]


def _left_out(rows: Sequence[SheetRow], plan: Sequence[tuple[int, int]]) -> str:
    queries = len(rows) - len({number for number, _ in plan})
    shown = sum(len(rows[number].hits[first : first + _COLUMNS]) for number, first in plan)
    hits = sum(len(row.hits) for row in rows) - shown
    if not queries and not hits:
        return ""
    return f"not shown for want of room: {queries:,} queries, {hits:,} hits"


def _draw(
    image: Image.Image, picture: Picture, place: tuple[int, int], head: tuple[str, str]
) -> None:
    """A picture and its three lines: what it is with its verdict, its label, its name."""
    _paste(image, picture, place)
    draw = ImageDraw.Draw(image)
    left, top = place
    said, colour = head
    draw.text((left, top + _SIDE + 6), said, colour, _font(17))
    if picture.verdict:
        draw.text(
            (left + _SIDE, top + _SIDE + 6),
            picture.verdict,
            _VERDICTS.get(picture.verdict, _SOFT),
            _font(17),
            anchor="ra",
        )
    below = top + _SIDE + 29
    if picture.label:
        draw.text((left, below), _cut(picture.label, _SIDE, 16), _TEXT, _font(16))
        below += 21
    draw.text((left, below), _cut(picture.name, _SIDE, 14, keep_end=True), _SOFT, _font(14))


def _paste(image: Image.Image, picture: Picture, place: tuple[int, int]) -> None:
    """The picture whole, in the middle of a square; or why there is none."""
    left, top = place
    draw = ImageDraw.Draw(image)
    draw.rectangle((left, top, left + _SIDE - 1, top + _SIDE - 1), _WELL)
    small = "no file is known" if picture.path is None else _small(picture.path)
    if isinstance(small, str):
        middle = (left + _SIDE // 2, top + _SIDE // 2)
        draw.text(middle, _cut(small, _SIDE - 12, 14), _SOFT, _font(14), anchor="mm")
    else:
        image.paste(small, (left + (_SIDE - small.width) // 2, top + (_SIDE - small.height) // 2))


def _small(path: Path) -> Image.Image | str:
    try:
        image = decode(path, shortest_side=_SIDE)
    except ImageError as error:
        return error.reason if path.exists() else "the picture is gone"
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return image


def _judge(draw: ImageDraw.ImageDraw, wanted: str, found: str, place: tuple[int, int]) -> None:
    """Right or wrong: by the colour of the frame, and by a sign for those who see no colours."""
    if not wanted:
        return
    right = wanted == found
    _frame(draw, place, _RIGHT if right else _WRONG)
    x, y = place[0] + _SIDE - 30, place[1] + 8
    draw.ellipse((x, y, x + 22, y + 22), _RIGHT if right else _WRONG)
    if right:
        draw.line((x + 6, y + 12, x + 10, y + 16, x + 17, y + 7), "white", 3, joint="curve")
    else:
        draw.line((x + 7, y + 7, x + 15, y + 15), "white", 3)
        draw.line((x + 15, y + 7, x + 7, y + 15), "white", 3)


def _frame(draw: ImageDraw.ImageDraw, place: tuple[int, int], colour: str) -> None:
    left, top = place
    draw.rectangle((left - 4, top - 4, left + _SIDE + 3, top + _SIDE + 3), outline=colour, width=4)


def _cut(value: str, room: int, size: int, *, keep_end: bool = False) -> str:
    """As much of a text as fits into so many pixels; of a path, its end says most."""
    clean = value.encode("utf-8", "backslashreplace").decode("utf-8")
    clean = "".join(c if c.isprintable() else repr(c)[1:-1] for c in clean)
    font = _font(size)
    if font.getlength(clean) <= room:
        return clean
    low, high = 0, len(clean)
    while low < high:  # the longest piece that fits beside the dots
        middle = (low + high + 1) // 2
        piece = clean[len(clean) - middle :] if keep_end else clean[:middle]
        if font.getlength(piece + "...") <= room:
            low = middle
        else:
            high = middle - 1
    return "..." + clean[len(clean) - low :] if keep_end else clean[:low] + "..."


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
