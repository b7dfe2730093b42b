"""What a CUDA machine does with embedkit, in one run of at most nine minutes.

    python -m benchmarks.gpu [--device cuda] [--toy]

training   images/s of our step for ResNet-50 and ViT-B/16 in bf16 on ready pixels, against the same
           backbone in a plain PyTorch loop with softmax, and against forward and backward alone.
chunks     how far the gradient of chunks is from that of the whole batch, in bf16, and peak memory.
onnx       images/s of the exported model at fp32 and fp16, and its least cosine with PyTorch;
           TensorRT where it is installed.
pipeline   images/s from JPEG files to vectors by number of decoding threads.
losses     seconds of a step of every loss, and of pytorch-metric-learning's where it is installed.

What cannot run is named with its reason. The figures go to benchmarks/results/gpu-<name>.json.
`--toy` runs every line at a toy size, on the CPU as well, and writes nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.figures import machine, save
from embedkit import losses
from embedkit.errors import EmbedKitError, MissingError
from embedkit.methods import Batch
from embedkit.models import EmbeddingNet, create_network, freeze_batch_norm, weights_hash
from embedkit.runtime import Embedder, ModelContract
from embedkit.runtime.latency import draw_photos, take_turns
from embedkit.train import Recipe
from embedkit.train.distributed import World
from embedkit.train.large_batch import divided

__all__ = ["SIZES", "TOY", "Sizes", "measure"]

_SECONDS = 540.0
_ALONE = World()


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the same lines run at any size."""

    backbones: tuple[str, ...] = ("resnet50", "vit_b_16")
    side: int = 224
    batch: int = 128
    dim: int = 512
    seconds: float = 6.0
    loss_batches: tuple[int, ...] = (512, 2048, 8192, 32768)
    loss_names: tuple[str, ...] = tuple(losses.names())
    loss_seconds: float = 0.4
    chunk_batches: tuple[int, ...] = (128, 512)
    chunk: int = 64
    deployed: str = "resnet50"
    engine_batches: tuple[int, ...] = (1, 8, 64)
    photos: int = 512
    photo_size: tuple[int, int] = (1024, 768)
    workers: tuple[int, ...] = (1, 2, 4, 8, 16)


SIZES = Sizes()
TOY = Sizes(
    backbones=("mobilenet_v3_small",),
    side=32,
    batch=4,
    dim=8,
    seconds=0.01,
    loss_batches=(8, 16),
    loss_names=("rll", "softmax"),
    loss_seconds=0.01,
    chunk_batches=(4, 8),
    chunk=2,
    deployed="mobilenet_v3_small",
    engine_batches=(1, 2),
    photos=4,
    photo_size=(40, 30),
    workers=(1, 2),
)


def measure(sizes: Sizes, device: torch.device, *, seconds: float = _SECONDS) -> dict[str, Any]:
    """All parts; one that fails, or for which no time is left, leaves its reason in ``skipped``."""
    end = time.monotonic() + seconds
    found: dict[str, Any] = {"skipped": {}}
    for part in (training, chunks, engines, pipeline, loss_steps):
        rows = found.setdefault(part.__name__, [])
        print(part.__name__, flush=True)
        try:
            for row in part(sizes, device):
                rows.append(row)
                print("  " + "  ".join(f"{k} {_short(v)}" for k, v in row.items()), flush=True)
                if "skipped" in row:
                    found["skipped"][f"{part.__name__} {row['case']}"] = row["skipped"]
                if time.monotonic() > end:
                    found["skipped"][part.__name__] = "the rest: no time was left"
                    break
        except (ImportError, EmbedKitError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            found["skipped"][part.__name__] = reason
            print(f"  skipped: {reason}", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


# --- training --------------------------------------------------------------------------------


def training(sizes: Sizes, device: torch.device) -> Iterator[dict[str, Any]]:
    """Images per second of three steps that take turns."""
    for backbone in sizes.backbones:
        batch = _batch(sizes.batch, sizes, device)
        steps = {
            "embedkit": _our_step(backbone, batch, sizes, device),
            "plain loop": _plain_step(backbone, batch, sizes, device),
            "forward and backward": _bound(backbone, batch, sizes, device),
        }
        took = take_turns([_waited(step, device) for step in steps.values()], seconds=sizes.seconds)
        rates = {
            name: sizes.batch / statistics.median(times)
            for name, times in zip(steps, took, strict=True)
        }
        yield {
            "case": backbone,
            "images/s": rates,
            "of plain loop": rates["embedkit"] / rates["plain loop"],
            "of bound": rates["embedkit"] / rates["forward and backward"],
            "device busy": _busy(steps["embedkit"], sizes.seconds, device),
        }


def _our_step(
    backbone: str, batch: Batch, sizes: Sizes, device: torch.device
) -> Callable[[], None]:
    network = _network(backbone, sizes, device).train()
    loss = losses.create("rll")
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)

    def step() -> None:
        with _bf16(device):
            value = loss(network(batch.pixels).float(), batch.labels)
        optimizer.zero_grad()
        torch.autograd.backward(value)
        optimizer.step()

    return step


def _plain_step(
    backbone: str, batch: Batch, sizes: Sizes, device: torch.device
) -> Callable[[], None]:
    """As one writes it first: a classifier of torchvision, floats in."""
    import torchvision

    options = {"image_size": sizes.side} if backbone.startswith("vit") else {}
    network = torchvision.models.get_model(backbone, weights=None, num_classes=100, **options)
    network = network.to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)

    def step() -> None:
        images = batch.pixels.permute(0, 3, 1, 2).float() / 255
        with _bf16(device):
            value = functional.cross_entropy(network(images), batch.labels % 100)
        optimizer.zero_grad()
        torch.autograd.backward(value)
        optimizer.step()

    return step


def _bound(backbone: str, batch: Batch, sizes: Sizes, device: torch.device) -> Callable[[], None]:
    """Our network alone: no loss, no update."""
    network = _network(backbone, sizes, device).train()

    def step() -> None:
        network.zero_grad()
        with _bf16(device):
            value = network(batch.pixels).float().sum()
        torch.autograd.backward(value)

    return step


def _busy(step: Callable[[], None], seconds: float, device: torch.device) -> float | None:
    """Share of the time in which a kernel runs, as the driver says; None where it cannot."""
    if device.type != "cuda":
        return None
    shares = []
    end = time.monotonic() + seconds / 3
    while time.monotonic() < end:
        step()
        try:
            shares.append(torch.cuda.utilization(device) / 100)
        except (ImportError, RuntimeError):
            return None  # It asks a package that a bare image need not have.
    return statistics.mean(shares)


# --- losses ----------------------------------------------------------------------------------


def loss_steps(sizes: Sizes, device: torch.device) -> Iterator[dict[str, Any]]:
    """Seconds of forward and backward on (B, dim) rows, four of a class."""
    # Of each name: options of ours with which the peer computes the same, and the peer.
    peers: dict[str, tuple[dict[str, Any], Callable[[], nn.Module]]] = {}
    try:
        from benchmarks.losses import PEERS

        peers = PEERS
    except ImportError as error:
        yield {"case": "theirs", "skipped": f"pytorch-metric-learning cannot be imported: {error}"}
    for name in sizes.loss_names:
        for count in sizes.loss_batches:
            classes = {"num_classes": 1000, "embedding_dim": sizes.dim}
            options, make = peers.get(name, ({}, None))
            ours = losses.create(name, **(classes if losses.needs_classes(name) else {}), **options)
            # The peers with a vector per class are made for rows of 512 numbers.
            theirs = make() if make is not None and sizes.dim == 512 else None
            yield {
                "case": f"{name} {count}",
                "seconds": _loss_seconds(ours, count, sizes, device),
                "theirs": theirs and _loss_seconds(theirs, count, sizes, device),
            }


def _loss_seconds(loss: nn.Module, count: int, sizes: Sizes, device: torch.device) -> float | str:
    loss = loss.to(device)
    rows = torch.randn(count, sizes.dim, device=device)
    labels = torch.arange(count, device=device) // 4 % 1000

    def step() -> None:
        loss.zero_grad()
        torch.autograd.backward(loss(rows.detach().requires_grad_(), labels))

    try:
        (took,) = take_turns([_waited(step, device)], seconds=sizes.loss_seconds)
    except (RuntimeError, ValueError) as error:
        # Out of memory, or a batch this loss does not take: some list every triplet.
        return f"{type(error).__name__}: {str(error).partition('.')[0]}"
    return statistics.median(took)


# --- gradient caching ------------------------------------------------------------------------


def chunks(sizes: Sizes, device: torch.device) -> Iterator[dict[str, Any]]:
    """The same gradient, part by part; the peak beside that of the whole batch."""
    for count in sizes.chunk_batches:
        batch = _batch(count, sizes, device)
        whole, peak = _gradient(batch, None, sizes, device)
        in_parts, low_peak = _gradient(batch, sizes.chunk, sizes, device)
        yield {
            "case": f"{sizes.backbones[0]} {count} by {sizes.chunk}",
            "difference": float((whole - in_parts).norm() / whole.norm()),
            "MB whole": peak / 1e6,
            "MB chunks": low_peak / 1e6,
        }


def _gradient(
    batch: Batch, chunk: int | None, sizes: Sizes, device: torch.device
) -> tuple[Tensor, float]:
    network = _network(sizes.backbones[0], sizes, device).train()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with _bf16(device):
        rows = divided(network, batch, chunk=chunk, world=_ALONE)(batch.pixels)
        value = losses.create("rll")(rows.float(), batch.labels)
    torch.autograd.backward(value)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    learned = [part.grad.flatten() for part in network.parameters() if part.grad is not None]
    return torch.cat(learned).float(), float(peak)


# --- what is deployed ------------------------------------------------------------------------


def engines(sizes: Sizes, device: torch.device) -> Iterator[dict[str, Any]]:
    """Images per second and least cosine with PyTorch, of each precision and engine."""
    with tempfile.TemporaryDirectory() as folder:
        model, network, contract = _exported(sizes, Path(folder))
        pixels = _batch(max(sizes.engine_batches), sizes, torch.device("cpu")).pixels
        with torch.no_grad():
            truth = functional.normalize(network.eval()(pixels))
        for case, make in _files(model, contract, device):
            try:
                with Embedder.load(make(), device=device.type) as embedder:
                    rates = {}
                    for count in sizes.engine_batches:
                        part = pixels[:count].numpy()
                        (took,) = take_turns(
                            [lambda part=part: embedder.embed_pixels(part)],  # type: ignore[misc]
                            seconds=sizes.seconds / 4,
                        )
                        rates[str(count)] = count / statistics.median(took)
                    vectors = torch.from_numpy(embedder.embed_pixels(pixels.numpy()))
                    least = float((vectors * truth).sum(1).min())
                    yield {"case": case, "images/s": rates, "least cosine": least}
            except (ImportError, EmbedKitError) as error:
                yield {"case": case, "skipped": str(error).partition("\n")[0]}


def _files(
    model: Path, contract: ModelContract, device: torch.device
) -> Iterator[tuple[str, Callable[[], Path]]]:
    """The same model as ONNX Runtime and TensorRT take it; a file is made when it is asked for."""
    from embedkit.export import build_engine

    def half() -> Path:
        import onnx

        from embedkit.export.precision import find_layers, to_fp16, with_contract

        graph = onnx.load(model)
        path = model.with_name("half.onnx")
        path.write_bytes(with_contract(to_fp16(graph, find_layers(graph)), contract))
        return path

    def engine() -> Path:
        built = model.with_name("model.engine")
        gpu = None if device.type == "cuda" else "sm89"
        build_engine(model, built, gpu=gpu)
        return built

    yield "onnxruntime fp32", lambda: model
    yield "onnxruntime fp16", half
    yield "tensorrt", engine


def pipeline(sizes: Sizes, device: torch.device) -> Iterator[dict[str, Any]]:
    """Images per second from files, by decoding threads."""
    with tempfile.TemporaryDirectory() as folder:
        model, _, _ = _exported(sizes, Path(folder))
        photos = draw_photos(Path(folder), sizes.photos, sizes.photo_size)
        with Embedder.load(model, device=device.type) as embedder:
            for workers in sizes.workers:
                began = time.perf_counter()
                done = sum(1 for _ in embedder.embed_files(photos, workers=workers))
                rate = done / (time.perf_counter() - began)
                yield {"case": f"{workers} workers", "images/s": rate}


def _exported(sizes: Sizes, folder: Path) -> tuple[Path, EmbeddingNet, ModelContract]:
    from embedkit.export import export_onnx

    network = _network(sizes.deployed, sizes, torch.device("cpu"))
    contract = ModelContract(
        name="benchmark",
        embedding_dim=sizes.dim,
        normalizes=True,
        metric="cosine",
        preprocess=Recipe(image_size=sizes.side).preprocess(),
        weights_hash=weights_hash(network),
        backbone=sizes.deployed,
        pooling="avg",
    )
    path = folder / "model.onnx"
    return path, network, export_onnx(network, contract, path)


# --- what they share -------------------------------------------------------------------------


def _network(backbone: str, sizes: Sizes, device: torch.device) -> EmbeddingNet:
    """The same weights each time; BatchNorm frozen, as with pretrained weights."""
    torch.manual_seed(0)
    preprocess = Recipe(image_size=sizes.side).preprocess()
    network = create_network(
        backbone=backbone,
        weights="none",
        pooling="avg",
        dim=sizes.dim,
        image_size=(sizes.side, sizes.side),
        mean=preprocess.mean,
        std=preprocess.std,
    )
    freeze_batch_norm(network)
    moved: EmbeddingNet = network.to(device, memory_format=torch.channels_last)
    return moved


def _batch(count: int, sizes: Sizes, device: torch.device) -> Batch:
    torch.manual_seed(1)
    pixels = torch.randint(0, 256, (count, sizes.side, sizes.side, 3), dtype=torch.uint8)
    rows = torch.arange(count, device=device)
    return Batch(pixels.to(device), rows, rows // 4, None, 0, 0)


def _bf16(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16)


def _waited(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The same, with the device done at the end."""

    def done() -> None:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return done


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(one)}" for name, one in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--toy", action="store_true")
    asked = parser.parse_args()
    device = torch.device(asked.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        missing = MissingError("there is no CUDA device here, and nothing was measured")
        print(f"{missing}; python -m benchmarks.gpu --toy --device cpu", file=sys.stderr)
        sys.exit(missing.exit_code)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    began = time.monotonic()
    found = measure(TOY if asked.toy else SIZES, device)
    if asked.toy:
        return
    about = {"gpu": name, "cuda": torch.version.cuda, "seconds": time.monotonic() - began}
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    sizes = dataclasses.asdict(SIZES)
    save(f"gpu-{slug}", {"machine": {**machine(), **about}, "sizes": sizes, **found})


if __name__ == "__main__":
    # Decoding threads want the cores that idle OpenMP threads would spin on.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
