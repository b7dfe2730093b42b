"""An exported file carries the thresholds that its own held-out vectors give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedkit.evaluate import calibrate
from embedkit.export import export_checked
from embedkit.index.threshold import Thresholds
from embedkit.runtime import Embedder
from tests.export.small import MakeNetwork


@pytest.mark.parametrize("count", [99, 104])
def test_thresholds_are_in_the_file_where_there_are_enough_photos(
    make_network: MakeNetwork, tmp_path: Path, count: int
) -> None:
    network, contract = make_network()
    labels = [f"class{n % 8}" for n in range(count)]
    photos = []
    for n in range(count):
        rng = np.random.default_rng(n % 8)
        pixels = rng.integers(0, 200, (16, 24, 3)) + np.random.default_rng(n).integers(0, 50, 3)
        photos.append(tmp_path / f"{n}.png")
        Image.fromarray(pixels.astype(np.uint8)).save(photos[-1])
    exported, _ = export_checked(network, contract, tmp_path / "model.onnx", photos, labels)
    with Embedder.load(tmp_path / "model.onnx", device="cpu") as embedder:
        assert embedder.contract.thresholds == exported.thresholds
        wanted = calibrate(embedder.embed(photos), labels)
        assert exported.thresholds == pytest.approx(wanted, abs=0.02)
        assert (Thresholds.for_search(embedder.contract) is not None) == (count >= 100)
