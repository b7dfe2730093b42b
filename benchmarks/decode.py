"""What decoding JPEGs at reduced size costs in recall, on real photos, and what it saves.

    python -m benchmarks.decode --photos GROCERY --weights mobilenet_v2.pth [--count 2370]

A contract with ``scaled_decode=2`` lets a JPEG be decoded at 1/2, 1/4 or 1/8 as long as two source
pixels per target pixel remain. The grocery photos (shortest side 192) are too small for that to
happen at a usual input, so they are read for an input of 42 pixels, where exactly two remain, and
of 28, where three do: 224 is to a photo of 1024, and of 1536, what these are to them. The network
(MobileNetV2, ImageNet) sees them enlarged. The same photos both ways: recall@1 and MAP@R over the
test classes, leave one out; hits won and lost; the least cosine; how many have another nearest one.
The saving is measured on drawn photos of camera sizes at an input of 224, for ``scaled_decode`` of
2, 3 and none; ``--saving`` measures that alone.

Decided by it: 2 stays what new models get. It reads photos of 1600 x 1200 and 2000 x 1500 1.8 times
as fast as 3, which reads them whole, and 4000 x 3000 1.3 times; the 0.8 points of recall@1 that it
costs at input 42 are the worst case, photos that were made small before and hold detail down to the
last pixel, of which exactly two are left. At three to a pixel as many hits were won as lost. The
number stands in the contract, so that a model keeps the one it was trained and measured with.

OpenCV was measured for the same work and left out (5.0.0, one thread, milliseconds CPU a photo)::

                                              2000 x 1500    grocery    largest difference
    Pillow, as here                              13.85          1.00     0
    cv2.imdecode (reduced), Pillow's resize      13.60          0.94     0
    cv2.imdecode (reduced), cv2 INTER_AREA       11.16          0.28     34 of 255

Both decode with libjpeg-turbo to the same bits in the same time. What is faster in OpenCV is its
resize, and that gives other pixels: another model, as far as the contract goes.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.figures import machine, save
from embedkit.evaluate import nearest, retrieval_metrics
from embedkit.imaging import Preprocess, read_pixels
from embedkit.models import create_network
from embedkit.runtime.latency import draw_photos

__all__ = ["recall_change", "saving"]

INPUTS, SEEN = (42, 28), 96
_SIZES = ((1024, 768), (1600, 1200), (2000, 1500), (4000, 3000))


def recall_change(photos: Path, weights: Path, count: int, small: int) -> dict[str, Any]:
    """Full and scaled decoding of the same photos, through the same network."""
    with (photos / "manifest.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    rows = rows[:: max(1, len(rows) // count)]
    labels = np.array([row["label"] for row in rows])
    spec = Preprocess(height=small, width=small)
    network = create_network(
        backbone="mobilenet_v2",
        weights=weights,
        pooling="avg",
        dim=128,
        image_size=(SEEN, SEEN),
        mean=spec.mean,
        std=spec.std,
    ).eval()
    found: dict[str, Any] = {"photos": len(rows), "classes": len(set(labels))}
    vectors = {}
    for name, least in (("full", 0), ("scaled", 2)):
        own = dataclasses.replace(spec, scaled_decode=least)
        pixels = np.stack([read_pixels(photos / row["path"], own) for row in rows])
        vectors[name] = features(network, pixels)
        found[name] = retrieval_metrics(vectors[name], labels, ks=(1,)).to_json()
        found[f"{name}_pixels"] = pixels
    difference = found.pop("full_pixels").astype(int) - found.pop("scaled_pixels")
    found["photos_decoded_smaller"] = int((difference != 0).any((1, 2, 3)).sum())
    found["largest_pixel_difference"] = int(np.abs(difference).max())
    unit = {n: v / np.linalg.norm(v, axis=1, keepdims=True) for n, v in vectors.items()}
    found["least_cosine"] = float((unit["full"] * unit["scaled"]).sum(1).min())
    first = [nearest(vectors[name], 1) for name in ("full", "scaled")]
    found["another_nearest"] = int((first[0] != first[1]).sum())
    full, scaled = (labels[one[:, 0]] == labels for one in first)
    found["hits_won"], found["hits_lost"] = int((scaled & ~full).sum()), int((full & ~scaled).sum())
    return found


def features(network: Any, pixels: np.ndarray) -> np.ndarray:
    """Pooled features ``(N, 1280)`` of the pixels enlarged to `SEEN`."""
    blocks = []
    with torch.inference_mode():
        for block in np.array_split(pixels, max(1, len(pixels) // 64)):
            planes = torch.from_numpy(block).permute(0, 3, 1, 2).float()
            large = torch.nn.functional.interpolate(planes, (SEEN, SEEN), mode="bicubic")
            seen = large.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)
            blocks.append(network.features(seen.contiguous()).numpy())
    return np.concatenate(blocks)


def saving(repeats: int = 5) -> dict[str, dict[str, float]]:
    """CPU milliseconds to read one photo at 224 pixels by its size, the best of `repeats`."""
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as work:
        for size in _SIZES:
            (photo,) = draw_photos(Path(work), 1, size)
            data = photo.read_bytes()
            found[f"{size[0]}x{size[1]}"] = {
                name: _milliseconds(data, Preprocess(scaled_decode=least), repeats)
                for name, least in (("full", 0), ("at 2", 2), ("at 3", 3))
            }
    return found


def _milliseconds(data: bytes, spec: Preprocess, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.process_time()
        read_pixels(data, spec)
        times.append(1000 * (time.process_time() - started))
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--count", type=int, default=2370)
    parser.add_argument("--saving", action="store_true")
    asked = parser.parse_args()
    if not asked.saving and not (asked.photos and asked.weights):
        parser.error("--photos and --weights, or --saving")
    recalls = {}
    for small in () if asked.saving else INPUTS:
        recall = recall_change(asked.photos, asked.weights, asked.count, small)
        recalls[f"input {small}"] = recall
        for name in ("full", "scaled"):
            at = recall[name]
            print(f"input {small} {name:<8} recall@1 {at['recall@1']:.4f}  MAP@R {at['map@r']:.4f}")
        print(
            f"  {recall['photos_decoded_smaller']:,} of {recall['photos']:,} photos differ, least "
            f"cosine {recall['least_cosine']:.4f}, {recall['another_nearest']} have another "
            f"nearest one: {recall['hits_won']} hits won, {recall['hits_lost']} lost"
        )
    costs = saving()
    for size, cost in costs.items():
        print(f"{size:<10} " + ", ".join(f"{name} {ms:.1f} ms CPU" for name, ms in cost.items()))
    if not asked.saving:
        save("decode", {"machine": machine(), "recall": recalls, "cpu_ms": costs})


if __name__ == "__main__":
    main()
