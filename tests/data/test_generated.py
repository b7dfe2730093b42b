"""The generated products are reproducible, told apart by no shortcut, and real image files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from embedkit.data import draw_products, generated, read_photos
from embedkit.evaluate import retrieval_metrics
from embedkit.imaging import decode


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(folder.rglob("*.jpg"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_the_same_seed_draws_the_same_files_and_more_of_them_keep_the_first(
    tmp_path: Path,
) -> None:
    def drawn(name: str, classes: int, images: int, seed: int) -> dict[str, bytes]:
        folder = tmp_path / name
        got = draw_products(folder, classes=classes, images_per_class=images, size=32, seed=seed)
        assert got == folder
        return contents(folder)

    first = drawn("a", 3, 2, 7)
    assert drawn("b", 3, 2, 7) == first
    assert first.items() <= drawn("more", 5, 3, 7).items()
    assert not set(drawn("c", 3, 2, 8).values()) & set(first.values())


def test_a_folder_per_class_can_be_read_back(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    draw_products(
        tmp_path / "new/products",
        classes=12,
        images_per_class=3,
        size=40,
        progress=lambda done, failed: told.append((done, failed)),
    )
    photos = read_photos(tmp_path / "new/products")
    assert (len(photos), len(photos.classes())) == (36, 12)
    assert told == [(3, 0)] * 12
    assert {decode(file).size for file in photos.files()} == {(40, 40)}


def test_every_silhouette_and_pattern_can_be_drawn(tmp_path: Path) -> None:
    draw_products(tmp_path, classes=200, images_per_class=1, size=16)
    names = [folder.name.split("-") for folder in tmp_path.iterdir()]
    assert len(names) == 200
    assert {silhouette for silhouette, _, _ in names} == set(generated._SILHOUETTES)
    assert {pattern for _, _, pattern in names} == set(generated._PATTERNS)


def test_colours_alone_do_not_tell_the_classes(tmp_path: Path) -> None:
    draw_products(tmp_path, classes=20, images_per_class=8, size=48, seed=1)
    photos = read_photos(tmp_path)
    pixels = np.stack([np.asarray(decode(file)) for file in photos.files()])
    raw = retrieval_metrics(pixels.reshape(len(pixels), -1) - 127.0, photos.labels)
    bins = [np.histogramdd(p.reshape(-1, 3), bins=4, range=[(0, 256)] * 3)[0] for p in pixels]
    colours = retrieval_metrics(np.sqrt(np.stack(bins).reshape(len(bins), -1)), photos.labels)
    assert raw.map_at_r < 0.2
    assert colours.map_at_r < 0.2


@pytest.mark.parametrize(
    "arguments", [{"classes": 0}, {"classes": 1201}, {"images_per_class": 0}, {"size": 8}]
)
def test_sizes_out_of_range_are_refused(tmp_path: Path, arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        draw_products(tmp_path, **arguments)  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())
