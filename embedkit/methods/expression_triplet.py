"""Odd-one-out triplets: judgements of people instead of classes.

Paper: Vemulapalli, Agarwala, "A Compact Embedding for Facial Expression Similarity", CVPR 2019,
arXiv:1811.11283.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from embedkit import losses
from embedkit.errors import DataError
from embedkit.methods._base import Batch, Method, Outcome, Sampler, Setting
from embedkit.models import EmbeddingNet

__all__ = ["ExpressionTriplet"]


class ExpressionTriplet(Method):
    """Batches of ``classes_per_batch x images_per_class / 3`` triplets, every triplet in turn.

    Learns from a CSV ``image_a,image_b,image_c`` with, if you like, ``odd,margin,split``; see
    `embedkit.data.read_photos`.

    Args:
        margin: Of triplets that have none of their own; the paper has 0.2, and 0.1 where all three
            images are of one class.
    """

    learns_from = "triplets"
    nests = True

    def __init__(self, *, margin: float = 0.2) -> None:
        super().__init__()
        self.loss = losses.create("expression-triplet", margin=margin)
        self.margin = float(margin)

    def prepare(self, setting: Setting, network: EmbeddingNet) -> None:
        triplets = setting.photos.triplets or ()
        margins = [self.margin if one.margin is None else one.margin for one in triplets]
        self._margins = torch.tensor(margins)
        self._in_turn = _InTurn(setting, setting.epoch_steps)

    def sampler(self, setting: Setting, steps: int | None) -> Sampler:
        return _InTurn(setting, steps)

    def step(self, network: EmbeddingNet, batch: Batch) -> Outcome:
        numbers = self._in_turn.numbers(batch.epoch, batch.step)
        # One label per row; the loss reads the first of three.
        margins = self._margins[torch.from_numpy(numbers)].repeat_interleave(3)
        embeddings = network(batch.pixels)
        value = self.loss(embeddings.float(), margins.to(batch.pixels.device))
        return Outcome(value, embeddings)


class _InTurn:
    """Every triplet once before any comes again, in a new order every time."""

    def __init__(self, setting: Setting, steps: int | None) -> None:
        three = [(one.a, one.b, one.odd) for one in setting.photos.triplets or ()]
        if not three:
            raise DataError(
                "there is no triplet to train on",
                facts="all of them are of val or test, or name photos that cannot be read",
            )
        self._places = np.array(three, np.int64)
        self._size = min(max(1, setting.recipe.batch_size // 3), len(three))
        self._seed = setting.recipe.seed
        self.steps = steps or -(-len(three) // self._size)

    def numbers(self, epoch: int, step: int) -> npt.NDArray[np.int64]:
        """Which triplets are in a batch."""
        places = (epoch * self.steps + step) * self._size + np.arange(self._size)
        turns, within = np.divmod(places, len(self._places))
        orders = {
            int(turn): np.random.default_rng([self._seed, int(turn)]).permutation(len(self._places))
            for turn in set(turns.tolist())
        }
        chosen = [orders[turn][place] for turn, place in zip(turns, within, strict=True)]
        return np.array(chosen, np.int64)

    def batches(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        return [self._places[self.numbers(epoch, step)].ravel() for step in range(self.steps)]
