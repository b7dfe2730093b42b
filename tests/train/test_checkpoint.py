"""A checkpoint comes back exactly, is whole or absent, and is not trusted blindly."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from embedkit.errors import EmbedKitError, MismatchError
from embedkit.train.checkpoint import pack, read_checkpoint, unpack, write_checkpoint


class _Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proxies = nn.Parameter(torch.randn(4, 3))


def _network() -> nn.Module:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(3))
    network(torch.randn(2, 3, 5, 5))
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _train(steps: int) -> tuple[nn.Module, _Loss, torch.optim.AdamW]:
    torch.manual_seed(0)
    network, loss = _network(), _Loss()
    optimizer = torch.optim.AdamW([{"params": [*network.parameters(), *loss.parameters()]}])
    for _ in range(steps):
        _step(network, loss, optimizer)
    return network, loss, optimizer


def _step(network: nn.Module, loss: _Loss, optimizer: torch.optim.Optimizer) -> None:
    value = (network(torch.randn(2, 3, 5, 5)) @ loss.proxies.T).square().sum()
    optimizer.zero_grad()
    value.backward()
    optimizer.step()


def _bytes(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: t.contiguous().numpy().tobytes() for name, t in tensors.items()}


def test_a_training_goes_on_from_its_file_bit_for_bit(tmp_path: Path) -> None:
    network, loss, optimizer = _train(3)
    write_checkpoint(tmp_path / "a", pack(network, loss, optimizer), {"epoch": 3})
    again, again_loss, again_optimizer = _train(0)
    saved = read_checkpoint(tmp_path / "a")
    unpack(saved.tensors, again, again_loss, again_optimizer)
    assert saved.state == {"epoch": 3}
    for parts in ((network, loss, optimizer), (again, again_loss, again_optimizer)):
        torch.manual_seed(1)
        _step(*parts)
    assert _bytes(pack(network, loss, optimizer)) == _bytes(
        pack(again, again_loss, again_optimizer)
    )


def test_the_optimisers_state_keeps_the_parameters_memory_format(tmp_path: Path) -> None:
    network, loss, optimizer = _train(1)
    write_checkpoint(tmp_path / "a", pack(network, loss, optimizer), {})
    unpack(read_checkpoint(tmp_path / "a").tensors, network, loss, optimizer)
    weight = next(network.parameters())
    assert optimizer.state[weight]["exp_avg"].stride() == weight.stride()


@pytest.mark.parametrize(
    "state", [{}, {"text": "ü \x00 \ud800"}, {"number": 1e-300, "none": None, "list": [0.1, 2**60]}]
)
def test_scalars_come_back_exactly(tmp_path: Path, state: dict[str, Any]) -> None:
    write_checkpoint(tmp_path / "a", {"x": torch.zeros(0)}, state)
    assert read_checkpoint(tmp_path / "a").state == state


def test_every_kind_of_tensor_comes_back(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(2, 0),
        "half": torch.randn(3).half(),
        "bfloat16": torch.randn(3).bfloat16(),
        "whole": torch.tensor([2**62]),
        "turned": torch.randn(3, 4).T,
        "nan": torch.tensor([float("nan"), float("inf")]),
    }
    write_checkpoint(tmp_path / "a", tensors, {})
    for name, tensor in read_checkpoint(tmp_path / "a").tensors.items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor.nan_to_num(), tensors[name].nan_to_num())


def _flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


def test_one_flipped_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, {"x": torch.arange(5.0), "y": torch.tensor(1)}, {"epoch": 1})
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    for place in [*range(0, header, 7), *range(header, len(good))]:
        path.write_bytes(good)
        _flip(path, place)
        try:
            saved = read_checkpoint(path)
        except MismatchError:
            continue
        # Only the run's own scalars are not covered: a changed digit there is still valid JSON.
        assert place < header
        assert torch.equal(saved.tensors["x"], torch.arange(5.0))


@pytest.mark.parametrize("size", [0, 1, 8, 100, -1])
def test_a_truncated_file_is_a_mismatch(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, {"x": torch.arange(50.0)}, {})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(MismatchError, match="damaged"):
        read_checkpoint(path)


def test_foreign_and_absent_files_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "absent")
    with pytest.raises(MismatchError, match="damaged"):
        read_checkpoint(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(MismatchError, match="no checkpoint of embedkit"):
        read_checkpoint(tmp_path / "foreign")
    document = json.dumps({"schema": "embedkit.checkpoint/9", "digest": "", "state": {}})
    save_file({"x": torch.zeros(1)}, tmp_path / "newer", {"embedkit.checkpoint": document})
    with pytest.raises(MismatchError, match="another embedkit"):
        read_checkpoint(tmp_path / "newer")
    save_file({"x": torch.zeros(1)}, tmp_path / "torn", {"embedkit.checkpoint": document[:-9]})
    with pytest.raises(MismatchError, match="damaged"):
        read_checkpoint(tmp_path / "torn")


def test_another_network_is_a_mismatch() -> None:
    network, loss, optimizer = _train(1)
    tensors = pack(network, loss, optimizer)
    with pytest.raises(MismatchError, match="another network"):
        unpack(tensors, nn.Linear(3, 3), None, None)
    other = _Loss()
    other.proxies = nn.Parameter(torch.randn(5, 3))
    with pytest.raises(MismatchError, match=r"another method(.|\n)*proxies"):
        unpack(tensors, network, other, None)
    frozen = torch.optim.AdamW(loss.parameters())
    with pytest.raises(MismatchError, match="which this run does not"):
        unpack(tensors, network, loss, frozen)


def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.safetensors"
    write_checkpoint(path, {"x": torch.zeros(3)}, {"epoch": 1})

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EmbedKitError, match="could not be written"):
        write_checkpoint(path, {"x": torch.ones(3)}, {"epoch": 2})
    assert read_checkpoint(path).state == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.safetensors"]


def test_a_number_that_json_does_not_know_is_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_checkpoint(tmp_path / "a", {}, {"loss": float("nan")})
    assert not list(tmp_path.iterdir())
