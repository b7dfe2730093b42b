"""The averaged weights follow the network, are what is measured and kept, and survive a stop."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from embedkit.data import PhotoSet
from embedkit.errors import Interrupted, UsageError
from embedkit.train import checkpoint, train
from embedkit.train.ema import WeightAverage
from tests.tiny_recipe import tiny_recipe
from tests.train.dividing import tiny_network
from tests.train.listener import Listener


def test_it_is_the_sum_written_out() -> None:
    network = tiny_network()
    average = WeightAverage(network, 0.5)
    weight = network.head.weight
    expected = weight.detach().clone()
    for step in range(1, 30):
        with torch.no_grad():
            weight.add_(step)
        average.update(network, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.detach()
    torch.testing.assert_close(average.network.head.weight.detach(), expected)
    assert not average.network.training
    assert not any(part.requires_grad for part in average.network.parameters())


def test_whole_numbers_are_copied() -> None:
    network = tiny_network()
    network.register_buffer("count", torch.tensor(1))
    average = WeightAverage(network, 0.9)
    network.count += 6
    average.update(network, 1)
    assert average.network.count == 7


def test_without_an_average_nothing_of_it_is_saved(photos: PhotoSet, tmp_path: Path) -> None:
    run = train(tiny_recipe(epochs=1), photos, tmp_path / "run", device="cpu")
    saved = checkpoint.read_checkpoint(run.path / "last.safetensors").tensors
    assert not [name for name in saved if name.startswith("average/")]


def test_the_average_is_what_is_kept_and_a_stop_changes_no_bit(
    photos: PhotoSet, tmp_path: Path
) -> None:
    # With BatchNorm that learns: its statistics are averaged too.
    recipe = tiny_recipe(ema=0.9, clip_gradient=0.5, freeze_batch_norm=False, val_share=0)
    straight = train(recipe, photos, tmp_path / "straight", device="cpu").path
    stop = Listener(at_step={3: lambda: signal.raise_signal(signal.SIGINT)})
    with pytest.raises(Interrupted):
        train(recipe, photos, tmp_path / "again", device="cpu", reporter=stop)
    again = train(recipe, photos, tmp_path / "again", device="cpu", resume=True).path
    for name in ("best", "last"):
        one, other = (
            checkpoint.read_checkpoint(run / f"{name}.safetensors").tensors
            for run in (straight, again)
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    last = checkpoint.read_checkpoint(straight / "last.safetensors").tensors
    best = checkpoint.read_checkpoint(straight / "best.safetensors").tensors
    for name in ("head.weight", "backbone.body.features.0.1.running_mean"):
        assert torch.equal(best[f"network/{name}"], last[f"average/{name}"])
    assert not torch.equal(last["average/head.weight"], last["network/head.weight"])


def test_a_clipped_gradient_is_told_and_moves_less(photos: PhotoSet, tmp_path: Path) -> None:
    run = train(tiny_recipe(clip_gradient=1e-9, epochs=1), photos, tmp_path / "run", device="cpu")
    assert run.record["best"]["stats"]["gradient_norm"] > 1e-6
    last = checkpoint.read_checkpoint(run.path / "last.safetensors").tensors
    squares = last["optimizer/exp_avg_sq/network/head.weight"].sum()
    assert 0 < squares < 1e-20  # of gradients of length 1e-9 together


@pytest.mark.parametrize("changes", [{"ema": 1.0}, {"ema": -0.1}, {"clip_gradient": 0.0}])
def test_impossible_settings_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=r"ema|clip_gradient"):
        tiny_recipe(**changes)
