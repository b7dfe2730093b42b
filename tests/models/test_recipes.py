"""Every recipe that comes with embedkit: complete, true to its format, and able to begin."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from embedkit import methods, models
from embedkit.cli.recipes import FACTS, find_recipe, read_recipe, recipe_names
from embedkit.data.protocols import protocol_names
from embedkit.errors import UnknownNameError, UsageError
from embedkit.train import Recipe
from embedkit.train.plan import check_names

every_recipe = pytest.mark.parametrize("name", recipe_names())


def test_the_papers_that_were_asked_for_have_a_recipe() -> None:
    wanted = {"rll-cub", "rll-sop", "multi-similarity-cub", "fastap-sop", "proxy-anchor-cub"}
    assert wanted <= set(recipe_names())


@every_recipe
def test_it_is_a_recipe_and_its_loss_can_be_made(name: str) -> None:
    recipe = Recipe.load(find_recipe(Path(name)))
    check_names(recipe)
    assert name.startswith(recipe.loss)
    assert recipe.backbone in models.backbone_names()
    # A setting of a paper must not change when a default here does.
    given = tomllib.loads(read_recipe(name).text)["loss_options"]
    assert given == recipe.loss_options
    assert given.keys() <= methods.options(recipe.loss).keys()


@every_recipe
def test_it_says_what_it_is_how_to_run_it_and_what_the_paper_reported(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.title
    assert tuple(recipe.facts) == FACTS
    assert all(recipe.facts.values())
    assert recipe.facts["Run"] == (
        f"embedkit train data/{name.rpartition('-')[2]}/manifest.csv --config {name}"
    )
    assert recipe.facts["Data"].removeprefix("embedkit data prepare ") in protocol_names()
    assert max(map(len, recipe.text.splitlines())) <= 100
    assert recipe.text.isascii()


@every_recipe
def test_nothing_is_chosen_on_the_photos_it_is_judged_on(name: str) -> None:
    recipe = Recipe.load(find_recipe(Path(name)))
    assert recipe.val_share == 0
    assert recipe.patience == 0


def test_a_file_is_taken_before_a_recipe_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(Path("rll-cub")).name == "rll-cub.toml"
    Path("rll-cub").write_text("")
    assert find_recipe(Path("rll-cub")) == Path("rll-cub")


def test_a_wrong_name_is_answered_with_the_nearest_and_a_path_with_its_file() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'rll-cub'"):
        find_recipe(Path("rll-cup"))
    with pytest.raises(UnknownNameError, match="no recipe named 'nonsense'"):
        read_recipe("nonsense")
    for path in ("runs/last/config.toml", "mine.toml"):
        assert find_recipe(Path(path)) == Path(path)
    with pytest.raises(UsageError, match=r"mine\.toml cannot be read"):
        Recipe.load(find_recipe(Path("mine.toml")))
