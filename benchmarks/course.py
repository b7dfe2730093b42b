"""What every trainer of `benchmarks.training` is given, and the clock it runs against.

Nothing here needs more than torch, torchvision, safetensors and pytorch-metric-learning, so that a
trainer with other needs can run in an environment of its own.
"""

from __future__ import annotations

import math
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning import losses as pml
from torch import nn

from benchmarks.losses import PEERS
from embedkit.evaluate import retrieval_metrics
from embedkit.models import EmbeddingNet, create_network, freeze_batch_norm, freeze_stages
from embedkit.models.folded import unfold

__all__ = ["WARM", "Course", "Stopwatch", "Update"]

WARM = 3
"""Steps in which workers start and photos are read the first time; they do not count in a rate."""

_EVALUATION_BATCH = 64

_SIZED: dict[str, Callable[[int, int], nn.Module]] = {
    "proxy-anchor": pml.ProxyAnchorLoss,
    "softmax": pml.NormalizedSoftmaxLoss,
    "arcface": partial(pml.ArcFaceLoss, margin=math.degrees(0.5)),
}


@dataclass(frozen=True)
class Course:
    """One training as plain values, which travel as JSON.

    Attributes:
        files: The photos.
        labels: Numbers of their classes, from 0.
        batches: Places among them, a list per step.
        held_out: ``.npz`` with the pixels of photos of other classes, their labels, and who asks.
        every: Steps from one measurement of recall to the next; 0: none.
        loss: Our name of it.
        network: Arguments of `create_network`.
        freeze: Backbone stages that do not learn.
        batch_norm_frozen: Whether BatchNorm keeps its statistics.
        crop: Least and greatest share of a picture in a crop.
        rates: Learning rates of backbone, head and loss; over a tenth they rise, then follow a
            cosine.
        weight_decay: Of AdamW.
        workers: That decode.
        seed: Of the first weights.
    """

    files: list[str]
    labels: list[int]
    batches: list[list[int]]
    held_out: str
    every: int
    loss: str
    network: dict[str, Any]
    freeze: int
    batch_norm_frozen: bool
    crop: tuple[float, float]
    rates: tuple[float, float, float]
    weight_decay: float
    workers: int
    seed: int

    @property
    def side(self) -> int:
        """Of the square pixels, which are as large as `create_network` is told."""
        return int(self.network["image_size"][0])

    def first_network(self, make: type[EmbeddingNet] | None = None) -> EmbeddingNet:
        """The same weights each time, in training mode; others train it as torchvision wrote it."""
        torch.manual_seed(self.seed)
        weights = self.network["weights"]
        known = weights if weights in ("none", "imagenet") else Path(weights)
        network = create_network(**{**self.network, "weights": known}, make=make or _Unfolded)
        freeze_stages(network, self.freeze)
        if self.batch_norm_frozen:
            freeze_batch_norm(network)
        shaped: EmbeddingNet = network.to(memory_format=torch.channels_last)
        return shaped.train()

    def peer_loss(self) -> nn.Module:
        """pytorch-metric-learning's loss of this name, computing what ours does."""
        if self.loss in _SIZED:
            return _SIZED[self.loss](max(self.labels) + 1, self.network["dim"])
        return PEERS[self.loss][1]()


class _Unfolded(EmbeddingNet):
    """Frozen batch normalisations stay layers of their own."""

    def train(self, mode: bool = True) -> EmbeddingNet:
        super().train(mode)
        unfold(self.backbone.body)
        return self


class Update:
    """AdamW on the groups and rates of the course, one step at a time."""

    def __init__(self, course: Course, network: EmbeddingNet, loss: nn.Module) -> None:
        body = list(network.backbone.parameters())
        head = list(network.head.parameters())
        self._steps = len(course.batches)
        groups = [
            {"params": learning, "lr": rate}
            for part, rate in zip((body, head, loss.parameters()), course.rates, strict=True)
            if (learning := [one for one in part if one.requires_grad])
        ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=course.weight_decay)
        self._schedule = self.follow(self.optimizer)

    def __call__(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._schedule.step()

    def follow(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        """The learning rates of `embedkit.train`: up over a tenth of the steps, then a cosine."""
        warmup = max(1, round(0.1 * self._steps))

        def share(step: int) -> float:
            cosine = (1 + math.cos(math.pi * step / self._steps)) / 2
            return min(1.0, (step + 1) / warmup) * cosine

        return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


class Stopwatch:
    """Wall and processor seconds of a training; stands still while recall is measured.

    Processor seconds are those of this process and of its children. What these prepare while the
    watch stands is counted in processor seconds only.
    """

    def __init__(self, course: Course) -> None:
        self._course = course
        self._steps = 0
        self._wall = self._own = 0.0
        self._since: tuple[float, float] | None = None
        self._children = children_seconds()
        self._warm = (0.0, 0.0)
        self._marks: list[dict[str, float]] = []

    def go(self) -> None:
        self._since = time.perf_counter(), time.process_time()

    def stand(self) -> None:
        if self._since is not None:
            self._wall += time.perf_counter() - self._since[0]
            self._own += time.process_time() - self._since[1]
        self._since = None

    def step(self) -> None:
        """A step is done."""
        self._steps += 1
        if self._steps == WARM:
            self._warm = self._spent()

    def step_and_mark(self, network: EmbeddingNet) -> None:
        """A step is done; measure recall when it is time to."""
        self.step()
        if self._course.every and self._steps % self._course.every == 0:
            self.stand()
            self.mark(network)
            self.go()

    def mark(self, network: EmbeddingNet) -> None:
        """Recall after so many steps; the watch stands."""
        wall, processor = self._spent()
        recall = recall_at_1(network, self._course.held_out)
        self._marks.append(
            {"step": self._steps, "recall": recall, "seconds": wall, "processor": processor}
        )

    def result(self) -> dict[str, Any]:
        """Images per second of wall and of processor time after `WARM` steps, and all marks."""
        wall, processor = self._spent()
        images = (self._steps - WARM) * len(self._course.batches[0])
        return {
            "images/s": images / (wall - self._warm[0]),
            "images/processor second": images / (processor - self._warm[1]),
            "marks": self._marks,
        }

    def _spent(self) -> tuple[float, float]:
        wall, own = self._wall, self._own
        if self._since is not None:
            wall += time.perf_counter() - self._since[0]
            own += time.process_time() - self._since[1]
        return wall, own + children_seconds() - self._children


def recall_at_1(network: EmbeddingNet, held_out: str) -> float:
    """On photos of classes that are not trained on, each asked of all others or of the gallery."""
    with np.load(held_out) as file:
        pixels, labels, query = file["pixels"], file["labels"], file["query"]
    training = network.training
    network.eval()
    with torch.no_grad():
        parts = torch.from_numpy(pixels).split(_EVALUATION_BATCH)
        rows = torch.cat([network(part) for part in parts]).numpy()
    network.train(training)
    asked = {"query": query, "gallery": ~query} if query.any() else {}
    return float(retrieval_metrics(rows, labels, ks=(1,), **asked).recall[1])


def children_seconds() -> float:
    """Processor seconds of all children so far, those that still run among them."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in brackets, may hold spaces; then state, parent, ..., user, system time.
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # It has ended since.
        if int(fields[1]) == os.getpid():
            ticks += int(fields[11]) + int(fields[12])
    return ended.ru_utime + ended.ru_stime + ticks / os.sysconf("SC_CLK_TCK")
