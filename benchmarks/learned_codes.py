"""Learned codes beside plain product quantisation, at the same bytes per picture.

    python -m benchmarks.learned_codes [--steps 60] [--dim 64] [--parts 8] [--words 16]
        [--classes 30] [--images 15] [--size 48] [--backbone resnet10] [--weights none]

Two networks are trained alike on generated product pictures, one by ``spq``, one by ``softmax``. Of
each, float vectors are searched exactly, and in codes of the same length: those that spq learned,
and FAISS's IndexPQ, without and with a rotation before it (OPQ), trained on the vectors of the
training pictures. A query is a float vector and leaves itself out; recall@1 and MAP@R by distance,
over classes that were trained on (other pictures of them) and over classes that were not.
``--weights FILE`` begins both from pretrained weights of the backbone.

The paper reports classes seen in training; nothing in it promises a gain for others.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from benchmarks.figures import machine, save
from embedkit.data import PhotoSet, draw_products, read_photos
from embedkit.imaging import read_pixels
from embedkit.index.learned import add_codes, learned_index
from embedkit.models.quantized import QuantizedNet
from embedkit.train import Recipe, train

__all__ = ["codes_against", "measure"]

Vectors = np.ndarray[Any, np.dtype[np.float32]]

_BATCH = 32


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per network, kind of code and group of classes."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="embedkit-") as folder:
        source = draw_products(
            Path(folder) / "products",
            classes=options.classes + options.classes // 2,
            images_per_class=options.images,
            size=options.size,
        )
        photos = read_photos(source)
        parts = _parts(photos, options.classes)
        learned = {"subspaces": options.parts, "words": options.words}
        for loss, said in (("spq", learned), ("softmax", {})):
            recipe = Recipe(
                loss=loss,
                loss_options=said,
                backbone=options.backbone,
                weights=options.weights,
                dim=options.dim,
                image_size=options.size,
                classes_per_batch=8,
                images_per_class=4,
                steps=options.steps,
                val_share=0,
            )
            run = train(recipe, photos.subset(parts["train"]), Path(folder) / loss, device="cpu")
            network = run.network()
            given = {
                name: _embedded(network, photos.subset(one), recipe, unit=loss != "spq")
                for name, one in parts.items()
            }
            books = network.codebooks() if isinstance(network, QuantizedNet) else None
            for name in ("seen", "new"):
                vectors, codes = given[name]
                labels = list(photos.subset(parts[name]).labels)
                stored = {"float": vectors}
                if books is not None:
                    index = learned_index(books)
                    add_codes(index, codes)
                    stored["learned codes"] = index.reconstruct_n(0, index.ntotal)
                stored |= codes_against(given["train"][0], vectors, options)
                rows += [
                    {
                        "loss": loss,
                        "classes": name,
                        "codes": kind,
                        **_quality(vectors, kept, labels),
                    }
                    for kind, kept in stored.items()
                ]
    return rows


def codes_against(
    training: Vectors, vectors: Vectors, options: argparse.Namespace
) -> dict[str, Vectors]:
    """What FAISS keeps of `vectors` in as many bytes, trained on others."""
    dim, bits = vectors.shape[1], (options.words - 1).bit_length()
    rotation, rotated_for = faiss.OPQMatrix(dim, options.parts), _quantizer(dim, options, bits)
    rotation.pq = rotated_for  # else it is fitted for 256 words
    found = {}
    for name, before in (("PQ", None), ("OPQ", rotation)):
        index: Any = faiss.IndexPQ(dim, options.parts, bits, faiss.METRIC_L2)
        index.pq.cp.min_points_per_centroid = 1  # few pictures are no news
        if before is not None:
            index = faiss.IndexPreTransform(before, index)
        index.train(training)
        index.add(vectors)
        found[name] = index.reconstruct_n(0, index.ntotal)
    return found


def _quantizer(dim: int, options: argparse.Namespace, bits: int) -> Any:
    quantizer = faiss.ProductQuantizer(dim, options.parts, bits)
    quantizer.cp.min_points_per_centroid = 1
    return quantizer


def _parts(photos: PhotoSet, trained: int) -> dict[str, list[int]]:
    """Rows: of the first classes three in five pictures to train on, their others, and the rest."""
    known = set(photos.classes()[:trained])
    met: dict[str, int] = {}
    parts: dict[str, list[int]] = {"train": [], "seen": [], "new": []}
    for row, label in enumerate(photos.labels):
        met[label] = met.get(label, 0) + 1
        part = "new" if label not in known else "train" if met[label] % 5 in (0, 1, 3) else "seen"
        parts[part].append(row)
    return parts


def _embedded(
    network: Any, photos: PhotoSet, recipe: Recipe, *, unit: bool
) -> tuple[Vectors, np.ndarray[Any, np.dtype[np.uint8]]]:
    """Vectors and, of a network with codebooks, codes."""
    pixels = np.stack([read_pixels(path, recipe.preprocess()) for path in photos.files()])
    rows, codes = [], []
    with torch.inference_mode():
        for start in range(0, len(pixels), _BATCH):
            some = torch.from_numpy(pixels[start : start + _BATCH])
            if isinstance(network, QuantizedNet):
                row, code = network.with_codes(some)
                codes.append(code.numpy())
            else:
                row = network(some)
            rows.append(row.numpy())
    vectors = np.concatenate(rows)
    if unit:
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors, np.concatenate(codes) if codes else np.empty((0, 0), np.uint8)


def _quality(asking: Vectors, kept: Vectors, labels: list[str]) -> dict[str, float]:
    """Each float vector looks for what is kept of the others, by distance."""
    names, count = np.array(labels), len(labels)
    recalls, precisions = [], []
    for row in range(count):
        others = np.delete(np.arange(count), row)
        far = ((kept[others] - asking[row]) ** 2).sum(axis=1)
        right = (names[others] == names[row])[np.argsort(far, kind="stable")]
        top = right[: int(right.sum())]
        recalls.append(right[0])
        precisions.append((top * np.cumsum(top) / np.arange(1, len(top) + 1)).mean())
    return {
        "recall@1": round(float(np.mean(recalls)), 4),
        "map@r": round(float(np.mean(precisions)), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--parts", type=int, default=8)
    parser.add_argument("--words", type=int, default=16)
    parser.add_argument("--classes", type=int, default=30)
    parser.add_argument("--images", type=int, default=15)
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--backbone", default="resnet10")
    parser.add_argument("--weights", default="none")
    options = parser.parse_args()
    rows = measure(options)
    bits = options.parts * (options.words - 1).bit_length()
    print(f"{'network':<8} {'classes':<7} {'kept':<14} {'bytes':>6} {'recall@1':>9} {'MAP@R':>7}")
    for row in rows:
        size = 4 * options.dim if row["codes"] == "float" else -(-bits // 8)
        print(
            f"{row['loss']:<8} {row['classes']:<7} {row['codes']:<14} {size:>6} "
            f"{row['recall@1']:>9.3f} {row['map@r']:>7.3f}"
        )
    given = vars(options) | {"weights": Path(options.weights).name}
    save("learned_codes", {"machine": machine(), "options": given, "rows": rows})


if __name__ == "__main__":
    main()
