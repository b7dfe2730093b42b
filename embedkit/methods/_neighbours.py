"""Batches for continuous labels: an anchor, its nearest in label space, and others at random.

As in Kim, Seo, Laptev, Cho, Kwak, "Deep Metric Learning Beyond Binary Supervision", CVPR 2019,
arXiv:1904.09626. There every photo is the anchor of one batch in an epoch; here an epoch shows
every photo about once, and anchors go on through the photos from epoch to epoch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from embedkit.errors import DataError
from embedkit.methods._base import Setting

__all__ = ["NeighbourSampler"]


class NeighbourSampler:
    """Batches of ``classes_per_batch x images_per_class`` photos, no photo twice.

    1. The anchor stands first; every photo is an anchor once before any is one again.
    2. Then come its `neighbours` nearest in label space, equally near ones by chance, then photos
       drawn from the others.
    3. `batches` depends on the targets, the recipe and the epoch alone.

    Args:
        neighbours: At least 0.
        tied: Whether photos of the anchor's own target count as its nearest.
        steps: None is as many as show every photo about once.

    Attributes:
        steps: Batches of an epoch.

    Raises:
        DataError: Fewer than three photos, or all of one target.
    """

    def __init__(self, setting: Setting, *, neighbours: int, tied: bool, steps: int | None) -> None:
        assert setting.photos.targets is not None
        self._points = np.array(setting.photos.targets, np.float64)
        count, values = len(self._points), len({*setting.photos.targets})
        if count < 3 or values < 2:
            raise DataError(
                "the photos to train on cannot be compared by their numbers",
                facts=f"{count} photos with {values} different targets; needed are 3 and 2",
                hint="more photos, of other targets",
            )
        self._size = min(max(3, setting.recipe.batch_size), count)
        self._neighbours, self._tied = min(neighbours, self._size - 1), tied
        self._seed = setting.recipe.seed
        self.steps = steps or -(-count // self._size)

    def batches(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        first = epoch * self.steps
        return [self._batch(first + step) for step in range(self.steps)]

    def _batch(self, number: int) -> npt.NDArray[np.int64]:
        """Batch 0, 1, ... of the whole training. Cost: O(N (d + log N))."""
        turn, place = divmod(number, len(self._points))
        anchor = np.random.default_rng([self._seed, 0, turn]).permutation(len(self._points))[place]
        rng = np.random.default_rng([self._seed, 1, number])
        apart = np.sqrt(((self._points - self._points[anchor]) ** 2).sum(1))
        order = rng.permutation(len(apart))
        order = order[order != anchor]
        near = order[np.argsort(apart[order], kind="stable")]
        if not self._tied:
            near = near[apart[near] > 0]
        near = near[: self._neighbours]
        others = order[~np.isin(order, near)][: self._size - 1 - len(near)]
        return np.concatenate([[anchor], near, others]).astype(np.int64)
