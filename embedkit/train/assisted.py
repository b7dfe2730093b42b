"""A method with what is learned besides: from doubted labels, from a teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedkit.errors import MissingError, UsageError
from embedkit.methods import (
    Batch,
    Group,
    Method,
    Outcome,
    Sampler,
    Setting,
    Term,
    View,
    learns_from,
)
from embedkit.models import EmbeddingNet
from embedkit.train.recipe import Recipe
from embedkit.train.robust_labels import RobustLabels, noise_options
from embedkit.train.teacher import Distillation, Teacher, check_distillation

__all__ = ["Assisted", "assisted", "check_assistance"]


def check_assistance(recipe: Recipe, teacher: Teacher | None) -> None:
    """Refuse what does not fit together before anything slow begins.

    Raises:
        UnknownNameError: No such way with noise, option, view or way to learn from a teacher.
        UsageError: Labels are doubted where there are none.
        MissingError: The recipe names a teacher, and none was handed in.
        UsageError: One was handed in that the recipe does not name.
    """
    if recipe.teacher is not None and teacher is None:
        raise MissingError(
            f"the teacher {recipe.teacher!r} of this recipe is not here",
            hint="embedkit train --teacher FILE; in Python: train(..., teacher=Teacher(...))",
        )
    if recipe.teacher is None and teacher is not None:
        raise UsageError("a teacher was given, and the recipe names none", hint="Recipe(teacher=)")
    check_distillation(recipe.distill, recipe.teacher_view)
    if recipe.noise == "none":
        if recipe.noise_options:
            raise UsageError(
                "there are options of --noise, and no --noise",
                facts=f"they are {', '.join(recipe.noise_options)}",
                hint="--noise proselflc",
            )
        return
    noise_options(recipe.noise, recipe.noise_options)
    if learns_from(recipe.loss) != "classes":
        raise UsageError(
            f"--noise doubts labels, and {recipe.loss} learns from {learns_from(recipe.loss)}",
            hint="leave --noise out",
        )


def assisted(method: Method, recipe: Recipe, teacher: Teacher | None) -> Method:
    """`method` with the assistance the recipe asks for; itself where that is none."""
    if recipe.noise == "none" and teacher is None:
        return method
    noise = None
    if recipe.noise != "none":
        noise = RobustLabels(recipe.noise, recipe.noise_options)
    distillation = None
    if teacher is not None:
        distillation = Distillation(
            teacher,
            distill=recipe.distill,
            weight=recipe.distill_weight,
            view=recipe.teacher_view,
        )
    return Assisted(method, noise, distillation)


class Assisted(Method):
    """All of another method, and terms beside its own.

    Where labels are corrected, the method gets the corrected ones in its batches and for drawing
    them; what it has made of labels before the training stays as it is.

    Args:
        method: Already prepared; `prepare` of this one is for the assistance alone.
        noise: None: labels are believed.
        distillation: None: there is no teacher.
    """

    def __init__(
        self, method: Method, noise: RobustLabels | None, distillation: Distillation | None
    ) -> None:
        super().__init__()
        self.method, self.noise, self.distillation = method, noise, distillation

    @property
    def normalizes(self) -> bool:
        return self.method.normalizes

    @property
    def stats(self) -> dict[str, float]:
        """The method's own, then those of the assistance."""
        told = dict(self.method.stats)
        for part in (self.noise, self.distillation):
            told |= part.stats if part is not None else {}
        return told

    def create_network(self, recipe: Recipe, *, weights: str) -> EmbeddingNet:
        return self.method.create_network(recipe, weights=weights)

    def prepare(self, setting: Setting, network: EmbeddingNet) -> None:
        if self.distillation is not None and network.vectors > 1:
            raise UsageError(
                "a teacher teaches one vector per picture",
                facts=f"this network gives {network.vectors} of each",
                hint="leave --teacher out",
            )
        for part in (self.noise, self.distillation):
            if part is not None:
                part.prepare(setting, network)

    def sampler(self, setting: Setting, steps: int | None) -> Sampler:
        if self.noise is None or not self.noise.corrects:
            return self.method.sampler(setting, steps)
        return _AsBelieved(self.method, self.noise, setting, steps)

    def groups(self, network: EmbeddingNet, recipe: Recipe) -> list[Group]:
        groups = self.method.groups(network, recipe)
        if self.noise is not None:
            groups += self.noise.groups(recipe.proxy_learning_rate)
        if self.distillation is not None:
            groups += self.distillation.groups(recipe.head_learning_rate)
        return groups

    def begin_epoch(self, epoch: int, view: View) -> None:
        """The method comes last: nothing has changed when a stop strikes in its own look.

        The teacher's vectors are the same whenever they are asked for, and what PENCIL believes
        depends on distributions that do not change here.
        """
        if self.distillation is not None:
            self.distillation.begin_epoch(epoch, view)
        if self.noise is not None:
            self.noise.begin_epoch(epoch)
        self.method.begin_epoch(epoch, view)

    def step(self, network: EmbeddingNet, batch: Batch) -> Outcome:
        believed = batch
        if self.noise is not None:
            believed = dataclasses.replace(batch, labels=self.noise.labels(batch))
        outcome = self.method.step(network, believed)
        value = self._value(outcome.embeddings, batch)
        shown = outcome.loss + (value if not outcome.terms else value.detach())
        if not outcome.terms:
            return Outcome(shown, outcome.embeddings)
        # With its learners named, the graph is kept for the method's own terms.
        learners = [*network.parameters()]
        for part in (self.noise, self.distillation):
            learners += [] if part is None else [*part.parameters()]
        return Outcome(shown, outcome.embeddings, _first(Term(value, learners), outcome))

    def _value(self, embeddings: Tensor, batch: Batch) -> Tensor:
        parts = [part for part in (self.noise, self.distillation) if part is not None]
        return torch.stack([part(embeddings, batch) for part in parts]).sum()


def _first(term: Term, outcome: Outcome) -> Iterator[Term]:
    yield term
    yield from outcome.terms


class _AsBelieved:
    """The method's batches, by the labels that count when the epoch begins."""

    def __init__(
        self, method: Method, noise: RobustLabels, setting: Setting, steps: int | None
    ) -> None:
        self._method, self._noise, self._setting = method, noise, setting
        self._given = method.sampler(setting, steps)
        self.steps = self._given.steps

    def batches(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        believed = self._noise.believed.cpu().numpy()
        if (believed == self._setting.labels).all():
            return self._given.batches(epoch)
        setting = dataclasses.replace(self._setting, labels=believed)
        return self._method.sampler(setting, self.steps).batches(epoch)
