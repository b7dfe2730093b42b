"""`embedkit atlas` as typed: a page, a picture, counts that add up; `eval --failures` too."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from embedkit.data import draw_products
from embedkit.index import Row, write_catalog
from tests.tiny_model import tiny_contract, write_tiny_model


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """We are in a folder with photos of three classes and an index of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    draw_products(tmp_path / "photos", classes=3, images_per_class=5, size=40)
    index(tmp_path, sorted((tmp_path / "photos").rglob("*.jpg")))
    return tmp_path


def index(folder: Path, photos: list[Path]) -> None:
    vectors = np.random.default_rng(0).normal(size=(len(photos), 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = [
        Row(at, os.fsencode(path.relative_to(folder)), os.fsencode(path.parent.name), vector)
        for at, (path, vector) in enumerate(zip(photos, vectors, strict=True))
    ]
    write_catalog(folder / "catalog.faiss", rows, contract=tiny_contract(), root=folder)


def test_a_page_and_a_picture_are_made_and_the_document_says_what_is_in_them(
    place: Path, run: Any
) -> None:
    done = run("atlas", "catalog.faiss", "--png", "atlas.png", "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document["schema"] == "embedkit.atlas/1"
    assert (document["shown"], document["thumbnails"], document["labels"]) == (15, 15, 3)
    page = place / document["page"]
    assert page.name == "catalog.atlas.html"
    assert page.stat().st_size == document["bytes"]
    with Image.open(place / "atlas.png") as image:
        assert image.format == "PNG"
    assert {path.name for path in place.iterdir()} == {
        *("photos", "catalog.faiss", "catalog.atlas.html", "atlas.png")
    }


def test_a_lost_and_a_broken_photo_are_named_and_end_with_3(place: Path, run: Any) -> None:
    first, second, *_ = sorted((place / "photos").rglob("*.jpg"))
    first.unlink()
    second.write_bytes(b"no picture")
    done = run("atlas", "-o", "out/map.html")
    assert done.code == 3
    assert "15 pictures, 3 labels, 13 thumbnails" in done.out
    assert first.name in done.err
    assert second.name in done.err
    assert "2 without a thumbnail" in (place / "out/map.html").read_text(encoding="utf-8")


def test_a_limit_takes_some_and_says_so(place: Path, run: Any) -> None:
    done = run("atlas", "--limit", 4, "--thumbnails", 0, "--json")
    document = json.loads(done.out)
    assert (document["pictures"], document["shown"], document["thumbnails"]) == (15, 4, 0)
    assert "4 of 15 pictures" in (place / "catalog.atlas.html").read_text(encoding="utf-8")


def test_without_the_package_a_larger_index_ends_with_6_and_the_pip_line(
    place: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(place, sorted((place / "photos").rglob("*.jpg")) * 2)
    monkeypatch.setitem(sys.modules, "pacmap", None)
    done = run("atlas")
    assert done.code == 6
    assert 'pip install "embedkit[atlas]"' in done.err
    assert not (place / "catalog.atlas.html").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--png", "atlas.jpg"], 2, ".png"),
        (["gone.faiss"], 2, "there is no index"),
        (["photos"], 2, "there is no index"),
        (["--limit", "0"], 2, "--limit"),
        (["-o", "photos"], 1, "could not be written"),
    ],
)
def test_a_wrong_call_is_one_clear_error(
    place: Path, run: Any, arguments: list[str], code: int, words: str
) -> None:
    done = run("atlas", *arguments)
    assert (done.code, done.out) == (code, "")
    assert words in done.err


def test_eval_writes_the_page_of_its_failures(place: Path, run: Any) -> None:
    write_tiny_model(place / "model.onnx")
    done = run("eval", "model.onnx", "photos", "--repeats", 2, "--failures", "out/failures.html")
    assert done.code == 0, done.err
    page = (place / "out/failures.html").read_text(encoding="utf-8")
    assert "15 queries" in page
    assert "Where tiny fails" in page


def test_eval_of_photos_without_classes_has_no_page_of_failures(place: Path, run: Any) -> None:
    rows = [f"{path},0.{at}" for at, path in enumerate(sorted(place.rglob("*.jpg")))]
    (place / "numbers.csv").write_text("\n".join(["path,target", *rows]) + "\n")
    write_tiny_model(place / "model.onnx")
    done = run("eval", "model.onnx", "numbers.csv", "--failures", "failures.html")
    assert done.code == 2
    assert "--failures" in done.err
    assert not (place / "failures.html").exists()
