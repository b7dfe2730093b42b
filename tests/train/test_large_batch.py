"""Batches in chunks have the gradient of the whole batch, for every loss, in constant memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from embedkit import losses
from embedkit.data import PhotoSet
from embedkit.errors import UsageError
from embedkit.train import Run, train
from embedkit.train.distributed import World
from embedkit.train.large_batch import check_divisible, divided, in_chunks
from tests.tiny_recipe import tiny_recipe
from tests.train.dividing import (
    farthest,
    loss_gradients,
    method_gradients,
    method_names,
    tiny_batch,
    tiny_network,
)


@pytest.mark.parametrize("name", losses.names())
def test_every_loss_has_the_gradient_of_the_whole_batch(name: str) -> None:
    whole = loss_gradients(name)
    for chunk in (1, 5, 12, 100):
        assert farthest(whole, loss_gradients(name, chunk=chunk)) < 1e-12


@pytest.mark.parametrize("name", method_names())
def test_every_method_has_it_too_or_is_refused(name: str, photos: PhotoSet) -> None:
    try:
        chunked = method_gradients(name, photos, chunk=4)
    except UsageError as error:
        if error.what != "--chunk needs frozen BatchNorm":
            raise
        return
    assert farthest(method_gradients(name, photos), chunked) < 1e-5  # in float32


@pytest.mark.parametrize("count", [0, 1, 6, 7])
def test_any_number_of_images_is_embedded_in_chunks_of_three(count: int) -> None:
    seen = []

    def embed(pixels: Tensor) -> Tensor:
        seen.append(len(pixels))
        return pixels.float() * 2

    pixels = torch.arange(count, dtype=torch.uint8)
    assert in_chunks(embed, pixels, 3).tolist() == [2.0 * value for value in range(count)]
    assert max(seen) <= 3


def test_both_passes_draw_the_same_random_numbers() -> None:
    """A loss that is linear in the embeddings shows the dropout of each pass by itself."""
    network = tiny_network(dropout=0.5).train()
    batch = tiny_batch(6)
    torch.manual_seed(4)
    embeddings = divided(network, batch, chunk=2, world=World())(batch.pixels)
    embeddings.sum().backward()
    torch.manual_seed(4)
    again = tiny_network(dropout=0.5).train()
    torch.manual_seed(4)
    by_hand = torch.cat([again(piece) for piece in batch.pixels.split(2)])
    by_hand.sum().backward()
    assert torch.equal(embeddings, by_hand)
    ours = [part.grad for part in network.parameters()]
    theirs = [part.grad for part in again.parameters()]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_what_a_method_sees_is_its_own_network() -> None:
    network = tiny_network()
    batch = tiny_batch(4)
    seen = divided(network, batch, chunk=2, world=World())
    assert type(seen) is type(network)
    assert seen.head is network.head
    assert [*seen.parameters()] == [*network.parameters()]
    assert torch.equal(seen.features(batch.pixels), network.features(batch.pixels))
    assert divided(network, batch, chunk=None, world=World()) is network


def test_learning_batch_norm_is_refused_and_other_networks_are_not(
    photos: PhotoSet, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="--chunk needs frozen BatchNorm"):
        train(tiny_recipe(chunk=4, freeze_batch_norm=False), photos, tmp_path / "run", device="cpu")
    check_divisible(tiny_network(), chunk=4, world=World())


def test_a_training_in_chunks_is_the_training(photos: PhotoSet, tmp_path: Path) -> None:
    runs = [
        train(tiny_recipe(chunk=chunk, epochs=1), photos, tmp_path / str(chunk), device="cpu")
        for chunk in (None, 4)
    ]
    whole, chunked = (run.network().head.weight.detach() for run in runs)
    # Adam turns rounding of the smallest gradients into steps; the lengths agree.
    assert float((whole - chunked).norm() / whole.norm()) < 1e-2
    assert Run.load(tmp_path / "4").recipe.chunk == 4


def test_peak_memory_does_not_grow_with_the_batch() -> None:
    # Each tensor its own mapping, given back when freed: what is resident is what is alive.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _PEAKS], capture_output=True, text=True, check=True, env=env
    )
    peaks = json.loads(done.stdout)
    assert peaks["whole 64"] > 3 * peaks["chunks 64"]
    assert peaks["chunks 256"] < 1.2 * peaks["chunks 64"] + 4e6


_PEAKS = """
import json
from pathlib import Path
from embedkit.train.distributed import World
from embedkit.train.large_batch import divided
from tests.train.dividing import tiny_batch, tiny_network

def step(count, chunk):
    network = tiny_network()
    batch = tiny_batch(count, side=48)
    seen = divided(network, batch, chunk=chunk, world=World())
    seen(batch.pixels).square().sum().backward()

def peak(count, chunk):
    Path("/proc/self/clear_refs").write_text("5")  # The high-water mark is now what is resident.
    before = resident()
    step(count, chunk)
    return resident() - before

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    return 1024 * int(value)

step(8, 8)
print(json.dumps({
    "whole 64": peak(64, None), "chunks 64": peak(64, 8), "chunks 256": peak(256, 8)
}))
"""
