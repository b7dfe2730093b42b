"""The sheet as a picture: what is where, read back from its pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedkit.report import Picture, SheetRow, contact_picture, contact_strip

RED, GREEN, BLUE, YELLOW = (200, 30, 40), (20, 160, 60), (40, 60, 200), (230, 200, 20)
COLOURS = {"red": RED, "green": GREEN, "blue": BLUE, "yellow": YELLOW}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A photo of each colour, wide ones and high ones."""
    found = {}
    for place, (name, colour) in enumerate(COLOURS.items()):
        size = (300, 200) if place % 2 else (200, 300)
        found[name] = tmp_path / f"{name}.png"
        Image.new("RGB", size, colour).save(found[name])
    return found


def row(files: dict[str, Path], query: str, *hits: str, label: str = "") -> SheetRow:
    shown = [Picture(files[name], name, name, 0.9, "match") for name in hits]
    return SheetRow(Picture(files[query], query, label), shown)


def middles(image: Image.Image, colour: tuple[int, int, int]) -> list[tuple[int, int]]:
    """Where blocks of at least 60 x 60 of a colour lie, from left to right and down."""
    same = (np.abs(np.asarray(image, int) - colour).max(axis=2) < 12)[::20, ::20]
    found: list[tuple[int, int]] = []
    for y, x in zip(*np.nonzero(same), strict=True):
        if not any(abs(x - a) < 12 and abs(y - b) < 12 for a, b in found):
            found.append((int(x), int(y)))
    return found


def near(image: Image.Image, colour: tuple[int, int, int]) -> int:
    """How many pixels have a colour."""
    return int((np.abs(np.asarray(image, int) - colour).max(axis=2) < 12).sum())


def test_hits_stand_in_order_to_the_right_of_their_query(files: dict[str, Path]) -> None:
    image = contact_picture([row(files, "red", "blue", "green", "yellow")], title="Found")
    order = [middles(image, COLOURS[name]) for name in ("red", "blue", "green", "yellow")]
    assert [len(places) for places in order] == [1, 1, 1, 1]
    across = [places[0][0] for places in order]
    assert across == sorted(across)
    assert max(places[0][1] for places in order) - min(places[0][1] for places in order) < 4


def test_every_query_and_every_sixth_hit_begins_a_line(files: dict[str, Path]) -> None:
    one = contact_picture([row(files, "red", *["blue"] * 5)], title="t")
    two = contact_picture([row(files, "red", *["blue"] * 6)], title="t")
    three = contact_picture([row(files, "red", *["blue"] * 6), row(files, "green")], title="t")
    assert one.width == two.width == three.width
    assert two.height - one.height == three.height - two.height > 200
    assert len(middles(two, BLUE)) == 6


def test_right_and_wrong_are_framed_only_where_the_query_has_a_label(
    files: dict[str, Path],
) -> None:
    frames = [(23, 121, 74), (194, 53, 43)]
    judged = contact_strip(row(files, "blue", "yellow", "blue", label="yellow"))
    plain = contact_strip(row(files, "blue", "yellow", "blue"))
    assert [near(judged, colour) > 2000 for colour in frames] == [True, True]
    assert [near(plain, colour) for colour in frames] == [0, 0]


def test_score_verdict_and_name_are_written(files: dict[str, Path]) -> None:
    full = contact_picture([row(files, "red", "blue")], title="t")
    hit = Picture(files["blue"], "")
    bare = contact_picture([SheetRow(Picture(files["red"], ""), [hit])], title="t")
    difference = np.asarray(full, int) - np.asarray(bare, int)
    changed = np.nonzero(np.abs(difference).max(axis=2))
    assert changed[0].min() > 300  # below the pictures
    assert near(full, (23, 121, 74)) > 10 > near(bare, (23, 121, 74))


def test_what_cannot_be_shown_is_a_placeholder(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    gone = [Picture(tmp_path / "gone.jpg", "a"), Picture(tmp_path / "text.jpg", "b")]
    shown = SheetRow(Picture(None, "q"), [*gone, Picture(files["red"], "c")])
    image = contact_picture([shown], title="t")
    assert len(middles(image, RED)) == 1
    assert contact_strip(shown).width == contact_strip(row(files, "red", "red")).width


def test_odd_names_and_no_rows_are_drawn(files: dict[str, Path]) -> None:
    odd = "\udcff\n\x1b[31m" + "long " * 300
    evil = SheetRow(Picture(files["red"], odd, odd), [Picture(files["red"], odd, odd, 0.5, odd)])
    assert contact_picture([evil], title=odd, subtitle=odd).width < 2000
    assert contact_picture([], title="nothing").height < 400
    assert contact_picture([row(files, "red")], title="no hits").height < 600


def test_very_many_rows_stay_a_picture_that_opens_and_the_rest_is_counted(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    from PIL import ImageDraw

    text = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "text",
        lambda self, where, words, *rest, **more: (
            said.append(words),
            text(self, where, words, *rest, **more),
        ),
    )
    rows = [SheetRow(Picture(None, "q"), [Picture(None, "hit")] * 7) for _ in range(30)]
    image = contact_picture(rows, title="t")
    assert image.height < 16_000
    assert "not shown for want of room: 5 queries, 35 hits" in said
    assert said.count("query") == 25
