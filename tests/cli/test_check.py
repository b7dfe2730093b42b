"""`embedkit check` as typed: the verdict, streams, files written, exit codes."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.tiny_model import write_tiny_model


def picture(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(small).resize((96, 80), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve classes of four photos in ./data, a cache folder of our own; we are in there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    for n in range(48):
        picture(tmp_path / f"data/c{n // 4:02}/{n}.jpg", n)
    return tmp_path


def test_good_photos_are_called_good_and_remembered_in_the_users_cache(
    place: Path, run: Any
) -> None:
    done = run("check")
    assert done.code == 0
    assert done.out.startswith("good      48 photos of 12 classes")
    assert (place / "caches/embedkit/check.sqlite").is_file()
    assert "check.sqlite" in done.err
    assert sorted(path.name for path in place.iterdir()) == ["caches", "data"]


def test_json_holds_the_findings_and_the_pairs(place: Path, run: Any) -> None:
    shutil.copy(place / "data/c00/0.jpg", place / "data/c03/copy.jpg")
    done = run("check", "data", "--json", "--cache", "here.sqlite")
    assert done.code == 0
    document = done.json()
    assert document["schema"] == "embedkit.check/1"
    assert document["verdict"] == "usable"
    assert [found["code"] for found in document["findings"]] == ["label-conflict", "copies"]
    (pair,) = document["twins"]
    assert (pair["a"]["label"], pair["b"]["path"]) == ("c00", "c03/copy.jpg")
    assert pair["exact"]
    assert document["complexity"] is None
    assert (place / "here.sqlite").is_file()
    assert not (place / "caches").exists()


def test_unreadable_files_end_in_3_and_are_named(place: Path, run: Any) -> None:
    (place / "data/c00/broken.jpg").write_bytes(b"")
    done = run("check")
    assert done.code == 3
    assert "c00/broken.jpg: the file is empty" in done.out


def test_what_cannot_work_is_refused_with_the_reason_after_the_answer(
    place: Path, run: Any
) -> None:
    for label in range(2):
        picture(place / f"few/c{label}/1.jpg", label)
    done = run("check", "few", "--json", "--html", "few.html")
    assert done.code == 2
    assert done.json()["verdict"] == "cannot work"
    assert done.err.splitlines()[-3:] == [
        "error: metric learning cannot work on these photos",
        "  0 classes of 2 to train on have two different photos, and at least two must",
        "  try: two photos of one class are what it learns from: take more photos of each class",
    ]
    assert "Cannot work" in (place / "few.html").read_text(encoding="utf-8")


def test_the_page_shows_both_pictures_of_a_suspicious_pair(place: Path, run: Any) -> None:
    shutil.copy(place / "data/c00/0.jpg", place / "data/c03/copy.jpg")
    done = run("check", "--html", "check.html", "-q")
    assert done.code == 0
    assert done.err == ""
    text = (place / "check.html").read_text(encoding="utf-8")
    assert text.count('src="data:image/jpeg;base64,') == 2
    assert "Two labels for one picture" in text
    assert "c03/<wbr>copy.jpg" in text


def test_a_model_adds_the_complexity_and_the_confusable_classes(place: Path, run: Any) -> None:
    write_tiny_model(place / "model.onnx")
    (place / "data/c00/broken.jpg").write_bytes(b"")
    done = run("check", "--model", "model.onnx", "--device", "cpu", "--json", "--html", "x.html")
    assert done.code == 3
    csg = done.json()["complexity"]
    assert csg["low"] <= csg["csg"] <= csg["high"]
    assert csg["classes"] == 12
    assert "How tangled" in (place / "x.html").read_text(encoding="utf-8")
    assert run("check", "--model", "model.onnx", "--device", "cpu").out.count("csg ") == 1


def test_a_cache_that_cannot_be_written_matters_only_when_it_was_asked_for(
    place: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "file"))
    done = run("check")
    assert done.code == 0
    assert "nothing is remembered" in done.err
    done = run("check", "--cache", place / "file" / "cache")
    assert done.code == 1
    assert "cannot be written" in done.err
    (place / "text").write_text("this is no database at all, whatever it is" * 30)
    assert run("check", "--cache", place / "text").code == 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "no folder or CSV"),
        (["--near", "97"], "0 to 96"),
        (["--model", "none.onnx"], "none.onnx"),
    ],
)
def test_wrong_usage_is_one_clear_sentence(
    place: Path, run: Any, arguments: list[str], said: str
) -> None:
    done = run("check", *arguments)
    assert done.code in (2, 5)
    assert said in done.err


def test_wrong_labels_are_written_on_purpose_and_said(place: Path, run: Any) -> None:
    done = run("check", "--inject-noise", "0.25", "-o", "out", "--json", "--seed", "2")
    assert done.code == 0
    document = done.json()
    rows = (place / "out/noisy.csv").read_text(encoding="utf-8").splitlines()
    assert rows[0] == "path,label,split,true_label,flipped"
    assert len(rows) == 49
    assert sum(row.endswith(",1") for row in rows) == len(document["flipped"])
    assert len(document["flipped"]) == round(0.25 * document["train"])
    said = run("check", "--inject-noise", "0.25", "-o", "again.csv", "--seed", "2")
    assert said.out.startswith("10 of 40 training labels are wrong now, in again.csv; 8 photos")
    paired = ["--inject-noise", "0.25", "--noise-kind", "asymmetric", "-o", "paired.csv"]
    assert run("check", *paired, "--json", "--seed", "2").json()["kind"] == "asymmetric"
    with (place / "paired.csv").open(newline="") as file:
        wrong = [row for row in csv.DictReader(file) if row["flipped"] == "1"]
    assert len(wrong) == 10
    told = {row["true_label"]: row["label"] for row in wrong}
    assert all(told[row["true_label"]] == row["label"] for row in wrong)
    for arguments in (
        ["--inject-noise", "0.2"],
        ["-o", "x"],
        ["--inject-noise", "2", "-o", "x"],
        ["--noise-kind", "asymmetric"],
    ):
        assert run("check", *arguments).code == 2
    done = run("check", "again.csv", "--inject-noise", "0.2", "-o", "again.csv")
    assert done.code == 2
    assert "is the data itself" in done.err
