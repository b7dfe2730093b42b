"""Batches are the same whatever the threads and the cache, and `plain` is what the runtime sees."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from embedkit.data import Augment, PhotoLoader
from embedkit.data import loader as loader_module
from embedkit.data.resample import resample_on
from embedkit.errors import DataError
from embedkit.imaging import Pixels, Preprocess, decode, read_pixels

PREPROCESS = Preprocess(height=32, width=24)
AUGMENT = Augment()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Pictures of odd sizes and kinds, JPEGs large enough to be shrunk among them."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    paths = []
    for number, (width, height) in enumerate([(300, 200), (37, 411), (20, 20), (1, 1), (640, 480)]):
        coarse = rng.integers(0, 256, size=(7, 9, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        paths.append(folder / f"{number}.{'png' if number % 2 else 'jpg'}")
        picture.save(paths[-1])
    return paths


def make_loader(
    files: list[Path],
    *,
    augment: Augment | None = AUGMENT,
    seed: int = 0,
    workers: int = 2,
    cache_bytes: int = 1 << 30,
) -> PhotoLoader:
    return PhotoLoader(
        files, PREPROCESS, augment=augment, seed=seed, workers=workers, cache_bytes=cache_bytes
    )


LISTS = [[0, 1, 2], [4, 3], [0, 0, 0, 0], [], [2]]


def epoch_of(loader: PhotoLoader, epoch: int = 0, start: int = 0) -> list[Pixels]:
    return list(loader.batches(LISTS, epoch=epoch, start=start))


def same(left: list[Pixels], right: list[Pixels]) -> bool:
    return len(left) == len(right) and all(map(np.array_equal, left, right))


def test_batches_come_in_order_as_uint8(files: list[Path]) -> None:
    got = epoch_of(make_loader(files))
    assert [batch.shape for batch in got] == [(len(rows), 32, 24, 3) for rows in LISTS]
    assert all(batch.dtype == np.uint8 and batch.flags.writeable for batch in got)


@pytest.mark.parametrize("workers", [1, 3, 8])
@pytest.mark.parametrize("cache_bytes", [0, 40_000, 1 << 30])
def test_neither_threads_nor_cache_change_a_pixel(
    files: list[Path], workers: int, cache_bytes: int
) -> None:
    loader = make_loader(files, workers=workers, cache_bytes=cache_bytes)
    expected = epoch_of(make_loader(files, workers=1, cache_bytes=0))
    assert same(epoch_of(loader), expected)
    assert same(epoch_of(loader), expected)  # again, now from the cache


def test_each_photo_is_augmented_by_seed_epoch_step_and_place_alone(files: list[Path]) -> None:
    got = epoch_of(make_loader(files, seed=5), epoch=3)
    for step, rows in enumerate(LISTS):
        for place, row in enumerate(rows):
            picture = np.asarray(decode(files[row]))
            side = AUGMENT.decode_size(PREPROCESS)
            if min(picture.shape[:2]) > side:
                continue  # shrunk first: the next test
            rng = np.random.default_rng([5, 3, step, place])
            assert np.array_equal(got[step][place], AUGMENT(picture, PREPROCESS, rng))
    assert not np.array_equal(got[2][0], got[2][1])  # one photo, two places
    assert not same(got, epoch_of(make_loader(files, seed=5), epoch=4))
    assert not same(got, epoch_of(make_loader(files, seed=6), epoch=3))


def test_shrinking_first_changes_a_crop_by_very_little(files: list[Path]) -> None:
    got = epoch_of(make_loader(files))[1][0]  # 640 x 480, crops of a 32 x 24 input
    full = AUGMENT(np.asarray(decode(files[4])), PREPROCESS, np.random.default_rng([0, 0, 1, 0]))
    assert np.abs(got.astype(int) - full.astype(int)).mean() < 4


def test_an_epoch_taken_up_in_the_middle_goes_on_as_it_would_have(files: list[Path]) -> None:
    whole = epoch_of(make_loader(files), epoch=2)
    assert same(epoch_of(make_loader(files), epoch=2, start=2), whole[2:])
    assert epoch_of(make_loader(files), start=len(LISTS)) == []


def test_plain_is_what_the_runtime_sees_bit_for_bit(files: list[Path]) -> None:
    loader = make_loader(files)
    epoch_of(loader)  # whatever the training cache holds by now
    for _ in range(2):
        batches = list(loader.plain([4, 0, 1, 2, 3], 2))
        assert [len(batch) for batch in batches] == [2, 2, 1]
        expected = [read_pixels(files[row], PREPROCESS) for row in (4, 0, 1, 2, 3)]
        assert np.array_equal(np.concatenate(batches), np.stack(expected))
    assert list(loader.plain([], 2)) == []
    with pytest.raises(ValueError, match="batch must be at least 1"):
        loader.plain([0], 0)


def test_without_augmentation_training_sees_plain_pixels(files: list[Path]) -> None:
    got = epoch_of(make_loader(files, augment=None))
    expected = list(make_loader(files).plain([0, 1, 2], 3))
    assert np.array_equal(got[0], expected[0])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are decoded for training from here on."""
    calls: list[Path] = []

    def counted(path: Path, *, shortest_side: int | None = None) -> Image.Image:
        calls.append(path)
        return decode(path, shortest_side=shortest_side)

    monkeypatch.setattr(loader_module, "decode", counted)
    return calls


def test_a_photo_is_decoded_once_while_the_cache_has_room(
    files: list[Path], calls: list[Path]
) -> None:
    loader = make_loader(files, workers=1)
    for epoch in range(3):
        epoch_of(loader, epoch=epoch)
    assert sorted(calls) == sorted(files)
    without = make_loader(files, workers=1, cache_bytes=0)
    epoch_of(without)
    assert len(calls) == len(files) + sum(map(len, LISTS))


def test_a_photo_is_kept_no_larger_than_its_crops_need(tmp_path: Path, calls: list[Path]) -> None:
    Image.new("RGB", (500, 400)).save(tmp_path / "large.png")
    side = AUGMENT.decode_size(PREPROCESS)
    needed = side * round(side * 500 / 400) * 3
    for room, decoded in ((needed, 1), (needed - 1, 3)):
        calls.clear()
        loader = make_loader([tmp_path / "large.png"], workers=1, cache_bytes=room)
        assert len(list(loader.batches([[0], [0], [0]], epoch=0))) == 3
        assert len(calls) == decoded


def test_leaving_early_stops_the_threads(files: list[Path]) -> None:
    before = threading.active_count()
    stream = make_loader(files, workers=4).batches([[0, 1, 2]] * 50, epoch=0)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_only_the_next_two_batches_are_made_ahead(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    loader = make_loader([files[step % len(files)] for step in range(10)])
    read = loader._large_of

    def noted(row: int) -> Pixels:
        asked.append(row)
        return read(row)

    monkeypatch.setattr(loader, "_large_of", noted)
    stream = loader.batches([[step] for step in range(10)], epoch=0)
    for step in range(10):
        next(stream)
        give_up = time.monotonic() + 30
        while max(asked) < min(step + 2, 9) and time.monotonic() < give_up:
            time.sleep(0.001)
        assert max(asked) == min(step + 2, 9)


def test_crops_resampled_together_on_a_device_are_the_same_pictures(files: list[Path]) -> None:
    loader = make_loader(files)
    for start in (0, 2):
        expected = epoch_of(loader, epoch=1, start=start)
        stream = loader.cuts(LISTS, epoch=1, start=start)
        got = [resample_on(torch.device("cpu"), cuts, PREPROCESS).numpy() for cuts in stream]
        assert same(got, expected)
    none = [list(cuts) for cuts in loader.cuts(LISTS, epoch=1, part=lambda size: slice(0, 0))]
    assert none == [[] for _ in LISTS]
    assert resample_on(torch.device("cpu"), [], PREPROCESS).shape == (0, 32, 24, 3)
    with pytest.raises(ValueError, match="there is none"):
        make_loader(files, augment=None).cuts(LISTS, epoch=1)


def test_a_photo_that_vanishes_during_training_is_named(tmp_path: Path, files: list[Path]) -> None:
    lost = tmp_path / "lost.jpg"
    for stream in (
        make_loader([*files, lost]).batches([[0], [1, 5]], epoch=0),
        make_loader([*files, lost]).plain([0, 5], 1),
    ):
        next(stream)
        with pytest.raises(DataError, match=r"lost\.jpg' can no longer be read"):
            next(stream)


def test_no_worker_is_refused(files: list[Path]) -> None:
    with pytest.raises(ValueError, match="workers must be at least 1"):
        make_loader(files, workers=0)
