"""Embed photos with onnxruntime, Pillow and numpy alone: an exported model needs no embedkit.

    python examples/03_bare_onnxruntime.py MODEL.onnx PHOTO... [--check]

The file says itself how photos become pixels; the forty lines of `read_pixels` and `embed` are all
there is to write again in another program or language. Prints how alike the photos are. `--check`
compares the vectors with those of `embedkit.Embedder`, which also reads what cameras and shops
make besides everyday JPEG, PNG and WebP (16 bits, CMYK keys, damaged metadata), and has limits
against hostile files.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def main() -> None:
    """Print the cosine of every photo with every other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("photos", type=Path, nargs="+")
    parser.add_argument("--check", action="store_true", help="compare with embedkit")
    options = parser.parse_args()
    vectors = embed(options.model, options.photos)
    for photo, row in zip(options.photos, vectors @ vectors.T, strict=True):
        print(" ".join(f"{cosine:6.3f}" for cosine in row), photo)
    if options.check:
        check(options.model, options.photos, vectors)


def embed(model: Path, photos: list[Path]) -> np.ndarray:
    """``(N, D)`` float32: unit rows where the model normalises, as most do."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    contract = json.loads(session.get_modelmeta().custom_metadata_map["embedkit.contract"])
    pixels = np.stack([read_pixels(photo, contract["preprocess"]) for photo in photos])
    (vectors,) = session.run([contract["output_name"]], {contract["input_name"]: pixels})
    return vectors


def read_pixels(photo: Path, spec: dict[str, Any]) -> np.ndarray:
    """``(height, width, 3)`` uint8; scaling, mean and std are inside the graph."""
    width, height, kept = spec["width"], spec["height"], spec["crop_ratio"]
    image = Image.open(photo)
    if spec["scaled_decode"]:  # a large JPEG is decoded at 1/2, 1/4 or 1/8 of its size
        shortest = math.ceil(spec["scaled_decode"] * max(height, width) / kept)
        image.draft(None, (shortest, shortest))
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGB", image.size, "white")
        image.paste(layer, mask=layer)
    image = image.convert("RGB")

    # The largest centred box of the network's shape, shrunk by the crop, resampled in one step.
    scale = min(image.width / width, image.height / height) * kept
    box_width, box_height = min(width * scale, image.width), min(height * scale, image.height)
    left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
    box = (left, top, min(left + box_width, image.width), min(top + box_height, image.height))
    return np.asarray(image.resize((width, height), FILTERS[spec["filter"]], box=box))


def check(model: Path, photos: list[Path], vectors: np.ndarray) -> None:
    """Leave with 1 unless embedkit gives the same vectors."""
    from embedkit import Embedder

    with Embedder.load(model, device="cpu") as embedder:
        difference = float(np.abs(embedder.embed(photos) - vectors).max())
    print(f"largest difference from embedkit's own vectors: {difference:.1e}")
    if difference > 1e-5:
        raise SystemExit("they are not the same vectors")


if __name__ == "__main__":
    main()
