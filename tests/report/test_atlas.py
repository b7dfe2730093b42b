"""The atlas: what is drawn is what was given, thumbnails stay in their budget, hands find files."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from embedkit.errors import MissingExtraError
from embedkit.report.atlas import PALETTE, atlas_page, atlas_picture
from embedkit.report.atlas_layout import lay_out
from embedkit.report.sprites import Sprites, make_sprites
from tests.serve.browser import Browser, chromium, find_chromium

COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (30, 200, 200)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five pictures of one colour each."""
    folder = tmp_path_factory.mktemp("photos")
    for at, colour in enumerate(COLOURS):
        Image.new("RGB", (120, 120), colour).save(folder / f"{at}.png")
    return sorted(folder.iterdir())


def content(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found is not None
    read: dict[str, Any] = json.loads(found[1])
    return read


# --- thumbnails ----------------------------------------------------------------------------------


def test_each_thumbnail_stands_where_its_picture_is_told_to(photos: list[Path]) -> None:
    files: list[Path | None] = [*photos, None]
    sprites = make_sprites(files, 1_000_000)
    assert (sprites.side, len(sprites.sheets), sprites.places[-1]) == (96, 1, -1)
    sheet = np.asarray(Image.open(io.BytesIO(sprites.sheets[0])), np.int64)
    for place, colour in zip(sprites.places[:-1].tolist(), COLOURS, strict=True):
        row, column = divmod(place, sprites.columns)
        middle = sheet[row * 96 + 10 : row * 96 + 86, column * 96 + 10 : column * 96 + 86]
        assert np.abs(middle.mean(axis=(0, 1)) - colour).max() < 6


def test_what_cannot_be_shown_is_named_and_the_others_stay(
    photos: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    seen: list[tuple[int, int]] = []
    sprites = make_sprites(
        [photos[0], broken, tmp_path / "gone.jpg", photos[1]],
        1_000_000,
        progress=lambda done, failed: seen.append((done, failed)),
    )
    assert [at for at, _ in sprites.failed] == [1, 2]
    assert (sprites.places >= 0).tolist() == [True, False, False, True]
    assert sum(done for done, _ in seen) == 4
    assert sum(failed for _, failed in seen) == 2


@pytest.mark.parametrize("budget", [0, 500, 1_300, 5_000, 60_000])
def test_the_budget_is_kept_whatever_is_in_the_pictures(budget: int, tmp_path: Path) -> None:
    noise = tmp_path / "noise.png"
    pixels = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(noise)
    sprites = make_sprites([noise] * 20, budget)
    assert sum(len(base64.b64encode(sheet)) for sheet in sprites.sheets) <= budget
    shown = int((sprites.places >= 0).sum())
    assert shown == 0 if not sprites.sheets else 0 < shown <= 20
    assert make_sprites([], 1000).sheets == ()


# --- where they stand ----------------------------------------------------------------------------


def test_few_pictures_keep_their_distances_up_to_one_scale() -> None:
    flat = np.random.default_rng(1).normal(size=(12, 2))
    turned = flat @ np.linalg.qr(np.random.default_rng(2).normal(size=(7, 7)))[0][:2]
    points = lay_out(turned).astype(float)
    assert points.min() >= 0
    assert points.max() <= 1
    assert np.ptp(points, axis=0).max() == pytest.approx(1, abs=1e-6)

    def distances(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.array([np.linalg.norm(a - b) for a in rows for b in rows])

    ratio = distances(points).sum() / distances(flat).sum()
    np.testing.assert_allclose(distances(points), ratio * distances(flat), atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 2, 40])
def test_none_one_and_all_the_same_have_a_place(count: int) -> None:
    points = lay_out(np.ones((count, 3)))
    assert points.shape == (count, 2)
    assert (points == 0.5).all()


def test_without_the_package_it_names_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pacmap", None)
    with pytest.raises(MissingExtraError) as raised:
        lay_out(np.random.default_rng(0).normal(size=(30, 4)))
    assert raised.value.hint == 'pip install "embedkit[atlas]"'


@pytest.mark.slow  # the first import of pacmap compiles for a minute
@pytest.mark.filterwarnings("default")
def test_groups_stay_together_and_a_seed_gives_the_same_map_again() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(6), 40)
    vectors = rng.normal(size=(6, 32))[labels] + 0.1 * rng.normal(size=(240, 32))
    points = lay_out(vectors, seed=4)
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    assert (labels[distance.argmin(axis=1)] == labels).all()
    assert (lay_out(vectors, seed=4) == points).all()


# --- the page and the picture --------------------------------------------------------------------


def test_the_page_carries_every_point_name_and_label_and_nothing_from_outside() -> None:
    points = np.random.default_rng(0).random((5, 2)).astype(np.float32)
    names = ["a.jpg", "</script><b>.jpg", "caf\udce9.jpg", "$data.jpg", "写真.jpg"]
    labels = ["x", "y", "x", "", "x"]
    none = Sprites(0, 0, (), np.full(5, -1, np.int32), ())
    page = atlas_page(points, names, labels, none, title="<T>", subtitle="s")
    page.encode("utf-8")
    assert page.count("</script>") == 2
    assert "<title>&lt;T&gt;</title>" in page
    assert not re.search(r"https?://|@import|url\(|<link|<img|fetch\(", page)
    read = content(page)
    assert read["names"] == names
    codes = np.frombuffer(base64.b64decode(read["label"]), "<u4")
    said = [read["labels"][code] for code in codes]
    assert [label.replace("(no label)", "") for label in said] == labels
    assert dict(zip(read["labels"], read["counts"], strict=True)) == {
        "x": 3,
        "(no label)": 1,
        "y": 1,
    }
    stored = np.frombuffer(base64.b64decode(read["points"]), "<u2").reshape(5, 2) / 65535
    np.testing.assert_allclose(stored, points, atol=1e-5)


def test_the_still_picture_has_each_colour_where_its_point_is() -> None:
    points = np.array([[0, 0], [1, 0], [0, 1], [1, 1]], np.float32)
    image = atlas_picture(points, ["b", "b", "b", "a"], title="é\n")
    assert image.size == (1600, 1240)
    assert image.getpixel((2, 2)) == (255, 255, 255)
    for (x, y), colour in zip(points.tolist(), (0, 0, 0, 1), strict=True):
        pixel = image.getpixel((round(40 + 1120 * x), round(80 + 1120 * y)))
        assert isinstance(pixel, tuple)
        assert "#{:02x}{:02x}{:02x}".format(*pixel) == PALETTE[colour]
    many = [f"label {number}" for number in range(40)]
    atlas_picture(np.zeros((40, 2), np.float32), many, title="t")
    assert atlas_picture(np.zeros((0, 2), np.float32), [], title="t").size == (1240, 1240)


# --- in a browser --------------------------------------------------------------------------------


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium here: install one, or name it in EMBEDKIT_CHROMIUM")
    with chromium(program, tmp_path / "profile") as browser:
        yield browser


_LISTED = "[...document.querySelectorAll('#files span')].map((one) => one.textContent)"


def test_lasso_search_legend_and_keys_find_the_right_files(
    browser: Browser, photos: list[Path], tmp_path: Path
) -> None:
    points = np.array([[0, 0], [1, 0], [0, 1], [1, 1], [0.5, 0.5]], np.float32)
    names = [f"photo-{at}.png" for at in range(5)]
    labels = ["left", "right", "left", "right", "middle"]
    page = tmp_path / "atlas.html"
    sprites = make_sprites(photos, 100_000)
    page.write_text(atlas_page(points, names, labels, sprites, title="t"), encoding="utf-8")
    browser.look(1000, 700)
    browser.open(page.as_uri())
    browser.wait("typeof sheets !== 'undefined' && sheets[0] && sheets[0].ready")

    x, y = browser.middle("#map")
    browser.drag((x, y), (x, y))
    assert browser.run("document.getElementById('tip-name').textContent") == "photo-4.png"
    # Few are in view, so that the middle of the map shows the picture itself.
    browser.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    browser.screenshot(tmp_path / "seen.png")
    with Image.open(tmp_path / "seen.png") as seen:
        pixel = seen.convert("RGB").getpixel((round(x) - 25, round(y) - 25))
    assert np.abs(np.subtract(pixel, COLOURS[4])).max() < 12
    browser.run("document.getElementById('map').focus()")
    browser.run("step(-1, -1)")
    assert browser.run("data.names[current]") == "photo-0.png"

    browser.click("#all")
    around_the_left = (
        "(() => { const w = map.clientWidth / 2 - 80, h = map.clientHeight;"
        "chooseInside([[0, 0], [w, 0], [w, h], [0, h]]); })()"
    )
    browser.run(around_the_left)
    assert browser.run(_LISTED) == ["photo-0.png", "photo-2.png"]
    browser.click("#clear")
    assert browser.run("document.getElementById('found').hidden")

    browser.click("#legend li:first-child button")
    browser.click("#in-view")
    assert browser.run(_LISTED) == ["photo-0.png", "photo-2.png"]
    browser.click("#every")
    browser.run("at('search').value = 'PHOTO-3'; search()")
    assert browser.run(_LISTED) == ["photo-3.png"]
    assert browser.run("at('found-count').textContent") == "1 of 5 pictures"
    browser.run("at('search').value = 'middle'; search()")
    assert browser.run(_LISTED) == ["photo-4.png"]
    assert browser.messages == []
