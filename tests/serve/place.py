"""A small catalog to serve: twelve pictures of three labels, by a model without torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from starlette.types import ASGIApp

from embedkit.index import Catalog, sync_folder
from embedkit.runtime import Embedder
from embedkit.serve import Rules, Settings, create_app
from tests.tiny_model import write_tiny_model

__all__ = ["Place", "draw", "made"]


@dataclass(frozen=True)
class Place:
    """What a test needs to serve, and to check by another route."""

    folder: Path
    catalog: Catalog
    embedder: Embedder

    def app(self, rules: Rules | None = None, **settings: Any) -> ASGIApp:
        """The application, by whatever name it is called."""
        rules = replace(rules or Rules(), hosts=None)
        chosen = {"rules": rules, "thumbnails": self.folder / "thumbnails", **settings}
        return create_app(self.catalog, self.embedder, Settings(**chosen))


@contextmanager
def made(folder: Path) -> Iterator[Place]:
    """The catalog, written into a folder."""
    write_tiny_model(folder / "model.onnx")
    for n in range(12):
        draw(folder / f"photos/{('cup', 'shoe', 'bag')[n % 3]}/{n:02}.png", n)
    with Embedder.load(folder / "model.onnx", device="cpu", threads=1) as embedder:
        index = folder / "catalog.faiss"
        sync_folder(folder / "photos", index, embedder, model=folder / "model.onnx", workers=1)
        yield Place(folder, Catalog.open(index), embedder)


def draw(path: Path, seed: int) -> Path:
    """Blocks of colour: 60 x 48, no two alike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(small).resize((60, 48), Image.Resampling.NEAREST).save(path)
    return path
