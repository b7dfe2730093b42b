"""`embedkit index --type ... --recall ... --memory ...` as typed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedkit.cli import main as command_line
from embedkit.cli.index import _bytes
from embedkit.errors import UsageError
from tests.tiny_model import write_tiny_model


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_tiny_model(tmp_path / "model.onnx")
    (tmp_path / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (1010, 6, 6, 3), dtype=np.uint8)
    for n, picture in enumerate(pixels):
        Image.fromarray(picture).resize((24, 24)).save(tmp_path / f"photos/{n:04}.png")
    return tmp_path


def call(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        command_line.main(list(arguments))
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    return int(ended.value.code or 0), out, err


def test_the_kind_and_what_was_measured_are_told(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(capfd, "index", "photos")
    assert code == 0
    assert "kind      flat: finds exactly" in out
    code, out, _ = call(capfd, "index", "photos", "--low-latency", "--recall", "0.9")
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith("kind"))
    assert line.startswith("kind      hnsw: recall@10 ")
    assert "queries/s" in line
    assert len(line) <= 80
    assert "scores    rounded: off by up to 0.0" in out
    code, out, err = call(capfd, "index", "photos", "--tiny", "--json")
    kind = json.loads(out)["kind"]
    assert (kind["kind"], kind["search"]) == ("tiny", {})
    if kind["recall"] < 0.9:
        assert "tried     tiny finds" in err
    code, out, _ = call(capfd, "search", "photos/0003.png", "--index", "photos.faiss", "--json")
    assert code == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--type", "hsnw"], "did you mean 'hnsw'"),
        (["--type", "pq", "--tiny"], "not pq and tiny"),
        (["--recall", "2"], "at most 1"),
        (["--memory", "much"], "takes a size"),
        (["--memory", "-1"], "takes a size"),
    ],
)
def test_what_cannot_be_is_refused_at_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    options: list[str],
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capfd, "index", *options)
    assert code == 2
    assert text in err


@pytest.mark.parametrize(
    ("text", "size"),
    [("2G", 2 * 10**9), ("500M", 5 * 10**8), ("1.5 GB", 15 * 10**8), ("0", 0), ("7k", 7000)],
)
def test_a_size_as_people_write_it(text: str, size: int) -> None:
    assert _bytes(text) == size


@pytest.mark.parametrize("text", ["", "G", "1e3", "-5M", "2 Q"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError):
        _bytes(text)
