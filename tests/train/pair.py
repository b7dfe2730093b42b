"""One of two processes that train together; started twice by test_distributed.

    python -m tests.train.pair PHOTOS FOLDER PORT PORT PORT PORT

Whatever is found goes into FOLDER. One pair does everything, because starting PyTorch twice takes
longer than all of it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from embedkit import losses
from embedkit.cli.main import main as command_line
from embedkit.data import read_photos
from embedkit.errors import EmbedKitError, Interrupted, UsageError
from embedkit.train import train
from embedkit.train.distributed import World, joined
from tests.tiny_recipe import tiny_recipe
from tests.train.dividing import (
    farthest,
    found_rates,
    loss_gradients,
    method_gradients,
    method_names,
)
from tests.train.listener import Listener


def main() -> None:
    pictures, folder = Path(sys.argv[1]), Path(sys.argv[2])
    ports = iter(sys.argv[3:])
    torch.set_num_threads(1)
    os.environ["MASTER_PORT"] = next(ports)
    with joined() as world:
        found = _found(world, pictures)
    (folder / f"found-{world.rank}.json").write_text(json.dumps(found))

    # The first process is asked to stop after step 3; both do, after the next one.
    os.environ["MASTER_PORT"] = next(ports)
    stop = Listener(at_step={3: lambda: signal.raise_signal(signal.SIGINT)})
    try:
        train(tiny_recipe(ema=0.5), read_photos(pictures), folder / "run", reporter=stop)
    except Interrupted:
        (folder / f"stopped-{world.rank}").touch()

    os.environ["MASTER_PORT"] = next(ports)
    (folder / f"rates-{os.environ['RANK']}.json").write_text(
        json.dumps(found_rates(read_photos(pictures), folder / "rates"))
    )

    # The second one dies in its first step.
    os.environ["MASTER_PORT"] = next(ports)
    if world.rank == 1:
        World.average_gradients = lambda self, parameters: os._exit(9)  # type: ignore[method-assign]
    recipe = folder / f"recipe-{world.rank}.toml"
    recipe.write_text(tiny_recipe().to_toml())
    command_line(["train", str(pictures), "--config", str(recipe), "--runs", str(folder / "runs")])


def _found(world: World, pictures: Path) -> dict[str, Any]:
    """How far shared gradients are from those of one process, and what is agreed on."""
    found: dict[str, Any] = {"losses": {}, "chunks": {}, "methods": {}}
    for name in losses.names():
        whole = loss_gradients(name)
        found["losses"][name] = farthest(whole, loss_gradients(name, world=world))
        found["chunks"][name] = farthest(whole, loss_gradients(name, world=world, chunk=2))
    photos = read_photos(pictures)
    for name in method_names():
        try:
            shared = method_gradients(name, photos, world=world)
            found["methods"][name] = farthest(method_gradients(name, photos), shared)
        except UsageError as error:
            found["methods"][name] = error.what
    for count in (1, 2, 5):
        rows = torch.arange(float(count))[:, None]
        found[f"gathered {count}"] = world.gather(rows[world.part(count)], count)[:, 0].tolist()
    found["one says yes"] = world.any(world.rank == 1)
    found["all say no"] = world.any(False)
    found["of the leader"] = world.of_leader(lambda: f"made by {world.rank}")
    module = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(module.weight, world.rank + 5)
    world.align(module)
    found["aligned"] = float(module.weight.detach().mean())
    try:
        world.of_leader(_refuse)
    except EmbedKitError as error:
        found["refused"] = error.what
    return found


def _refuse() -> None:
    raise UsageError("the photos are no good")


if __name__ == "__main__":
    main()
