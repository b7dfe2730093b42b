"""Peak memory of a training step by batch: whole, in chunks, and with a memory of earlier batches.

    python -m benchmarks.large_batch [--batches 256 1024 4096] [--chunk 64] [--backbone NAME]

A step is forward, loss and backward in float32 on the CPU, with frozen BatchNorm, each in a process
of its own. Counted is the peak of its resident set above what was there before the step: weights
and the batch's pixels are not in it, the weights' gradients are.

whole       all images through the network at once.
chunks      as with `--chunk`: the same gradient, a part at a time.
memory      as with `--memory-bank`: a batch of one chunk, compared with B embeddings that are kept.
loss        the loss of B embeddings and its gradient, without a network.

What grows with B in chunks is named beside it: the pixels, of which training holds the batch in use
and the two that are being made, the embeddings with their gradients, and the loss, which for losses
of pairs takes matrices of B x B.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.figures import machine, save
from embedkit import losses
from embedkit.losses import CrossBatchMemory
from embedkit.methods import Batch
from embedkit.models import freeze_batch_norm
from embedkit.train import Recipe
from embedkit.train.distributed import World
from embedkit.train.large_batch import divided
from embedkit.train.run import create_untrained

__all__ = ["measure", "proportional"]

_KINDS = ("whole", "chunks", "memory", "loss")
# One of pairs, and one that compares every image with class vectors only and so needs no memory.
_MEASURED = {"rll": _KINDS, "proxy-anchor": ("whole", "chunks")}
_PER_CLASS, _CLASSES = 4, 1000
_BATCHES_HELD = 3


def measure(kind: str, count: int, *, loss: str, chunk: int, recipe: Recipe) -> float:
    """Peak MiB of one step, in a process of its own."""
    asked = [kind, str(count), loss, str(chunk), recipe.backbone, str(recipe.image_size)]
    command = [sys.executable, "-m", "benchmarks.large_batch", "--worker", *asked]
    # Each tensor its own mapping, given back when freed: what is resident is what is alive.
    exact = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, check=True, text=True, env={**os.environ, **exact}
    )
    return round(float(done.stdout), 1)


def proportional(count: int, recipe: Recipe) -> dict[str, float]:
    """MiB of what is kept of every image of a batch of `count`, whatever the chunk."""
    pixels = count * recipe.image_size**2 * 3
    return {
        "pixels": _mib(pixels),
        "pixels held while training": _mib(pixels * _BATCHES_HELD),
        "embeddings and their gradients": _mib(count * recipe.dim * 4 * 2),
    }


def _recipe(backbone: str, side: int) -> Recipe:
    return Recipe(backbone=backbone, weights="none", image_size=side)


def _step(kind: str, count: int, name: str, chunk: int, recipe: Recipe) -> Callable[[], None]:
    """One step, with all that a training has before it in place."""
    torch.manual_seed(0)
    sizes = {"num_classes": _CLASSES, "embedding_dim": recipe.dim}
    loss = losses.create(name, **(sizes if losses.needs_classes(name) else {}))
    if kind == "loss":
        rows = torch.randn(count, recipe.dim, requires_grad=True)
        return lambda: _backward(loss(rows, _labels(count)))
    if kind == "memory":
        loss = CrossBatchMemory(loss, size=count, embedding_dim=recipe.dim)
        loss.rows.normal_()
        loss.labels.copy_(_labels(count))
        loss.count.fill_(count)
    network = create_untrained(recipe, weights="none")
    freeze_batch_norm(network)
    network.train()
    images = chunk if kind == "memory" else count
    pixels = torch.randint(
        0, 256, (images, recipe.image_size, recipe.image_size, 3), dtype=torch.uint8
    )
    batch = Batch(pixels, torch.arange(images), _labels(images), None, 0, 0)
    seen = divided(network, batch, chunk=chunk if kind == "chunks" else None, world=World())
    return lambda: _backward(loss(seen(pixels), batch.labels))


def _backward(value: Tensor) -> None:
    torch.autograd.backward(value)


def _labels(count: int) -> Tensor:
    return torch.arange(count) // _PER_CLASS % _CLASSES


def _peak(step: Callable[[], None]) -> float:
    # 5: set the high-water mark to what is resident now (Linux, proc(5)).
    Path("/proc/self/clear_refs").write_text("5")
    before = _high_water()
    step()
    return _mib(_high_water() - before)


def _high_water() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    return 1024 * int(value)


def _mib(count: float) -> float:
    return round(count / 2**20, 1)


def _worker(kind: str, count: str, loss: str, chunk: str, backbone: str, side: str) -> None:
    recipe = _recipe(backbone, int(side))
    # PyTorch's own set-up, once.
    _step("loss", 8, loss, 8, recipe)()
    _step("chunks", 8, loss, 4, recipe)()
    print(_peak(_step(kind, int(count), loss, int(chunk), recipe)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--backbone", default="mobilenet_v3_small")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--worker", nargs=6, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        _worker(*asked.worker)
        return
    recipe = _recipe(asked.backbone, asked.image_size)
    found: list[dict[str, Any]] = []
    print(f"{'MiB':<14}{'B':>6}" + "".join(f"{kind:>9}" for kind in _KINDS))
    for name, kinds in _MEASURED.items():
        for count in asked.batches:
            peaks = {
                kind: measure(kind, count, loss=name, chunk=asked.chunk, recipe=recipe)
                for kind in kinds
            }
            found.append({"loss": name, "batch": count, "MiB": peaks})
            print(f"{name:<14}{count:>6}", end="")
            print("".join(f"{peaks.get(kind, '-'):>9}" for kind in _KINDS), flush=True)
    about = {"backbone": asked.backbone, "image_size": asked.image_size, "dim": recipe.dim}
    kept = {str(count): proportional(count, recipe) for count in asked.batches}
    figures = {**about, "chunk": asked.chunk, "peaks": found, "MiB that grow with B": kept}
    save("large_batch", {"machine": machine(), **figures})


if __name__ == "__main__":
    main()
