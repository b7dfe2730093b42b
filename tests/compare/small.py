"""The smallest comparison there is: two losses, two folds, trainings of two steps."""

from __future__ import annotations

import dataclasses
from typing import Any

from embedkit.compare import Protocol
from embedkit.train import Recipe

__all__ = ["LOSSES", "PHOTOS", "protocol", "recipe"]

LOSSES = ("triplet", "softmax")
PHOTOS = {"classes": 12, "images_per_class": 4, "size": 40}


def recipe(**changes: Any) -> Recipe:
    tiny = Recipe(
        backbone="squeezenet1_1",
        weights="none",
        dim=8,
        image_size=32,
        classes_per_batch=3,
        images_per_class=2,
        freeze=10,
        steps=2,
        epoch_steps=2,
    )
    return dataclasses.replace(tiny, **changes)


def protocol(**changes: Any) -> Protocol:
    tiny = Protocol(recipe(), folds=2, trials=2, repeats=2)
    return dataclasses.replace(tiny, **changes)
