"""What a method is: a loss, how its batches are made, and what happens between epochs.

The trainer calls a method in this order, and nothing else of it:

    method = create(name, **options)          options only: no data, no random numbers
    method.create_network(recipe, weights=)   also when a run is read back
    method.sampler(setting, None).steps       how long an epoch is, when the recipe does not say
    method.prepare(setting, network)          parameters and buffers; torch's generator is seeded
    method.nest(setting)                      a loss for every width, where there are several
    method.groups(network, recipe)            who learns how fast
    for every epoch:
        method.begin_epoch(epoch, view)       once, not again when resumed within the epoch
        method.sampler(setting, steps).batches(epoch)
        for every batch:
            method.step(network, batch)       torch's generator is seeded for the step

A method is a module, and its state dict is in the checkpoint: whatever must survive a stop is a
parameter or a buffer, made in `prepare` with the shape it keeps. So that a resumed run is the
uninterrupted one bit for bit, two rules:

1. What `batches` reads of the state changes in `begin_epoch` only.
2. `begin_epoch` changes the state only after its last look through the view, which is where a
   training can be stopped.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from embedkit import models
from embedkit.data import PhotoSet, PKSampler
from embedkit.losses import MetricLoss, NestedLoss
from embedkit.models import EmbeddingNet

if TYPE_CHECKING:
    from embedkit.train.recipe import Recipe

__all__ = [
    "Batch",
    "Group",
    "LearnsFrom",
    "Method",
    "Outcome",
    "Sampler",
    "Setting",
    "Term",
    "View",
    "options_of",
]

Indices = npt.NDArray[np.int64]

LearnsFrom = Literal["classes", "images", "numbers", "triplets"]
"""Labels of photos; photos alone; one or more numbers per photo; who is the odd one of three."""


@dataclass(frozen=True)
class Setting:
    """What is learned from, and for how long.

    Attributes:
        recipe: All settings.
        photos: The N training photos, with categories, targets and triplets where the data has
            them.
        labels: ``(N,)`` numbers of their classes, from 0.
        classes: Names of the classes, by number.
        epoch_steps: Steps of an epoch; 0 while the plan is being made.
        epochs: Of the training, the last may be shorter; 0 while the plan is being made.
    """

    recipe: Recipe
    photos: PhotoSet
    labels: Indices
    classes: tuple[str, ...]
    epoch_steps: int = 0
    epochs: int = 0


class Sampler(Protocol):
    """Plans the batches of an epoch; `embedkit.data.PKSampler` is one.

    Attributes:
        steps: Batches of an epoch.
    """

    steps: int

    def batches(self, epoch: int) -> list[Indices]:
        """`steps` batches, each ``(B,)`` places among the training photos.

        A place may stand twice in a batch: its two pictures then have different noise.
        """
        ...


class View(Protocol):
    """The training photos as the network sees them now, in evaluation mode and without noise.

    Each look is one pass over `rows`, with a bar; the network is in evaluation mode afterwards.
    """

    def embeddings(self, rows: Sequence[int] | Indices | None = None) -> Tensor:
        """``(N, D)`` float32 on the CPU: raw outputs of the network for these places, or all."""
        ...

    def features(self, rows: Sequence[int] | Indices | None = None) -> Tensor:
        """``(N, F)`` float32 on the CPU: pooled, before the head."""
        ...

    def through(
        self, embed: Callable[[Tensor], Tensor], rows: Sequence[int] | Indices | None = None
    ) -> Tensor:
        """``(N, ...)`` of anything that takes pixels ``(B, H, W, 3)``."""
        ...


@dataclass(frozen=True)
class Batch:
    """What a step works on; tensors are on the training's device.

    Attributes:
        pixels: ``(B, H, W, 3)`` uint8.
        rows: ``(B,)`` int64, places among the training photos.
        labels: ``(B,)`` int64, numbers of classes; all 0 where the data has no labels.
        targets: ``(B, d)`` float32 where the data has numbers, else None.
        epoch: From 0.
        step: Of the epoch, from 0.
    """

    pixels: Tensor
    rows: Tensor
    labels: Tensor
    targets: Tensor | None
    epoch: int
    step: int


@dataclass(frozen=True)
class Term:
    """A scalar to go down, and who learns from it; None: all parameters it depends on."""

    value: Tensor
    learners: Iterable[nn.Parameter] | None = None


@dataclass(frozen=True)
class Outcome:
    """The result of a step.

    Attributes:
        loss: The scalar that is shown, and that is back-propagated when there are no `terms`.
        embeddings: ``(B, D)`` raw; training ends when they are not finite.
        terms: Back-propagated one after the other instead of `loss`, before one optimiser step. A
            generator frees the graph of each before it makes the next.
    """

    loss: Tensor
    embeddings: Tensor
    terms: Iterable[Term] = ()


@dataclass(frozen=True)
class Group:
    """Parameters of one learning rate; `weight_decay` None is the recipe's."""

    name: str
    parameters: Iterable[nn.Parameter]
    learning_rate: float
    weight_decay: float | None = None


class Method(nn.Module):
    """A loss and what its training does beyond it; all of it may be replaced.

    As it stands: the recipe's network, PK batches, and `loss` of embeddings and labels. The options
    are the keywords of ``__init__``, which keeps and checks them (ValueError) and makes nothing
    random.

    Attributes:
        loss: Made in ``__init__`` or `prepare`; of no use to a method that writes `step`, `stats`
            and `normalizes` itself.
        learns_from: What the data must have.
        certainty: What is known of the paper's method: ``"paper"``, ``"code read"``, ``"secondary
            source"`` or ``"reconstruction"``.
        nests: Whether the first numbers of an embedding alone can be learned by `loss_of` as an
            embedding too: `step` gives `loss` whole raw embeddings and nothing of their width.
    """

    learns_from: ClassVar[LearnsFrom] = "classes"
    certainty: ClassVar[str] = "paper"
    nests: ClassVar[bool] = False

    loss: MetricLoss

    @property
    def normalizes(self) -> bool:
        """Whether embeddings are compared on the unit sphere, by the exported model as well."""
        return self.loss.normalizes

    @property
    def stats(self) -> dict[str, float]:
        """Tell-tales of the last step; ``spread`` raises the alarm of a collapse."""
        return self.loss.stats

    def network_class(self, recipe: Recipe) -> Callable[..., EmbeddingNet]:
        """What `create_network` makes: a subclass with its own arguments bound by `partial`."""
        return EmbeddingNet

    def create_network(self, recipe: Recipe, *, weights: str) -> EmbeddingNet:
        """The network before training; the only place where this method's network is made.

        What `forward` of it does is what is exported: pixels to raw embedding.

        Args:
            weights: ``"none"``, ``"imagenet"`` or a path; not the recipe's own when a run is read.
        """
        preprocess = recipe.preprocess()
        return models.create_network(
            backbone=recipe.backbone,
            weights=weights if weights in ("none", "imagenet") else Path(weights),
            pooling=recipe.pooling,
            dim=recipe.dim,
            image_size=(preprocess.height, preprocess.width),
            mean=preprocess.mean,
            std=preprocess.std,
            make=self.network_class(recipe),
        )

    def prepare(self, setting: Setting, network: EmbeddingNet) -> None:
        """Make parameters and buffers, now that the data is known; do not keep the network."""

    def loss_of(self, setting: Setting, width: int) -> MetricLoss:
        """A loss of its own for embeddings of this width, where the method `nests`."""
        return copy.deepcopy(self.loss)

    def nest(self, setting: Setting) -> None:
        """After `prepare`: learn all widths of the recipe, each by its own loss."""
        *narrower, whole = setting.recipe.widths
        if narrower:
            parts = {width: self.loss_of(setting, width) for width in narrower}
            self.loss = NestedLoss({**parts, whole: self.loss})

    def sampler(self, setting: Setting, steps: int | None) -> Sampler:
        """How batches are made; with None, only its `steps` is asked, before `prepare`.

        Raises:
            DataError: The data is not enough.
        """
        recipe = setting.recipe
        return PKSampler(
            setting.labels,
            classes_per_batch=recipe.classes_per_batch,
            images_per_class=recipe.images_per_class,
            seed=recipe.seed,
            steps=steps,
        )

    def groups(self, network: EmbeddingNet, recipe: Recipe) -> list[Group]:
        """Every parameter that learns, in exactly one group; those without gradient are skipped."""
        body = set(network.backbone.parameters())
        rest = [part for part in network.parameters() if part not in body]
        return [
            Group("backbone", network.backbone.parameters(), recipe.backbone_learning_rate),
            Group("head", rest, recipe.head_learning_rate),
            Group("loss", self.parameters(), recipe.proxy_learning_rate),
        ]

    def begin_epoch(self, epoch: int, view: View) -> None:
        """Renew the state from what the network knows now."""

    def step(self, network: EmbeddingNet, batch: Batch) -> Outcome:
        """Forward and loss, under the recipe's autocast; raw embeddings go into a loss as float."""
        embeddings = network(batch.pixels)
        return Outcome(self.loss(embeddings.float(), batch.labels), embeddings)


def options_of(method: type[Method]) -> dict[str, Any]:
    """Names and defaults of a method's options."""
    parameters = list(inspect.signature(method).parameters.values())
    return {part.name: part.default for part in parameters}
