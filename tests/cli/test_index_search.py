"""`embedkit index` and `embedkit search` as typed: answers, streams, exit codes."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from embedkit.imaging import Preprocess, read_pixels
from embedkit.runtime import Embedder
from tests.cli.command import picture
from tests.tiny_model import tiny_vectors, write_tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, a catalog of eight pictures in two classes, and a query; we are in there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    write_tiny_model(tmp_path / "model.onnx")
    for n in range(8):
        picture(tmp_path / f"catalog/class{n // 4}/{n}.png", n)
    shutil.copy(tmp_path / "catalog/class1/5.png", tmp_path / "query.png")
    return tmp_path


# The owner's lines


def test_the_two_lines_find_the_picture(place: Path, run: Any) -> None:
    done = run("index", "./catalog")
    assert done.code == 0
    assert (place / "catalog.faiss").is_file()
    done = run("search", "./query.png", "--index", "catalog.faiss")
    assert done.code == 0
    first, second, *_ = done.out.splitlines()
    assert first == "query.png"
    assert second.split() == ["1", "1.0000", "class1", "catalog/class1/5.png"]
    assert max(map(len, done.out.splitlines())) <= 80
    assert len(done.out.splitlines()) == 9


def test_hits_equal_the_model_and_the_search_written_in_numpy(place: Path, run: Any) -> None:
    run("index")
    picture(place / "other.png", 99)
    document = run("search", "other.png", "query.png", "-k", 99, "--json").json()
    preprocess = Preprocess(height=16, width=16, crop_ratio=1.0)
    files = sorted((place / "catalog").rglob("*.png"))
    gallery = tiny_vectors(np.stack([read_pixels(path, preprocess) for path in files]))
    for result in document["results"]:
        query = tiny_vectors(read_pixels(place / result["query"], preprocess)[None])[0]
        scores = gallery @ query
        order = np.argsort(-scores, kind="stable")
        assert [hit["path"] for hit in result["hits"]] == [
            str(files[n].relative_to(place)) for n in order
        ]
        found = [hit["score"] for hit in result["hits"]]
        assert found == pytest.approx(scores[order].tolist(), abs=1e-5)


def test_what_is_stored_equals_a_fresh_embedding(place: Path, run: Any) -> None:
    run("index", "-q")
    files = sorted((place / "catalog").rglob("*.png"))
    with Embedder.load(place / "model.onnx") as embedder:
        fresh = embedder.embed(files)
    flat = faiss.read_index(str(place / "catalog.faiss"))
    assert np.array_equal(flat.reconstruct_n(0, flat.ntotal), fresh)


def test_neither_needs_torch_nor_onnx(place: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'torchvision', 'onnx', 'onnxscript', 'safetensors'):\n"
        "    sys.modules[name] = None\n"
        "from embedkit.cli.main import main\n"
        "main(sys.argv[1:])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for arguments in (["index", "catalog"], ["search", "query.png", "--html", "x.html"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
    assert "catalog/class1/5.png" in done.stdout
    assert (place / "x.html").stat().st_size > 10_000


# Index


def test_index_counts_what_it_did(place: Path, run: Any) -> None:
    document = run("index", "--json").json()
    assert document["schema"] == "embedkit.index/1"
    expected = {"found": 8, "embedded": 8, "unchanged": 0, "moved": 0, "failed": 0, "removed": 0}
    assert {key: document[key] for key in expected} == expected
    assert document["index"] == "catalog.faiss"
    assert document["count"] == 8
    (place / "catalog/class0/0.png").rename(place / "catalog/class0/x.png")
    (place / "catalog/class0/1.png").unlink()
    picture(place / "catalog/new.png", 50)
    done = run("index", "./catalog")
    assert done.code == 0
    table = {line.split()[0]: line.split()[1] for line in done.out.splitlines()}
    assert table["found"] == "8"
    assert table["embedded"] == "1"
    assert table["unchanged"] == "6"
    assert table["moved"] == "1"
    assert table["removed"] == "2"
    assert max(map(len, done.out.splitlines())) <= 80
    assert "next" in done.err
    again = run("index", "--json").json()
    assert (again["unchanged"], again["published"]) == (8, False)


def test_failures_are_named_listed_and_exit_3(place: Path, run: Any) -> None:
    (place / "catalog/broken.jpg").write_bytes(b"no picture")
    (place / "catalog" / os.fsdecode(b"\xff\x1b[31m.jpg")).symlink_to("nowhere")
    listed = place / "catalog.faiss.failed.jsonl"
    for _ in range(2):  # the second time they are remembered
        done = run("index")
        assert done.code == 3
        assert "broken.jpg" in done.err
        assert "\x1b" not in done.err + done.out
        assert "catalog.faiss.failed.jsonl" in done.out
        lines = [json.loads(line) for line in listed.read_text().splitlines()]
        assert [(line["path"], line["code"]) for line in lines] == [
            ("broken.jpg", "not-an-image"),
            (os.fsdecode(b"\xff\x1b[31m.jpg"), "unreadable"),
        ]
    document = run("index", "--json")
    assert document.code == 3
    assert len(document.json()["failures"]) == 2
    for name in os.listdir(place / "catalog"):  # noqa: PTH208
        if name.endswith(".jpg"):
            (place / "catalog" / name).unlink()
    assert run("index").code == 0
    assert not listed.exists()


def test_where_the_model_is_looked_for(place: Path, run: Any) -> None:
    (place / "runs").mkdir()
    own = write_tiny_model(place / "runs/own.onnx", seed=5)
    (place / "runs/last").mkdir()
    last = write_tiny_model(place / "runs/last/model.onnx", seed=6)

    def used(*options: str) -> str:
        document = run("index", "--json", *options).json()
        fingerprint: str = document["model"]["fingerprint"]
        return fingerprint

    assert used() == last.fingerprint  # before the one that lies here
    assert used("--model", "runs/own.onnx", "--rebuild") == own.fingerprint
    assert used() == own.fingerprint  # the index's own
    (place / "model.onnx").unlink()
    shutil.rmtree(place / "runs")
    (place / "catalog.faiss").unlink()
    (place / "catalog.faiss.store").unlink()
    done = run("index")
    assert done.code == 2
    assert "which model?" in done.err
    assert "--model FILE" in done.err
    for name in ("a.onnx", "b.onnx"):
        write_tiny_model(place / name)
    done = run("index")
    assert done.code == 2
    assert "a.onnx, b.onnx" in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["nowhere"], 2, "there is no folder"),
        (["empty"], 2, "no picture"),
        (["query.png"], 2, "there is no folder"),
        (["catalog", "-o", "no/c.faiss"], 2, "there is no folder"),
        (["catalog", "-o", "query.png"], 2, "will not be overwritten"),
        (["catalog", "--model", "nowhere.onnx"], 2, "nowhere.onnx"),
        (["catalog", "--model", "query.png"], 5, "query.png"),
        (["catalog", "--batch", "0"], 2, "--batch"),
        (["catalog", "--device", "nothing"], 2, "nothing"),
        (["catalog", "more"], 2, "more"),
        (["bad"], 2, "no picture in"),
    ],
)
def test_what_index_refuses(
    place: Path, run: Any, arguments: list[str], code: int, text: str
) -> None:
    (place / "empty").mkdir()
    (place / "bad").mkdir()
    (place / "bad/x.jpg").write_bytes(b"")
    done = run("index", *arguments)
    assert (done.code, done.out) == (code, "")
    assert text in done.err
    assert len(done.err.strip().splitlines()) <= 8
    assert not list(place.glob("*.faiss"))
    assert (place / "query.png").stat().st_size > 100


def test_a_dry_run_writes_nothing(place: Path, run: Any) -> None:
    before = sorted(place.rglob("*"))
    done = run("index", "--dry-run")
    assert done.code == 0
    assert "nothing was written" in done.out
    assert run("index", "--dry-run", "--json").json()["embedded"] == 8
    assert sorted(place.rglob("*")) == before


def test_ctrl_c_says_how_to_go_on_and_exits_130(
    place: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed_pixels = Embedder.embed_pixels
    calls = 0

    def press(self: Embedder, pixels: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:  # the first is the self-test
            raise KeyboardInterrupt
        return embed_pixels(self, pixels)

    monkeypatch.setattr(Embedder, "embed_pixels", press)
    done = run("index", "--batch", 2, "--workers", 1)
    assert done.code == 130
    assert "again to go on" in done.err
    monkeypatch.undo()
    os.chdir(place)
    document = run("index", "--json").json()
    assert (document["embedded"], document["unchanged"]) == (4, 4)


def test_here_is_indexed_where_there_is_no_catalog(place: Path, run: Any) -> None:
    (place / "catalog").rename(place / "things")
    document = run("index", "--json").json()
    assert document["found"] == 9
    assert document["index"] == f"{place.name}.faiss"


# Search


def test_the_json_document_is_complete(place: Path, run: Any) -> None:
    run("index")
    document = run("search", "query.png", "-k", 2, "--json").json()
    assert set(document) == {
        *("schema", "model", "index", "indexes", "elapsed_ms", "results", "failed"),
        *("thresholds", "min_score", "rerank"),
    }
    assert document["schema"] == "embedkit.search/1"
    assert document["index"]["path"] == "catalog.faiss"
    assert (document["index"]["count"], document["index"]["dim"]) == (8, 8)
    assert document["elapsed_ms"] > 0
    assert document["failed"] == []
    (result,) = document["results"]
    assert result["query"] == "query.png"
    first, second = result["hits"]
    assert set(first) == {"rank", "score", "verdict", "id", "path", "label"}
    assert (first["rank"], first["path"], first["label"]) == (1, "catalog/class1/5.png", "class1")
    assert first["score"] >= second["score"]


def test_several_pictures_and_folders_are_looked_for_at_once(place: Path, run: Any) -> None:
    run("index")
    done = run("search", "query.png", "catalog/class0", "-k", 1, "--json")
    results = done.json()["results"]
    assert [result["query"] for result in results] == [
        "query.png",
        *(f"catalog/class0/{n}.png" for n in range(4)),
    ]
    for result in results[1:]:
        assert result["hits"][0]["path"] == result["query"]


def test_an_unreadable_query_among_several_is_skipped_and_named(place: Path, run: Any) -> None:
    run("index")
    (place / "text.jpg").write_text("text")
    (place / "empty").mkdir()
    done = run("search", "text.jpg", "nowhere.jpg", "empty", "query.png")
    assert done.code == 3
    assert done.out.startswith("query.png\n")
    for name in ("text.jpg", "nowhere.jpg", "empty"):
        assert f"{name}: " in done.err
    done = run("search", "text.jpg", "query.png", "empty", "--json")
    assert done.code == 3
    assert [one["path"] for one in done.json()["failed"]] == ["empty", "text.jpg"]
    assert len(done.json()["results"]) == 1


@pytest.mark.parametrize("given", [["text.jpg"], ["nowhere.jpg"], ["empty"], ["text.jpg", "empty"]])
def test_nothing_to_look_for_is_an_error(place: Path, run: Any, given: list[str]) -> None:
    run("index")
    (place / "text.jpg").write_text("text")
    (place / "empty").mkdir()
    done = run("search", *given)
    assert (done.code, done.out) == (2, "")
    assert given[-1] in done.err


def test_the_only_index_here_needs_no_name(place: Path, run: Any) -> None:
    done = run("search", "query.png")
    assert done.code == 2
    assert "embedkit index FOLDER" in done.err
    run("index", "-o", "one.faiss")
    assert run("search", "query.png").code == 0
    run("index", "-o", "two.faiss")
    done = run("search", "query.png")
    assert done.code == 2
    assert "one.faiss, two.faiss" in done.err


@pytest.mark.parametrize(("seed", "dim"), [(1, 8), (0, 9), (1, 9)])
def test_another_model_of_whatever_width_is_exit_5(
    place: Path, run: Any, seed: int, dim: int
) -> None:
    own = run("index", "--json").json()["model"]["fingerprint"]
    other = write_tiny_model(place / "other.onnx", seed=seed, dim=dim)
    for arguments in (
        ["search", "query.png", "--model", "other.onnx"],
        ["index", "--model", "other.onnx"],
    ):
        done = run(*arguments)
        assert (done.code, done.out) == (5, "")
        assert own in done.err
        assert other.fingerprint in done.err
        assert "--rebuild" in done.err
    assert run("index", "--model", "other.onnx", "--rebuild").code == 0
    assert run("search", "query.png").code == 0


def test_the_model_is_found_beside_the_index_or_where_it_was(place: Path, run: Any) -> None:
    (place / "away").mkdir()
    shutil.move(place / "model.onnx", place / "away/model.onnx")
    run("index", "--model", "away/model.onnx")
    assert run("search", "query.png").code == 0
    # Another model of the same name beside the index is passed over.
    write_tiny_model(place / "model.onnx", seed=9)
    assert run("search", "query.png").code == 0
    (place / "model.onnx").write_bytes(b"no model")
    assert run("search", "query.png").code == 0
    shutil.move(place / "away/model.onnx", place / "model.onnx")
    assert run("search", "query.png").code == 0
    shutil.move(place / "model.onnx", place / "renamed.onnx")
    done = run("search", "query.png")
    assert done.code == 2
    assert "--model FILE" in done.err
    assert run("search", "query.png", "--model", "renamed.onnx").code == 0


def test_a_damaged_index_is_exit_5_in_three_lines(place: Path, run: Any) -> None:
    run("index")
    file = place / "catalog.faiss"
    whole = bytearray(file.read_bytes())
    whole[100] ^= 1  # a vector: only the checksum shows it
    file.write_bytes(whole)
    done = run("search", "query.png")
    assert (done.code, done.out) == (5, "")
    assert "damaged" in done.err
    assert "embedkit index" in done.err
    file.write_bytes(whole[:500])
    assert run("search", "query.png").code == 5
    assert run("search", "query.png", "--mmap").code == 5
    assert run("index").code == 0
    assert run("search", "query.png").code == 0


def test_an_index_without_names_still_answers(place: Path, run: Any) -> None:
    run("index")
    faiss.write_index(faiss.read_index("catalog.faiss"), "catalog.faiss")
    assert run("search", "query.png").code == 2  # which model it was is gone too
    done = run("search", "query.png", "--model", "model.onnx", "-k", 1)
    assert done.code == 0
    assert "numbers without names" in done.err
    assert done.out.splitlines()[1].split() == ["1", "1.0000", "picture", "5"]
    document = run("search", "query.png", "--model", "model.onnx", "--json").json()
    assert document["results"][0]["hits"][0]["path"] is None


def test_it_works_when_the_photos_are_gone_and_nothing_can_be_written(
    place: Path, run: Any
) -> None:
    run("index")
    shutil.rmtree(place / "catalog")
    (place / "catalog.faiss.store").unlink()
    (place / "media").mkdir()
    for name in ("catalog.faiss", "model.onnx", "query.png"):
        shutil.move(place / name, place / "media" / name)
        (place / "media" / name).chmod(0o444)
    (place / "media").chmod(0o555)
    before = {path: path.stat() for path in (place / "media").iterdir()}
    done = run("search", "media/query.png", "--index", "media/catalog.faiss", "--html", "p.html")
    assert done.code == 0
    assert {path: path.stat().st_mtime_ns for path in (place / "media").iterdir()} == {
        path: status.st_mtime_ns for path, status in before.items()
    }
    assert (place / "p.html").read_text().count("the picture is gone") == 8


@pytest.mark.parametrize("extra", [[], ["--mmap"]])
def test_hits_are_named_from_where_the_user_stands(
    place: Path, run: Any, monkeypatch: pytest.MonkeyPatch, extra: list[str]
) -> None:
    run("index")
    monkeypatch.chdir(place / "catalog/class1")
    done = run("search", "5.png", "--index", "../../catalog.faiss", "--json", *extra)
    paths = [hit["path"] for hit in done.json()["results"][0]["hits"]]
    assert paths[0] == "5.png"
    assert str(place / "catalog/class0/0.png") in paths


def test_the_page_marks_hits_where_the_query_has_a_label(place: Path, run: Any) -> None:
    run("index")
    picture(place / "queries/class0/a.png", 0)
    picture(place / "queries/plain.png", 70)
    assert run("search", "queries", "-k", 3, "--html", "page.html", "-q").err == ""
    page = (place / "page.html").read_text()
    assert page.count("<section") == 2
    assert "hit right" in page
    assert page.count('class="hit"') == 3
    assert "nearest hit right for <strong>1 of 1</strong>" in page
    done = run("search", "query.png", "--html", "query.png/page.html")
    assert done.code == 1
    assert "query.png/page.html could not be written" in done.err


def test_odd_names_are_printed_safely_and_kept_exactly(place: Path, run: Any) -> None:
    odd = os.fsdecode(b"a\xff\n\x1b[2J.png")
    shutil.copy(place / "query.png", place / "catalog" / odd)
    (place / "catalog/class1/5.png").unlink()
    assert run("index").code == 0
    done = run("search", "query.png", "-k", 1)
    assert len(done.out.splitlines()) == 2
    assert "\x1b" not in done.out
    (result,) = run("search", "query.png", "-k", 1, "--json").json()["results"]
    assert result["hits"][0]["path"] == "catalog/" + odd
    done = run("search", place / "catalog" / odd, "-k", 1)
    assert done.code == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "QUERY"),
        (["query.png", "-k", "0"], "-k"),
        (["query.png", "--index", "nowhere.faiss"], "there is no index"),
        (["query.png", "--nothing"], "--nothing"),
    ],
)
def test_what_search_refuses(place: Path, run: Any, arguments: list[str], text: str) -> None:
    done = run("search", *arguments)
    assert (done.code, done.out) == (2, "")
    assert text in done.err


def test_no_model_file_is_taken_for_an_index(place: Path, run: Any) -> None:
    done = run("search", "query.png", "--index", "model.onnx")
    assert done.code == 5
    assert "no embedkit index" in done.err


# Real files


def test_every_odd_file_gets_the_outcome_its_list_names(
    shared_data: Path, place: Path, run: Any
) -> None:
    odd = shared_data / "odd"
    done = run("index", odd, "-o", "odd.faiss", "--json")
    assert done.code == 3
    document = done.json()
    failed = {Path(one["path"]).name for one in document["failures"]}
    with (odd / "index.csv").open(newline="") as file:
        outcome = {row["file"]: row["expected"] for row in csv.DictReader(file)}
    assert {name for name in failed if outcome[name] == "ok"} == set()
    from embedkit.imaging import find_images

    walked = {path.name for path in find_images(odd)}
    wrong = {name for name, expected in outcome.items() if expected == "error"}
    assert wrong & walked <= failed
    assert document["found"] == document["embedded"] + document["moved"] + document["failed"]
    assert document["found"] == len(walked)
