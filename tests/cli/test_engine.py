"""`embedkit export model.onnx --trt`, and `--backend` where a model is run, without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedkit.cli.engine import wish
from embedkit.errors import UsageError
from embedkit.runtime.backends.cuda import this_gpu
from embedkit.runtime.engine_file import open_engine
from tests.cli.command import embedkit
from tests.runtime.fake_nvidia import Nvidia
from tests.tiny_model import tiny_contract, write_tiny_model

pytest.importorskip("tensorrt_rtx")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: model.onnx, and photos/ of two classes."""
    monkeypatch.chdir(tmp_path)
    write_tiny_model(tmp_path / "model.onnx")
    rng = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / label / f"{number}.png")
    return tmp_path


def test_an_onnx_file_becomes_an_engine_beside_it(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--gpu", "sm89", "--batch", "1:2:3", "--workspace", "256M", "--json"]
    assert embedkit("export", "model.onnx", "--trt", *arguments) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    info = open_engine(here / "model.engine").info
    assert document["schema"] == "embedkit.export/1"
    assert document["run"] is document["gate"] is document["engine"]["self_test"] is None
    assert document["engine"]["engine_sha256"] == info.engine_sha256
    assert info.profile["pixels"]["max"][0] == 3
    assert "built, not run" in err
    assert not (here / "export-report.json").exists()


def test_an_engine_goes_where_it_is_asked_to(here: Path) -> None:
    assert embedkit("export", "model.onnx", "--trt", "--gpu", "sm89", "-o", "out", "-q") == 0
    assert sorted(path.name for path in (here / "out").iterdir()) == [
        "model.engine",
        "model.engine.json",
    ]


def test_an_onnx_file_without_trt_is_told_what_to_type(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embedkit("export", "model.onnx") == 2
    assert "try: embedkit export model.onnx --trt" in capsys.readouterr().err
    assert embedkit("export", "absent.onnx", "--trt", "--gpu", "sm89") == 2


@pytest.mark.parametrize(
    ("option", "value"),
    [("gpu", "sm89"), ("batch", "1:8:32"), ("workspace", "1G"), ("version_compatible", True)],
)
def test_what_belongs_to_an_engine_is_refused_without_one(option: str, value: object) -> None:
    given = {"gpu": None, "batch": None, "workspace": None}
    flags = {"version_compatible": False, "hardware_compatible": False}
    with pytest.raises(UsageError, match=f"--{option.replace('_', '-')} belongs to --trt"):
        wish(False, **{**given, **flags, option: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("2G", 2 << 30),
        ("512m", 512 << 20),
        ("3 K", None),
        ("4KiB", 4096),
        ("5GB", 5 << 30),
    ]
    + [(text, None) for text in ("", "G", "-1G", "1.5G", "2T", "0", "\u0661G", "1G 2G")],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int | None) -> None:
    if size is None and text:
        with pytest.raises(UsageError, match="takes a size"):
            wish(True, None, None, text, False, False)
    elif size is not None:
        asked = wish(True, None, None, text, False, False)
        assert asked is not None
        assert asked.workspace == size


def test_an_engine_is_measured_where_it_can_run(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embedkit("export", "model.onnx", "--trt", "--gpu", "sm89", "-q") == 0
    if this_gpu() is None:
        assert embedkit("eval", "model.engine", "photos") == 6
        assert "needs" not in capsys.readouterr().out
    Nvidia(tiny_contract()).install(monkeypatch)
    figures = []
    for model in ("model.engine", "model.onnx"):
        capsys.readouterr()
        device = [] if model == "model.engine" else ["--device", "cpu"]
        assert embedkit("eval", model, "photos", "--json", "--no-nmi", *device) == 0
        figures.append(json.loads(capsys.readouterr().out))
    assert figures[0]["model"]["kind"] == "engine"
    for figure in figures:
        del figure["model"]
    assert figures[0] == figures[1]


def test_backend_reaches_every_command_that_runs_a_model(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    index = ["index", "photos", "--model", "model.onnx", "-o", "i.faiss", "-q"]
    assert embedkit(*index) == 0
    capsys.readouterr()
    commands = [
        [*index, "--rebuild"],
        ["search", "photos/a/0.png", "--index", "i.faiss"],
        ["eval", "model.onnx", "photos", "--no-nmi"],
    ]
    for command in commands:
        assert embedkit(*command, "--backend", "tensort") == 2
        assert "did you mean 'tensorrt'" in capsys.readouterr().err
        assert embedkit(*command, "--backend", "tensorrt") == 2  # no engine yet
        assert "embedkit export model.onnx --trt" in capsys.readouterr().err.replace(f"{here}/", "")
    assert embedkit("export", "model.onnx", "--trt", "--gpu", "sm89", "-q") == 0
    Nvidia(tiny_contract()).install(monkeypatch)
    for command in commands:
        assert embedkit(*command, "--backend", "tensorrt") == 0, command


def test_backend_is_not_for_runs_and_vectors(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save("v.npy", np.eye(4, dtype=np.float32))
    for model in ("v.npy", "runs/last"):
        assert embedkit("eval", model, "photos", "--backend", "tensorrt") == 2
        assert "for exported models" in capsys.readouterr().err
