"""Generated pictures, and one of the small trainings by which methods are tested."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from embedkit.data import PhotoSet, draw_products, read_photos
from embedkit.errors import Interrupted
from embedkit.train import Recipe, checkpoint, train
from tests.tiny_recipe import tiny_recipe
from tests.train.listener import Listener

TrainStopped = Callable[[Recipe, PhotoSet, Path, Sequence[int]], Path]


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> PhotoSet:
    """9 classes of 5 pictures of 40 pixels."""
    folder = tmp_path_factory.mktemp("data") / "products"
    return read_photos(draw_products(folder, classes=9, images_per_class=5, size=40))


@pytest.fixture
def tiny() -> Callable[..., Recipe]:
    """Makes the recipe of these trainings, with changes."""
    return tiny_recipe


@pytest.fixture
def train_stopped() -> TrainStopped:
    """Trains with a Ctrl-C after each of these steps (counted from the last stop), and resumes."""

    def run(recipe: Recipe, photos: PhotoSet, folder: Path, stops: Sequence[int]) -> Path:
        for number, step in enumerate(stops):
            stop = Listener(at_step={step: lambda: signal.raise_signal(signal.SIGINT)})
            with pytest.raises(Interrupted):
                train(recipe, photos, folder, device="cpu", reporter=stop, resume=number > 0)
        return train(recipe, photos, folder, device="cpu", resume=bool(stops)).path

    return run


@pytest.fixture
def contents() -> Callable[[Path], dict[str, Any]]:
    """All that a training left behind, but for the times."""

    def read(folder: Path) -> dict[str, Any]:
        last = checkpoint.read_checkpoint(folder / "last.safetensors").tensors
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        times = ("seconds", "waited")
        return {
            "tensors": {name: tensor.numpy().tobytes() for name, tensor in last.items()},
            "rows": [{k: v for k, v in row.items() if k not in times} for row in rows],
            "split": (folder / "split.csv").read_bytes(),
        }

    return read
