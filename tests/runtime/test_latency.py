"""Timing in turns, on calls whose length is known."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from embedkit.runtime import Embedder
from embedkit.runtime.latency import draw_photos, measure, take_turns
from tests.tiny_model import write_tiny_model


def test_calls_take_turns_and_each_round_begins_with_another() -> None:
    order: list[str] = []
    took = take_turns(
        [lambda: order.append("a"), lambda: order.append("b"), lambda: order.append("c")],
        seconds=0,
    )
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"  # the first round warms up
    assert [len(times) for times in took] == [3, 3, 3]


def test_times_are_those_of_the_calls() -> None:
    slow, fast = take_turns([lambda: time.sleep(0.01), lambda: None], seconds=0.05)
    assert len(slow) == len(fast) >= 3
    assert 0.01 <= np.median(slow) < 0.05
    assert np.median(fast) < 0.005


def test_no_calls_take_no_time() -> None:
    assert take_turns([], seconds=5) == []


def test_every_model_is_measured_at_every_batch_on_pixels_and_files(tmp_path: Path) -> None:
    photos = draw_photos(tmp_path, 3, (60, 40))
    names = ("first", "second")
    for seed, name in enumerate(names):
        write_tiny_model(tmp_path / f"{name}.onnx", seed=seed)
    embedders = {
        name: Embedder.load(tmp_path / f"{name}.onnx", device="cpu", threads=1) for name in names
    }
    cells = list(measure(embedders, [1, 5], photos=photos, workers=1, seconds=0.02))
    assert [(cell.batch, cell.decode, cell.model) for cell in cells] == [
        (batch, decode, name) for batch in (1, 5) for decode in (False, True) for name in names
    ]
    for cell in cells:
        assert cell.timing is not None
        assert cell.error == ""
        assert cell.timing.runs >= 3
        assert 0 < cell.timing.p50_ms <= cell.timing.p95_ms
        if not cell.decode:
            by_hand = 1000 * cell.batch / cell.timing.p50_ms
            assert cell.timing.images_per_second == pytest.approx(by_hand)
    assert [cell.ratio for cell in cells if cell.model == "first"] == [1.0] * 4
    for first, second in zip(cells[::2], cells[1::2], strict=True):
        assert first.timing is not None
        assert second.timing is not None
        rates = second.timing.images_per_second, first.timing.images_per_second
        assert second.ratio == pytest.approx(rates[0] / rates[1])


def test_streams_run_on_models_of_their_own_and_single_batches_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = draw_photos(tmp_path, 2, (60, 40))
    write_tiny_model(tmp_path / "m.onnx")
    one, other = (Embedder.load(tmp_path / "m.onnx", device="cpu", threads=1) for _ in range(2))
    met: list[tuple[bool, bool]] = []
    real = Embedder.embed_files

    def seen(self: Embedder, paths: Any, **options: Any) -> Any:
        met.append((isinstance(paths, itertools.cycle), self is other))
        return real(self, paths, **options)

    monkeypatch.setattr(Embedder, "embed_files", seen)
    list(measure({"m": one}, [2], photos=photos, streaming={"m": other}, seconds=0.02))
    assert set(met) == {(False, False), (True, True)}


def test_a_photo_that_cannot_be_read_is_an_error_of_its_cell_alone(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    write_tiny_model(tmp_path / "model.onnx")
    with Embedder.load(tmp_path / "model.onnx", device="cpu") as embedder:
        pixels, files = measure(
            {"model": embedder}, [1], photos=[tmp_path / "broken.jpg"], seconds=0.01
        )
    assert pixels.timing is not None
    assert files.timing is None
    assert files.ratio is None
    assert "no picture of a known format" in files.error


def test_drawn_photos_are_the_same_on_every_machine_and_as_large_as_asked(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    first, second = draw_photos(tmp_path, 2, (64, 48)), draw_photos(tmp_path / "again", 2, (64, 48))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert first[0].read_bytes() != first[1].read_bytes()
    with Image.open(first[0]) as image:
        assert (image.format, image.size) == ("JPEG", (64, 48))
