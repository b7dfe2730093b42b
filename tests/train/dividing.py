"""One step's gradients, with the batch whole, in chunks, or shared by processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from embedkit import losses, methods
from embedkit.data import PhotoLoader, PhotoSet
from embedkit.methods import Batch
from embedkit.models import EmbeddingNet, create_pooling, freeze_batch_norm
from embedkit.train import make_plan, train, trainer
from embedkit.train.distributed import World
from embedkit.train.find_rate import RangeTest, range_test
from embedkit.train.large_batch import check_divisible, divided
from tests.tiny_recipe import tiny_recipe

__all__ = [
    "farthest",
    "found_rates",
    "loss_gradients",
    "method_gradients",
    "method_names",
    "tiny_batch",
    "tiny_network",
]

ALONE = World()
Gradients = dict[str, Tensor]
Indices = npt.NDArray[np.int64]


class _Body(nn.Module):
    """A backbone that is quick, with all that a batch could get wrong but BatchNorm."""

    name, num_features, stages = "tiny", 6, ()

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.GELU(), nn.Dropout(dropout)
        )

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.body(images)
        return result


def tiny_network(*, dropout: float = 0.0) -> EmbeddingNet:
    """In float64, for pictures of any size, 8-d."""
    torch.manual_seed(0)
    body: Any = _Body(dropout)
    net = EmbeddingNet(body, create_pooling("avg", 6), 8, mean=(0.5,) * 3, std=(0.2,) * 3)
    return net.double()


def tiny_batch(count: int, *, side: int = 7) -> Batch:
    """Noise, two pictures of each class."""
    torch.manual_seed(1)
    pixels = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8)
    rows = torch.arange(count)
    return Batch(pixels, rows, rows // 2, None, 0, 0)


def loss_gradients(name: str, *, chunk: int | None = None, world: World = ALONE) -> Gradients:
    """Of a loss of 12 pictures of 6 classes; a loss must not mind the labels' meaning."""
    network = tiny_network()
    sizes = {"num_classes": 6, "embedding_dim": 8} if losses.needs_classes(name) else {}
    loss = losses.create(name, **sizes).double()
    whole = tiny_batch(12)
    batch = dataclasses.replace(whole, pixels=whole.pixels[world.part(12)])
    torch.manual_seed(2)
    value = loss(divided(network, batch, chunk=chunk, world=world)(batch.pixels), batch.labels)
    value.backward()
    world.average_gradients([*network.parameters(), *loss.parameters()])
    return {"value": value.detach(), **_gradients(network), **_gradients(loss)}


def method_names() -> list[str]:
    """Those that learn from photos with or without labels, and no loss alone."""
    return [
        name
        for name in methods.method_names()
        if methods.learns_from(name) in ("classes", "images")
    ]


def method_gradients(
    name: str, photos: PhotoSet, *, chunk: int | None = None, world: World = ALONE
) -> Gradients:
    """Of the first step of a training by a method."""
    recipe = tiny_recipe(loss=name, dim=24, freeze=0)
    plan = make_plan(recipe, photos, device=torch.device("cpu"))
    method, setting = methods.create(name), plan.setting()
    torch.manual_seed(0)
    network = method.create_network(recipe, weights="none")
    freeze_batch_norm(network)
    method.prepare(setting, network)
    loader = PhotoLoader(setting.photos.files(), recipe.preprocess(), augment=None, seed=0)
    torch.manual_seed(1)
    method.begin_epoch(0, _Look(network, loader, len(setting.labels)))
    rows = method.sampler(setting, plan.epoch_steps).batches(0)[0]
    (pixels,) = loader.batches([rows], epoch=0, part=world.part)
    labels = torch.from_numpy(setting.labels[rows])
    batch = Batch(torch.from_numpy(pixels), torch.from_numpy(rows), labels, None, 0, 0)
    check_divisible(network, chunk=chunk, world=world)
    torch.manual_seed(2)
    outcome = method.step(divided(network, batch, chunk=chunk, world=world), batch)
    terms = iter(outcome.terms)
    term = next(terms, None)
    if term is None:
        outcome.loss.backward()
    while term is not None:
        learners = None if term.learners is None else list(term.learners)
        torch.autograd.backward(term.value, retain_graph=learners is not None, inputs=learners)
        term = next(terms, None)
    world.average_gradients([*network.parameters(), *method.parameters()])
    return {"value": outcome.loss.detach(), **_gradients(network), **_gradients(method)}


def found_rates(photos: PhotoSet, folder: Path) -> dict[str, Any]:
    """What this process's own test of learning rates gave, and the factor it then trained with."""
    # All classes in every batch, so that losses differ by the rates and not by the batches.
    recipe = tiny_recipe(
        loss="proxy-anchor",
        backbone="resnet10",
        freeze=0,
        classes_per_batch=9,
        val_share=0,
        epochs=1,
        epoch_steps=1,
        find_learning_rate=True,
    )
    own: list[RangeTest] = []
    agreed: list[float] = []

    def watched(step: Callable[[int, float], float]) -> RangeTest:
        own.append(range_test(step))
        return own[-1]

    with (
        mock.patch.object(trainer, "range_test", watched),
        mock.patch.object(trainer, "tell_rates", lambda test, *_: agreed.append(test["factor"])),
    ):
        train(recipe, photos, folder, device="cpu")
    return {**own[0].to_json(), "agreed": agreed}


@dataclasses.dataclass(frozen=True)
class _Look:
    """What a method sees between epochs."""

    network: EmbeddingNet
    loader: PhotoLoader
    count: int

    def embeddings(self, rows: Sequence[int] | Indices | None = None) -> Tensor:
        return self.through(self.network, rows)

    def features(self, rows: Sequence[int] | Indices | None = None) -> Tensor:
        return self.through(self.network.features, rows)

    def through(
        self, embed: Callable[[Tensor], Tensor], rows: Sequence[int] | Indices | None = None
    ) -> Tensor:
        self.network.eval()
        places = np.arange(self.count) if rows is None else rows
        with torch.no_grad():
            return torch.cat([embed(torch.from_numpy(p)) for p in self.loader.plain(places, 64)])


def farthest(one: Gradients, other: Gradients) -> float:
    """The greatest length of a difference, as a share of the length of everything.

    What is shorter than 0.01 in all counts as that: where nothing is to be learned there is only
    rounding.
    """
    assert one.keys() == other.keys()
    size = torch.stack([part.norm() for name, part in one.items() if name != "value"]).norm()
    apart = max(float((one[name] - other[name]).norm()) for name in one)
    return apart / max(float(size), 0.01)


def _gradients(module: nn.Module) -> Gradients:
    return {
        f"{type(module).__name__}/{name}": part.grad.clone()
        for name, part in module.named_parameters()
        if part.grad is not None
    }
