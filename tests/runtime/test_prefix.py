"""Narrower widths of a model: the first numbers, of unit length again, and never mixed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedkit.errors import MismatchError, UsageError
from embedkit.imaging import read_pixels
from embedkit.index import Catalog
from embedkit.index.migrate import migrate
from embedkit.runtime import Embedder, ModelContract, read_contract
from embedkit.runtime.contract import Prefix
from embedkit.runtime.prefix import cut
from tests.cli.command import embedkit, picture
from tests.tiny_model import tiny_contract, tiny_graph, tiny_vectors, write_tiny_model


def nested_contract() -> ModelContract:
    prefixes = (Prefix(3, {"recall@1": 0.5}, {"match": 0.9}), Prefix(5))
    return dataclasses.replace(
        tiny_contract(), prefixes=prefixes, quality={"fp32": {"recall@1": 0.75}}
    )


def write_nested(path: Path) -> ModelContract:
    """A model of 8 numbers, of which 3 or 5 will do."""
    model, contract = tiny_graph(), nested_contract()
    model.metadata_props.add(key="embedkit.contract", value=contract.dumps())
    path.write_bytes(model.SerializeToString())
    return contract


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """We are in a folder with such a model and six pictures in two classes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    write_nested(tmp_path / "model.onnx")
    for n in range(6):
        picture(tmp_path / f"catalog/class{n // 3}/{n}.png", n)
    return tmp_path


def test_the_contract_comes_back_and_an_older_one_has_no_widths() -> None:
    contract = nested_contract()
    assert ModelContract.loads(contract.dumps()) == contract
    assert contract.widths == (3, 5, 8)
    assert "prefixes" not in json.loads(tiny_contract().dumps())
    assert ModelContract.loads(tiny_contract().dumps()).widths == (8,)


def test_a_cut_contract_speaks_of_the_prefix_alone_and_is_another_model() -> None:
    whole = nested_contract()
    three, five = whole.cut(3), whole.cut(5)
    assert whole.cut(8) is whole
    assert (three.embedding_dim, three.widths, five.widths) == (3, (3,), (3, 5))
    assert (three.quality, three.thresholds) == ({"fp32": {"recall@1": 0.5}}, {"match": 0.9})
    assert (five.quality, five.thresholds) == ({}, {})
    assert len({one.fingerprint for one in (whole, three, five)}) == 3
    assert whole.fingerprint == tiny_contract().fingerprint
    assert ModelContract.loads(three.dumps()) == three


@pytest.mark.parametrize("widths", [(5, 3), (3, 3), (8,), (9,), (0,)])
def test_widths_that_do_not_rise_to_the_whole_are_no_contract(widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not rise"):
        dataclasses.replace(tiny_contract(), prefixes=tuple(Prefix(width) for width in widths))
    document = json.loads(nested_contract().dumps())
    document["prefixes"] = [{"dim": width, "quality": {}, "thresholds": {}} for width in widths]
    with pytest.raises(MismatchError, match="damaged"):
        ModelContract.loads(json.dumps(document))


@pytest.mark.parametrize("dim", [3, 5, 8])
def test_vectors_are_those_numpy_cuts_and_scales(place: Path, dim: int) -> None:
    files = sorted(place.glob("catalog/*/*.png"))
    preprocess = read_contract(place / "model.onnx").preprocess
    whole = tiny_vectors(np.stack([read_pixels(one, preprocess) for one in files]))
    wanted = whole[:, :dim] / np.linalg.norm(whole[:, :dim], axis=1, keepdims=True)
    with Embedder.load(place / "model.onnx", device="cpu", dim=dim) as embedder:
        assert embedder.embedding_dim == dim
        assert embedder.device == "cpu"
        assert embedder.embed(files) == pytest.approx(wanted, abs=1e-5)
        assert embedder.embed([]).shape == (0, dim)
        assert embedder.self_test() == pytest.approx(1)
        streamed = [one.vector for one in embedder.embed_files(files)]
        assert np.stack([row for row in streamed if row is not None]) == pytest.approx(
            wanted, abs=1e-5
        )


def test_a_row_of_nothing_stays_nothing_and_raw_vectors_keep_their_length() -> None:
    rows = np.array([[0, 0, 1], [3, 4, 0]], np.float32)
    assert cut(rows, 2, normalizes=True).tolist() == [
        [0, 0],
        [pytest.approx(0.6), pytest.approx(0.8)],
    ]
    assert cut(rows, 2, normalizes=False).tolist() == [[0, 0], [3, 4]]
    assert rows.tolist() == [[0, 0, 1], [3, 4, 0]]
    assert cut(rows[:0], 2, normalizes=True).shape == (0, 2)


def test_a_width_the_model_has_not_is_refused_with_those_it_has(place: Path) -> None:
    with pytest.raises(UsageError, match="no vectors of 4 numbers") as refused:
        Embedder.load(place / "model.onnx", device="cpu", dim=4)
    assert refused.value.facts == "it has 3, 5, 8"
    assert refused.value.hint == "--dim 3"
    with pytest.raises(UsageError, match="no vectors of 4 numbers") as refused:
        tiny_contract().cut(4)
    assert refused.value.hint is not None
    assert "--nested 4" in refused.value.hint


def _answer(capfd: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capfd.readouterr()
    assert embedkit(*arguments, "--json") == 0
    return json.loads(capfd.readouterr().out)


def test_an_index_keeps_its_width_and_search_finds_it_by_itself(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = _answer(capfd, "index", "catalog", "--model", "model.onnx", "--dim", "3")
    assert first["embedded"] == 6
    picture(place / "catalog/class1/new.png", 9)
    again = _answer(capfd, "index", "catalog")
    assert (again["embedded"], again["unchanged"]) == (1, 6)
    assert again["model"]["fingerprint"] == nested_contract().cut(3).fingerprint
    added = _answer(capfd, "index", "add", "catalog.faiss", str(picture(place / "other.png", 11)))
    assert added["embedded"] == 1
    found = _answer(capfd, "search", "catalog/class0/1.png", "--index", "catalog.faiss")
    assert found["index"]["dim"] == 3
    (answer,) = found["results"]
    best = answer["hits"][0]
    assert best["path"].endswith("class0/1.png")
    files = [place / "catalog/class0/1.png", place / "catalog/class1/3.png"]
    with Embedder.load(place / "model.onnx", device="cpu", dim=3) as embedder:
        one, other = embedder.embed(files).astype(np.float64)
    (hit,) = [hit for hit in answer["hits"] if hit["path"].endswith("class1/3.png")]
    assert hit["score"] == pytest.approx(float(one @ other), abs=1e-5)


def test_another_width_of_the_same_model_is_another_model(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert embedkit("index", "catalog", "--dim", "3") == 0
    capfd.readouterr()
    assert embedkit("index", "catalog", "--dim", "5") == 5
    said = capfd.readouterr().err
    assert "was made by another model" in said
    assert "3 wide" in said
    assert "5 wide" in said
    assert embedkit("index", "catalog", "--dim", "5", "--rebuild") == 0
    assert embedkit("index", "catalog", "--dim", "4") == 2
    assert "it has 3, 5, 8" in capfd.readouterr().err


def test_dedupe_and_check_take_a_width_of_the_model_they_embed_with(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = sorted((place / "catalog").glob("*/*.png"))
    with Embedder.load(place / "model.onnx", device="cpu", dim=3) as embedder:
        one, *others = embedder.embed(files).astype(np.float64)
    with_model = ("catalog", "--model", "model.onnx")
    groups = _answer(capfd, "dedupe", *with_model, "--dim", "3", "--min-score", "-1")["groups"]
    found = [member["score"] for member in groups[0][1:]]
    assert found == pytest.approx([float(one @ other) for other in others], abs=1e-5)
    scores = {
        dim: _answer(capfd, "check", *with_model, *dim)["complexity"]["csg"]
        for dim in ((), ("--dim", "3"))
    }
    assert scores[()] != scores["--dim", "3"]
    assert embedkit("index", "catalog", "--dim", "3") == 0
    for refused in (
        ("dedupe", "catalog.faiss", "--dim", "3"),
        ("dedupe", "catalog", "--exact", "--dim", "3"),
        ("check", "catalog", "--dim", "3"),
        ("dedupe", *with_model, "--dim", "4"),
        ("check", *with_model, "--dim", "4"),
    ):
        capfd.readouterr()
        assert embedkit(*refused) == 2
        assert "--dim" in capfd.readouterr().err


def test_an_index_goes_over_to_a_width_of_another_model(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for n in range(6, 120):
        picture(place / f"catalog/class{n % 5}/{n}.png", n)
    write_tiny_model(place / "old.onnx", dim=5, seed=9, name="old")
    assert embedkit("index", "catalog", "--model", "old.onnx") == 0
    catalog = Catalog.open(place / "catalog.faiss")

    class Stop(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stop

    # Half-way the whole model is named, and the bridge knows which of its widths it is for.
    with Embedder.load(place / "model.onnx", device="cpu", dim=3) as new, pytest.raises(Stop):
        migrate(catalog.path, new, model=place / "model.onnx", progress=stop)
    with catalog.embedder(place / "model.onnx") as over, new:
        assert over.contract.embedding_dim == 5
        assert over.contract.name == new.contract.name
    migrating = ("index", "migrate", "catalog.faiss", "--to", "model.onnx")
    assert _answer(capfd, *migrating, "--dim", "3")["embedded"] == 120
    assert Catalog.open(place / "catalog.faiss").dim == 3
    assert _answer(capfd, "index", "catalog")["unchanged"] == 120


def test_embed_and_eval_take_a_width_and_info_shows_them(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert embedkit("embed", "catalog", "--dim", "5", "-o", "vectors.npy") == 0
    assert np.load("vectors.npy").shape == (6, 5)
    figures = _answer(capfd, "eval", "model.onnx", "catalog", "--dim", "3", "--no-nmi")
    assert figures["model"]["dim"] == 3
    assert embedkit("eval", "vectors.npy", "catalog", "--dim", "3") == 2
    assert "these are vectors" in capfd.readouterr().err
    assert embedkit("info", "model.onnx") == 0
    said = capfd.readouterr().out
    assert "8 numbers of unit length (or the first 3 or 5)" in " ".join(said.split())
    assert "3: recall@1 0.5000" in said
