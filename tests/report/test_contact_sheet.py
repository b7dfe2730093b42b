"""The page: whole in one file, safe against odd names, and readable without colours."""

from __future__ import annotations

import base64
import importlib
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedkit.report import Picture, SheetRow, contact_sheet

VOID = {"meta", "img", "wbr", "br", "link"}


class Page(HTMLParser):
    """Reads a page back: its images, its text, its classes; fails where tags do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.classes: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.classes += (dict(attrs).get("class") or "").split()
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    pixels = np.random.default_rng(0).integers(0, 255, (300, 900, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def row(photo: Path, label: str, *hits: str) -> SheetRow:
    shown = [Picture(photo, f"c/{hit}.jpg", hit, 0.9 - n / 10) for n, hit in enumerate(hits)]
    return SheetRow(Picture(photo, "query.jpg", label), shown)


def test_everything_is_inside_and_nothing_runs(photo: Path) -> None:
    page = contact_sheet([row(photo, "a", "a", "b")], title="Found")
    parsed = Page(page)
    assert not {"script", "link", "iframe"} & set(parsed.tags)
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    outside = [
        value
        for name, value in parsed.attributes
        if name in ("src", "href") and not str(value).startswith("data:image/jpeg;base64,")
    ]
    assert outside == []
    assert "http" not in page
    assert "@import" not in page
    assert "url(" not in page


def test_thumbnails_are_small_jpegs_of_the_pictures(photo: Path) -> None:
    parsed = Page(contact_sheet([row(photo, "", "a")], title="t"))
    assert len(parsed.images) == 2
    for image in parsed.images:
        data = base64.b64decode(str(image["src"]).split(",")[1])
        thumbnail = Image.open(io.BytesIO(data))
        assert (thumbnail.format, thumbnail.size) == ("JPEG", (160, 53))
        assert image["alt"]


def test_hits_are_marked_right_and_wrong_in_colour_and_in_words(photo: Path) -> None:
    page = contact_sheet([row(photo, "a", "a", "b", "a"), row(photo, "b", "a")], title="t")
    parsed = Page(page)
    assert parsed.classes.count("hit") == 4
    assert page.count('class="hit right"') == 2
    assert page.count('class="hit wrong"') == 2
    assert page.count('aria-label="same label"') == 2
    assert page.count('aria-label="another label"') == 2
    assert "nearest hit right for 1 of 2 (50%)" in parsed.text
    for text in ("0.9000", "0.8000", "c/b.jpg"):
        assert text in parsed.text


def test_without_a_label_nothing_is_judged(photo: Path) -> None:
    page = contact_sheet([row(photo, "", "a", "b")], title="t")
    assert 'class="hit"' in page
    assert "hit right" not in page
    assert "nearest hit" not in Page(page).text


def test_odd_names_cannot_break_the_page(photo: Path) -> None:
    evil = '"><script>alert(1)</script>&amp;\n\x1b[31m\udcff$title${name}'
    rows = [
        SheetRow(Picture(photo, evil, evil), [Picture(photo, evil, evil, 0.5)]),
        SheetRow(Picture(None, evil), []),
    ]
    page = contact_sheet(rows, title=evil, subtitle=evil)
    page.encode("utf-8")
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert "\x1b" not in page
    assert r"\udcff" in parsed.text
    assert "<script>alert(1)</script>&amp;" in parsed.text
    assert "$title${name}" in parsed.text


def test_pictures_that_are_not_there_get_a_placeholder_that_says_why(
    photo: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    hits = [
        Picture(tmp_path / "gone.jpg", "gone.jpg", "", 0.5),
        Picture(text, "text.jpg", "", 0.4),
        Picture(None, "picture 7", "", 0.3),
    ]
    parsed = Page(contact_sheet([SheetRow(Picture(photo, "q.jpg"), hits)], title="t"))
    assert len(parsed.images) == 1
    assert parsed.classes.count("gone") == 3
    assert "the picture is gone" in parsed.text
    assert "no file is known" in parsed.text


def test_no_rows_and_no_hits_say_so(photo: Path) -> None:
    assert "No results." in Page(contact_sheet([], title="t")).text
    assert "No hits." in Page(contact_sheet([row(photo, "a")], title="t")).text


def test_each_picture_is_decoded_once(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("embedkit.report.page")
    decoded: list[Path] = []
    decode = module.decode

    def count(path: Path, **options: int) -> Image.Image:
        decoded.append(path)
        return decode(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "decode", count)
    contact_sheet([row(photo, "a", "a", "b")] * 3, title="t")
    assert decoded == [photo]


def test_a_few_dozen_rows_stay_under_5_mb(shared_data: Path) -> None:
    files = sorted((shared_data / "tiny/images").rglob("*.jpg"))
    assert len(files) >= 100
    rows = [
        SheetRow(
            Picture(files[n], "q", "x"),
            [Picture(files[(7 * n + m) % len(files)], "hit", "x", 0.5) for m in range(10)],
        )
        for n in range(36)
    ]
    page = contact_sheet(rows, title="t")
    assert len(page) < 5_000_000
    assert len(re.findall("data:image/jpeg", page)) == 36 * 11
