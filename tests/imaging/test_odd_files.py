"""Each odd, broken and hostile file of the shared collection gets the outcome its list names."""

from __future__ import annotations

import csv
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedkit.errors import ImageError
from embedkit.imaging import Preprocess, decode, find_images, read_pixels

_SHARED = os.environ.get("EMBEDKIT_SHARED", Path(__file__).resolve().parents[3] / "shared")
_ODD = Path(_SHARED) / "data" / "odd"
_LIST = _ODD / "index.csv"
_ROWS = list(csv.DictReader(_LIST.read_text("utf-8").splitlines())) if _LIST.is_file() else []

_CODES = {
    "truncated_pillow.jpg": "truncated",
    "truncated_pillow.png": "truncated",
    "truncated_60.jpg": "truncated",
    "broken_data_stream.png": "unreadable",
    "broken.png": "unreadable",
    "png_text_bomb.png": "unreadable",
    "gif_bomb.gif": "too-large",
    "huge_196mp.png": "too-large",
    "ico_bomb.ico": "too-large",
    "empty.jpg": "empty",
    "text.jpg": "not-an-image",
    "html_error.jpg": "not-an-image",
    "photoshop.psd": "unsupported",
    "jpeg2000.jp2": "unsupported",
    "folder.jpg": "not-a-file",
}


@pytest.mark.parametrize("row", _ROWS, ids=lambda row: row["file"])
def test_an_odd_file_has_the_outcome_its_list_names(row: dict[str, str]) -> None:
    path = _ODD / row["file"]
    start = time.process_time()
    try:
        image = decode(path)
    except ImageError as error:
        image = error
    assert time.process_time() - start < 2
    if isinstance(image, ImageError):
        assert row["expected"] in ("error", "either"), image.reason
        assert image.code == _CODES.get(row["file"], image.code)
        assert image.reason.isprintable()
        return
    assert row["expected"] in ("ok", "either")
    assert image.mode == "RGB"
    pixels = np.asarray(image, np.float64)
    if row["rgb_width"]:
        assert image.size == (int(row["rgb_width"]), int(row["rgb_height"]))
        np.testing.assert_allclose(pixels.mean((0, 1)), _wanted_mean(path, row), atol=0.6)
    assert Preprocess(height=32, width=48)(image).shape == (32, 48, 3)


def _wanted_mean(path: Path, row: dict[str, str]) -> np.ndarray:
    """The list's mean; it ignores transparency, so that is laid over white here, in floats."""
    listed = np.array([float(value) for value in row["rgb_mean"].split()])
    with Image.open(path) as stored:
        if not stored.has_transparency_data:
            return listed
        if stored.mode == "I;16":
            values = np.asarray(stored, np.float64)
            assert abs((values / 257).mean() - listed[0]) < 0.2
            return np.full(
                3, np.where(values == stored.info["transparency"], 255, values / 257).mean()
            )
        layer = np.asarray(stored.convert("RGBA"), np.float64)
    if row["file"] != "gif_transparent.gif":  # its hidden pixels are white already
        np.testing.assert_allclose(layer[..., :3].mean((0, 1)), listed, atol=0.6)
    opaque = layer[..., 3:] / 255
    return (layer[..., :3] * opaque + 255 * (1 - opaque)).mean((0, 1))


def test_the_walk_finds_the_odd_names(shared_data: Path) -> None:
    found = {path.name for path in find_images(shared_data / "odd")}
    assert {"UPPER.JPEG", "gray16.pgm", "icon.ico"} <= found
    assert any("写真" in name for name in found)
    assert "folder.jpg" not in found


def test_the_same_photo_in_other_clothes_gives_the_same_pixels(shared_data: Path) -> None:
    odd = shared_data / "odd"
    base = np.asarray(decode(odd / "base_photo.jpg")).astype(int)
    for name in (
        "trailing_garbage.jpg",
        "png_named.jpg",
        "lossless.png",
        "lossless.webp",
        "UPPER.JPEG",
    ):
        np.testing.assert_array_equal(np.asarray(decode(odd / name)), base, err_msg=name)
    for name in ("phone_exif6.jpg", "cmyk_plain.jpg", "progressive.jpg", "icc_srgb.jpg"):
        difference = np.abs(np.asarray(decode(odd / name)).astype(int) - base)
        assert difference.mean() < 4, name
    gray = np.asarray(decode(odd / "gray8.png")).astype(int)
    assert np.abs(np.asarray(decode(odd / "gray16.png")).astype(int) - gray).max() <= 1


def test_the_eight_orientations_look_alike(shared_data: Path) -> None:
    upright = np.asarray(decode(shared_data / "odd" / "control_hopper.jpg")).astype(int)
    for number in range(2, 9):
        turned = np.asarray(decode(shared_data / "odd" / f"exif_orientation_{number}.jpg"))
        assert np.abs(turned.astype(int) - upright).mean() < 6, number


def test_threads_decode_together_as_one_alone(shared_data: Path) -> None:
    paths = [path for path in find_images(shared_data / "odd") if path.stat().st_size < 200_000]

    def outcome(path: Path) -> str:
        try:
            return read_pixels(path, Preprocess(height=16, width=16)).tobytes().hex()
        except ImageError as error:
            return error.code

    alone = [outcome(path) for path in paths]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(outcome, paths)) == alone
