"""Two processes with half a batch each are one with the whole; they stop, fail and end together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from embedkit import losses
from embedkit.data import PhotoSet
from embedkit.errors import UsageError
from embedkit.train import checkpoint, train
from embedkit.train.distributed import World
from tests.tiny_recipe import tiny_recipe
from tests.train.dividing import found_rates, method_names


@dataclass(frozen=True)
class _Pair:
    folder: Path
    codes: tuple[int, int]
    told: tuple[str, str]

    def found(self, rank: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / f"found-{rank}.json").read_text())
        return found


@pytest.fixture(scope="module")
def pair(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> _Pair:
    """What two processes, started as torchrun does, have found and left behind."""
    folder = tmp_path_factory.mktemp("pair")
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.train.pair", str(pictures), str(folder), *_ports(4)]
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        told = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = (processes[0].returncode, processes[1].returncode)
    return _Pair(folder, codes, (told[0], told[1]))


def _ports(count: int) -> list[str]:
    """Free ones, as far as one can know."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def test_every_loss_has_the_gradient_of_one_process(pair: _Pair) -> None:
    for kind in ("losses", "chunks"):
        apart = pair.found()[kind]
        assert apart.keys() == set(losses.names())
        assert {name: far for name, far in apart.items() if far > 1e-12} == {}


def test_every_method_has_it_or_is_refused(pair: _Pair) -> None:
    apart = pair.found()["methods"]
    assert apart.keys() == set(method_names())
    sentence = "training in several processes needs frozen BatchNorm"
    refused = {name for name, far in apart.items() if far == sentence}
    assert {n: far for n, far in apart.items() if n not in refused and far > 1e-5} == {}  # float32
    assert len(refused) < len(apart) / 2


def test_both_see_all_rows_in_order_and_agree(pair: _Pair) -> None:
    for rank in (0, 1):
        found = pair.found(rank)
        for count in (1, 2, 5):
            assert found[f"gathered {count}"] == [float(row) for row in range(count)]
        assert (found["one says yes"], found["all say no"]) == (True, False)
        assert found["of the leader"] == "made by 0"
        assert found["aligned"] == 5
    assert pair.found(0)["refused"] == "the photos are no good"
    assert pair.found(1)["refused"] == "the first process of this training has failed"


def test_a_stop_of_one_stops_both_and_one_process_goes_on_with_the_run(
    pair: _Pair, photos: PhotoSet, tmp_path: Path
) -> None:
    assert (pair.folder / "stopped-0").exists()
    assert (pair.folder / "stopped-1").exists()
    recipe = tiny_recipe(ema=0.5)
    saved = json.loads((pair.folder / "run" / "run.json").read_text())
    assert (saved["processes"], saved["steps"]) == (2, 4)
    run = train(recipe, photos, pair.folder / "run", device="cpu", resume=True)
    alone = train(recipe, photos, tmp_path / "alone", device="cpu")
    assert run.record["steps"] == alone.record["steps"] == 6
    one, other = (
        checkpoint.read_checkpoint(each.path / "last.safetensors").tensors for each in (run, alone)
    )
    assert one.keys() == other.keys()
    # Adam turns rounding of the smallest gradients into steps; the lengths agree.
    for name in ("network/head.weight", "average/head.weight"):
        assert float((one[name] - other[name]).norm() / other[name].norm()) < 1e-2


def test_both_find_the_learning_rates_of_one_process(
    pair: _Pair, photos: PhotoSet, tmp_path: Path
) -> None:
    one, other = (json.loads((pair.folder / f"rates-{rank}.json").read_text()) for rank in (0, 1))
    assert one == other
    assert one["agreed"] == [one["factor"]]
    alone = found_rates(photos, tmp_path / "alone")
    assert one["reason"] == alone["reason"] == ""
    assert one["factor"] == alone["factor"] != 1
    # Up to where Adam has turned rounding into steps.
    assert one["losses"][:30] == pytest.approx(alone["losses"][:30], rel=1e-2)


def test_when_one_dies_the_other_says_so_and_fails(pair: _Pair) -> None:
    assert pair.codes == (1, 9)
    told = pair.told[0]
    assert "error: another process of this training has ended" in told.replace("\n", " ")
    assert "Traceback" not in told
    assert "--resume" in told


def test_only_the_first_one_talks(pair: _Pair) -> None:
    assert "2 processes" in pair.told[0]
    assert pair.told[1] == ""


@pytest.mark.parametrize("count", [0, 1, 3, 4, 64, 67])
def test_parts_are_all_of_it_and_equal_but_for_one(count: int) -> None:
    rows = list(range(count))
    parts = [rows[World(rank, 4).part(count)] for rank in range(4)]
    if count < 4:
        assert parts == [rows] * 4
    else:
        assert [row for part in parts for row in part] == rows
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_alone_nothing_is_exchanged() -> None:
    world, rows = World(), torch.ones(3, 2)
    assert world.gather(rows, 3) is rows
    assert world.any(True)
    assert not world.any(False)
    assert world.of_leader(lambda: 7) == 7
    assert world.device("cuda:3") == "cuda:3"
    assert world.workers(None) is None
    world.average_gradients([])
    world.align(torch.nn.Linear(1, 1))


def test_each_process_has_its_own_gpu_and_share_of_the_machine() -> None:
    world = World(rank=5, size=8, local_rank=1, local_size=4)
    assert world.device("cuda") == "cuda:1"
    assert world.device("cpu") == "cpu"
    assert world.workers(3) == 3
    assert world.workers(None) == max(1, (os.cpu_count() or 1) // 4)
    with pytest.raises(UsageError, match="8 processes cannot share cuda:0"):
        world.device("cuda:0")


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match="not all that belongs to it"):
        World.told()


@pytest.mark.slow
def test_torchrun_trains_and_leaves_a_run(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(tiny_recipe().to_toml())
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "embedkit.cli.main", "train", str(pictures), "--config", "recipe.toml"]
    command += ["--device", "cpu", "--json"]
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["steps"] == 6
    assert (tmp_path / "runs" / "last" / "best.safetensors").exists()
