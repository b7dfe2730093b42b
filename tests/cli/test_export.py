"""`embedkit export` on a run that was really trained, for a moment, on generated photos."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from embedkit.export.precision import with_contract
from embedkit.runtime import Embedder, read_contract
from embedkit.train import Run
from tests.cli.command import embedkit


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos/ and runs/, trained for two steps."""
    home = tmp_path_factory.mktemp("home")
    rng = np.random.default_rng(0)
    for label in range(10):
        folder = home / "photos" / f"class{label}"
        folder.mkdir(parents=True)
        color = rng.integers(0, 256, size=3)
        for number in range(4):
            noise = rng.normal(0, 60, size=(40, 40, 3))
            pixels = np.clip(color + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    arguments = ["train", str(home / "photos"), "--backbone", "resnet10", "--weights", "none"]
    arguments += ["--image-size", "32", "--dim", "8", "--steps", "2", "--batch", "4x2"]
    arguments += ["--device", "cpu", "--workers", "1", "--runs", str(home / "runs"), "--quiet"]
    assert embedkit(*arguments) == 0
    return home


@pytest.fixture
def home(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run and the photos, and the current folder."""
    shutil.copytree(trained, tmp_path / "home", symlinks=True)
    monkeypatch.chdir(tmp_path / "home")
    for record in Path("runs").glob("*/run.json"):
        text = record.read_text()
        record.write_text(text.replace(str(trained), str(tmp_path / "home")))
    return tmp_path / "home"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, trained: Path) -> None:
    """Every export after the first hands out the first one's file: tracing takes seconds."""
    from embedkit.export import gate
    from embedkit.export.onnx import export_onnx
    from embedkit.models import EmbeddingNet
    from embedkit.runtime import ModelContract

    def write(network: EmbeddingNet, contract: ModelContract, path: Path) -> ModelContract:
        kept = trained / "kept.onnx"
        if not kept.exists():
            export_onnx(network, contract, kept)
        shutil.copy(kept, path)
        return read_contract(path)

    monkeypatch.setattr(gate, "export_onnx", write)


def test_the_latest_run_becomes_a_model_an_engine_and_a_report(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embedkit("export", "--trt", "--gpu", "sm89", "--batch", "1:2:4") == 0
    out, err = capsys.readouterr()
    run = home / "runs" / "last"

    assert "cosine" in out
    assert "recall@1" in out
    assert "fp32: no other precision was asked for" in out
    assert "next      embedkit index ./catalog\n" in err
    with Embedder.load(run / "model.onnx", device="cpu") as embedder:
        assert embedder.self_test() > 0.9999
        assert embedder.contract.weights_hash == Run.load(run).contract().weights_hash
    assert read_contract(run / "model.engine").fingerprint == embedder.contract.fingerprint
    assert "### With onnxruntime alone" in (run / "MODEL_CARD.md").read_text()
    report = json.loads((run / "export-report.json").read_text())
    assert report["schema"] == "embedkit.export/1"
    assert report["gate"]["passed"] is True
    assert report["gate"]["images"] == 8  # two of ten classes are held out
    assert report["engine"]["profile"]["pixels"]["max"] == [4, 32, 32, 3]
    assert not [path for path in run.iterdir() if "tmp" in path.name]


@pytest.mark.usefixtures("quick")
def test_json_is_one_document_and_output_goes_where_it_is_told(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = next((home / "runs").glob("*/best.safetensors"))
    assert embedkit("export", str(checkpoint), "-o", "out", "--json") == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["schema"] == "embedkit.export/1"
    assert document["model"] == "out/model.onnx"
    assert document["size"] == Path("out/model.onnx").stat().st_size
    assert document["engine"] is None
    assert document["fingerprint"] == read_contract(Path("out/model.onnx")).fingerprint
    assert "embedkit index ./catalog --model out/model.onnx" in err
    assert not (checkpoint.parent / "model.onnx").exists()


@pytest.mark.usefixtures("quick", "home")
def test_quiet_says_nothing_but_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert embedkit("export", "--quiet") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("quick")
def test_without_tensorrt_the_onnx_stands_and_the_pip_line_is_named(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    assert embedkit("export", "--trt", "--gpu", "sm89") == 6
    assert 'try: pip install "embedkit[rtx]"' in capsys.readouterr().err
    run = home / "runs" / "last"
    assert read_contract(run / "model.onnx").embedding_dim == 8
    assert json.loads((run / "export-report.json").read_text())["gate"]["passed"] is True
    assert not (run / "model.engine").exists()


@pytest.mark.usefixtures("quick")
def test_a_gate_that_cannot_be_passed_leaves_no_model(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network_noise_is_more_than = "1.0"
    assert embedkit("export", "--min-cosine", network_noise_is_more_than) == 4
    err = capsys.readouterr().err
    assert "error: the exported file is not as good as the network" in err
    assert "cosine" in err
    assert not (home / "runs" / "last" / "model.onnx").exists()
    assert not (home / "runs" / "last" / "export-report.json").exists()


@pytest.mark.usefixtures("quick")
def test_int8_is_written_beside_fp32_and_leftovers_of_another_model_go(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = home / "runs" / "last"
    (run / "model.fp16.onnx").write_bytes(b"of another model")
    (run / "model.engine").write_bytes(b"ftrt of another model")
    eight_photos_prove_little = "100"
    arguments = ["export", "--quant", "int8", "--max-drop", eight_photos_prove_little]
    assert embedkit(*arguments) == 0
    out, err = capsys.readouterr()
    assert all(len(line) <= 80 for line in out.splitlines())
    assert "int8: was asked for; passes" in out
    assert "model.fp16.onnx belonged to another model and was removed" in err
    assert "model.engine belonged to another model and was removed" in err
    assert "next      embedkit index ./catalog --model runs/" in err
    assert read_contract(run / "model.int8.onnx").precision == "int8"
    assert not (run / "model.fp16.onnx").exists()
    assert not (run / "model.engine").exists()

    assert embedkit(*arguments, "--json") == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert "as kept from last time" in err
    assert document["quant"]["calibration"]["reused"] is True
    assert document["quant"]["calibration"]["photos"] == 32  # the eight others are held out
    assert document["quant"]["taken"] == "int8"
    assert document["removed"] == []
    assert json.loads((run / "export-report.json").read_text()) == document


@pytest.mark.usefixtures("quick")
def test_int8_that_fails_the_gate_is_not_written_and_the_layers_are_named(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    int8_is_rougher_than = "0.999999"
    assert embedkit("export", "--quant", "int8", "--min-cosine", int8_is_rougher_than) == 4
    err = capsys.readouterr().err
    assert "error: int8 is not as good as the network; it was not published" in err
    assert "layers that hurt the most" in err
    assert "layer" in err.partition("layers that hurt the most")[2]
    run = home / "runs" / "last"
    assert not [path.name for path in run.iterdir() if "int8" in path.name or "tmp" in path.name]
    assert json.loads((run / "export-report.json").read_text())["quant"]["taken"] == "fp32"


def test_a_wrong_mean_in_the_file_ends_with_4_and_no_model(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from embedkit.export import gate
    from embedkit.export.onnx import export_onnx
    from embedkit.models import EmbeddingNet
    from embedkit.runtime import ModelContract

    def write(network: EmbeddingNet, contract: ModelContract, path: Path) -> ModelContract:
        contract = export_onnx(network, contract, path)
        model = onnx.load(path)
        (mean,) = [t for t in model.graph.initializer if t.name == "network.shift"]
        mean.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(mean) + 1, mean.name))
        path.write_bytes(with_contract(model, contract))
        return contract

    monkeypatch.setattr(gate, "export_onnx", write)
    assert embedkit("export", "--quant", "auto") == 4
    assert "stages that differ, in order: pixels" in capsys.readouterr().err
    assert not list((home / "runs" / "last").glob("*.onnx"))


@pytest.mark.usefixtures("quick")
def test_photos_to_calibrate_with_are_never_those_that_judge(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embedkit("export", "--quant", "fp16", "--calibration", "photos", "--json") == 0
    document = json.loads(capsys.readouterr().out)["quant"]
    assert document["calibration"]["photos"] == 32
    assert document["calibration"]["source"] == "photos"
    held_out, _ = Run.load(home / "runs" / "last").held_out()
    apart = home / "apart" / "class"
    apart.mkdir(parents=True)
    for number, path in enumerate(held_out):
        (apart / f"{number}.png").symlink_to(path)
    assert embedkit("export", "--quant", "fp16", "--calibration", "apart") == 2
    assert "no photo to calibrate" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_photos_that_are_gone_are_named_and_some_left_are_enough(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out, _ = Run.load(home / "runs" / "last").held_out()
    held_out[0].unlink()
    assert embedkit("export") == 3
    assert str(held_out[0]) in capsys.readouterr().err
    shutil.rmtree(home / "photos")
    assert embedkit("export") == 2
    err = capsys.readouterr().err
    assert "error: there is no held-out photo to check the export with" in err
    assert "try: put the photos back" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "sm89"], "belongs to --trt"),
        (["--batch", "1:2:3"], "belongs to --trt"),
        (["--trt", "--batch", "8"], "least:usual:largest"),
        (["--trt", "--batch", "1:x:8"], "least:usual:largest"),
        (["nowhere"], "there is no run"),
        (["--max-drop", "-1"], "--max-drop"),
        (["--quant", "int9"], "did you mean 'int8'"),
        (["--calibration", "photos"], "belongs to --quant"),
    ],
)
def test_wrong_usage_ends_with_2(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert embedkit("export", *arguments) == 2
    assert said in capsys.readouterr().err


def test_before_any_training_it_says_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert embedkit("export") == 2
    assert "try: embedkit train ./photos" in capsys.readouterr().err


def test_without_torch_the_pip_line_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [
        name for name in sys.modules if name.startswith(("embedkit.export", "embedkit.train"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert embedkit("export") == 6
    assert 'try: pip install "embedkit[train]"' in capsys.readouterr().err
