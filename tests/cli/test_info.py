"""`embedkit info` on everything embedkit writes, and on what it does not."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from PIL import Image

from embedkit.index import sync_folder
from embedkit.report.checkpoint_file import read_checkpoint_file
from embedkit.runtime import CONTRACT_KEY, Embedder
from embedkit.runtime.contract import Prefix
from embedkit.train.checkpoint import write_checkpoint
from tests.cli.command import embedkit
from tests.tiny_model import tiny_contract, tiny_graph, write_tiny_model

METRICS = {"recall@1": 0.9, "map@r": 0.7, "r_precision": 0.75, "mrr": 0.94}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert embedkit("info", *arguments, "--json") == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document["schema"] == "embedkit.info/1"
    return document


def write_run(folder: Path, status: str = "finished") -> Path:
    """A run's folder as the trainer leaves it, without the weights."""
    folder.mkdir(parents=True)
    splits = {
        "train": {"images": 40, "classes": 4},
        "val": {"images": 10, "classes": 2},
        "test": {"images": 0, "classes": 0},
    }
    record = {
        "schema": "embedkit.run/1",
        "name": "shoes",
        "status": status,
        "device": "cpu",
        "photos_root": str(folder),
        "data": {"hash": "ab" * 32, "images": 50, "splits": splits},
        "loss_options": {"alpha": 1.2},
        "steps": 240,
        "elapsed": 61.2,
        "baseline": {"val": {**METRICS, "recall@1": 0.5}},
        "best": {"epoch": 3, "step": 200, "val": METRICS},
        "test": None,
        "versions": {"embedkit": "0.1.0"},
    }
    (folder / "run.json").write_text(json.dumps(record))
    recipe = 'loss = "rll"\nbackbone = "resnet10"\npooling = "avg"\ndim = 8\n'
    (folder / "config.toml").write_text(recipe)
    (folder / "split.csv").write_text("path,label,split,is_query,is_gallery\n")
    return folder


def write_best(path: Path) -> dict[str, torch.Tensor]:
    tensors = {
        "network/weight": torch.arange(12.0).reshape(3, 4),
        "network/count": torch.tensor(7),
        "network/half": torch.ones(5, dtype=torch.bfloat16),
        "loss/proxies": torch.zeros(2, 0),
    }
    recipe = {"backbone": "resnet10", "pooling": "avg", "dim": 8, "image_size": 32, "loss": "rll"}
    state = {
        "recipe": recipe,
        "data": {"hash": "cd" * 32, "images": 50},
        "best": {"epoch": 3, "step": 200, "val": METRICS},
    }
    write_checkpoint(path, tensors, state)
    return tensors


def test_a_model_tells_what_it_is_and_what_to_do_next(capsys: pytest.CaptureFixture[str]) -> None:
    contract = write_tiny_model(Path("model.onnx"), name="shoes")
    assert embedkit("info", "model.onnx") == 0
    out, err = capsys.readouterr()
    told = " ".join(out.split())
    assert "shoes" in told
    assert "8 numbers of unit length, compared by cosine" in told
    assert "largest centred box of the shape 16 x 16" in told
    assert contract.fingerprint in told
    assert max(map(len, out.splitlines())) <= 80
    assert err == "next      embedkit index ./catalog --model model.onnx\n"
    document = answer(capsys, "model.onnx")
    assert document["kind"] == "model"
    assert document["contract"]["fingerprint"] == contract.fingerprint
    assert document["sha256"] == hashlib.sha256(Path("model.onnx").read_bytes()).hexdigest()


def test_a_nested_model_tells_its_narrower_widths_and_what_they_reach(
    capsys: pytest.CaptureFixture[str],
) -> None:
    contract = dataclasses.replace(
        tiny_contract(),
        prefixes=(Prefix(2), Prefix(4, {"recall@1": 0.75, "map@r": 0.5})),
        data={"held_out": "test"},
    )
    graph = tiny_graph()
    graph.metadata_props.add(key=CONTRACT_KEY, value=contract.dumps())
    onnx.save(graph, "nested.onnx")
    assert embedkit("info", "nested.onnx") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "8 numbers of unit length (or the first 2 or 4)" in told
    assert "--dim 2: not measured, the first 2 numbers alone" in told
    assert "4: recall@1 0.7500, MAP@R 0.5000 (fp32 on test), the first 4 numbers alone" in told


def test_the_self_test_passes_on_a_sound_model_and_ends_with_4_on_another(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_tiny_model(Path("model.onnx"))
    document = answer(capsys, "model.onnx", "--self-test", "--device", "cpu")
    assert document["self_test"]["passed"] is True
    assert document["self_test"]["cosine"] == pytest.approx(1, abs=1e-6)
    # The graph of other weights with this contract: a file that was damaged and still loads.
    other = tiny_graph(seed=1)
    other.metadata_props.add(key=CONTRACT_KEY, value=tiny_contract(seed=0).dumps())
    onnx.save(other, "other.onnx")
    assert embedkit("info", "other.onnx", "--self-test", "--json") == 4
    out, err = capsys.readouterr()
    assert json.loads(out)["self_test"]["passed"] is False
    assert "error: the model other.onnx does not give the vectors" in err
    assert "next" not in err


def test_a_model_that_gives_nothing_finite_fails_its_self_test(
    capsys: pytest.CaptureFixture[str],
) -> None:
    graph = tiny_graph()
    (bias,) = (one for one in graph.graph.initializer if one.name == "bias")
    values = onnx.numpy_helper.to_array(bias) * float("nan")
    bias.CopyFrom(onnx.numpy_helper.from_array(values, "bias"))
    graph.metadata_props.add(key=CONTRACT_KEY, value=tiny_contract().dumps())
    onnx.save(graph, "nan.onnx")
    assert embedkit("info", "nan.onnx", "--self-test") == 4
    assert "cannot be used" in capsys.readouterr().err


def test_only_models_have_a_self_test(capsys: pytest.CaptureFixture[str]) -> None:
    write_best(Path("best.safetensors"))
    assert embedkit("info", "best.safetensors", "--self-test") == 2
    assert "only a model has a self-test" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "model", "advice"),
    [
        ("finished", False, "embedkit export runs/shoes"),
        ("finished", True, "embedkit index ./catalog --model runs/shoes/model.onnx"),
        ("unfinished", False, "embedkit train --resume runs/shoes"),
    ],
)
def test_a_run_tells_before_and_after_and_how_to_go_on(
    status: str, model: bool, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(Path("runs/shoes"), status)
    if model:
        write_tiny_model(folder / "model.onnx")
    assert embedkit("info", "runs/shoes") == 0
    out, err = capsys.readouterr()
    assert "train: 40 photos of 4 classes" in out
    assert "test:" not in out
    assert re.search(r"before +recall@1 0.5000", out)
    assert re.search(r"after +recall@1 0.9000, MAP@R 0.7000", out)
    assert "0:01:01" in out
    assert err == f"next      {advice}\n"
    document = answer(capsys, "runs/shoes/run.json")
    assert document["kind"] == "run"
    assert document["next"] == advice


def test_a_checkpoint_is_read_and_checked_without_torch(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tensors = write_best(Path("best.safetensors"))
    document = answer(capsys, "best.safetensors")
    network = [tensor for name, tensor in tensors.items() if name.startswith("network/")]
    assert document["numbers"] == {"network": sum(one.numel() for one in network), "loss": 0}
    assert document["state"]["best"]["epoch"] == 3
    assert document["next"] == "embedkit export best.safetensors"
    code = "import sys; sys.modules.update(torch=None, safetensors=None); sys.argv[0] = 'embedkit'"
    code += "; from embedkit.cli.main import main; main()"
    command = [sys.executable, "-c", code, "info", "best.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "whole: its digest is right" in done.stdout


def test_any_damage_to_a_checkpoint_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    write_best(Path("best.safetensors"))
    whole = Path("best.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    damages = {
        "cut": whole[:-1],
        "header cut": whole[: length // 2],
        "short": whole[:5],
        "empty": b"",
        "one bit of a weight": whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:],
        "a huge header": (1 << 62).to_bytes(8, "little") + whole[8:],
        "no JSON": whole[:8] + b"x" * length + whole[8 + length :],
        "deep JSON": (100_000).to_bytes(8, "little") + b"[" * 100_000,
        "a tensor outside": whole.replace(b'"shape":[3,4]', b'"shape":[9,9]'),
        "negative": whole.replace(b'"shape":[3,4]', b'"shape":[-3,4'),
    }
    for what, data in damages.items():
        Path("damaged.safetensors").write_bytes(data)
        assert embedkit("info", "damaged.safetensors") == 5, what
        err = capsys.readouterr().err
        assert err.startswith("error: the checkpoint damaged.safetensors is damaged"), what
        assert len(err) < 600, what
    assert read_checkpoint_file(Path("best.safetensors")).numbers["network"] == 18


def test_an_index_names_its_model_its_pictures_and_its_store(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_model(here / "model.onnx", name="shoes")
    folder = here / "photos"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (20, 20), (80 * number, 0, 0)).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    with Embedder.load(here / "model.onnx", device="cpu") as embedder:
        sync_folder(folder, here / "catalog.faiss", embedder, model=here / "model.onnx")
    assert embedkit("info", "catalog.faiss") == 0
    out, err = capsys.readouterr()
    assert "3 pictures, 8 wide, cosine" in out
    assert "shoes" in out
    assert "model.onnx" in out
    assert "3 pictures embedded, 1 not-an-image failed" in out
    assert err == "next      embedkit search ./query.jpg --index catalog.faiss\n"
    document = answer(capsys, "catalog.faiss")
    assert (document["count"], document["dim"]) == (3, 8)
    assert document["store"]["failed"] == {"not-an-image": 1}
    store = answer(capsys, "catalog.faiss.store")
    assert (store["kind"], store["embedded"]) == ("store", 3)
    shutil.rmtree(folder)
    assert embedkit("info", "catalog.faiss") == 0
    assert "which is not there" in " ".join(capsys.readouterr().out.split())


def test_documents_are_told_by_their_schema(capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = {"schema": "embedkit.eval/1", "images": 240, "metrics": METRICS, "skipped": []}
    Path("eval.json").write_text(json.dumps(evaluation))
    assert embedkit("info", "eval.json") == 0
    out = capsys.readouterr().out
    assert out.startswith("an evaluation\n")
    assert "recall@1 0.9000, MAP@R 0.7000" in out
    Path("later.json").write_text('{"schema": "embedkit.later/7", "n": 1}')
    assert answer(capsys, "later.json")["what"] == "the answer of `embedkit later`"
    Path("export-report.json").write_text(
        json.dumps({"schema": "embedkit.export/1", "model": "/elsewhere/model.onnx"})
    )
    write_tiny_model(Path("model.onnx"))
    assert answer(capsys, "export-report.json")["next"] == "embedkit info model.onnx"


def hostile(folder: Path) -> dict[str, bytes | None]:
    """Name and content of files that are none of ours; None is a folder."""
    write_tiny_model(folder / "whole.onnx")
    whole = (folder / "whole.onnx").read_bytes()
    foreign = tiny_graph().SerializeToString()
    return {
        "cut.onnx": whole[: len(whole) // 2],
        "foreign.onnx": foreign,
        "empty.onnx": b"",
        "noise.bin": bytes(range(256)),
        "empty": b"",
        "page.html": b"<!doctype html>",
        "list.json": b'{"schema": ["embedkit.eval/1"]}',
        "other.json": b'{"schema": "other.thing/1"}',
        "deep.json": b'{"a":' * 100_000,
        "half.json": b'{"schema": "embedkit.eval/1", ',
        "empty.faiss": b"",
        "cut.faiss": b"IxFI" + b"\0" * 40,
        "named.engine": b"vtrt" + b"\0" * 100,
        "plan.bin": b"ftrt" + b"\0" * 100,
        "folder": None,
    }


def test_what_is_not_ours_or_damaged_gets_one_clear_error(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in hostile(here).items():
        if content is None:
            (here / name).mkdir()
        else:
            (here / name).write_bytes(content)
        assert embedkit("info", name) == 5, name
        out, err = capsys.readouterr()
        assert out == "", name
        assert err.startswith("error: "), name
        assert err.count("error: ") == 1, name
        assert "unforeseen" not in err, name
        assert name.partition(".")[0] in err, name


def test_what_is_not_there_or_not_readable_is_wrong_usage(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embedkit("info", "nowhere.onnx") == 2
    (here / "dangling.onnx").symlink_to("nowhere.onnx")
    assert embedkit("info", "dangling.onnx") == 2
    assert capsys.readouterr().err.count("error: ") == 2


def test_a_database_of_another_program_is_no_store(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = sqlite3.connect(here / "other.store")
    base.execute("CREATE TABLE item (error TEXT)")
    base.commit()
    base.close()
    assert embedkit("info", "other.store") == 5
    assert "no store of an index" in capsys.readouterr().err
    (here / "cut.store").write_bytes(b"SQLite format 3\0" + b"\xff" * 200)
    assert embedkit("info", "cut.store") == 5
    assert "cannot be read" in capsys.readouterr().err


def test_a_damaged_run_is_one_error(capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(Path("runs/shoes"))
    record = json.loads((folder / "run.json").read_text())
    for key in ("data", "baseline", "best", "elapsed", "versions", "name"):
        (folder / "run.json").write_text(json.dumps({**record, key: "nonsense"}))
        assert embedkit("info", "runs/shoes") in (0, 5), key
        assert "unforeseen" not in capsys.readouterr().err, key


def test_names_that_speak_to_the_terminal_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_model(Path("model.onnx"), name="shoes\x1b[2J[bold]")
    assert embedkit("info", "model.onnx") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\\x1b[2J[bold]" in out
