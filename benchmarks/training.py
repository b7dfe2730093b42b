"""Images a second in training: ours, a plain PyTorch loop and pytorch-metric-learning's trainer.

    python -m benchmarks.training [--backbone mobilenet_v3_small] [--steps 20] [--rounds 3]

The same photos (generated JPEGs of 384 x 384), backbone, batch of 16 classes x 4 images, crops,
flips and loss (triplet, margin 0.2) for all; pixels of 112 x 112, random weights, BatchNorm frozen
as it is with pretrained ones. The three take turns, as many decoding workers each as there are
cores, and their first steps, in which workers start and photos are read the first time, do not
count.

embedkit  `embedkit.train`, its second epoch, without evaluation.
plain     torchvision's RandomResizedCrop and flip in a DataLoader, AdamW.
pml       the same DataLoader in `trainers.MetricLossOnly`.

`bound` is forward, loss, backward and update on one ready batch: no trainer can be faster. The
photos fit into memory: ours keeps them decoded, in the others each epoch decodes them again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import trainers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms

from benchmarks.figures import machine, save
from embedkit import losses
from embedkit.data import PhotoSet, PKSampler, draw_products, read_photos
from embedkit.models import EmbeddingNet, freeze_batch_norm
from embedkit.train import Recipe, train
from embedkit.train.run import create_untrained

__all__ = ["measure"]

_CLASSES, _IMAGES = 24, 8
_WARM = 3


def measure(recipe: Recipe, photos: PhotoSet, *, workers: int, rounds: int) -> dict[str, float]:
    """Images per second of each, medians over rounds in which they take turns."""
    ways = {"embedkit": _ours, "plain": _plain, "pml": _pml, "bound": _bound}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            rates[name].append(way(recipe, photos, workers))
            print(f"  {name:<10}{rates[name][-1]:8.1f} images/s", flush=True)
    return {name: statistics.median(found) for name, found in rates.items()}


def _ours(recipe: Recipe, photos: PhotoSet, workers: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        run = train(recipe, photos, Path(folder) / "run", device="cpu", workers=workers)
        lines = (run.path / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line) for line in lines)
    images = (second["step"] - first["step"]) * recipe.batch_size
    return images / float(second["seconds"] - first["seconds"])


def _plain(recipe: Recipe, photos: PhotoSet, workers: int) -> float:
    step = _step(recipe)
    files = _Files(recipe, photos)
    loader = DataLoader(files, batch_sampler=_Batches(recipe, files.labels), num_workers=workers)
    for number, (pixels, labels) in enumerate(loader):
        if number == _WARM:
            began = time.perf_counter()
        step(pixels, labels)
    return (number + 1 - _WARM) * recipe.batch_size / (time.perf_counter() - began)


def _pml(recipe: Recipe, photos: PhotoSet, workers: int) -> float:
    files = _Files(recipe, photos)
    batches = _Batches(recipe, files.labels)
    network = _network(recipe)
    parts = {"trunk": _Trunk(network), "embedder": network.head}
    ends: list[float] = []
    trainer = trainers.MetricLossOnly(
        models=parts,
        optimizers={
            f"{name}_optimizer": torch.optim.AdamW(part.parameters(), 1e-4)
            for name, part in parts.items()
        },
        batch_size=recipe.batch_size,
        loss_funcs={"metric_loss": pml_losses.TripletMarginLoss(0.2)},
        dataset=files,
        # Its loader takes single places in order, and these are those of our batches.
        sampler=[int(row) for batch in batches for row in batch],
        iterations_per_epoch=len(batches),
        freeze_trunk_batchnorm=True,
        dataloader_num_workers=workers,
        end_of_iteration_hook=lambda trainer: ends.append(time.perf_counter()),
    )
    trainer.train(num_epochs=1)
    return (len(ends) - _WARM) * recipe.batch_size / (ends[-1] - ends[_WARM - 1])


def _bound(recipe: Recipe, photos: PhotoSet, workers: int) -> float:
    step = _step(recipe)
    pixels = torch.randint(0, 256, (recipe.batch_size, recipe.image_size, recipe.image_size, 3))
    labels = torch.arange(recipe.batch_size) // recipe.images_per_class
    ready = pixels.to(torch.uint8)
    for number in range(_WARM + 6):
        if number == _WARM:
            began = time.perf_counter()
        step(ready, labels)
    return 6 * recipe.batch_size / (time.perf_counter() - began)


def _network(recipe: Recipe) -> EmbeddingNet:
    torch.manual_seed(0)
    network = create_untrained(recipe, weights="none")
    freeze_batch_norm(network)
    shaped: EmbeddingNet = network.to(memory_format=torch.channels_last)
    return shaped.train()


def _step(recipe: Recipe) -> Callable[[Tensor, Tensor], None]:
    """What a script does with a batch of uint8 pixels ``(B, H, W, 3)``."""
    network = _network(recipe)
    loss = losses.create("triplet")
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4)

    def step(pixels: Tensor, labels: Tensor) -> None:
        value = loss(network(pixels), labels)
        optimizer.zero_grad()
        torch.autograd.backward(value)
        optimizer.step()
        value.item()

    return step


class _Trunk(nn.Module):
    """Our network before its head."""

    def __init__(self, network: EmbeddingNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network.features(pixels)


class _Files(Dataset[tuple[Tensor, int]]):
    """Photos as such scripts read them; uint8, since the network normalises."""

    def __init__(self, recipe: Recipe, photos: PhotoSet) -> None:
        names = sorted(set(photos.labels))
        self.labels = [names.index(label) for label in photos.labels]
        self._files = photos.files()
        self._crop = transforms.Compose(
            [
                transforms.RandomResizedCrop(recipe.image_size, recipe.augment_scale),
                transforms.RandomHorizontalFlip(),
                transforms.PILToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        with Image.open(self._files[row]) as image:
            pixels: Tensor = self._crop(image.convert("RGB"))
        return pixels.permute(1, 2, 0).contiguous(), self.labels[row]


class _Batches(Sampler[list[int]]):
    """The batches of our sampler, as many as are warmed up and measured."""

    def __init__(self, recipe: Recipe, labels: list[int]) -> None:
        steps = (recipe.epoch_steps or 0) + _WARM
        self._batches = PKSampler(
            labels,
            classes_per_batch=recipe.classes_per_batch,
            images_per_class=recipe.images_per_class,
            seed=0,
            steps=steps,
        ).batches(0)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[int(row) for row in batch] for batch in self._batches])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backbone", default="mobilenet_v3_small")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")  # The peer's trainer is written for an older PyTorch.
    logging.disable(logging.INFO)
    workers = len(os.sched_getaffinity(0))
    recipe = Recipe(
        loss="triplet",
        backbone=asked.backbone,
        weights="none",
        image_size=112,
        freeze_batch_norm=True,
        learning_rate=1e-4,
        val_share=0,
        epochs=2,
        epoch_steps=asked.steps,
    )
    with tempfile.TemporaryDirectory() as folder:
        draw_products(Path(folder), classes=_CLASSES, images_per_class=_IMAGES, size=384)
        photos = read_photos(Path(folder))
        rates = measure(recipe, photos, workers=workers, rounds=asked.rounds)
    shares: dict[str, Any] = {
        f"of {name}": round(rates["embedkit"] / rates[name], 3) for name in rates
    }
    print(f"embedkit: {shares}")
    figures = {"backbone": asked.backbone, "batch": recipe.batch_size, "workers": workers}
    save("training", {"machine": machine(), **figures, "images_per_second": rates, **shares})


if __name__ == "__main__":
    # Decoding threads want the cores that idle OpenMP threads would spin on.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
