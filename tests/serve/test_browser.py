"""The page in a real browser: give it a photo, crop, click through, compare, link, go back."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedkit.serve import Rules, Settings, create_app, running
from embedkit.serve.finder import Box, Finder
from tests.serve.browser import Browser, chromium, find_chromium
from tests.serve.place import Place

_HITS = "[...document.querySelectorAll('.hit')].map((hit) => Number(hit.dataset.id))"
_ANSWERED = "document.querySelectorAll('.score').length > 0 && !document.querySelector('.busy')"


@pytest.fixture(scope="module")
def url(place: Place) -> Iterator[str]:
    settings = Settings(rules=Rules(), thumbnails=place.folder / "thumbnails")
    with running(create_app(place.catalog, place.embedder, settings)) as url:
        yield url


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium here: install one, or name it in EMBEDKIT_CHROMIUM")
    with chromium(program, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def nearest(place: Place, file: Path, box: Box, k: int) -> list[int]:
    """What the page has to show, without server or browser."""
    finder = Finder(place.catalog, place.embedder.contract)
    vector = place.embedder.embed_pixels(finder.pixels(file, box)[None])[0]
    return [hit.id for hit in finder.search(vector, k)]


def test_a_photo_is_dropped_cropped_and_clicked_through(
    place: Place, url: str, browser: Browser
) -> None:
    browser.look(1200, 900)
    browser.open(url)
    browser.wait(f"{_HITS}.length === 12")  # pictures to start from
    photo = place.folder / "photos/shoe/04.png"

    browser.drop(photo, "#drop")
    browser.wait(_ANSWERED)
    assert browser.run(_HITS) == nearest(place, photo, Box(), 20)
    assert browser.run("document.querySelector('#query-name').textContent") == "04.png"
    assert browser.run("document.querySelector('#copy').disabled")

    # Crop: from near the upper left corner (which is round) to the middle.
    browser.wait("document.querySelector('#stage').style.getPropertyValue('--ratio')")
    left, top, width, height = browser.run(
        "(() => { const b = document.querySelector('#stage').getBoundingClientRect();"
        "return [b.x, b.y, b.width, b.height]; })()"
    )
    browser.drag((left + 6, top + 6), (left + width / 2, top + height / 2))
    browser.wait("history.state.box")
    browser.wait(_ANSWERED)
    marked = browser.run(
        "(() => { const b = document.querySelector('#region').getBoundingClientRect();"
        "return [b.x, b.y, b.width, b.height]; })()"
    )
    assert marked == pytest.approx([left + 6, top + 6, width / 2 - 6, height / 2 - 6], abs=3)
    box = Box(*map(float, browser.run("history.state.box").split(",")))
    assert box.right == pytest.approx(0.5, abs=0.01)
    assert browser.run(_HITS) == nearest(place, photo, box, 20)

    # Click the second hit: it becomes the query, and the address can be given to others.
    second = browser.run(_HITS)[1]
    browser.click(".hit:nth-child(2) .look")
    browser.wait(f"location.search.includes('id={second}&')")
    browser.wait(f"{_ANSWERED} && {_HITS}.length === 11")
    assert second not in browser.run(_HITS)
    link = browser.run("location.href")
    hits = browser.run(_HITS)

    browser.run("history.back()")
    browser.wait("history.state.box && !document.querySelector('.busy')")
    browser.wait(f"{_HITS}.length === 12")
    assert browser.run("document.querySelector('#query-name').textContent") == "04.png"

    browser.open(link)
    browser.wait(_ANSWERED)
    assert browser.run(_HITS) == hits
    assert browser.messages == []


def test_k_labels_and_a_region_stand_in_the_link(url: str, browser: Browser) -> None:
    browser.open(f"{url}/?id=1&k=10&label=cup&label=bag&box=0.1,0.1,0.8,0.9")
    browser.wait(_ANSWERED)
    assert browser.run("document.querySelectorAll('.chips button').length") == 2
    labels = browser.run("[...document.querySelectorAll('.hit .label')].map((l) => l.textContent)")
    assert set(labels) == {"cup", "bag"}
    assert not browser.run("document.querySelector('#region').hidden")
    browser.click(".chips button")
    browser.wait("!location.search.includes('label=cup')")
    browser.wait(f"{_ANSWERED} && {_HITS}.length < 8")
    assert "box=0.1%2C0.1%2C0.8%2C0.9" in browser.run("location.search")


@pytest.mark.parametrize("how", ["paste", "pick"])
def test_a_photo_is_also_pasted_or_picked(
    place: Place, url: str, browser: Browser, how: str
) -> None:
    browser.open(url)
    browser.wait(f"{_HITS}.length === 12")
    photo = place.folder / "photos/bag/05.png"
    content = base64.b64encode(photo.read_bytes()).decode()
    hand_over = {
        "paste": "document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: given}))",
        "pick": "(input.files = given.files, input.dispatchEvent(new Event('change')))",
    }[how]
    browser.run(
        "(() => { const given = new DataTransfer(), input = document.querySelector('#file');"
        f"const bytes = Uint8Array.from(atob('{content}'), (c) => c.charCodeAt(0));"
        "given.items.add(new File([bytes], 'mine.png', {type: 'image/png'}));"
        f"{hand_over}; }})()"
    )
    browser.wait(_ANSWERED)
    assert browser.run("document.querySelector('#query-name').textContent") == "mine.png"
    assert browser.run(_HITS) == nearest(place, photo, Box(), 20)


def test_k_is_switched_and_the_link_that_is_copied_has_it(url: str, browser: Browser) -> None:
    browser.open(f"{url}/?id=1&k=20")
    browser.wait(f"{_ANSWERED} && {_HITS}.length === 11")
    browser.run(
        "(() => { const k = document.querySelector('#k'); k.value = 10;"
        "k.dispatchEvent(new Event('change')); })()"
    )
    browser.wait(f"{_HITS}.length === 10 && !document.querySelector('.busy')")
    browser.run(
        "(() => { navigator.clipboard.writeText = async (text) => { window.copied = text; }; })()"
    )
    browser.click("#copy")
    browser.wait("document.querySelector('#message').textContent === 'The link is copied.'")
    link = browser.run("window.copied")
    assert link == browser.run("location.href")
    assert "id=1&k=10" in link


def test_two_pictures_are_compared_by_mouse_and_by_keys(url: str, browser: Browser) -> None:
    browser.open(f"{url}/?id=1&k=10")
    browser.wait(_ANSWERED)
    browser.click(".hit:nth-child(3) .with")
    browser.wait("document.querySelector('#compare').open")
    chosen = "document.querySelector('#right-side').value"
    assert browser.run(chosen) == "3"
    browser.key("ArrowRight", 39)
    assert browser.run(chosen) == "4"
    browser.wait("document.querySelector('#right-picture').naturalWidth > 0")
    browser.key("Escape", 27)
    browser.wait("!document.querySelector('#compare').open")


def test_a_hit_is_searched_on_with_the_keyboard_alone(url: str, browser: Browser) -> None:
    browser.open(f"{url}/?id=1&k=10")
    browser.wait(_ANSWERED)
    first = browser.run(_HITS)[0]
    browser.run("document.querySelector('#results').focus()")
    browser.key("Tab", 9)
    spoken = browser.run("document.activeElement.getAttribute('aria-label')")
    assert spoken.startswith("Result 1, score ")
    browser.key("Enter", 13, "\r")
    browser.wait(f"location.search.includes('id={first}&')")


def test_what_is_no_picture_is_said_on_the_page(url: str, browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    browser.open(url)
    browser.wait(f"{_HITS}.length === 12")
    browser.drop(tmp_path / "text.jpg", "#drop")
    browser.wait("document.querySelector('#message.bad')?.textContent.includes('no picture of')")
    browser.messages.clear()  # the browser notes the 422


def test_everything_a_person_can_use_has_a_name_and_fits_a_phone(
    url: str, browser: Browser
) -> None:
    browser.look(360, 740, phone=True)
    browser.open(f"{url}/?id=1&k=10&label=cup")
    browser.wait(_ANSWERED)
    assert browser.run("document.documentElement.scrollWidth") <= 360
    nameless = browser.run(
        "[...document.querySelectorAll('button, a, input, select, summary')].filter((one) =>"
        "!(one.getAttribute('aria-label') || one.labels?.length || one.textContent.trim()))"
        ".map((one) => one.outerHTML)"
    )
    assert nameless == []
    outside = browser.run(
        "performance.getEntriesByType('resource').map((one) => one.name)"
        f".filter((name) => !name.startsWith({json.dumps(url)}))"
    )
    assert outside == []
