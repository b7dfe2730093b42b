"""A few generated pictures, and one finished comparison of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedkit.compare import compare
from embedkit.data import PhotoSet, draw_products, read_photos
from tests.compare.small import LOSSES, PHOTOS, protocol


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 classes of 4 pictures of 40 pixels."""
    return draw_products(tmp_path_factory.mktemp("data") / "products", seed=0, **PHOTOS)


@pytest.fixture(scope="session")
def photos(pictures: Path) -> PhotoSet:
    return read_photos(pictures)


@pytest.fixture(scope="session")
def finished(photos: PhotoSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one uninterrupted comparison; not to be changed."""
    folder = tmp_path_factory.mktemp("compare") / "finished"
    compare(LOSSES, photos, folder, protocol(), device="cpu")
    return folder
