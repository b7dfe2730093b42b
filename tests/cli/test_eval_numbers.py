"""`embedkit eval` of photos known by numbers, or by who of three is the odd one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from embedkit.evaluate import continuous_metrics
from tests.cli.command import embedkit


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve files and a vector of each."""
    monkeypatch.chdir(tmp_path)
    for row in range(12):
        (tmp_path / f"{row}.jpg").touch()
    np.save("v.npy", np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32))
    return tmp_path


def run(*arguments: object) -> int:
    return embedkit("eval", *arguments)


def test_numbers_are_measured_without_labels(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["path,target", *(f"{row}.jpg,{row * row}" for row in range(12))]
    (here / "photos.csv").write_text("\n".join(lines))
    assert run("v.npy", "photos.csv", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    wanted = continuous_metrics(np.load("v.npy"), [float(row * row) for row in range(12)])
    assert document["beyond_classes"] == wanted.to_json()
    assert "metrics" not in document
    assert run("v.npy", "photos.csv") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"nDCG@1          {wanted.ndcg[1]:.4g}")
    assert "by chance" in out
    assert run("v.npy", "photos.csv", "--per-query") == 2
    assert "for photos with classes" in capsys.readouterr().err


def test_numbers_and_classes_are_both_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["path,label,target", *(f"{row}.jpg,{row % 3},{row}" for row in range(12))]
    (here / "photos.csv").write_text("\n".join(lines))
    assert run("v.npy", "photos.csv", "--json", "--no-nmi") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["beyond_classes"]["queries"] == document["metrics"]["queries"] == 12


def test_triplets_are_measured_by_their_accuracy(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        "image_a,image_b,image_c",
        *(f"{row}.jpg,{row + 1}.jpg,{row + 2}.jpg" for row in range(10)),
    ]
    (here / "triplets.csv").write_text("\n".join(lines))
    assert run("v.npy", "triplets.csv") == 0
    assert "of 10 triplets" in capsys.readouterr().out


def test_photos_of_which_nothing_is_known_cannot_be_measured(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("v.npy", here) == 2
    assert "have no labels" in capsys.readouterr().err
