"""`embedkit list`: every name has its line, and a name's page says what its docstring says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from embedkit import losses, methods, models
from embedkit.cli.described import describe
from embedkit.cli.recipes import recipe_names
from tests.cli import command

CERTAINTIES = {"paper", "code read", "secondary source", "reconstruction"}


def embedkit(*arguments: str) -> int:
    return command.embedkit("list", *arguments)


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert embedkit(*arguments, "--json") == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document["schema"] == "embedkit.list/1"
    return document


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("losses", losses.names()),
        ("methods", methods.method_names()),
        ("backbones", models.backbone_names()),
        ("recipes", recipe_names()),
    ],
)
def test_each_name_is_listed_once_with_a_line_that_fits(
    what: str, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert embedkit(what) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == names
    assert max(map(len, lines)) <= 80
    assert f"embedkit list {what.replace('losses', 'losse')[:-1]} {names[0]}" in said.err
    entries = answer(capsys, what)["entries"]
    assert [entry["name"] for entry in entries] == names
    assert all(entry["about"] for entry in entries)


@pytest.mark.parametrize("what", ["losses", "methods"])
def test_each_says_its_paper_its_certainty_and_what_its_options_mean(
    what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for entry in answer(capsys, what)["entries"]:
        assert entry["certainty"] in CERTAINTIES
        assert entry["paper"], entry["name"]
        assert entry["paper"][-4:].isdecimal() or "arXiv" in entry["paper"]
        for option in entry["options"]:
            assert option["meaning"], (entry["name"], option["name"])


def test_a_loss_is_shown_with_its_defaults_and_their_meaning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert embedkit("loss", "rll") == 0
    said = capsys.readouterr()
    assert "arXiv:1903.03238" in said.out
    assert "`" not in said.out
    (line,) = [line for line in said.out.splitlines() if line.startswith("alpha")]
    assert line.split()[1:4] == ["1.2", "Boundary", "that"]
    assert said.err.splitlines()[-1].split()[1:] == (
        ["embedkit", "train", "./photos", "--loss", "rll", "-s", "alpha=1.2"]
    )
    entry = answer(capsys, "losses", "rll")["entry"]
    assert {one["name"]: one["default"] for one in entry["options"]} == losses.options("rll")


def test_a_name_of_both_kinds_leads_to_the_other_and_a_method_is_found_as_a_loss(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert embedkit("loss", "fastap") == 0
    assert "--loss fastap trains" in capsys.readouterr().out
    names = {one["name"] for one in answer(capsys, "method", "fastap")["entry"]["options"]}
    assert "batches_per_pair" in names
    assert answer(capsys, "loss", "dces") == {
        **answer(capsys, "method", "dces"),
        "what": "loss",
    }


def test_a_loss_of_pytorch_metric_learning_shows_its_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("pytorch_metric_learning")
    entry = answer(capsys, "loss", "pml:CircleLoss")["entry"]
    assert {"name": "gamma", "default": 80} in entry["options"]


def test_a_recipe_shows_its_figures_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert embedkit("recipe", "rll-cub") == 0
    said = capsys.readouterr()
    assert "recall@1 57.4" in said.out
    assert "classes_per_batch" in said.out
    assert "--config rll-cub" in said.out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["loses"], "did you mean 'losses'"),
        (["loss"], "which loss?"),
        (["loss", "rlll"], "did you mean 'rll'"),
        (["method", "dcse"], "did you mean 'dces'"),
        (["backbone", "resnet5"], "did you mean 'resnet50'"),
        (["recipe", "rll-cup"], "did you mean 'rll-cub'"),
    ],
)
def test_a_wrong_name_is_one_clear_answer(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embedkit(*arguments) == 2
    said = capsys.readouterr()
    assert expected in said.err
    assert said.out == ""


def test_without_torch_recipes_are_listed_and_losses_name_the_pip_line(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from embedkit.cli.main import main\n"
        "main(sys.argv[1:])"
    )
    for what, expected in (("recipes", 0), ("losses", 6), ("backbones", 6)):
        done = subprocess.run(
            [sys.executable, "-c", code, "list", what],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        assert done.returncode == expected, done.stderr
        if expected:
            assert 'pip install "embedkit[train]"' in done.stderr
            assert "torch" in done.stderr
        else:
            assert "rll-cub" in done.stdout


def test_a_docstring_is_parted_into_text_options_and_paper() -> None:
    described = describe(losses.loss_class("cross-entropy"))
    assert described.short == "Zhai et al., BMVC 2019"
    assert "Args:" not in described.text
    assert set(described.options) >= set(losses.options("cross-entropy"))
    assert describe(losses.loss_class("npair")).short == "Sohn, NIPS 2016"
    assert not describe(dict).options
