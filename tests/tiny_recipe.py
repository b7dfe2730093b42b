"""The smallest training that has everything a training has, for tests."""

from __future__ import annotations

import dataclasses
from typing import Any

from embedkit.train import Recipe

__all__ = ["tiny_recipe"]


def tiny_recipe(**changes: Any) -> Recipe:
    """3 epochs of 2 steps of 3 classes x 2 pictures, with changes."""
    tiny = Recipe(
        backbone="mobilenet_v3_small",
        weights="none",
        dim=8,
        image_size=32,
        classes_per_batch=3,
        images_per_class=2,
        freeze=6,
        freeze_batch_norm=True,
        epochs=3,
        epoch_steps=2,
        val_share=0.3,
        patience=0,
    )
    return dataclasses.replace(tiny, **changes)
