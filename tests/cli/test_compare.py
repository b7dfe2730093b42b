"""`embedkit compare`: the table, the JSON, the label of a quick try, the exit codes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from embedkit.data import draw_products
from tests.cli.command import embedkit

TINY = [
    *("--backbone", "squeezenet1_1", "--weights", "none", "--image-size", "32", "--dim", "8"),
    *("--batch", "3x2", "--freeze", "10", "--steps", "2", "--device", "cpu", "--losses"),
    "triplet,softmax",
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "products"
    return draw_products(folder, classes=12, images_per_class=4, size=40)


def run(*arguments: object) -> int:
    """The exit code of ``embedkit compare ...`` in this process."""
    return embedkit("compare", *arguments)


def test_a_quick_try_shows_its_table_and_says_everywhere_that_it_compares_nothing(
    pictures: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(pictures, *TINY, "--quick") == 0
    out, err = capsys.readouterr()
    folder = here / "compare" / "products-quick"
    assert max(map(len, out.split("The lead of")[0].splitlines())) <= 80
    for said in ("P@1", "R-precision", "MAP@R", "recall@8", "untrained", "side by side", "noise"):
        assert said in out, said
    for said in (
        "24 images of 6 classes in 2 folds",
        "2 rows x (no search + 2 repeats) x 2 folds = 8 trainings",
        "baseline  test MAP@R",
        "trainings to come",
        "repeat    triplet seed 1",
        "saved     compare/products-quick/compare.json",
        f"next      embedkit train {pictures} --config compare/products-quick/rows/",
    ):
        assert said in err, said
    assert "ot comparable" in out
    assert "warning   not comparable" in err
    assert "Not comparable" in (folder / "compare.html").read_text()
    document = json.loads((folder / "compare.json").read_text())
    assert document["comparable"] is False
    with (folder / "compare.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["comparable"] for line in lines} == {"no"}
    assert len(lines) == 2 * 2 + 1

    # The same command again has nothing left to do, and answers alike.
    assert run(pictures, *TINY, "--quick", "--json", "-q") == 0
    out, err = capsys.readouterr()
    assert err == ""
    answered = json.loads(out)
    assert answered.pop("folder") == "compare/products-quick"
    assert answered == document

    assert run(pictures, *TINY, "--steps", 3, "--quick") == 5
    err = capsys.readouterr().err
    assert "steps: 2 there, 3 here" in err
    assert "try: another -o" in err
    winner = document["lead"]["winner"]
    recipe = folder / "rows" / winner / "recipe.toml"
    assert embedkit("train", pictures, "--config", recipe, "--dry-run", "-q") == 0


def test_a_dry_run_shows_the_plan_and_writes_nothing(
    pictures: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [pictures, *TINY, "--folds", 3, "--repeats", 4, "--trials", 7, "--dry-run"]
    assert run(*arguments) == 0
    out, _ = capsys.readouterr()
    assert "2 rows x (7 trials + 4 repeats) x 3 folds = 66 trainings" in out
    assert run(*arguments, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["trainings"] == 66
    assert document["steps_of_a_training"] == 2
    assert document["comparable"] is True
    assert not list(here.iterdir())


def test_widths_are_rows(pictures: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments: list[Any] = [pictures, "--losses", "rll", "--dims", "8,64", "--weights", "none"]
    assert run(*arguments, "--folds", 2, "--dry-run", "--json", "-q") == 0
    document = json.loads(capsys.readouterr().out)
    assert [(row["row"], row["dim"]) for row in document["rows"]] == [("rll-8", 8), ("rll-64", 64)]


def test_a_recipe_brings_everything_but_its_loss(
    pictures: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.toml").write_text(
        'loss = "triplet"\nsteps = 7\nweights = "none"\n[loss_options]\nmargin = 0.9\n'
    )
    arguments: list[Any] = [pictures, "--config", "mine.toml", "--folds", 2, "--dry-run", "--json"]
    assert run(*arguments, "--losses", "softmax") == 0
    assert json.loads(capsys.readouterr().out)["steps_of_a_training"] == 7
    assert run(*arguments, "--losses", "softmax", "--steps", 3) == 0
    assert json.loads(capsys.readouterr().out)["steps_of_a_training"] == 3


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--losses", "rlll"], 2, "did you mean 'rll'"),
        (["--losses", "rll,rll"], 2, "named twice"),
        (["--losses", "rll,"], 2, "there is no loss named ''"),
        (["--folds", "1"], 2, "folds must be 2 or more"),
        (["--folds", "9"], 2, "cannot make 9 folds"),
        (["--quick", "--folds", "4"], 2, "--quick brings its own folds"),
        (["--dims", "8,x"], 2, "--dims takes numbers"),
        (["--dims", "8", "--dim", "4"], 2, "both say how wide"),
        (["--ks", "2,4"], 2, "1 among them"),
        (["--batch", "9"], 2, "--batch takes classes x images"),
        (["--steps", "1", "--epochs", "1"], 2, "both say how long"),
        (["--add", "absent", "--folds", "2"], 2, "there is no comparison absent"),
        (["--device", "cuda:97"], 6, "try: --device cpu"),
        (["--weights", "absent.pth", "--folds", "2", "--trials", "1"], 2, "no weights file"),
    ],
)
def test_what_is_wrong_is_said_in_three_lines_with_its_exit_code(
    pictures: Path,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    says: str,
) -> None:
    assert run(pictures, "--weights", "none", *arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert "Traceback" not in err
