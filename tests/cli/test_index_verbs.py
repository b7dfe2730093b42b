"""`embedkit index` as a command with verbs: as typed, with exit codes, streams and words."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import picture
from tests.tiny_model import write_tiny_model

VERBS = ["add", "rm", "compact", "verify", "merge", "info"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model and a catalog of six pictures in two classes; we are in there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    write_tiny_model(tmp_path / "model.onnx")
    for n in range(6):
        picture(tmp_path / f"catalog/class{n // 3}/{n}.png", n)
    return tmp_path


def document(done: tuple[int, str, str]) -> dict[str, Any]:
    assert done[0] == 0, done
    found: dict[str, Any] = json.loads(done[1])
    return found


def count(line_of: str, done: tuple[int, str, str]) -> int:
    """The number in the line of a table that begins so."""
    (line,) = [line for line in done[1].splitlines() if line.startswith(line_of)]
    return int(line[len(line_of) :].split()[0].replace(",", ""))


# A command and a group


@pytest.mark.parametrize(
    "arguments",
    [
        ["./catalog"],
        ["catalog"],
        ["--model", "model.onnx", "./catalog"],
        ["./catalog", "--model", "model.onnx", "-q"],
        [],
        ["-o", "catalog.faiss"],
    ],
)
def test_without_a_verb_it_is_the_command_it_was(
    place: Path, run: Any, arguments: list[str]
) -> None:
    code, out, _ = run("index", *arguments)
    assert code == 0
    assert "6 pictures" in out
    assert (place / "catalog.faiss").is_file()


@pytest.mark.parametrize("name", VERBS)
def test_a_folder_called_like_a_verb_is_reached_by_its_path(
    place: Path, run: Any, name: str
) -> None:
    shutil.move(place / "catalog", place / name)
    code, _, _ = run("index", f"./{name}")
    assert (code, (place / f"{name}.faiss").is_file()) == (0, True)
    assert run("index", name)[0] == 2


def test_its_help_has_the_folder_and_the_verbs(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run("index", "--help")
    assert code == 0
    assert "embedkit index [OPTIONS] [FOLDER] | VERB" in out
    assert "Example: embedkit index ./catalog" in out
    for name in VERBS:
        assert [line for line in out.splitlines() if line.split()[1:2] == [name]]
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("name", VERBS)
def test_each_verb_has_a_help_that_fits_and_ends_with_an_example(
    run: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run("index", name, "--help")
    assert code == 0
    assert f"Usage: embedkit index {name} " in out
    assert "Example: embedkit" in out
    assert max(map(len, out.splitlines())) <= 80
    for group in out.split("╰"):
        assert len(group.splitlines()) <= 24 + 12


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ad", "catalog.faiss", "x.png"], "Did you mean 'add'?"),
        (["catalog", "other"], "unexpected extra argument"),
        (["add"], "INDEX"),
        (["add", "catalog.faiss"], "PATHS"),
        (["verify", "catalog.faiss", "--sampel", "3"], "--sample"),
        (["rm", "nothing.faiss", "x.png"], "there is no index"),
    ],
)
def test_a_slip_is_one_clear_answer_with_exit_2(
    place: Path, run: Any, arguments: list[str], words: str
) -> None:
    code, out, err = run("index", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert words in err


# The verbs, one after the other


def test_a_life_of_an_index(place: Path, run: Any) -> None:
    run("index", "catalog")
    new = picture(place / "elsewhere/boot/new.png", 50)
    looked = run("index", "add", "catalog.faiss", new, "--dry-run")
    assert (count("embedded", looked), "nothing was written" in looked[1]) == (1, True)
    done = run("index", "add", "catalog.faiss", new)
    assert (count("named", done), count("embedded", done)) == (1, 1)
    assert "catalog.faiss: 7 pictures" in done[1]
    assert run("index", "catalog")[1].count("7 pictures") == 1
    found = document(run("search", new, "--index", "catalog.faiss", "-k", 1, "--json"))
    (hit,) = found["results"][0]["hits"]
    assert (hit["path"], hit["label"]) == ("elsewhere/boot/new.png", "boot")

    looked = run("index", "rm", "catalog.faiss", "--label", "class1", "--dry-run")
    assert count("removed", looked) == 3
    done = run("index", "rm", "catalog.faiss", "--label", "class1", new)
    assert (count("removed", done), count("kept out", done), count("forgotten", done)) == (4, 3, 1)
    done = run("index", "catalog")
    assert (count("found", done), count("left out", done)) == (3, 3)

    (place / "catalog/class0/0.png").unlink()
    assert count("dropped", run("index", "compact", "catalog.faiss", "--dry-run")) == 1
    done = document(run("index", "compact", "catalog.faiss", "--json"))
    assert (done["schema"], done["kept"], done["count"]) == ("embedkit.index-compact/1", 2, 2)
    code, out, _ = run("index", "verify", "catalog.faiss", "--sample", 5)
    assert code == 0
    assert "2 embedded again, least cosine 1.0000" in out
    assert "BAD" not in out


def test_shards_are_merged_and_the_counts_add_up(place: Path, run: Any) -> None:
    for name in ("class0", "class1"):
        run("index", f"catalog/{name}")
    looked = document(
        run("index", "merge", "all.faiss", "class0.faiss", "class1.faiss", "--dry-run", "--json")
    )
    assert not (place / "all.faiss").exists()
    done = document(run("index", "merge", "all.faiss", "class0.faiss", "class1.faiss", "--json"))
    assert done["kind"]["kind"] == "flat"
    assert {**looked, "dry_run": False, "kind": done["kind"]} == done
    assert sum(done["parts"].values()) == done["count"] + done["duplicates"] == 6
    assert done["root"] == str(place / "catalog")
    assert run("index", "verify", "all.faiss", "-q")[0] == 0
    done = run("index", "catalog", "-o", "all.faiss")
    assert (count("embedded", done), count("unchanged", done)) == (0, 6)
    write_tiny_model(place / "other.onnx", seed=1)
    run("index", "catalog/class1", "-o", "o.faiss", "--model", "other.onnx")
    code, _, err = run("index", "merge", "m.faiss", "class0.faiss", "o.faiss")
    assert code == 5
    assert "different models" in err


def test_an_index_that_is_not_whole_ends_with_5_and_the_line_that_repairs_it(
    place: Path, run: Any
) -> None:
    run("index", "catalog")
    data = bytearray((place / "catalog.faiss").read_bytes())
    data[80] ^= 1
    (place / "catalog.faiss").write_bytes(data)
    code, out, err = run("index", "verify", "catalog.faiss", "--sample", 2)
    assert code == 5
    assert "BAD" in out
    line = err.splitlines()[-1].removeprefix("  try: ")
    assert line == f"embedkit index compact {place / 'catalog.faiss'}"
    assert run(*line.split()[1:])[0] == 0
    assert run("index", "verify", "catalog.faiss")[0] == 0
    code, out, _ = run("index", "verify", "catalog.faiss", "--json")
    assert {check["ok"] for check in json.loads(out)["checks"]} == {True}


def test_a_model_that_gives_other_vectors_now_is_met_by_the_sample(place: Path, run: Any) -> None:
    run("index", "catalog")
    with sqlite3.connect(place / "catalog.faiss.store") as database:
        swap = "UPDATE item SET vector = (SELECT vector FROM item WHERE id = 2) WHERE id = 1"
        database.execute(swap)
    database.close()
    assert run("index", "compact", "catalog.faiss")[0] == 0
    assert run("index", "verify", "catalog.faiss")[0] == 0
    code, _, err = run("index", "verify", "catalog.faiss", "--sample", 6)
    assert (code, "model" in err, "--rebuild" in err) == (5, True, True)
    assert run("index", "catalog", "-o", "catalog.faiss", "--rebuild")[0] == 0
    assert run("index", "verify", "catalog.faiss", "--sample", 6)[0] == 0


def test_what_is_no_picture_is_named_and_ends_with_3(place: Path, run: Any) -> None:
    run("index", "catalog")
    (place / "new\nline.png").write_text("no picture")
    code, out, err = run("index", "add", "catalog.faiss", "new\nline.png", "--json")
    assert code == 3
    assert json.loads(out)["failures"][0]["code"] == "not-an-image"
    assert "not added" in err


def test_without_the_model_adding_says_which_is_missing(place: Path, run: Any) -> None:
    run("index", "catalog")
    new = picture(place / "new.png", 9)
    (place / "model.onnx").rename(place / "away.onnx")
    code, _, err = run("index", "add", "catalog.faiss", new)
    assert code == 2
    assert "--model FILE" in err
    assert run("index", "add", "catalog.faiss", new, "--model", "away.onnx")[0] == 0
    assert run("index", "rm", "catalog.faiss", new)[0] == 0  # needs none


def test_labels_come_from_a_table(place: Path, run: Any) -> None:
    (place / "labels.csv").write_text("path,label\ncatalog/class0/0.png,red\n")
    assert run("index", "catalog", "--labels", "labels.csv")[0] == 0
    found = document(
        run("search", "catalog/class0/0.png", "--index", "catalog.faiss", "-k", 1, "--json")
    )
    assert found["results"][0]["hits"][0]["label"] == "red"


def test_a_name_that_is_no_text_goes_in_and_out(place: Path, run: Any) -> None:
    run("index", "catalog")
    odd = picture(place / "odd.png", 77).rename(place / os.fsdecode(b"\xff.png"))
    assert run("index", "add", "catalog.faiss", odd)[0] == 0
    code, _, err = run("index", "rm", "catalog.faiss", odd)
    assert code == 0
    assert "\\udcff.png" in err
