"""The random crop stays inside and has the area and shape it should; half of them are mirrored."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from embedkit.data import Augment
from embedkit.imaging import Pixels, Preprocess


def noise_picture(width: int, height: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, size=(height, width, 3), dtype=np.uint8)


@given(
    width=st.integers(1, 4000),
    height=st.integers(1, 4000),
    shape=st.floats(0.3, 3),
    seed=st.integers(0, 1000),
)
def test_the_crop_lies_inside_and_has_a_ratio_in_range(
    width: int, height: int, shape: float, seed: int
) -> None:
    box = Augment().box(width, height, shape, np.random.default_rng(seed))
    left, top, right, bottom = box
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    ratio = (right - left) / (bottom - top) / shape
    assert 3 / 4 - 1e-6 <= ratio <= 4 / 3 + 1e-6


def test_areas_and_ratios_are_spread_evenly_over_their_ranges() -> None:
    rng = np.random.default_rng(0)
    areas, ratios = [], []
    for _ in range(4000):
        left, top, right, bottom = Augment(scale=(0.1, 0.5)).box(400, 400, 1, rng)
        areas.append((right - left) * (bottom - top) / 160_000)
        ratios.append(math.log((right - left) / (bottom - top)))
    assert min(areas) == pytest.approx(0.1, abs=0.01)
    assert max(areas) == pytest.approx(0.5, abs=0.01)
    assert np.mean(areas) == pytest.approx(0.3, abs=0.01)
    assert np.mean(ratios) == pytest.approx(0, abs=0.01)
    assert max(ratios) == pytest.approx(math.log(4 / 3), abs=0.01)


def test_a_picture_that_no_crop_fits_is_cropped_in_the_middle() -> None:
    # 1000 x 10 holds no crop of 30 % of its area with a ratio up to 4/3.
    box = Augment().box(1000, 10, 1, np.random.default_rng(0))
    assert box == pytest.approx((500 - 20 / 3, 0, 500 + 20 / 3, 10))


@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
@pytest.mark.parametrize("side", [9, 50, 123])
def test_the_whole_picture_is_resized_as_pillow_does_it(filter: str, side: int) -> None:
    picture = noise_picture(side, side)
    whole = Augment(scale=(1, 1), ratio=(1, 1), flip=False)
    got = whole(picture, Preprocess(height=32, width=32, filter=filter), np.random.default_rng(0))
    resample = Image.Resampling[filter.upper()]
    expected = np.asarray(Image.fromarray(picture).resize((32, 32), resample))
    apart = np.abs(got.astype(int) - expected.astype(int))
    assert apart.max() <= 1
    assert apart.mean() < 0.02


def test_a_crop_is_that_part_of_the_picture_on_whole_pixels() -> None:
    picture = noise_picture(120, 80)
    preprocess = Preprocess(height=16, width=24)
    for seed in range(20):
        got = Augment(flip=False)(picture, preprocess, np.random.default_rng(seed))
        box = Augment().box(120, 80, 24 / 16, np.random.default_rng(seed))
        part = Image.fromarray(picture).crop(tuple(round(side) for side in box))
        expected = np.asarray(part.resize((24, 16), Image.Resampling.BICUBIC))
        assert np.abs(got.astype(int) - expected.astype(int)).max() <= 1


@given(width=st.integers(1, 5), height=st.integers(1, 5), seed=st.integers(0, 50))
def test_a_picture_of_a_few_pixels_still_gives_a_crop(width: int, height: int, seed: int) -> None:
    augment = Augment(scale=(0.01, 0.02))
    picture = noise_picture(width, height)
    got = augment(picture, Preprocess(height=4, width=6), np.random.default_rng(seed))
    assert got.shape == (4, 6, 3)


def test_half_of_the_pictures_are_mirrored() -> None:
    picture = noise_picture(16, 16)
    augment = Augment(scale=(1, 1), ratio=(1, 1), flip=True)
    preprocess = Preprocess(height=16, width=16)
    mirrored = 0
    for seed in range(200):
        got = augment(picture, preprocess, np.random.default_rng(seed))
        is_mirrored = np.array_equal(got, picture[:, ::-1])
        assert is_mirrored or np.array_equal(got, picture)
        mirrored += is_mirrored
    assert 70 < mirrored < 130


def test_an_oblong_input_is_filled_without_stretching() -> None:
    # A disc stays a disc: as wide as high, in pixels, whatever the input's shape.
    rows, columns = np.mgrid[:200, :200]
    disc = ((rows - 100) ** 2 + (columns - 100) ** 2 < 30**2) * np.uint8(255)
    picture = np.repeat(disc[:, :, None], 3, axis=2)
    augment = Augment(scale=(0.4, 0.4), ratio=(1, 1), flip=False)
    got = augment(picture, Preprocess(height=40, width=80), np.random.default_rng(3))[:, :, 0] > 127
    assert got.shape == (40, 80)
    assert abs(int(got.any(axis=0).sum()) - int(got.any(axis=1).sum())) <= 1


@pytest.mark.parametrize(
    ("scale", "side"),
    [((1.0, 1.0), 224), ((0.3, 1.0), 409), ((0.25, 1.0), 448), ((0.08, 1.0), 448)],
)
def test_photos_are_kept_large_enough_for_the_smallest_crop(
    scale: tuple[float, float], side: int
) -> None:
    assert Augment(scale=scale).decode_size(Preprocess(height=224, width=112)) == side


@pytest.mark.parametrize(
    "arguments",
    [{"scale": (0.0, 1.0)}, {"scale": (0.5, 0.3)}, {"scale": (0.5, 1.5)}, {"ratio": (0, 1)}],
)
def test_ranges_that_make_no_crop_are_refused(arguments: dict[str, tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="must be a range"):
        Augment(**arguments)  # type: ignore[arg-type]
