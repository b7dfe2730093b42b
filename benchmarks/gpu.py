"""What a CUDA machine does with embedkit, in one run of at most nine minutes.

    python -m benchmarks.gpu [--device cuda] [--toy]

training   images/s of our step for ResNet-50 and ViT-B/16 in bf16 on ready pixels, against the same
           backbone in a plain PyTorch loop with softmax, and against forward and backward alone.
trainer    images/s of `embedkit.train` from JPEG files, by epoch (the first one decodes them), and
           of a plain loop with a DataLoader on the same files and batch; and how busy the device
           is: the share of the time in which the network does not wait for pixels.
compiled   our step again, with and without `torch.compile`, and the seconds that compiling takes.
chunks     how far the gradient of chunks is from that of the whole batch, in bf16, beside how far
           bf16 is from float32, and peak memory.
engines    images/s of the exported model at fp32 and fp16, and its least cosine with PyTorch;
           TensorRT where it is installed.
pipeline   images/s from JPEG files to vectors by number of decoding threads.
           Where nothing can be exported (onnxscript is missing), both take a small drawn network,
           and what onnxruntime gives of it in float32 on the CPU takes PyTorch's place.
loss_steps seconds of a step of every loss, and of pytorch-metric-learning's where it is installed.

Each part has its share of the time, and what earlier ones have left. What cannot run is named with
its reason, and the others run. The figures go to benchmarks/results/gpu-<name>.json after each
part. `--toy` runs every line at a toy size, on the CPU as well, and writes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from benchmarks.figures import machine, save
from benchmarks.pipeline import write_model
from embedkit import losses
from embedkit.data import PhotoSet
from embedkit.errors import EmbedKitError, MissingError, MissingExtraError
from embedkit.methods import Batch
from embedkit.models import EmbeddingNet, create_network, freeze_batch_norm, weights_hash
from embedkit.runtime import Embedder, ModelContract, read_contract
from embedkit.runtime.latency import draw_photos, take_turns
from embedkit.train import Recipe, train
from embedkit.train.distributed import World
from embedkit.train.large_batch import divided
from embedkit.train.story import Silent

__all__ = ["SIZES", "TOY", "Sizes", "measure"]

# Of nine minutes; what is left of them is for a part that ends late.
_SECONDS = 500.0
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
    epoch_steps: int = 20
    trainer_seconds: float = 30.0
    compiler: str = "inductor"


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
    epoch_steps=2,
    compiler="eager",
)


def measure(
    sizes: Sizes,
    device: torch.device,
    *,
    seconds: float = _SECONDS,
    keep: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Rows of all parts; what did not run, or not to its end, is in ``skipped`` with the reason.

    Args:
        sizes: How much of everything.
        device: Where.
        seconds: For all of it; a row that has begun is finished.
        keep: Is given everything so far after each part.
    """
    began, due = time.monotonic(), 0.0
    found: dict[str, Any] = {"skipped": {}}
    for part, share in _SHARES.items():
        name = part.__name__
        due += seconds * share
        found[name] = []
        print(name, flush=True)
        try:
            if time.monotonic() - began >= due:
                found["skipped"][name] = "all of it: no time was left"
            else:
                for row in part(sizes, device):
                    found[name].append(row)
                    print("  " + "  ".join(f"{k} {_short(v)}" for k, v in row.items()), flush=True)
                    if "skipped" in row:
                        found["skipped"][f"{name} {row['case']}"] = row["skipped"]
                    if time.monotonic() - began >= due:
                        found["skipped"][name] = "the rest: no time was left"
                        break
        except Exception as error:  # whatever it is, the other parts are worth having
            found["skipped"][name] = f"failed: {_sentence(error)}"
        if name in found["skipped"]:
            print(f"  skipped: {found['skipped'][name]}", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if keep is not None:
            keep(found)
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
        }


def _our_step(
    backbone: str, batch: Batch, sizes: Sizes, device: torch.device, *, compiler: str = ""
) -> Callable[[], None]:
    network = _network(backbone, sizes, device).train()
    if compiler:
        network.backbone.compile(backend=compiler)
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
    learn = _plain_learner(backbone, sizes, device)

    def step() -> None:
        learn(batch.pixels.permute(0, 3, 1, 2), batch.labels)

    return step


def _plain_learner(
    backbone: str, sizes: Sizes, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """As one writes it first: a classifier of torchvision, (B, 3, H, W) uint8 in, its loss out."""
    import torchvision

    options = {"image_size": sizes.side} if backbone.startswith("vit") else {}
    network = torchvision.models.get_model(backbone, weights=None, num_classes=100, **options)
    network = network.to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)

    def learn(images: Tensor, labels: Tensor) -> Tensor:
        with _bf16(device):
            value = functional.cross_entropy(network(images.float() / 255), labels % 100)
        optimizer.zero_grad()
        torch.autograd.backward(value)
        optimizer.step()
        return value.detach()

    return learn


def _bound(backbone: str, batch: Batch, sizes: Sizes, device: torch.device) -> Callable[[], None]:
    """Our network alone: no loss, no update."""
    network = _network(backbone, sizes, device).train()

    def step() -> None:
        network.zero_grad()
        with _bf16(device):
            value = network(batch.pixels).float().sum()
        torch.autograd.backward(value)

    return step


def trainer(sizes: Sizes, device: torch.device) -> Iterator[dict[str, Any]]:
    """From files to weights: does the network wait?"""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        files = draw_photos(root, sizes.photos, sizes.photo_size)
        for backbone in sizes.backbones:
            yield from _our_epochs(backbone, files, sizes, device)
            yield _plain_epoch(backbone, files, sizes, device)


def _our_epochs(
    backbone: str, files: Sequence[Path], sizes: Sizes, device: torch.device
) -> Iterator[dict[str, Any]]:
    root, each = files[0].parent, min(4, sizes.batch // 2)
    recipe = Recipe(
        backbone=backbone,
        weights="none",
        dim=sizes.dim,
        image_size=sizes.side,
        freeze_batch_norm=True,
        classes_per_batch=sizes.batch // each,
        images_per_class=each,
        epochs=3,
        epoch_steps=sizes.epoch_steps,
        val_share=0,
        max_time=sizes.trainer_seconds,
    )
    labels = tuple(str(number // each) for number in range(len(files)))
    names = tuple(path.relative_to(root) for path in files)
    photos = PhotoSet(root, names, labels, split=("train",) * len(files))
    clock = _EpochClock()
    run = train(recipe, photos, root / backbone, device=str(device), reporter=clock)
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    steps, waited = 0, 0.0
    for row, took in zip(rows, clock.seconds, strict=True):
        yield {
            "case": f"{backbone} epoch {row['epoch']}",
            "images/s": (row["step"] - steps) * sizes.batch / took,
            "device busy": 1 - (row["waited"] - waited) / took,
        }
        steps, waited = row["step"], row["waited"]


class _EpochClock(Silent):
    """Seconds of the steps of each epoch, without what is measured and saved between them."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    @contextlib.contextmanager
    def progress(self, what: str, total: int | None) -> Iterator[Callable[[int, int], None]]:
        began = time.monotonic()
        yield lambda done, failed: None
        if what.startswith("epoch"):
            self.seconds.append(time.monotonic() - began)


def _plain_epoch(
    backbone: str, files: Sequence[Path], sizes: Sizes, device: torch.device
) -> dict[str, Any]:
    """The same files, batch, crops and flips as one loads them first: a DataLoader of processes."""
    from torchvision.transforms import v2

    noise = v2.Compose(
        [
            v2.PILToTensor(),
            v2.RandomResizedCrop(sizes.side, scale=Recipe().augment_scale, antialias=True),
            v2.RandomHorizontalFlip(),
        ]
    )
    order = [*range(len(files))] * -(-sizes.epoch_steps * sizes.batch // len(files))
    loader = DataLoader(
        _Photos(files, noise),
        batch_size=sizes.batch,
        sampler=order[: sizes.epoch_steps * sizes.batch],
        num_workers=len(os.sched_getaffinity(0)) if device.type == "cuda" else 0,
        pin_memory=device.type == "cuda",
    )
    learn = _plain_learner(backbone, sizes, device)
    waited, began, steps = 0.0, time.monotonic(), 0
    ready = iter(loader)
    while True:
        asked = time.monotonic()
        batch = next(ready, None)
        waited += time.monotonic() - asked
        if batch is None or time.monotonic() - began > sizes.trainer_seconds:
            break
        images, labels = (part.to(device, non_blocking=True) for part in batch)
        # The loss is looked at after each step, as most loops do and as our trainer does.
        float(learn(images, labels))
        steps += 1
    took = time.monotonic() - began
    return {
        "case": f"{backbone} plain loop",
        "images/s": steps * sizes.batch / took,
        "device busy": 1 - waited / took,
    }


class _Photos(Dataset[tuple[Tensor, int]]):
    """A photo with its noise, and a label."""

    def __init__(self, files: Sequence[Path], noise: nn.Module) -> None:
        self._files, self._noise = files, noise

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        with Image.open(self._files[place]) as image:
            return self._noise(image.convert("RGB")), place // 4


def compiled(sizes: Sizes, device: torch.device) -> Iterator[dict[str, Any]]:
    """Our step as it is and compiled: does it pay?"""
    for backbone in sizes.backbones:
        batch = _batch(sizes.batch, sizes, device)
        plain = _waited(_our_step(backbone, batch, sizes, device), device)
        faster = _our_step(backbone, batch, sizes, device, compiler=sizes.compiler)
        faster = _waited(faster, device)
        began = time.perf_counter()
        faster()
        first = time.perf_counter() - began
        took = take_turns([plain, faster], seconds=sizes.seconds)
        rates = [sizes.batch / statistics.median(times) for times in took]
        yield {
            "case": backbone,
            "images/s": dict(zip(("plain", "compiled"), rates, strict=True)),
            "of plain": rates[1] / rates[0],
            "seconds of the first step": first,
        }


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
    # Those with a peer first, in case that the time does not suffice.
    for name in sorted(sizes.loss_names, key=lambda name: name not in peers):
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
        return _sentence(error)
    return statistics.median(took)


# --- gradient caching ------------------------------------------------------------------------


def chunks(sizes: Sizes, device: torch.device) -> Iterator[dict[str, Any]]:
    """The same gradient, part by part; the peak beside that of the whole batch."""
    for count in sizes.chunk_batches:
        batch = _batch(count, sizes, device)
        whole, peak = _gradient(batch, None, sizes, device)
        in_parts, low_peak = _gradient(batch, sizes.chunk, sizes, device)
        exact, _ = _gradient(batch, sizes.chunk, sizes, device, number=torch.float32)
        yield {
            "case": f"{sizes.backbones[0]} {count} by {sizes.chunk}",
            "difference": float((whole - in_parts).norm() / whole.norm()),
            "of bf16 from float32": float((whole - exact).norm() / exact.norm()),
            "MB whole": peak / 1e6,
            "MB chunks": low_peak / 1e6,
        }


def _gradient(
    batch: Batch,
    chunk: int | None,
    sizes: Sizes,
    device: torch.device,
    *,
    number: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, float]:
    network = _network(sizes.backbones[0], sizes, device).train()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.autocast(device.type, number, enabled=number != torch.float32):
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
        deployed = _deployed(sizes, Path(folder))
        if deployed.instead:
            yield {"case": deployed.contract.name, "skipped": deployed.instead}
        pixels = _batch(max(sizes.engine_batches), sizes, torch.device("cpu")).pixels
        truth = deployed.truth(pixels)
        for case, make in _files(deployed.model, deployed.contract, device):
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
        deployed = _deployed(sizes, Path(folder))
        if deployed.instead:
            yield {"case": deployed.contract.name, "skipped": deployed.instead}
        photos = draw_photos(Path(folder), sizes.photos, sizes.photo_size)
        with Embedder.load(deployed.model, device=device.type) as embedder:
            for workers in sizes.workers:
                began = time.perf_counter()
                done = sum(1 for _ in embedder.embed_files(photos, workers=workers))
                rate = done / (time.perf_counter() - began)
                yield {"case": f"{workers} workers", "images/s": rate}


@dataclass(frozen=True)
class _Deployed:
    """A model file, its contract, the vectors it should give, and why it is none of ours."""

    model: Path
    contract: ModelContract
    truth: Callable[[Tensor], Tensor]
    instead: str = ""


def _deployed(sizes: Sizes, folder: Path) -> _Deployed:
    model = folder / "model.onnx"
    try:
        from embedkit.export import export_onnx
    except MissingExtraError as error:
        write_model(model, sizes.side)
        why = f"{error.what}: a drawn network takes its place"
        return _Deployed(model, read_contract(model), partial(_on_the_cpu, model), why)
    network = _network(sizes.deployed, sizes, torch.device("cpu"))
    contract = ModelContract(
        name=sizes.deployed,
        embedding_dim=sizes.dim,
        normalizes=True,
        metric="cosine",
        preprocess=Recipe(image_size=sizes.side).preprocess(),
        weights_hash=weights_hash(network),
        backbone=sizes.deployed,
        pooling="avg",
    )

    def truth(pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return functional.normalize(network.eval()(pixels))

    return _Deployed(model, export_onnx(network, contract, model), truth)


def _on_the_cpu(model: Path, pixels: Tensor) -> Tensor:
    with Embedder.load(model, device="cpu") as embedder:
        return torch.from_numpy(embedder.embed_pixels(pixels.numpy()))


# Part by part, and the share of the time that each may take.
_SHARES: dict[Callable[[Sizes, torch.device], Iterator[dict[str, Any]]], float] = {
    training: 0.14,
    trainer: 0.24,
    compiled: 0.2,
    chunks: 0.06,
    engines: 0.1,
    pipeline: 0.06,
    loss_steps: 0.2,
}

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
    return network.to(device).to(memory_format=torch.channels_last)


def _batch(count: int, sizes: Sizes, device: torch.device) -> Batch:
    """Soft colours: embeddings of noise would lie in one place, and gradients be rounding."""
    torch.manual_seed(1)
    coarse = torch.rand(count, 3, 8, 8)
    smooth = functional.interpolate(coarse, size=sizes.side, mode="bilinear")
    pixels = (smooth.permute(0, 2, 3, 1) * 255).to(torch.uint8).contiguous()
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


def _sentence(error: Exception) -> str:
    """The first line of what it says; those of PyTorch go on for pages."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


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
    if asked.toy:
        measure(TOY, device)
        return
    began = time.monotonic()
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

    def keep(found: dict[str, Any]) -> None:
        about = {"gpu": name, "cuda": torch.version.cuda, "seconds": time.monotonic() - began}
        sizes = dataclasses.asdict(SIZES)
        save(f"gpu-{slug}", {"machine": {**machine(), **about}, "sizes": sizes, **found})

    measure(SIZES, device, keep=keep)


if __name__ == "__main__":
    # Decoding threads want the cores that idle OpenMP threads would spin on.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
