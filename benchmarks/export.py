"""Three ways to deploy one network: are the vectors those of the trained one, and how fast?

    python -m benchmarks.export [--data ../shared/data] [--photos 256] [--size 128] [--seconds 2]

The network: MobileNetV2 with the ImageNet weights beside the photos, average pooling, a linear head
of 128 numbers. The truth: the network in PyTorch, on the pixels that training and validation see.

embedkit  its exported file, which carries the preprocessing, run by its Embedder.
plain     what one writes first: torch.onnx.export of the network with float input, torchvision's
          Resize, CenterCrop, ToTensor and Normalize outside, onnxruntime, L2 norm in numpy.
modules   as sentence-transformers and optimum lay it out: the graph ends after pooling; before it
          an image processor in numpy (shortest edge, centre crop, rescale, normalise), after it
          head and norm in numpy. Written for this file, because neither of the two exports a
          network that is not of transformers or timm.

Parity is the cosine with the truth, from the same JPEG files, and the share of the ten nearest
neighbours that stay. The two others write the preprocessing down a second time, as one does, and
that is what they lose; `graph` feeds each graph what PyTorch is fed too, and there all are equal.
The ways take turns; images a second are medians, from files in batches of 32 and from ready input
at batch 1 and 8.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from PIL import Image
from torch import nn
from torchvision import transforms

from benchmarks.figures import machine, save
from embedkit.evaluate import nearest, neighbour_overlap
from embedkit.export import export_onnx
from embedkit.imaging import Preprocess, find_images, read_pixels
from embedkit.models import EmbeddingNet, create_network, weights_hash
from embedkit.runtime import Embedder, ModelContract
from embedkit.runtime.latency import take_turns

Floats = npt.NDArray[np.float32]

DIM, BATCH = 128, 32


@dataclass(frozen=True)
class Way:
    """One way to deploy.

    Attributes:
        files: What has to be copied to the other machine.
        embed: Photos to unit vectors.
        run: Ready input of `ready` to what the graph gives.
        ready: So many pictures as the graph takes them.
        graph_cosine: Least cosine of the graph with PyTorch on the same input.
    """

    files: list[Path]
    embed: Callable[[list[Path]], Floats]
    run: Callable[[npt.NDArray[Any]], object]
    ready: Callable[[int], npt.NDArray[Any]]
    graph_cosine: float


def with_embedkit(network: EmbeddingNet, side: Preprocess, photos: list[Path], work: Path) -> Way:
    """Export, load, embed."""
    contract = ModelContract(
        name="benchmark",
        embedding_dim=DIM,
        normalizes=True,
        metric="cosine",
        preprocess=side,
        weights_hash=weights_hash(network),
        backbone="mobilenet_v2",
        pooling="avg",
    )
    file = work / "embedkit.onnx"
    export_onnx(network, contract, file)
    embedder = Embedder.load(file, device="cpu")
    pixels = np.stack([read_pixels(path, side) for path in photos[:BATCH]])

    def embed(paths: list[Path]) -> Floats:
        rows = [one.vector for one in embedder.embed_files(paths, batch=BATCH)]
        return np.stack([row for row in rows if row is not None])

    return Way(
        files=[file],
        embed=embed,
        run=embedder.embed_pixels,
        ready=lambda count: pixels[:count],
        graph_cosine=cosines(truth(network, pixels), embedder.embed_pixels(pixels)).min(),
    )


class FloatInput(nn.Module):
    """The network as such scripts have it: normalised floats ``(B, 3, H, W)`` in."""

    def __init__(self, network: EmbeddingNet, *, head: bool) -> None:
        super().__init__()
        self.backbone, self.pooling = network.backbone, network.pooling
        self.head = network.head if head else nn.Identity()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        embedding: torch.Tensor = self.head(self.pooling(self.backbone(pixels)))
        return embedding


def plain(network: EmbeddingNet, side: Preprocess, photos: list[Path], work: Path) -> Way:
    """torch.onnx.export with torchvision's transforms."""
    shrink = transforms.Compose(
        [
            transforms.Resize(
                round(side.height / side.crop_ratio), transforms.InterpolationMode.BICUBIC
            ),
            transforms.CenterCrop(side.height),
            transforms.ToTensor(),
            transforms.Normalize(side.mean, side.std),
        ]
    )

    def read(path: Path) -> Floats:
        with Image.open(path) as image:
            return np.asarray(shrink(image.convert("RGB")))

    module = FloatInput(network, head=True).eval()
    return float_way(module, work / "plain" / "model.onnx", photos, read, lambda rows: rows)


def modules(network: EmbeddingNet, side: Preprocess, photos: list[Path], work: Path) -> Way:
    """A graph without its head, an image processor before it, the rest after it."""
    mean, std = np.float32(side.mean), np.float32(side.std)
    edge = round(side.height / side.crop_ratio)
    weight = network.head.weight.detach().numpy()
    bias = network.head.bias.detach().numpy()

    def read(path: Path) -> Floats:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
        scale = edge / min(rgb.size)
        size = (max(edge, int(rgb.width * scale)), max(edge, int(rgb.height * scale)))
        pixels = np.asarray(rgb.resize(size, Image.Resampling.BICUBIC))
        top, left = (size[1] - side.height) // 2, (size[0] - side.width) // 2
        cut = pixels[top : top + side.height, left : left + side.width].astype(np.float32)
        return np.ascontiguousarray(((cut / 255 - mean) / std).transpose(2, 0, 1))

    module = FloatInput(network, head=False).eval()
    return float_way(
        module,
        work / "modules" / "model.onnx",
        photos,
        read,
        lambda rows: rows @ weight.T + bias,
        head=[weight, bias],
    )


def float_way(
    module: FloatInput,
    file: Path,
    photos: list[Path],
    read: Callable[[Path], Floats],
    finish: Callable[[Floats], Floats],
    head: list[Floats] | None = None,
) -> Way:
    """Export `module` as it is, and embed in batches, one file after the other."""
    file.parent.mkdir()
    first = np.stack([read(path) for path in photos[:BATCH]])
    torch.onnx.export(
        module,
        (torch.from_numpy(first[:2]),),
        file,
        input_names=["pixels"],
        output_names=["embedding"],
        dynamic_shapes={"pixels": {0: torch.export.Dim("batch", min=1)}},
        dynamo=True,
        verbose=False,
    )
    if head is not None:
        np.savez(file.with_name("head.npz"), *head)
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(pixels: npt.NDArray[Any]) -> Floats:
        (rows,) = session.run(None, {"pixels": pixels})
        return unit(finish(np.asarray(rows, np.float32)))

    def embed(paths: list[Path]) -> Floats:
        parts = [paths[start : start + BATCH] for start in range(0, len(paths), BATCH)]
        return np.concatenate([run(np.stack([read(path) for path in part])) for part in parts])

    with torch.inference_mode():
        wanted = unit(finish(module(torch.from_numpy(first)).numpy()))
    return Way(
        files=sorted(path for path in file.parent.iterdir() if path.is_file()),
        embed=embed,
        run=run,
        ready=lambda count: first[:count],
        graph_cosine=cosines(wanted, run(first)).min(),
    )


def truth(network: EmbeddingNet, pixels: npt.NDArray[np.uint8]) -> Floats:
    """What the network itself gives."""
    with torch.inference_mode():
        parts = [network(torch.from_numpy(part)) for part in np.array_split(pixels, 8) if len(part)]
    return unit(torch.cat(parts).numpy())


def unit(rows: Floats) -> Floats:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def cosines(a: Floats, b: Floats) -> Floats:
    return (a.astype(np.float64) * b).sum(1).astype(np.float32)


def compare(ways: dict[str, Way], expected: Floats, photos: list[Path], seconds: float) -> Any:
    """Parity, size and speed of each."""
    found: dict[str, dict[str, Any]] = {}
    near = nearest(expected, 10)
    for name, way in ways.items():
        vectors = way.embed(photos)
        cosine = cosines(expected, vectors)
        found[name] = {
            "cosine_min": float(cosine.min()),
            "cosine_mean": float(cosine.mean()),
            "neighbours_kept": neighbour_overlap(near, nearest(vectors, 10)),
            "graph_cosine_min": float(way.graph_cosine),
            "bytes": sum(path.stat().st_size for path in way.files),
            "files": len(way.files),
        }
    some = photos[: 2 * BATCH]
    speeds = {f"from_files_{BATCH}": [lambda way=way: way.embed(some) for way in ways.values()]}
    for batch in (1, 8):
        inputs = [(way, way.ready(batch)) for way in ways.values()]
        speeds[f"ready_{batch}"] = [lambda way=way, x=x: way.run(x) for way, x in inputs]
    for what, calls in speeds.items():
        count = len(some) if what.startswith("from") else int(what.rpartition("_")[2])
        for name, took in zip(ways, take_turns(calls, seconds=seconds), strict=True):
            found[name][f"images_per_second_{what}"] = count / float(np.median(took))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--photos", type=int, default=256)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=2.0)
    asked = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    side = Preprocess(height=asked.size, width=asked.size)
    network = create_network(
        backbone="mobilenet_v2",
        weights=asked.data / "weights/mobilenet_v2_imagenet.pth",
        pooling="avg",
        dim=DIM,
        image_size=(side.height, side.width),
        mean=side.mean,
        std=side.std,
    ).eval()
    every = list(find_images(asked.data / "grocery"))
    photos = every[:: max(1, len(every) // asked.photos)][: asked.photos]
    expected = truth(network, np.stack([read_pixels(path, side) for path in photos]))
    with tempfile.TemporaryDirectory() as work:
        ways = {
            name: make(network, side, photos, Path(work))
            for name, make in (("embedkit", with_embedkit), ("plain", plain), ("modules", modules))
        }
        found = compare(ways, expected, photos, asked.seconds)
    for name, row in found.items():
        print(
            f"{name:<9} cosine {row['cosine_min']:.6f} least, {row['cosine_mean']:.6f} mean; "
            f"{row['neighbours_kept']:.1%} of neighbours; graph {row['graph_cosine_min']:.7f}; "
            f"{row['bytes'] / 1e6:.1f} MB in {row['files']}; images/s "
            f"{row[f'images_per_second_from_files_{BATCH}']:.0f} from files, "
            f"{row['images_per_second_ready_1']:.0f} and {row['images_per_second_ready_8']:.0f} "
            "ready at 1 and 8"
        )
    save(
        "export",
        {
            "machine": machine(),
            "photos": len(photos),
            "size": asked.size,
            "network": "mobilenet_v2, avg, 128",
            "ways": found,
        },
    )


if __name__ == "__main__":
    main()
