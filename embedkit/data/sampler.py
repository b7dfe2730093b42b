"""PK batches: P classes with K images each, every class in every epoch, no image twice in a batch.

The idea is Hermans, Beyer, Leibe, "In Defense of the Triplet Loss", 2017, arXiv:1703.07737; what
happens with small classes and odd sizes is ours and is listed with `PKSampler`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import DataError

__all__ = ["PKSampler"]

Indices = npt.NDArray[np.int64]


class PKSampler:
    """Plans the batches of an epoch from the labels alone.

    Write P for ``min(classes_per_batch, classes)`` and K' of a class for ``min(images_per_class,
    its images)``; classes of one image are left out, because they have no positive. Then:

    1. A batch holds P member classes with K' images each. Where small classes leave room below
       ``classes_per_batch x images_per_class``, further classes come in with 2 to K' images, so
       long as there are any. So a batch has at least 2 classes, at least 2 images of each, at most
       ``classes_per_batch x images_per_class`` images, and no image twice. Images of a class stand
       together.
    2. As members, two classes differ by at most 1 batch in an epoch; two images of a class are
       used at most 1 time more or less than each other in an epoch.
    3. With ``steps x P >= classes``, as by default, every class is a member in every epoch, and
       every image is used within ``ceil(its class's images / K')`` epochs, counted from epoch 0.
       With fewer steps an epoch takes a fresh random part of the classes.
    4. `batches` depends on the labels, the arguments and the epoch, and on nothing else: to resume,
       ask again.

    Args:
        labels: ``(N,)`` integers, one per image.
        classes_per_batch: 2 or more.
        images_per_class: 2 or more.
        seed: 0 or more.
        steps: Batches of an epoch; None is as many as hold every usable image once, and reach every
            class.

    Attributes:
        steps: Batches of an epoch.
        left_out: Labels of the classes of one image, sorted.

    Raises:
        DataError: Fewer than two classes have two images.
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
        for name, value in (
            ("classes_per_batch", classes_per_batch),
            ("images_per_class", images_per_class),
        ):
            if value < 2:
                raise ValueError(f"{name} must be at least 2, got {value}")
        if steps is not None and steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        names, codes, sizes = np.unique(
            np.asarray(labels, dtype=np.int64), return_inverse=True, return_counts=True
        )
        by_class = np.split(np.argsort(codes, kind="stable"), np.cumsum(sizes)[:-1])
        self.left_out: tuple[int, ...] = tuple(int(name) for name in names[sizes == 1])
        self._images = [rows for rows in by_class if len(rows) > 1]
        self._labels = names[sizes > 1]
        if len(self._images) < 2:
            raise DataError(
                "training needs at least two classes with two photos each",
                facts=f"found {len(self._images)} such classes, and {len(self.left_out)} with one",
                hint="a photo is compared with one of its class and one of another",
            )
        self._members = min(classes_per_batch, len(self._images))
        self._images_per_class = images_per_class
        self._room = classes_per_batch * images_per_class
        self._seed = seed
        usable = sum(len(rows) for rows in self._images)
        enough = max(math.ceil(usable / self._room), math.ceil(len(self._images) / self._members))
        self.steps = enough if steps is None else steps

    def batches(self, epoch: int) -> list[Indices]:
        """The epoch's batches, each ``(B,)`` positions in `labels`. Cost: O(steps x B)."""
        classes = _Deck(self._shuffled_classes(epoch))
        images: dict[int, _Deck] = {}
        plan = []
        for step in range(self.steps):
            count, each = self._shape(epoch, step)
            members = self._draw_members(classes, count)
            taken = [self._draw_images(number, epoch, images, each) for number in members]
            room = self._room - sum(len(rows) for rows in taken)
            guests = len(self._images) - len(members)
            while room >= 2 and guests:
                # A guest keeps its turn as a member, or small classes would cost others theirs.
                members.append(classes.peek(excluding=members))
                taken.append(self._draw_images(members[-1], epoch, images, min(each, room)))
                room -= len(taken[-1])
                guests -= 1
            plan.append(np.concatenate(taken))
        return plan

    # What another way of making batches replaces: `embedkit.data.class_batches`.

    def _shape(self, epoch: int, step: int) -> tuple[int, int]:
        """Member classes of a batch, and images of each."""
        return self._members, self._images_per_class

    def _draw_members(self, classes: _Deck, count: int) -> list[int]:
        return classes.draw(count)

    def _draw_images(self, number: int, epoch: int, decks: dict[int, _Deck], most: int) -> Indices:
        rows = self._images[number]
        if number not in decks:
            decks[number] = _Deck(self._shuffled_images(number, epoch))
        return rows[decks[number].draw(min(most, len(rows)))]

    def _shuffled_classes(self, epoch: int) -> Callable[[int], list[int]]:
        rng = np.random.default_rng([self._seed, 0, epoch])
        return lambda _: [int(place) for place in rng.permutation(len(self._images))]

    def _shuffled_images(self, number: int, epoch: int) -> Callable[[int], list[int]]:
        """Epochs share one order until all of it has been first, each beginning where the last
        one's first visit ended."""
        count = len(self._images[number])
        least = min(self._images_per_class, count)
        cycle, turn = divmod(epoch, math.ceil(count / least))

        def shuffled(turn_of_deck: int) -> list[int]:
            if turn_of_deck == 0:
                order = np.random.default_rng([self._seed, 1, number, cycle]).permutation(count)
                order = np.roll(order, -turn * least)
            else:
                key = [self._seed, 2, number, epoch, turn_of_deck]
                order = np.random.default_rng(key).permutation(count)
            return [int(place) for place in order]

        return shuffled


class _Deck:
    """Cards dealt without repeats in a hand, one shuffled deck laid under the other."""

    def __init__(self, shuffled: Callable[[int], list[int]]) -> None:
        self._shuffled = shuffled
        self._decks = 0
        self._cards: list[int] = []

    def draw(self, count: int, *, excluding: Sequence[int] = ()) -> list[int]:
        """`count` different cards, at most a deck; a card that would repeat waits its turn."""
        hand: list[int] = []
        for _ in range(count):
            hand.append(self.peek(excluding=[*excluding, *hand]))
            self._cards.remove(hand[-1])
        return hand

    def peek(self, *, excluding: list[int]) -> int:
        """The next card that is none of these, left where it is."""
        while True:
            for card in self._cards:
                if card not in excluding:
                    return card
            self._cards += self._shuffled(self._decks)
            self._decks += 1
