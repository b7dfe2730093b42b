"""A compiled backbone trains as the plain one; PyTorch traces it, but nothing is generated here."""

from __future__ import annotations

import json
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from embedkit.data import PhotoSet
from embedkit.models import create_backbone
from embedkit.models.folded import fold
from embedkit.models.taps import two_taps, watched
from embedkit.train import train
from tests.tiny_recipe import tiny_recipe


@pytest.fixture(autouse=True)
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the code generator, which needs a C++ compiler and minutes."""
    torch.compiler.reset()
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))


def test_it_is_the_same_training(photos: PhotoSet, tmp_path: Path) -> None:
    losses = {}
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        train(tiny_recipe(compile=compiled, epochs=2), photos, folder, device="cpu")
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses[compiled] = [row["loss"] for row in rows]
    assert losses[True] == losses[False]
    assert "compile = true" in (tmp_path / "True" / "config.toml").read_text()


def test_what_watches_a_compiled_backbone_sees_each_picture_anew() -> None:
    backbone = create_backbone("resnet10", weights="none", image_size=(64, 64)).eval()
    taps = list(two_taps(backbone, (64, 64)))
    pictures = torch.rand(2, 1, 3, 64, 64)
    with torch.no_grad():
        wanted = []
        for picture in pictures:
            with watched(backbone, taps) as maps:
                backbone(picture)
            wanted.append(maps[taps[0]])
        backbone.compile()
        for picture, expected in zip(pictures, wanted, strict=True):
            assert torch.allclose(backbone(picture), backbone(picture))
            with watched(backbone, taps) as maps:
                backbone(picture)
            assert torch.equal(maps[taps[0]], expected)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "resnet10"])
def test_it_is_compiled_in_one_piece(name: str) -> None:
    backbone = create_backbone(name, weights="none", image_size=(64, 64)).eval()
    assert fold(backbone.body) > 0  # as it is where BatchNorm is frozen
    backbone.compile()
    counters.clear()
    backbone(torch.zeros(2, 3, 64, 64)).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
