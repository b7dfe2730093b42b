"""Dense triplets on continuous labels: the nearer of two in label shall be nearer to the anchor.

The baseline of Kim, Seo, Laptev, Cho, Kwak, "Deep Metric Learning Beyond Binary Supervision", CVPR
2019, arXiv:1904.09626; batches as for log-ratio, and photos of the anchor's own target count among
its nearest.
"""

from __future__ import annotations

from typing import Literal

from embedkit import losses
from embedkit.losses._base import check_whole
from embedkit.methods._base import Batch, Method, Outcome, Sampler, Setting
from embedkit.methods._neighbours import NeighbourSampler
from embedkit.models import EmbeddingNet

__all__ = ["DenseTriplet"]


class DenseTriplet(Method):
    """Learns from columns ``target`` or ``target_0``, ``target_1``, ...; see `NeighbourSampler`.

    Args:
        margin: Of the loss.
        anchors: Of the loss: the first row, as the batches are made, or all.
        neighbours: How many of the anchor's nearest in label space are in a batch.
    """

    learns_from = "numbers"
    certainty = "code read"
    nests = True

    def __init__(
        self,
        *,
        margin: float = 0.03,
        anchors: Literal["first", "all"] = "first",
        neighbours: int = 5,
    ) -> None:
        super().__init__()
        self.neighbours = check_whole("neighbours", neighbours, least=0)
        self.loss = losses.create("dense-triplet", margin=margin, anchors=anchors)

    def sampler(self, setting: Setting, steps: int | None) -> Sampler:
        return NeighbourSampler(setting, neighbours=self.neighbours, tied=True, steps=steps)

    def step(self, network: EmbeddingNet, batch: Batch) -> Outcome:
        assert batch.targets is not None
        embeddings = network(batch.pixels)
        return Outcome(self.loss(embeddings.float(), batch.targets), embeddings)
