"""Which settings of a loss are searched, in which ranges, and what is tried next.

Every row gets the same number of trials. The first are its defaults; the others are proposed by
optuna's TPE sampler (Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NeurIPS 2011).
A proposal is a function of the seed and the trials before it, so that a search that was killed goes
on as if it had not been.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

from embedkit import losses, methods
from embedkit.train import Recipe
from embedkit.train.guards import seed_of

__all__ = ["SPACES", "Range", "Settings", "Trial", "apply", "defaults", "propose", "space_of"]

Settings = dict[str, float]
"""Searched values by name: a learning rate of the recipe, or ``option.<name>`` of the loss."""

_RATES = ("learning_rate", "head_learning_rate", "proxy_learning_rate")
_RATE_SPAN = 10.0
_OPTION = "option."


@dataclass(frozen=True)
class Range:
    """Where a value is looked for, both ends included.

    Attributes:
        low: Least value.
        high: Greatest value.
        log: Whether it is looked for evenly in its logarithm.
        whole: Whether it is a whole number.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False


SPACES: dict[str, dict[str, Range]] = {
    "arcface": {"margin": Range(0.1, 1.0), "scale": Range(8, 128, log=True)},
    "contrastive": {"positive_margin": Range(0, 0.5), "negative_margin": Range(0.5, 1.5)},
    "edms": {"alpha": Range(0.3, 0.95), "temperature": Range(0.1, 2, log=True)},
    "fastap": {"bins": Range(5, 40, whole=True)},
    "lifted": {"margin": Range(0.3, 2.0)},
    "margin": {"margin": Range(0.05, 0.5), "beta": Range(0.6, 1.8)},
    "multi-similarity": {
        "alpha": Range(0.1, 10, log=True),
        "beta": Range(10, 100, log=True),
        "base": Range(0, 1),
    },
    "multibatch": {"theta": Range(0.3, 2.0)},
    "npair": {"l2": Range(0, 0.05)},
    "proxy-anchor": {"alpha": Range(8, 128, log=True), "margin": Range(0, 0.5)},
    "proxy-nca": {"scale": Range(1, 30, log=True)},
    "repmet": {"sigma": Range(0.2, 1.5, log=True), "alpha": Range(0.1, 1.0)},
    "rll": {
        "alpha": Range(0.8, 1.6),
        "margin": Range(0.1, 0.7),
        "temperature": Range(1, 30, log=True),
        "balance": Range(0.3, 3, log=True),
    },
    "rll-simpler": {"margin": Range(0.1, 0.8), "temperature": Range(1, 30, log=True)},
    "softmax": {"temperature": Range(0.02, 0.3, log=True)},
    "triplet": {"margin": Range(0.02, 0.5, log=True)},
}
"""The options of each loss that are searched, around its defaults. A loss that is not here, as one
of another library, is searched in its learning rates alone."""


@dataclass(frozen=True)
class Trial:
    """Settings, and the mean over the folds of the validation MAP@R they reached."""

    settings: Settings
    value: float


def space_of(recipe: Recipe) -> dict[str, Range]:
    """What is searched for this loss: its options in `SPACES`, and the learning rates that matter.

    A rate is looked for from a tenth to ten times the recipe's; one of 0 stays 0. The rate of the
    loss's own parameters counts only where there are any.
    """
    known = methods.options(recipe.loss)
    options = SPACES.get(recipe.loss, {})
    found = {}
    for name in _RATES if _has_parameters(recipe.loss) else _RATES[:2]:
        rate = _rate(recipe, name)
        if rate > 0:
            found[name] = Range(rate / _RATE_SPAN, rate * _RATE_SPAN, log=True)
    found |= {f"{_OPTION}{name}": where for name, where in options.items() if name in known}
    return found


def defaults(recipe: Recipe) -> Settings:
    """The values of `space_of` that the recipe and the loss have by themselves."""
    known = methods.options(recipe.loss)
    return {
        name: known[name.removeprefix(_OPTION)] if name.startswith(_OPTION) else _rate(recipe, name)
        for name in space_of(recipe)
    }


def apply(recipe: Recipe, settings: Mapping[str, float]) -> Recipe:
    """The recipe with these settings, and the loss's other options at their defaults."""
    options = {
        name.removeprefix(_OPTION): value
        for name, value in settings.items()
        if name.startswith(_OPTION)
    }
    rates: dict[str, Any] = {
        name: value for name, value in settings.items() if not name.startswith(_OPTION)
    }
    return dataclasses.replace(recipe, loss_options=options, **rates)


def propose(recipe: Recipe, done: Sequence[Trial], *, trials: int, seed: int) -> Settings:
    """What to try after the trials `done`.

    Args:
        recipe: Of the row.
        done: In their order; none: the answer is `defaults`.
        trials: How many there will be; a third of them, at most 10, are drawn without a model.
        seed: Of the search.
    """
    if not done:
        return defaults(recipe)
    space = {name: _distribution(where) for name, where in space_of(recipe).items()}
    if not space:
        return {}
    number = seed_of("search", seed, recipe.loss, recipe.dim, len(done)) % 2**32
    sampler = optuna.samplers.TPESampler(seed=number, n_startup_trials=max(1, min(10, trials // 3)))
    with _quiet():
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for trial in done:
            study.add_trial(
                optuna.trial.create_trial(
                    params=dict(trial.settings), distributions=space, value=trial.value
                )
            )
        return dict(study.ask(space).params)


def _has_parameters(loss: str) -> bool:
    """Whether something learns beside the network; of a method it is not known, so it may be."""
    if methods.is_method(loss):
        return True
    sizes = (2, 2) if losses.needs_classes(loss) else (None, None)
    made = losses.create(loss, num_classes=sizes[0], embedding_dim=sizes[1])
    return any(True for _ in made.parameters())


def _rate(recipe: Recipe, name: str) -> float:
    return recipe.backbone_learning_rate if name == "learning_rate" else getattr(recipe, name)


def _distribution(where: Range) -> BaseDistribution:
    if where.whole:
        return IntDistribution(int(where.low), int(where.high), log=where.log)
    return FloatDistribution(where.low, where.high, log=where.log)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Optuna reports every study on stderr; only the command line talks here."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
