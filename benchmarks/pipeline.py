"""Images a second of `Embedder.embed_files`, against the loop everyone writes first.

    python -m benchmarks.pipeline [--folder PHOTOS] [--model M.onnx] [--count 96] [--repeats 3]

The loop: Pillow opens, converts, resizes and crops one file after the other, onnxruntime runs a
batch of 32 with its own settings; same files, same model file. The two take turns and the best
round of each counts. Without --folder, photos of 1600 x 1200 are drawn; without --model, a stack of
convolutions of MobileNetV2's size (0.3 G multiply-adds, 224 pixels, random weights) is written.
Targets: at least 1.5 times the loop's images a second on the drawn photos, and never more CPU time
per image; the smaller the photos, the more of both is the model.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from benchmarks.figures import machine, save
from embedkit.imaging import Preprocess, find_images
from embedkit.runtime import CONTRACT_KEY, Embedder, ModelContract

__all__ = ["draw_photos", "measure", "write_model"]

BATCH = 32


def measure(model: Path, paths: list[Path], repeats: int) -> dict[str, Any]:
    """Both ways in turn: images a second, CPU milliseconds an image, and how alike they are."""
    with Embedder.load(model, device="cpu") as embedder:
        size = embedder.contract.preprocess
        session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])

        def ours() -> np.ndarray:
            rows = [one.vector for one in embedder.embed_files(paths, batch=BATCH)]
            return np.stack([row for row in rows if row is not None])

        def loop() -> np.ndarray:
            return plain_loop(session, paths, size)

        best: dict[str, tuple[float, float]] = {}
        vectors: dict[str, np.ndarray] = {}
        for _ in range(repeats):
            for name, way in (("loop", loop), ("embedkit", ours)):
                vectors[name], wall, cpu = timed(way)
                before = best.get(name, (wall, cpu))
                best[name] = (min(wall, before[0]), min(cpu, before[1]))
    alike = (vectors["loop"] * vectors["embedkit"]).sum(1)
    return {
        "images": len(paths),
        "images_per_second": {name: len(paths) / wall for name, (wall, _) in best.items()},
        "cpu_ms_per_image": {name: 1000 * cpu / len(paths) for name, (_, cpu) in best.items()},
        "speed_ratio": best["loop"][0] / best["embedkit"][0],
        "cpu_ratio": best["embedkit"][1] / best["loop"][1],
        "cosine_min": float(alike.min()),
    }


def timed(way: Callable[[], np.ndarray]) -> tuple[np.ndarray, float, float]:
    """What it gives, wall seconds, CPU seconds of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    vectors = way()
    return vectors, time.perf_counter() - wall, time.process_time() - cpu


def plain_loop(session: Any, paths: list[Path], spec: Preprocess) -> np.ndarray:
    """One file after the other, a batch at a time."""
    edge = round(min(spec.width, spec.height) / spec.crop_ratio)
    vectors, waiting = [], []
    for number, path in enumerate(paths, start=1):
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        scale = edge / min(image.size)
        image = image.resize(
            (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
        )
        left, top = (image.width - spec.width) // 2, (image.height - spec.height) // 2
        waiting.append(np.asarray(image.crop((left, top, left + spec.width, top + spec.height))))
        if len(waiting) == BATCH or number == len(paths):
            (found,) = session.run(None, {session.get_inputs()[0].name: np.stack(waiting)})
            vectors.append(found)
            waiting = []
    return np.concatenate(vectors)


def draw_photos(folder: Path, count: int) -> None:
    """Photos of 1600 x 1200 with the weight of real ones: coarse colours and fine grain."""
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((1600, 1200), Image.Resampling.BICUBIC), np.int16)
        grain = rng.integers(-9, 10, (1200, 1600, 1), dtype=np.int16)
        photo = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
        photo.save(folder / f"{number:04}.jpg", quality=90)


def write_model(path: Path) -> None:
    """Five convolutions, a mean, a matrix and unit length: the cost of a small backbone."""
    rng = np.random.default_rng(0)
    layers = [(3, 32, 2), (32, 64, 2), (64, 128, 2), (128, 256, 2), (256, 256, 1)]
    nodes = [
        helper.make_node("Cast", ["pixels"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Div", ["planes", "white"], ["map0"]),
    ]
    constants = {"white": np.float32([255])}
    for number, (given, made, stride) in enumerate(layers):
        weight = rng.standard_normal((made, given, 3, 3)) * np.sqrt(2 / (9 * given))
        constants[f"w{number}"] = weight.astype(np.float32)
        sizes = {"kernel_shape": [3, 3], "strides": [stride] * 2, "pads": [1] * 4}
        nodes += [
            helper.make_node("Conv", [f"map{number}", f"w{number}"], [f"sum{number}"], **sizes),
            helper.make_node("Relu", [f"sum{number}"], [f"map{number + 1}"]),
        ]
    constants["head"] = rng.standard_normal((256, 128)).astype(np.float32)
    nodes += [
        helper.make_node("GlobalAveragePool", [f"map{len(layers)}"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["features"]),
        helper.make_node("MatMul", ["features", "head"], ["raw"]),
        helper.make_node("LpNormalization", ["raw"], ["embedding"], axis=1, p=2),
    ]
    graph = helper.make_graph(
        nodes,
        "benchmark",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", 224, 224, 3])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", 128])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    contract = ModelContract(
        name="benchmark",
        embedding_dim=128,
        normalizes=True,
        metric="cosine",
        preprocess=Preprocess(),
        weights_hash="0" * 64,
    )
    model.metadata_props.add(key=CONTRACT_KEY, value=contract.dumps())
    onnx.save(model, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder, model = asked.folder, asked.model
        if folder is None:
            folder = Path(work)
            draw_photos(folder, asked.count)
        if model is None:
            model = Path(work) / "model.onnx"
            write_model(model)
        found = measure(model, list(find_images(folder))[: asked.count], asked.repeats)
    for name, rate in found["images_per_second"].items():
        print(f"{name:<10} {rate:7.1f} images/s {found['cpu_ms_per_image'][name]:7.1f} ms CPU each")
    print(f"embedkit: {found['speed_ratio']:.2f} x the images a second of the loop")
    print(
        f"          {found['cpu_ratio']:.2f} x its CPU time; least cosine {found['cosine_min']:.5f}"
    )
    save("pipeline", {"machine": machine(), "photos": "own" if asked.folder else "drawn", **found})


if __name__ == "__main__":
    main()
