"""`embedkit embed` and `embedkit index --shard` as typed: answers, files, exit codes."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest

from embedkit.imaging import Shard
from embedkit.index import Catalog
from embedkit.runtime import Embedder
from tests.scale.places import picture
from tests.tiny_model import tiny_contract, tiny_graph, write_tiny_model


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model and twelve photos in three classes; we are in there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    write_tiny_model(tmp_path / "model.onnx")
    for n in range(12):
        picture(tmp_path / f"photos/c{n % 3}/{n}.jpg", n)
    return tmp_path


def lines(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def test_a_folder_becomes_vectors_and_a_list_of_their_rows(place: Path, run: Any) -> None:
    done = run("embed", "photos")
    assert done.code == 0
    listed = lines("vectors.jsonl")
    assert len(listed) == 12
    assert listed[0]["label"] == "c0"
    with Embedder.load("model.onnx", device="cpu") as embedder:
        expected = embedder.embed([row["path"] for row in listed])
    assert np.abs(np.load("vectors.npy") - expected).max() < 1e-6
    assert "vectors   vectors.npy: 12 x 8 float32" in done.out


@pytest.mark.parametrize(("name", "shape"), [("v.npy", (12, 2, 4)), ("v.parquet", (12, 8))])
def test_of_a_model_of_several_vectors_the_shape_is_the_files(
    place: Path, run: Any, name: str, shape: tuple[int, ...]
) -> None:
    model = tiny_graph(dim=8)
    contract = dataclasses.replace(tiny_contract(dim=8), vectors=2)
    model.metadata_props.add(key="embedkit.contract", value=contract.dumps())
    (place / "model.onnx").write_bytes(model.SerializeToString())
    done = run("embed", "photos", "-o", name)
    assert f"vectors   {name}: {' x '.join(map(str, shape))} float32" in done.out
    said = json.loads(run("embed", "photos", "-o", name, "--json").out)
    assert tuple(said["shape"]) == shape
    if name == "v.npy":
        assert np.load(name).shape == shape
    else:
        assert np.stack(parquet.read_table(name)["vector"].to_numpy()).shape == shape


def test_json_counts_add_up_failures_are_named_and_the_exit_code_is_3(
    place: Path, run: Any
) -> None:
    Path("photos/c0/broken.jpg").write_bytes(b"\xff\xd8\xff")
    done = run("embed", "photos", "-o", "v.parquet", "--json")
    assert done.code == 3
    said = json.loads(done.out)
    assert said["schema"] == "embedkit.embed/1"
    assert said["found"] == said["embedded"] + said["known"] + said["failed"] == 13
    assert said["rows"] == parquet.read_table("v.parquet").num_rows == 12
    assert [row["path"] for row in lines(said["failed_list"])] == ["photos/c0/broken.jpg"]
    assert "photos/c0/broken.jpg" in done.err


def test_a_list_on_stdin(place: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = b"photos/c1/4.jpg\n\nphotos/caf\xe9.jpg\r\nphotos/c2\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    done = run("embed", "-", "-o", "v.npy")
    assert done.code == 3
    assert [row["path"] for row in lines("v.jsonl")] == [
        *("photos/c1/4.jpg", "photos/c2/11.jpg", "photos/c2/2.jpg"),
        *("photos/c2/5.jpg", "photos/c2/8.jpg"),
    ]
    assert lines("v.failed.jsonl")[0]["path"] == os.fsdecode(b"photos/caf\xe9.jpg")


def test_every_shard_has_a_file_of_its_own_and_together_they_are_all(place: Path, run: Any) -> None:
    run("embed", "photos", "-o", "all.npy")
    whole = {row["path"]: v for row, v in zip(lines("all.jsonl"), np.load("all.npy"), strict=True)}
    met: dict[str, Any] = {}
    for i in range(3):
        done = run("embed", "photos", "-o", "v.npy", "--shard", f"{i}/3", "--json")
        assert done.code == 0
        assert json.loads(done.out)["output"] == f"v.{i}-of-3.npy"
        part = lines(f"v.{i}-of-3.jsonl")
        met |= dict(zip((row["path"] for row in part), np.load(f"v.{i}-of-3.npy"), strict=True))
        assert {Shard(i, 3).has(row["path"].removeprefix("photos/")) for row in part} == {True}
    assert met.keys() == whole.keys()
    assert max(np.abs(met[path] - whole[path]).max() for path in met) < 1e-6


def test_a_shard_without_pictures_is_an_empty_file(place: Path, run: Any) -> None:
    empty = next(i for i in range(99) if not Shard(i, 99).has("photos/c1/4.jpg"))
    done = run("embed", "photos/c1/4.jpg", "--shard", f"{empty}/99", "--format", "parquet")
    assert done.code == 0
    assert parquet.read_table(f"vectors.{empty}-of-99.parquet").num_rows == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere"], 2, "there is no 'nowhere'"),
        (["photos", "-o", "v.txt"], 2, "-o vectors.npy"),
        (["photos", "-o", "v.npy", "--format", "parquet"], 2, "do not agree"),
        (["photos", "--format", "hdf5"], 2, "known: npy, parquet"),
        (["photos", "-o", "photos"], 2, "is a folder"),
        (["photos", "--shard", "8/8"], 2, "numbered from 0"),
        (["photos", "--model", "no.onnx"], 2, "no.onnx"),
        (["http://example.org/a.jpg"], 2, "--web"),
        (["ftp://example.org/a.jpg"], 2, "s3://"),
        (["empty"], 2, "no picture to embed"),
        ([], 2, "PATHS"),
    ],
)
def test_each_mistake_is_one_clear_answer(
    place: Path, run: Any, arguments: list[str], code: int, words: str
) -> None:
    Path("empty").mkdir()
    done = run("embed", *arguments)
    assert done.code == code
    assert done.err.count("error: ") == 1
    assert words in done.err
    assert not list(place.glob("vectors*")) + list(place.glob("v.*"))


def test_indexes_of_shards_merge_into_the_index_of_the_whole(place: Path, run: Any) -> None:
    for i in range(3):
        done = run("index", "photos", "-o", "photos.faiss", "--shard", f"{i}/3")
        assert done.code == 0, done.err
        assert "embedkit index merge photos.faiss photos.*-of-3.faiss" in done.err
    assert run("index", "merge", "merged.faiss", *sorted(place.glob("*-of-3.faiss"))).code == 0
    assert run("index", "photos", "-o", "whole.faiss").code == 0
    merged, whole = Catalog.open(place / "merged.faiss"), Catalog.open(place / "whole.faiss")
    assert len(merged) == len(whole) == 12
    with Embedder.load("model.onnx", device="cpu") as embedder:
        query = embedder.embed(["photos/c1/4.jpg"])
    (one,), (other,) = merged.search(query, 12), whole.search(query, 12)
    assert [(hit.path, hit.label) for hit in one] == [(hit.path, hit.label) for hit in other]
    # Run again as one index: there is nothing left to embed.
    said = json.loads(run("index", "photos", "-o", "merged.faiss", "--json").out)
    assert (said["unchanged"], said["embedded"], said["removed"]) == (12, 0, 0)


def test_run_again_a_shard_keeps_to_its_share(place: Path, run: Any) -> None:
    first = json.loads(run("index", "photos", "--shard", "0/2", "--json").out)
    again = json.loads(run("index", "photos", "--shard", "0/2", "--json").out)
    assert first["found"] == first["embedded"] == again["found"] == again["unchanged"]
    assert 0 < first["found"] < 12
    empty = next(
        i for i in range(999) if not any(Shard(i, 999).has(f"c{n % 3}/{n}.jpg") for n in range(12))
    )
    done = run("index", "photos", "--shard", f"{empty}/999")
    assert done.code == 2
    assert f"for shard {empty}/999" in done.err
