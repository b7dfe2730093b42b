"""Two other ways to make batches by class: of varied shape, and of classes that are alike.

No paper is followed. Drawing C and K anew per batch was asked for and has no source that we found;
seeking out the nearest classes is an old idea (Sohn, NIPS 2016, calls it hard negative class
mining), and how it is done here is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.data.sampler import PKSampler, _Deck

__all__ = ["HardClassSampler", "VariedPKSampler"]

Indices = npt.NDArray[np.int64]


class VariedPKSampler(PKSampler):
    """PK batches of one size whose shape is drawn per batch: many classes or many images of each.

    With ``B = classes_per_batch x images_per_class``, a batch has K images of each of ``B // K``
    classes, K drawn from half, once and twice `images_per_class` (at least 2, at most ``B // 2``):
    for 16 x 4 these are 32 x 2, 16 x 4 and 8 x 8. Small classes and few classes as with
    `PKSampler`; its properties 1 and 4 hold as they stand, and 2 for classes. With as many `steps`
    as by default every class is a member in every epoch, and every image is used within ``ceil(its
    class's images / least K)`` epochs. The shape is a function of (seed, epoch, step).
    """

    def __init__(
        self,
        labels: Sequence[int] | npt.NDArray[np.integer[Any]],
        *,
        classes_per_batch: int,
        images_per_class: int,
        seed: int,
        steps: int | None = None,
    ) -> None:
        super().__init__(
            labels,
            classes_per_batch=classes_per_batch,
            images_per_class=images_per_class,
            seed=seed,
            steps=steps,
        )
        around = (images_per_class // 2, images_per_class, 2 * images_per_class)
        self._choices = sorted({min(max(2, each), self._room // 2) for each in around})
        # Where a class's photos begin moves on by as many as every batch takes at least.
        self._images_per_class = self._choices[0]
        if steps is None:
            fewest = min(self._room // self._choices[-1], len(self._images))
            self.steps = max(self.steps, math.ceil(len(self._images) / fewest))

    def _shape(self, epoch: int, step: int) -> tuple[int, int]:
        rng = np.random.default_rng([self._seed, 3, epoch, step])
        each = int(rng.choice(self._choices))
        return min(self._room // each, len(self._images)), each


class HardClassSampler(PKSampler):
    """PK batches around one class: half of the others are near it, the rest are any.

    With P member classes, the first has its turn, the next ``P // 2`` are what `near` says of it,
    and the others have their turn too. With as many `steps` as by default every class is in a batch
    in every epoch. Images are drawn as by `PKSampler`.

    Args:
        labels: ``(N,)`` numbers of classes from 0 to C - 1, one per image.
        near: Asked at the beginning of every epoch: ``(C, M)`` for each class the numbers of M
            others, the first is taken first. Classes of one image are passed over.
    """

    def __init__(
        self,
        labels: Sequence[int] | npt.NDArray[np.integer[Any]],
        *,
        near: Callable[[], Indices],
        classes_per_batch: int,
        images_per_class: int,
        seed: int,
        steps: int | None = None,
    ) -> None:
        super().__init__(
            labels,
            classes_per_batch=classes_per_batch,
            images_per_class=images_per_class,
            seed=seed,
            steps=steps,
        )
        self._near = near
        self._now = np.zeros((0, 0), np.int64)
        self._place = {int(label): place for place, label in enumerate(self._labels)}
        if steps is None:
            in_turn = self._members - self._members // 2
            self.steps = max(self.steps, math.ceil(len(self._images) / in_turn))

    def batches(self, epoch: int) -> list[Indices]:
        self._now = self._near()
        return super().batches(epoch)

    def _draw_members(self, classes: _Deck, count: int) -> list[int]:
        (first,) = classes.draw(1)
        near = [self._place.get(int(label)) for label in self._now[self._labels[first]]]
        members = [first, *[place for place in near if place is not None][: count // 2]]
        return members + classes.draw(count - len(members), excluding=members)
