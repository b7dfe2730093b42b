"""A few generated pictures, shared by the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedkit.data import PhotoSet, draw_products, read_photos


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 classes of 5 pictures of 40 pixels."""
    folder = tmp_path_factory.mktemp("data") / "products"
    return draw_products(folder, classes=9, images_per_class=5, size=40)


@pytest.fixture(scope="session")
def photos(pictures: Path) -> PhotoSet:
    return read_photos(pictures)
