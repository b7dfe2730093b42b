"""A recipe survives its TOML file, and refuses in a sentence what it does not know."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from embedkit.errors import UnknownNameError, UsageError
from embedkit.train import Recipe


def test_the_default_recipe_comes_back_from_its_toml() -> None:
    assert Recipe.from_toml(Recipe().to_toml()) == Recipe()


def test_every_setting_stands_in_the_toml_file() -> None:
    text = Recipe().to_toml()
    for setting in dataclasses.fields(Recipe):
        assert setting.name in text


def test_every_setting_has_a_sentence() -> None:
    for setting in dataclasses.fields(Recipe):
        assert f"\n        {setting.name}: " in (Recipe.__doc__ or "")


@given(
    name=some.text(),
    options=some.dictionaries(
        some.text(),
        some.none()
        | some.booleans()
        | some.integers(-(2**63), 2**63 - 1)
        | some.floats(allow_nan=False)
        | some.text().filter(lambda text: text != "none"),
        max_size=4,
    ),
    rate=some.floats(0, 1e300),
    weights=some.text(),
)
def test_any_text_and_number_comes_back(
    name: str, options: dict[str, Any], rate: float, weights: str
) -> None:
    recipe = Recipe(loss=name, loss_options=options, learning_rate=rate, weights=weights)
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_a_missing_option_value_is_written_as_the_word_none() -> None:
    text = Recipe(loss_options={"epsilon": None}).to_toml()
    assert tomllib.loads(text)["loss_options"] == {"epsilon": "none"}


def test_an_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'learning_rate'"):
        Recipe.from_toml("learning_rat = 1e-3")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dim = 0", "dim must be 1 to 65536"),
        ("dim = 1.5", "dim must be a whole number"),
        ("dim = true", "dim must be a whole number"),
        ('dim = "128"', "dim must be a whole number"),
        ("learning_rate = nan", "learning_rate must be 0 or more"),
        ("learning_rate = inf", "learning_rate must be 0 or more"),
        ("learning_rate = -1", "learning_rate must be 0 or more"),
        ("crop_ratio = 0", "crop_ratio must be greater than 0"),
        ("images_per_class = 1", "images_per_class must be 2 or more"),
        ("chunk = 0", "leave chunk out: then it is automatic"),
        ("dim = 0", "leave dim out: it is then 128"),
        ("nested = [1.5]", "nested must be a whole number"),
        ("nested = 32", "nested must be a list of whole numbers"),
        ("augment_scale = [1, 0.3]", "the least first"),
        ("augment_scale = [0.3]", "augment_scale must be two numbers"),
        ("augment_flip = 1", "augment_flip must be true or false"),
        ("epochs = 3\nsteps = 3", "both say how long"),
        ("loss = 3", "loss must be a text"),
        ("loss_options = 3", "a table of options"),
        ("loss rll", "not valid TOML"),
        ('amp = "fp8"', "no number format named 'fp8'"),
    ],
)
def test_an_impossible_setting_is_a_sentence(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Recipe.from_toml(text)


def test_a_recipe_file_that_cannot_be_read_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        Recipe.load(tmp_path / "absent.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot be read"):
        Recipe.load(tmp_path / "binary.toml")


def test_whole_numbers_are_good_rates() -> None:
    assert Recipe.from_toml("max_time = 60").max_time == 60.0


@pytest.mark.parametrize(
    ("weights", "rate", "frozen"),
    [("imagenet", 1e-4, True), ("mine.pth", 1e-4, True), ("none", 1e-3, False)],
)
def test_random_weights_learn_faster_and_with_live_batch_norm(
    weights: str, rate: float, frozen: bool
) -> None:
    recipe = Recipe(weights=weights)
    assert (recipe.backbone_learning_rate, recipe.batch_norm_frozen) == (rate, frozen)
    told = Recipe(weights=weights, learning_rate=0.5, freeze_batch_norm=not frozen)
    assert (told.backbone_learning_rate, told.batch_norm_frozen) == (0.5, not frozen)


@pytest.mark.parametrize("epoch_steps", [1, 20, 29, 30, 31, 48, 1000])
def test_automatic_epochs_are_ten_or_reach_300_steps(epoch_steps: int) -> None:
    epochs = Recipe().automatic_epochs(epoch_steps)
    assert epochs >= 10
    assert epochs * epoch_steps >= 300
    assert epochs == 10 or (epochs - 1) * epoch_steps < 300
    assert Recipe(weights="none").automatic_epochs(epoch_steps) == 3 * epochs


def test_differences_name_the_settings_and_both_values() -> None:
    ours, theirs = Recipe(dim=64, loss_options={"alpha": 1.4}), Recipe()
    assert ours.differences(theirs) == ["loss_options: {'alpha': 1.4}, not {}", "dim: 64, not 128"]
    assert ours.differences(dataclasses.replace(ours)) == []


def test_the_preprocessing_is_the_recipes() -> None:
    spec = Recipe(image_size=96, crop_ratio=0.5).preprocess()
    assert (spec.height, spec.width, spec.crop_ratio) == (96, 96, 0.5)
    assert math.isclose(sum(spec.mean), 1.347, abs_tol=1e-3)
