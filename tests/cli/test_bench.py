"""`embedkit bench`: the table, the document, the page, and what cannot be measured."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from embedkit.runtime import Embedder
from tests.cli.command import embedkit
from tests.tiny_model import write_tiny_model

QUICK = ("--seconds", "0.01", "--photo-size", "40x30")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    last = tmp_path / "runs" / "last"
    last.mkdir(parents=True)
    write_tiny_model(last / "model.onnx")
    write_tiny_model(tmp_path / "model.int8.onnx", seed=1)
    return tmp_path


def test_the_latest_runs_model_is_measured_on_pixels_and_on_files(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert embedkit("bench", "--batch", "1,4", *QUICK) == 0
    out, err = capsys.readouterr()
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["model.onnx", "on", "cpu"]
    assert [line[:2] for line in lines[3:]] == [
        ["1", "pixels"],
        ["1", "files"],
        ["4", "pixels"],
        ["4", "files"],
    ]
    assert max(map(len, out.splitlines())) <= 80
    assert "drawn JPEGs of 40 x 30" in err


def test_files_are_streamed_as_embed_streams_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of the model per core, of four; single batches take the cores for one run."""
    monkeypatch.setattr("embedkit.runtime.embedder.usable_cores", lambda: 4)
    met: set[tuple[int | None, bool, int]] = set()
    real = Embedder.embed_files

    def seen(self: Embedder, paths: Any, *, batch: int, workers: int | None) -> Any:
        stream = isinstance(paths, itertools.cycle)
        met.add((workers, stream, self.runs_at_once(workers)))
        return real(self, paths, batch=batch, workers=workers)

    monkeypatch.setattr(Embedder, "embed_files", seen)
    assert embedkit("bench", "--batch", "4", "--threads", "0,1,2", "--device", "cpu", *QUICK) == 0
    assert met == {
        *((None, False, 1), (None, True, 4)),
        *((1, False, 1), (1, True, 1)),
        *((2, False, 1), (2, True, 2)),
    }


def test_two_models_stand_side_by_side_with_their_ratio(
    capsys: pytest.CaptureFixture[str],
) -> None:
    models = ("runs/last/model.onnx", "model.int8.onnx")
    arguments = ("--batch", "2", "--threads", "1,2", "--device", "cpu", "--json")
    assert embedkit("bench", *models, *arguments, *QUICK) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "embedkit.bench/1"
    assert document["machine"]["cores"] >= 1
    rows = document["rows"]
    keys = [(row["threads"], row["from"], row["model"]) for row in rows]
    assert keys == [
        (threads, source, model)
        for threads in (1, 2)
        for source in ("pixels", "files")
        for model in ("model.onnx", "model.int8.onnx")
    ]
    for row in rows:
        assert row["device"] == "cpu"
        assert row["batch"] == 2
        assert row["runs"] >= 3
        assert row["p50_ms"] <= row["p95_ms"]
        assert row["error"] is None
    assert [row["ratio"] for row in rows[::2]] == [1.0] * 4
    assert document["left_out"] == []


def test_files_of_one_name_are_told_apart(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_model(here / "model.onnx")
    arguments = ("--batch", "1", "--device", "cpu", "--json")
    assert embedkit("bench", "runs/last/model.onnx", "model.onnx", *arguments, *QUICK) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["model"] for row in rows} == {"runs/last/model.onnx", "model.onnx"}


def test_the_page_is_offline_and_holds_the_numbers(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--batch", "1,2", "--device", "cpu", "--html", "bench.html", "--json")
    assert embedkit("bench", *arguments, *QUICK) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    page = (here / "bench.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert "<script" not in page
    assert page.count("<figure") == 4  # images a second and latency, from pixels and from files
    assert page.count('<path class="curve') >= 4
    assert "color-scheme" in page
    assert f"{rows[0]['p50_ms']:.2f}"[:3] in page


def test_own_photos_are_decoded_and_broken_ones_are_named(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from embedkit.runtime.latency import draw_photos

    (here / "photos").mkdir()
    draw_photos(here / "photos", 2, (50, 40))
    (here / "photos" / "000.jpg").write_bytes(b"broken")
    assert embedkit("bench", "--photos", "photos", "--batch", "2", *QUICK) == 0
    err = capsys.readouterr().err
    assert "photos/000.jpg" in err
    assert "1 photos of photos" in err
    (here / "empty").mkdir()
    assert embedkit("bench", "--photos", "empty", *QUICK) == 2
    assert "holds no picture that can be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nowhere.onnx"], 2, "there is no model nowhere.onnx"),
        (["runs/last"], 2, "there is no model runs/last"),
        (["--batch", "0"], 2, "--batch takes whole numbers from 1"),
        (["--batch", "8,x"], 2, "--batch takes whole numbers"),
        (["--threads", "-1"], 2, "--threads"),
        (["--photo-size", "100"], 2, "width x height"),
        (["--photo-size", "99999x99999"], 2, "larger than embedkit reads"),
        (["--device", "cdua", *QUICK], 2, "there is no device named 'cdua'"),
        (["--backend", "onxruntime"], 2, "there is no backend named"),
        (["--device", "cpu", "--backend", "tensorrt"], 2, "nothing can be measured that way"),
        (["--photos", "nowhere"], 2, "nowhere"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_sentence(
    arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embedkit("bench", *arguments) == code
    err = capsys.readouterr().err
    assert err.count("error: ") == 1
    assert said in err


@pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(), reason="this onnxruntime knows CUDA"
)
def test_a_gpu_that_is_not_there_is_left_out_unless_it_was_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert embedkit("bench", "--batch", "1", "--json", *QUICK) == 0
    out, err = capsys.readouterr()
    assert "cuda      left out" in err
    (left_out,) = json.loads(out)["left_out"]
    assert (left_out["model"], left_out["device"]) == ("model.onnx", "cuda")
    assert embedkit("bench", "--device", "cuda", *QUICK) == 6
    assert 'pip install "embedkit[gpu]"' in capsys.readouterr().err


def test_a_damaged_model_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = here / "model.int8.onnx"
    model.write_bytes(model.read_bytes()[:200])
    assert embedkit("bench", "model.int8.onnx", *QUICK) == 5
    assert "damaged" in capsys.readouterr().err


def test_what_is_no_model_is_refused_before_photos_are_drawn(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def draw(*_: object) -> None:
        raise AssertionError("drawn for nothing")

    monkeypatch.setattr("embedkit.runtime.latency.draw_photos", draw)
    (here / "bad.jpg").write_bytes(b"no model")
    assert embedkit("bench", "bad.jpg", *QUICK) == 5
    assert "bad.jpg" in capsys.readouterr().err
