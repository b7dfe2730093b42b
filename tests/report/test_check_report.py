"""The doctor's page: from its JSON alone, whole, safe, and under its size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from embedkit.report import check_page
from tests.report.pages import ReadPage


def pair(a: str, b: str, **changes: Any) -> dict[str, Any]:
    side = {"label": "x", "split": ""}
    flags = {"exact": False, "recoloured": False, "labels_differ": False, "splits_differ": False}
    return {"a": side | {"path": a}, "b": side | {"path": b}, "bits": 7, **flags, **changes}


def document(root: Path, **changes: Any) -> dict[str, Any]:
    names = ("photos", "readable", "unreadable", "classes", "singletons", "copies")
    more = ("near_duplicates", "label_conflicts", "leaked")
    return {
        "root": str(root),
        "verdict": "usable",
        "counts": dict.fromkeys([*names, *more], 3),
        "splits": {"unsplit": {"photos": 3, "classes": 2}},
        "findings": [
            {"code": "leak", "level": "warn", "what": "2 <photos> leak", "advice": "move them"}
        ],
        "failed": [],
        "classes": {"a": 1, "b <b>": 2},
        "twins": [],
        "flat": [],
        "pixels": {"shortest_side": dict.fromkeys(("min", "p5", "median", "p95", "max"), 9)},
        "colour": {"mean": [0.1, 0.2, 0.3], "std": [0.1, 0.2, 0.3]},
        "complexity": None,
    } | changes


def test_each_kind_of_pair_has_its_place(tmp_path: Path) -> None:
    for name in ("1.png", "2.png"):
        Image.new("RGB", (300, 200), "red").save(tmp_path / name)
    twins = [
        pair("1.png", "2.png", labels_differ=True, exact=True),
        pair("1.png", "2.png", splits_differ=True),
        pair("1.png", "2.png"),
        pair("1.png", "gone.png", recoloured=True, labels_differ=True),
    ]
    page = ReadPage(check_page(document(tmp_path, twins=twins), title="t"))
    assert len(page.images) == 7
    assert "there is no such file" in page.text or "the picture is gone" in page.text
    for said in ("Two labels", "both sides", "Twice in one class", "another colour", "same file"):
        assert said in page.text
    assert "2 <photos> leak" in page.text


def test_the_largest_page_stays_under_five_megabytes(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    paths = []
    for number in range(20):
        pixels = generator.integers(0, 255, (200, 200, 3), dtype=np.uint8)
        paths.append(f"{number}.jpg")
        Image.fromarray(pixels).save(tmp_path / paths[-1])
    kinds = [
        {"labels_differ": True},
        {"splits_differ": True},
        {},
        {"recoloured": True},
    ]
    twins = [pair(paths[n % 20], paths[(n + 1) % 20], **kind) for kind in kinds for n in range(400)]
    source = check_page(document(tmp_path, twins=twins), title="t")
    page = ReadPage(source)
    assert len(page.images) == 2 * 4 * 40
    # Noise is the worst that JPEG can meet.
    assert len(source) < 5_000_000
    assert "at least 400" in page.text


@pytest.mark.parametrize("verdict", ["good", "usable", "cannot work"])
def test_every_verdict_is_said(tmp_path: Path, verdict: str) -> None:
    page = ReadPage(check_page(document(tmp_path, verdict=verdict), title="t"))
    assert verdict in page.text.lower()


def test_nothing_readable_makes_a_page_too(tmp_path: Path) -> None:
    content = document(
        tmp_path,
        classes={},
        pixels=None,
        colour=None,
        findings=[],
        failed=[{"path": "<x>.jpg", "code": "empty", "reason": "the file is empty"}],
    )
    page = ReadPage(check_page(content, title="<t>"))
    assert "<x>.jpg" in page.text
    assert "the file is empty" in page.text


def test_the_confusable_classes_are_listed(tmp_path: Path) -> None:
    csg = {
        **{"csg": 0.4, "low": 0.3, "high": 0.5, "draws": 10, "samples": 100, "neighbours": 3},
        "own": 0.9,
        "confusions": [{"a": "mug", "b": "cup", "similarity": 0.6, "a_in_b": 0.3, "b_in_a": 0.1}],
    }
    page = ReadPage(check_page(document(tmp_path, complexity=csg), title="t"))
    assert "mug and cup" in page.text
    assert "30%" in page.text
