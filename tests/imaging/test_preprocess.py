"""The geometry from picture to pixels, against one written out in loops."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from embedkit.errors import MismatchError
from embedkit.imaging import Preprocess


def _noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def _kernel(name: str, x: float) -> float:
    x = abs(x)
    if name == "bilinear":
        return max(0.0, 1 - x)
    if x < 1:  # cubic convolution, a = -0.5
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def _resampled(line: np.ndarray, start: float, end: float, size: int, name: str) -> np.ndarray:
    """Along the first axis: each target pixel is a mean under a kernel as wide as its source."""
    step = (end - start) / size
    wide = max(step, 1.0)
    reach = (1 if name == "bilinear" else 2) * wide
    rows = []
    for target in range(size):
        centre = start + (target + 0.5) * step
        total, weight = np.zeros(line.shape[1:]), 0.0
        for source in range(len(line)):
            if not centre - reach - 1 < source + 0.5 < centre + reach + 1:
                continue
            share = _kernel(name, (source + 0.5 - centre) / wide)
            total += share * line[source]
            weight += share
        rows.append(total / weight)
    return np.clip(np.rint(np.array(rows)), 0, 255)


@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("width", "height", "target", "crop"),
    [
        (40, 30, (12, 12), 0.875),
        (30, 41, (7, 11), 1.0),
        (9, 9, (20, 20), 1.0),  # enlarged
        (64, 3, (6, 6), 0.5),  # very wide
        (2, 50, (5, 9), 0.9),  # very tall
        (1, 1, (4, 3), 0.875),
    ],
)
def test_pixels_equal_those_of_a_resample_written_in_loops(
    width: int, height: int, target: tuple[int, int], crop: float, filter: str
) -> None:
    image = _noise(width, height)
    spec = Preprocess(height=target[0], width=target[1], crop_ratio=crop, filter=filter)
    # The box from its definition: the target's shape, as large as fits, shrunk, in the middle.
    shape = target[1] / target[0]
    box_width = min(width, height * shape) * crop
    box_height = box_width / shape
    left, top = (width - box_width) / 2, (height - box_height) / 2

    def down(pixels: np.ndarray) -> np.ndarray:
        return _resampled(pixels, top, top + box_height, target[0], filter)

    def across(pixels: np.ndarray) -> np.ndarray:
        turned = pixels.swapaxes(0, 1)
        return _resampled(turned, left, left + box_width, target[1], filter).swapaxes(0, 1)

    pixels, stored = spec(image), np.asarray(image, float)
    assert pixels.dtype == np.uint8
    # Which way comes first is Pillow's choice, by the cost; it shows only where values are clipped.
    wanted = down(across(stored)), across(down(stored))
    assert min(np.abs(pixels - one).max() for one in wanted) <= 1


def test_a_picture_of_the_right_size_is_left_as_it_is() -> None:
    image = _noise(31, 17)
    np.testing.assert_array_equal(
        Preprocess(height=17, width=31, crop_ratio=1.0)(image), np.asarray(image)
    )


@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    target=st.tuples(st.integers(1, 600), st.integers(1, 600)),
    crop=st.floats(0.01, 1.0),
)
@settings(max_examples=500, deadline=None, derandomize=True)
def test_the_box_lies_inside_in_the_middle_and_has_the_targets_shape(
    width: int, height: int, target: tuple[int, int], crop: float
) -> None:
    spec = Preprocess(height=target[0], width=target[1], crop_ratio=crop)
    left, top, right, bottom = spec.box(width, height)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert math.isclose(left + right, width, rel_tol=1e-9)
    assert math.isclose(top + bottom, height, rel_tol=1e-9)
    assert math.isclose((right - left) * target[0], (bottom - top) * target[1], rel_tol=1e-6)
    assert max((right - left) / width, (bottom - top) / height) == pytest.approx(crop)


def test_rounding_never_carries_the_box_past_the_picture() -> None:
    # 649 * (649 / 300) style products end one unit of the last place too high.
    for side in range(1, 700, 3):
        spec = Preprocess(height=7, width=300, crop_ratio=1.0)
        assert spec(Image.new("RGB", (side, side))).shape == (7, 300, 3)


@pytest.mark.parametrize("size", [(1, 1), (3000, 1), (1, 3000), (3000, 4)])
def test_no_picture_is_too_narrow_or_too_small(size: tuple[int, int]) -> None:
    assert Preprocess(height=24, width=32)(_noise(*size)).shape == (24, 32, 3)


def test_the_decode_size_keeps_the_promised_pixels_per_target_pixel() -> None:
    assert Preprocess(scaled_decode=0).decode_size() is None
    assert Preprocess().decode_size() == 512  # 2 x 224 / 0.875
    for height, width, crop, times in [(64, 64, 1.0, 1), (100, 37, 0.9, 2), (7, 300, 0.3, 3)]:
        spec = Preprocess(height=height, width=width, crop_ratio=crop, scaled_decode=times)
        side = spec.decode_size()
        assert side is not None
        left, top, right, bottom = spec.box(side, side)
        assert right - left >= times * width - 1e-6
        assert bottom - top >= times * height - 1e-6


def test_the_spec_survives_json() -> None:
    spec = Preprocess(height=96, width=128, crop_ratio=0.9, filter="bilinear", scaled_decode=0)
    again = Preprocess.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.fingerprint() == spec.fingerprint()


def test_the_fingerprint_changes_with_each_field_that_can() -> None:
    changes: dict[str, Any] = {
        "height": 225,
        "width": 225,
        "crop_ratio": 0.9,
        "filter": "bilinear",
        "scaled_decode": 1,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
    }
    fixed = {"orientation", "alpha", "color"}
    assert {field.name for field in dataclasses.fields(Preprocess)} == {*changes, *fixed}
    prints = {Preprocess().fingerprint()}
    for name, value in changes.items():
        prints.add(dataclasses.replace(Preprocess(), **{name: value}).fingerprint())
    assert len(prints) == len(changes) + 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("height", 0),
        ("width", -1),
        ("crop_ratio", 0.0),
        ("crop_ratio", 1.01),
        ("filter", "nearest"),
        ("scaled_decode", -1),
        ("orientation", "ignore"),
        ("alpha", "black"),
        ("color", "BGR"),
    ],
)
def test_a_value_out_of_range_is_refused_here_and_in_a_file(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(Preprocess(), **{field: value})
    with pytest.raises(MismatchError, match="not one this embedkit knows"):
        Preprocess.from_json({**Preprocess().to_json(), field: value})


@pytest.mark.parametrize(
    "value",
    [{}, None, [], 5, "x", {**Preprocess().to_json(), "new": 1}, list(Preprocess().to_json())],
)
def test_a_document_of_another_shape_is_refused(value: Any) -> None:
    with pytest.raises(MismatchError, match="not one this embedkit knows"):
        Preprocess.from_json(value)


@pytest.mark.parametrize(("field", "value"), [("mean", None), ("std", 3), ("height", "224")])
def test_a_field_of_another_type_is_refused(field: str, value: Any) -> None:
    with pytest.raises(MismatchError, match="not one this embedkit knows"):
        Preprocess.from_json({**Preprocess().to_json(), field: value})
