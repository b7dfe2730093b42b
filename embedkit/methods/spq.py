"""Supervised product quantisation: a network that learns the codes an index will keep.

Paper: Klein, Wolf, "End-to-End Supervised Product Quantization for Image Search and Retrieval",
CVPR 2019, arXiv:1711.08589. The loss and what is known of it are in `embedkit.losses.spq`; that the
deployed model gives the soft rows and the codes, to be compared by their distance, is the paper's
asymmetric search.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal

from embedkit import losses
from embedkit.losses._base import check_choice, check_number, check_whole
from embedkit.losses.spq import ProductQuantizationLoss
from embedkit.methods._base import Batch, Group, Method, Outcome, Setting
from embedkit.models import EmbeddingNet
from embedkit.models.quantized import QuantizedNet

if TYPE_CHECKING:
    from embedkit.train.recipe import Recipe

__all__ = ["SupervisedProductQuantization"]

_MOST_WORDS = 256


class SupervisedProductQuantization(Method):
    """The network ends in codebooks; what is exported are soft rows and a byte per part.

    Results in the paper are for classes seen in training. For others compare ``--type learned``
    with ``--type tiny`` on your own photos: `benchmarks/learned_codes.py` shows how.

    Args:
        subspaces: Parts M, which divide ``--dim``; a picture takes M bytes in an index.
        words: Words in each codebook, 2 to 256; 16 make a part half a byte.
        assign: See `embedkit.losses.spq`.
        temperature: Likewise.
        centre: Likewise.
        even: Likewise.
        sharp: Likewise.
    """

    certainty = "secondary source"

    def __init__(
        self,
        *,
        subspaces: int = 8,
        words: int = 256,
        assign: Literal["logits", "distance"] = "logits",
        temperature: float = 0.1,
        centre: float = 0.1,
        even: float = 1e-3,
        sharp: float = 1e-3,
    ) -> None:
        super().__init__()
        self._subspaces = check_whole("subspaces", subspaces, least=1)
        self._words = check_whole("words", words, least=2)
        if words > _MOST_WORDS:
            raise ValueError(f"words must be at most {_MOST_WORDS}: a code is a byte, got {words}")
        self._assign = check_choice("assign", assign, ["logits", "distance"])
        self._temperature = check_number("temperature", temperature, above=0)
        self._weights = {
            "centre": check_number("centre", centre, least=0),
            "even": check_number("even", even, least=0),
            "sharp": check_number("sharp", sharp, least=0),
        }

    def network_class(self, recipe: Recipe) -> Callable[..., EmbeddingNet]:
        return partial(
            QuantizedNet,
            subspaces=self._subspaces,
            words=self._words,
            temperature=self._temperature if self._assign == "distance" else None,
        )

    def prepare(self, setting: Setting, network: EmbeddingNet) -> None:
        loss = losses.create(
            "spq",
            num_classes=len(setting.classes),
            embedding_dim=network.embedding_dim,
            subspaces=self._subspaces,
            words=self._words,
            assign=self._assign,
            temperature=self._temperature,
            **self._weights,
        )
        assert isinstance(loss, ProductQuantizationLoss)
        loss.borrow(_of(network).quantizer)
        self.loss = loss

    def groups(self, network: EmbeddingNet, recipe: Recipe) -> list[Group]:
        """As usual, but that the codebooks learn as fast as the class vectors."""
        backbone, head, loss = super().groups(network, recipe)
        words = list(_of(network).quantizer.parameters())
        own = set(words)
        rest = [part for part in head.parameters if part not in own]
        return [
            backbone,
            Group(head.name, rest, head.learning_rate, head.weight_decay),
            Group(loss.name, [*loss.parameters, *words], loss.learning_rate, loss.weight_decay),
        ]

    def step(self, network: EmbeddingNet, batch: Batch) -> Outcome:
        # In two calls, because batches are divided at `features`.
        rows = network.head(network.features(batch.pixels)).float()
        loss = self.loss(rows, batch.labels)
        return Outcome(loss, _of(network).quantizer(rows))


def _of(network: EmbeddingNet) -> QuantizedNet:
    assert isinstance(network, QuantizedNet), "made by create_network"
    return network
