"""The search: ranges that losses accept, the same budget, and proposals that can be repeated."""

from __future__ import annotations

import itertools

import optuna
import pytest

from embedkit import losses
from embedkit.compare.search import SPACES, Trial, apply, defaults, propose, space_of
from embedkit.train import Recipe


@pytest.mark.parametrize("name", sorted(SPACES))
def test_a_loss_takes_every_corner_of_its_space_and_its_defaults_lie_within(name: str) -> None:
    known = losses.options(name)
    sizes = {"num_classes": 3, "embedding_dim": 4} if losses.needs_classes(name) else {}
    for option, where in SPACES[name].items():
        assert where.low <= known[option] <= where.high
        assert where.low < where.high
        assert where.low > 0 or not where.log
    ends = [[(option, where.low), (option, where.high)] for option, where in SPACES[name].items()]
    for corner in itertools.product(*ends):
        whole = {option for option, where in SPACES[name].items() if where.whole}
        given = {option: int(end) if option in whole else end for option, end in corner}
        losses.create(name, **sizes, **given)


@pytest.mark.parametrize("name", ["rll", "softmax", "triplet", "cross-entropy", "fastap"])
def test_the_first_proposal_is_the_defaults_and_the_others_lie_in_the_ranges(name: str) -> None:
    recipe = Recipe(loss=name, weights="none")
    space, done = space_of(recipe), []
    for number in range(8):
        settings = propose(recipe, done, trials=8, seed=0)
        assert settings.keys() == space.keys()
        assert all(space[key].low <= value <= space[key].high for key, value in settings.items())
        if number == 0:
            assert settings == defaults(recipe)
            assert apply(recipe, settings).backbone_learning_rate == recipe.backbone_learning_rate
        made = apply(recipe, settings)
        assert Recipe.from_toml(made.to_toml()) == made
        done.append(Trial(settings, settings["learning_rate"]))
    assert len({trial.settings["learning_rate"] for trial in done}) == 8


def test_a_proposal_is_a_function_of_the_seed_and_of_what_was_tried() -> None:
    recipe = Recipe(loss="triplet")
    done: list[Trial] = []
    for value in (0.3, 0.1, 0.5, 0.2, 0.4):
        done.append(Trial(propose(recipe, done, trials=9, seed=0), value))
    again: list[Trial] = []
    for value in (0.3, 0.1, 0.5, 0.2, 0.4):
        again.append(Trial(propose(recipe, again, trials=9, seed=0), value))
    assert done == again
    following = propose(recipe, done, trials=9, seed=0)
    assert following == propose(recipe, again, trials=9, seed=0)
    assert following != propose(recipe, done, trials=9, seed=1)
    turned = [Trial(trial.settings, -trial.value) for trial in done]
    assert following != propose(recipe, turned, trials=9, seed=0)


def test_it_looks_where_it_was_good() -> None:
    recipe = Recipe(loss="softmax")
    done: list[Trial] = []
    for _ in range(25):
        settings = propose(recipe, done, trials=25, seed=0)
        done.append(Trial(settings, -abs(settings["option.temperature"] - 0.2)))
    early = sum(-trial.value for trial in done[:8]) / 8
    late = sum(-trial.value for trial in done[-8:]) / 8
    assert late < early / 2


def test_a_loss_without_a_space_is_searched_in_the_rates_that_matter() -> None:
    assert set(space_of(Recipe(loss="cross-entropy"))) == {
        "learning_rate",
        "head_learning_rate",
        "proxy_learning_rate",
    }
    assert set(space_of(Recipe(loss="pml:TripletMarginLoss"))) == {
        "learning_rate",
        "head_learning_rate",
    }
    assert set(space_of(Recipe(loss="pml:TripletMarginLoss", learning_rate=0))) == {
        "head_learning_rate"
    }


def test_nothing_to_search_is_no_error() -> None:
    still = Recipe(loss="pml:TripletMarginLoss", learning_rate=0, head_learning_rate=0)
    assert propose(still, [Trial({}, 0.1)], trials=3, seed=0) == {}


def test_the_library_is_as_loud_as_before(capfd: pytest.CaptureFixture[str]) -> None:
    before = optuna.logging.get_verbosity()
    recipe = Recipe(loss="triplet")
    propose(recipe, [Trial(defaults(recipe), 0.1)], trials=3, seed=0)
    assert optuna.logging.get_verbosity() == before
    assert capfd.readouterr() == ("", "")
