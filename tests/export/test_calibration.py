"""Calibration photos are spread over classes and over the embedding space, and kept."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from embedkit.errors import DataError
from embedkit.export import calibrate, calibration
from embedkit.export.calibration import balanced, farthest_first
from embedkit.imaging import read_pixels
from tests.export.small import Exported, Photos


def test_classes_take_part_as_equally_as_their_sizes_allow() -> None:
    labels = ["a"] * 100 + ["b"] * 3 + ["c"] * 50
    chosen = balanced(labels, 23)
    assert Counter(labels[row] for row in chosen) == {"a": 10, "b": 3, "c": 10}
    assert len(set(chosen)) == 23
    assert balanced(labels, 23) == chosen
    assert sorted(balanced(labels, 1000)) == list(range(153))
    assert balanced([], 5) == []


def test_each_next_photo_is_the_one_farthest_from_all_before() -> None:
    rows = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    chosen = farthest_first(rows, 12)
    middle = [float(((row - rows.mean(0)) ** 2).sum()) for row in rows]
    expected = [middle.index(min(middle))]
    while len(expected) < 12:
        gaps = {
            i: min(float(np.linalg.norm(rows[i] - rows[j])) for j in expected)
            for i in range(30)
            if i not in expected
        }
        expected.append(max(gaps, key=lambda i: gaps[i]))
    assert chosen == expected


def test_twins_and_few_photos_are_no_trouble() -> None:
    assert sorted(farthest_first(np.ones((4, 2), np.float32), 9)) == [0, 1, 2, 3]
    assert farthest_first(np.ones((1, 2), np.float32), 3) == [0]


def test_ranges_are_those_of_the_pixels_and_a_second_time_nothing_is_read(
    exported: Exported, photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = calibrate(exported.path, photos.paths, photos.labels, cache=tmp_path)
    assert (len(first.paths), first.classes, first.chosen_from) == (24, 4, 24)
    side = exported.contract.preprocess
    pixels = np.stack([read_pixels(Path(path), side) for path in first.paths])
    assert np.array_equal(first.pixels, pixels)
    normal = (pixels / 255 - np.array(side.mean)) / np.array(side.std)
    assert first.ranges["add"] == pytest.approx((normal.min(), normal.max()), abs=1e-4)

    monkeypatch.setattr(calibration, "read_pixels", None)
    again = calibrate(exported.path, photos.paths, photos.labels, cache=tmp_path)
    assert again.reused
    assert not first.reused
    assert again.ranges == first.ranges
    assert np.array_equal(again.pixels, first.pixels)
    assert again.paths == first.paths


def test_another_list_or_a_damaged_cache_is_done_again_and_one_file_is_kept(
    exported: Exported, photos: Photos, tmp_path: Path
) -> None:
    paths, labels = photos.paths[:6], photos.labels[:6]
    first = calibrate(exported.path, paths, labels, cache=tmp_path)
    first.cache.write_bytes(first.cache.read_bytes()[:100])
    assert not calibrate(exported.path, paths, labels, cache=tmp_path).reused
    other = calibrate(exported.path, paths[:5], labels[:5], cache=tmp_path)
    assert not other.reused
    assert [path.name for path in tmp_path.iterdir()] == [other.cache.name]


def test_broken_photos_are_left_out_and_none_at_all_is_an_error(
    exported: Exported, photos: Photos, tmp_path: Path
) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    paths = [tmp_path / "text.jpg", *photos.paths[:2], tmp_path / "gone.jpg"]
    seen = calibrate(exported.path, paths, ["a"] * 4, cache=tmp_path / "cache")
    assert sorted(seen.paths) == sorted(map(str, photos.paths[:2]))
    for nothing in ([], paths[:1]):
        with pytest.raises(DataError, match="no photo to calibrate"):
            calibrate(exported.path, nothing, ["a"] * len(nothing), cache=tmp_path / "cache")
