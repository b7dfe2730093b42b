"""MODEL_CARD.md: its numbers are the report's, its lines run, and what a person wrote stays."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from embedkit.errors import EmbedKitError
from embedkit.export import card
from embedkit.export.card import BARE_HEADING, CARD_NAME, write_card
from embedkit.imaging import Preprocess
from embedkit.runtime import CONTRACT_KEY, Embedder, ModelContract
from tests.export.small import Exported
from tests.tiny_model import tiny_contract, tiny_graph, write_tiny_model


def gate(**changes: Any) -> dict[str, Any]:
    return {
        "images": 240,
        "batches": [
            {"batch": 1, "min_cosine": 0.9999991, "mean_cosine": 0.9999998},
            {"batch": 7, "min_cosine": 0.9999987, "mean_cosine": 0.9999997},
        ],
        "neighbour_overlap@10": 0.998,
        "recall@1": {"torch": 0.9, "file": 0.9, "change": 0.0, "low": -0.004, "high": 0.002},
        "map@r": {"torch": 0.7, "file": 0.698, "change": -0.002, "low": -0.003, "high": -0.001},
        **changes,
    }


def report_of(model: Path, **changes: Any) -> dict[str, Any]:
    return {"run": "nowhere", "model": str(model), "gate": gate(), "engine": None, **changes}


def write_model(path: Path, contract: ModelContract) -> None:
    model = tiny_graph(dim=contract.embedding_dim)
    model.metadata_props.add(key=CONTRACT_KEY, value=contract.dumps())
    path.write_bytes(model.SerializeToString())


def bare_lines(text: str) -> str:
    """The code below the heading, cut out as a reader would."""
    after = text[text.index(BARE_HEADING) :]
    return after.split("```python\n")[1].split("```")[0]


def pictures(folder: Path) -> list[Path]:
    """One picture for each thing that the lines must do."""
    rng = np.random.default_rng(0)

    def drawn(width: int, height: int, bands: int) -> Image.Image:
        coarse = rng.integers(0, 256, (7, 9, bands), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    exif = Image.Exif()
    exif[0x0112] = 6
    drawn(1201, 799, 3).save(folder / "turned.jpg", exif=exif)
    drawn(97, 203, 3).save(folder / "narrow.jpg")
    drawn(90, 61, 4).save(folder / "glass.png")
    drawn(64, 64, 3).convert("P").save(folder / "palette.png", transparency=3)
    drawn(33, 50, 3).convert("L").save(folder / "grey.png")
    return sorted(folder.iterdir())


def check_bare_lines(model: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They give the Embedder's vectors, for each picture, bit for bit."""
    code = compile(bare_lines((model.parent / CARD_NAME).read_text()), CARD_NAME, "exec")
    folder = work / "pictures"
    folder.mkdir()
    monkeypatch.chdir(model.parent)
    with Embedder.load(model.name, device="cpu") as embedder:
        for picture in pictures(folder):
            # Pillow tells the format by content, so the name in the lines does for all.
            Path("photo.jpg").write_bytes(picture.read_bytes())
            names: dict[str, Any] = {}
            exec(code, names)
            np.testing.assert_allclose(
                names["vector"], embedder.embed([picture])[0], atol=1e-6, err_msg=picture.name
            )
            read = embedder._read(picture)
            np.testing.assert_array_equal(names["pixels"][0], read, err_msg=picture.name)


def test_the_lines_for_bare_onnxruntime_give_the_embedders_vectors(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(exported.path.read_bytes())
    write_card(report_of(model), seconds=0.01)
    check_bare_lines(model, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess(height=16, width=16, crop_ratio=1.0, filter="bilinear", scaled_decode=0),
        Preprocess(height=16, width=16, crop_ratio=0.7, scaled_decode=3),
    ],
)
def test_the_lines_follow_the_models_own_preprocessing(
    preprocess: Preprocess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model.onnx"
    write_model(model, dataclasses.replace(tiny_contract(), preprocess=preprocess))
    write_card(report_of(model), seconds=0.01)
    check_bare_lines(model, tmp_path, monkeypatch)


def test_the_card_names_each_file_with_its_hash_and_the_measured_numbers(tmp_path: Path) -> None:
    data = {
        "hash": "5" * 64,
        "held_out": "test",
        "splits": {
            "train": {"images": 1912, "classes": 38},
            "val": {"images": 0, "classes": 0},
            "test": {"images": 240, "classes": 10},
        },
    }
    contract = dataclasses.replace(
        tiny_contract(),
        name="shoes",
        loss="rll",
        loss_options={"alpha": 1.2},
        recipe={"weights": "imagenet", "seed": 3},
        data=data,
        quality={"fp32": {"recall@1": 0.91234, "map@r": 0.71, "queries": 240.0}},
    )
    model = tmp_path / "model.onnx"
    write_model(model, contract)
    small, engine = tmp_path / "model.int8.onnx", tmp_path / "model.engine"
    write_model(small, dataclasses.replace(contract, precision="int8"))
    engine.write_bytes(b"vtrt")
    taken = {
        "name": "int8 + 2 float",
        "precision": "int8",
        "kept_float": ["a", "b"],
        "file": str(small),
        "gate": gate(images=240),
        "verdict": "taken",
    }
    untried = {"name": "fp16", "precision": "fp16", "file": None, "gate": None}
    fp32 = {"name": "fp32", "precision": "fp32", "file": str(model), "gate": gate()}
    quant = {"asked": "auto", "taken": "int8", "file": str(small), "reason": "runs 2.7 x as fast"}
    path = write_card(
        report_of(
            model,
            quant={**quant, "rungs": [{**fp32, "verdict": "passed"}, taken, untried]},
            engine={
                "path": str(engine),
                "compute_capability": "8.9",
                "flavour": "tensorrt_rtx",
                "version": "1.7.1",
            },
        ),
        seconds=0.01,
    )
    text = path.read_text()
    assert path == tmp_path / CARD_NAME
    for file in (model, small, engine):
        assert hashlib.sha256(file.read_bytes()).hexdigest() in text
    assert "train: 1,912 photos of 38 classes" in text
    assert "val:" not in text
    assert "5" * 64 in text
    assert "split `test`: 240 photos of 10 classes" in text
    assert "| recall@1 | 0.9123 |" in text
    assert "| int8 + 2 float | 0.9999987 | 0.9999997 | 99.8% |" in text
    assert "0.9000, 0.0 points [-0.4, +0.2] | 0.6980, -0.2 points [-0.3, -0.1] | taken |" in text
    assert "| fp16 |" not in text
    assert "`--quant auto` took int8. It runs 2.7 x as fast." in text
    assert re.search(r"\| `model\.int8\.onnx` \| cpu \| 8 \| [\d.]+ \| [\d.]+ \| [\d,]+ \|", text)
    assert 'Embedder.load("model.int8.onnx")' in text
    assert "compute capability 8.9" in text
    assert "torchvision's ImageNet weights" in text


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    write_tiny_model(model)
    changed = gate(**{"recall@1": None, "map@r": None, "neighbour_overlap@10": None})
    text = write_card(report_of(model, gate=changed), seconds=0.01).read_text()
    assert "No photos were held out, so nothing was measured." in text
    assert "The model does not say." not in text.partition("## Files")[0]
    told = text.replace(bare_lines(text), "")
    for noise in ("None", "n/a", "nan", "{}", "[]"):
        assert noise not in told
    assert max(len(line) for line in text.splitlines() if line[:1].isupper()) <= 100


def test_the_licence_a_person_filled_in_stays_and_all_else_is_written_again(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    write_tiny_model(model, name="first")
    path = write_card(report_of(model), seconds=0.01)
    assert "\nlicense: unknown\n" in path.read_text()
    path.write_text(path.read_text().replace("license: unknown", "license: cc-by-4.0"))
    write_tiny_model(model, name="second")
    text = write_card(report_of(model), seconds=0.01).read_text()
    assert "\nlicense: cc-by-4.0\n" in text
    assert "Not filled in" not in text
    assert "# second" in text
    assert "first" not in text


def test_a_card_that_cannot_be_finished_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model.onnx"
    write_tiny_model(model)
    before = write_card(report_of(model), seconds=0.01).read_text()

    def fail(*_: object, **__: object) -> None:
        raise EmbedKitError("the engine is gone")

    monkeypatch.setattr(card, "measure", fail)
    with pytest.raises(EmbedKitError, match="the engine is gone"):
        write_card(report_of(model), seconds=0.01)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [CARD_NAME, "model.onnx"]
    assert (tmp_path / CARD_NAME).read_text() == before


def test_the_front_matter_is_plain_yaml_that_names_the_pipeline(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    write_tiny_model(model)
    head = write_card(report_of(model), seconds=0.01).read_text().split("---\n")[1]
    keys = dict(line.split(": ", 1) for line in head.splitlines())
    assert set(keys) == {"license", "library_name", "pipeline_tag", "tags"}
    assert keys["pipeline_tag"] == "image-feature-extraction"
    assert re.fullmatch(r'\[("[\w.-]+"(, )?)+\]', keys["tags"])
