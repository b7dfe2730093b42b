"""One training as open-metric-learning's documentation writes it; started by `benchmarks.training`.

Reads a course as JSON from its input, trains with `ImageLabeledDataset` in a DataLoader and the
plain loop of its README, and prints the figures as JSON. The triplet and ArcFace losses are its
own; for others it documents those of pytorch-metric-learning.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from typing import Any

import pandas
import torch
from oml.datasets import ImageLabeledDataset
from oml.losses.arcface import ArcFaceLoss
from oml.losses.triplet import TripletLossWithMiner
from oml.miners.inbatch_all_tri import AllTripletsMiner
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision import transforms

from benchmarks.course import Course, Stopwatch, Update

__all__ = ["run"]


def run(course: Course) -> dict[str, Any]:
    """Its images per second and its way to recall."""
    table = pandas.DataFrame({"label": course.labels, "path": course.files})
    crop = transforms.Compose(
        [
            transforms.RandomResizedCrop(course.side, course.crop),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
            transforms.Lambda(_channels_last),
        ]
    )
    loader = DataLoader(
        ImageLabeledDataset(table, transform=crop),
        batch_sampler=course.batches,
        num_workers=course.workers,
    )
    network = course.first_network()
    loss = _loss(course)
    update = Update(course, network, loss)
    watch = Stopwatch(course)
    if course.every:
        watch.mark(network)
    watch.go()
    for batch in loader:
        # As its extractors do when told to normalise their features.
        rows = functional.normalize(network(batch["input_tensors"]))
        value = loss(rows, batch["labels"])
        torch.autograd.backward(value)
        update()
        watch.step_and_mark(network)
    watch.stand()
    return watch.result()


def _loss(course: Course) -> nn.Module:
    if course.loss == "triplet":
        return TripletLossWithMiner(margin=0.2, miner=AllTripletsMiner())
    if course.loss == "arcface":
        return ArcFaceLoss(course.network["dim"], max(course.labels) + 1)
    return course.peer_loss()


def _channels_last(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.permute(1, 2, 0).contiguous()


def main() -> None:
    warnings.simplefilter("ignore")
    course = json.load(sys.stdin)
    known = {field.name for field in dataclasses.fields(Course)}
    found = run(Course(**{name: course[name] for name in known}))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
