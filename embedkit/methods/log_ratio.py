"""Log-ratio loss on continuous labels, in batches of an anchor, its nearest and others.

Paper: Kim, Seo, Laptev, Cho, Kwak, "Deep Metric Learning Beyond Binary Supervision", CVPR 2019,
arXiv:1904.09626. The loss and the batches are as in the authors' code, but for two things of ours:
photos of exactly the anchor's target, which the loss cannot use, are not counted among its nearest,
and an epoch shows every photo about once.
"""

from __future__ import annotations

from typing import Literal

from embedkit import losses
from embedkit.losses._base import check_whole
from embedkit.methods._base import Batch, Method, Outcome, Sampler, Setting
from embedkit.methods._neighbours import NeighbourSampler
from embedkit.models import EmbeddingNet

__all__ = ["LogRatio"]


class LogRatio(Method):
    """Learns from columns ``target`` or ``target_0``, ``target_1``, ...; see `NeighbourSampler`.

    Args:
        squared: Of the loss.
        anchors: Of the loss: the first row, as the batches are made, or all.
        neighbours: How many of the anchor's nearest in label space are in a batch.
    """

    learns_from = "numbers"
    certainty = "code read"
    nests = True

    def __init__(
        self,
        *,
        squared: bool = False,
        anchors: Literal["first", "all"] = "first",
        neighbours: int = 5,
    ) -> None:
        super().__init__()
        self.neighbours = check_whole("neighbours", neighbours, least=0)
        self.loss = losses.create("log-ratio", squared=squared, anchors=anchors)

    def sampler(self, setting: Setting, steps: int | None) -> Sampler:
        return NeighbourSampler(setting, neighbours=self.neighbours, tied=False, steps=steps)

    def step(self, network: EmbeddingNet, batch: Batch) -> Outcome:
        assert batch.targets is not None
        embeddings = network(batch.pixels)
        return Outcome(self.loss(embeddings.float(), batch.targets), embeddings)
