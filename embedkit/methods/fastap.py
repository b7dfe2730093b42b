"""FastAP in category-based batches, which are harder.

Paper: Cakir, He, Xia, Kulis, Sclaroff, "Deep Metric Learning to Rank", CVPR 2019. Batches are
as in the authors' code; ours is that an epoch shows every photo about once, that the pairs of
categories go on from epoch to epoch, and that large classes come in parts: theirs have 5 photos on
the average, and where one has 60 whole classes would be batches of two. Their large batches in
pieces are ``--chunk`` of any training.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from embedkit import losses
from embedkit.losses._base import check_whole
from embedkit.methods._base import Method, Sampler, Setting

__all__ = ["FastAP"]

# Classes in half a batch: fewer are told apart without learning anything.
_LEAST = 4


class FastAP(Method):
    """Half of a batch from each of two categories; without a column ``category``, PK batches.

    PK batches as well where categories have fewer than four classes on the average: a batch of two
    would be of so few classes that telling them apart teaches nothing.

    Args:
        bins: Of the loss.
        batches_per_pair: Batches drawn from a pair of categories before the next pair has its turn;
            the authors have 5 for SOP and 2 for In-Shop.
    """

    certainty = "code read"
    nests = True

    def __init__(self, *, bins: int = 10, batches_per_pair: int = 5) -> None:
        super().__init__()
        self.batches_per_pair = check_whole("batches_per_pair", batches_per_pair, least=1)
        self.loss = losses.create("fastap", bins=bins)

    def sampler(self, setting: Setting, steps: int | None) -> Sampler:
        categories = {*(setting.photos.category or ())}
        if len(categories) < 2 or len(setting.classes) < _LEAST * len(categories):
            return super().sampler(setting, steps)
        return _CategoryPairs(setting, self.batches_per_pair, steps)


class _CategoryPairs:
    """Within a category, classes in random order, each class's images together, round and round.

    A class that is more than a quarter of its half of the batch comes in parts no larger than that,
    in random order too. A part may be cut by the end of a batch; its lone images then have no
    positive there.
    """

    def __init__(self, setting: Setting, per_pair: int, steps: int | None) -> None:
        names = np.array(setting.photos.category)
        self._members = [np.flatnonzero(names == name) for name in sorted(set(names.tolist()))]
        self._labels = setting.labels
        self._pairs = list(itertools.combinations(range(len(self._members)), 2))
        self._per_pair, self._half = per_pair, max(2, setting.recipe.batch_size // 2)
        self._seed = setting.recipe.seed
        self.steps = steps or -(-len(names) // setting.recipe.batch_size)

    def batches(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        rng = np.random.default_rng([self._seed, 0, epoch])
        rings = [self._in_class_order(rows, rng) for rows in self._members]
        cursors = [0] * len(rings)
        plan = []
        for step in range(self.steps):
            halves = []
            for category in self._pair(epoch * self.steps + step):
                ring = rings[category]
                count = min(self._half, len(ring))
                halves.append(ring[(cursors[category] + np.arange(count)) % len(ring)])
                cursors[category] = (cursors[category] + count) % len(ring)
            plan.append(np.concatenate(halves))
        return plan

    def _pair(self, number: int) -> tuple[int, int]:
        """Of batch 0, 1, ... of the whole training: each pair in turn, in a new order each time."""
        turn, place = divmod(number // self._per_pair, len(self._pairs))
        order = np.random.default_rng([self._seed, 1, turn]).permutation(len(self._pairs))
        first, second = self._pairs[order[place]]
        return first, second

    def _in_class_order(
        self, rows: npt.NDArray[np.int64], rng: np.random.Generator
    ) -> npt.NDArray[np.int64]:
        shuffled = rng.permutation(rows)
        labels, most = self._labels[shuffled], max(2, self._half // _LEAST)
        parts = [
            part
            for label in np.unique(labels)
            for part in _even_parts(shuffled[labels == label], most)
        ]
        return np.concatenate([parts[place] for place in rng.permutation(len(parts))])


def _even_parts(rows: npt.NDArray[np.int64], most: int) -> list[npt.NDArray[np.int64]]:
    """As few as none has more than `most`; their sizes differ by one at most."""
    return np.array_split(rows, -(-len(rows) // most))
