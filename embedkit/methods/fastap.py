"""FastAP in category-based batches, which are harder, and large ones in bounded memory.

Paper: Cakir, He, Xia, Kulis, Sclaroff, "Deep Metric Learning to Rank", CVPR 2019. Batches and
chunked back-propagation are as in the authors' code; ours is that an epoch shows every photo about
once and that the pairs of categories go on from epoch to epoch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from embedkit import losses
from embedkit.losses._base import check_whole
from embedkit.methods._base import Batch, Method, Outcome, Sampler, Setting, Term
from embedkit.models import EmbeddingNet

__all__ = ["FastAP"]


class FastAP(Method):
    """Half of a batch from each of two categories; without a column ``category``, PK batches.

    Args:
        bins: Of the loss.
        batches_per_pair: Batches drawn from a pair of categories before the next pair has its turn;
            the authors have 5 for SOP and 2 for In-Shop.
        chunk: Images that go through the network at once; 0 is the whole batch. The gradient is the
            same, because the loss sees all embeddings, for twice the forward passes; not with
            BatchNorm that learns its statistics (--freeze-batch-norm).
    """

    certainty = "code read"

    def __init__(self, *, bins: int = 10, batches_per_pair: int = 5, chunk: int = 0) -> None:
        super().__init__()
        self.batches_per_pair = check_whole("batches_per_pair", batches_per_pair, least=1)
        self.chunk = check_whole("chunk", chunk, least=0)
        self.loss = losses.create("fastap", bins=bins)

    def sampler(self, setting: Setting, steps: int | None) -> Sampler:
        if len({*(setting.photos.category or ())}) < 2:
            return super().sampler(setting, steps)
        return _CategoryPairs(setting, self.batches_per_pair, steps)

    def step(self, network: EmbeddingNet, batch: Batch) -> Outcome:
        if not 0 < self.chunk < len(batch.pixels):
            return super().step(network, batch)
        pieces = torch.split(batch.pixels, self.chunk)
        with torch.no_grad():
            embeddings = torch.cat([network(piece).float() for piece in pieces])
        embeddings.requires_grad_()
        value = self.loss(embeddings, batch.labels)
        (slopes,) = torch.autograd.grad(value, embeddings)

        def terms() -> Iterator[Term]:
            for piece, slope in zip(pieces, torch.split(slopes, self.chunk), strict=True):
                yield Term((network(piece).float() * slope).sum())

        return Outcome(value, embeddings, terms())


class _CategoryPairs:
    """Within a category, classes in random order, each class's images together, round and round.

    A class may be cut by the end of a batch; its lone images then have no positive there.
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
        labels = self._labels[shuffled]
        rank = {label: place for place, label in enumerate(rng.permutation(np.unique(labels)))}
        order = np.argsort([rank[label] for label in labels], kind="stable")
        return np.asarray(shuffled[order], np.int64)
