"""Images a second of `embedkit embed`, against the machine's bound, the plain loop and fastembed.

    python -m benchmarks.pipeline [--photos FOLDER] [--model M.onnx] [--fastembed PYTHON] [--memory]

Drawn JPEGs of 2000 x 1500, and the photos of --photos. In one run, in turns, the best of each:

bound      reading a photo and running the model, each alone on one thread, in processor seconds; no
           program on this machine can do more images a second than the cores over their sum.
embedkit   `Embedder.load(threads=1)` and `embed_files`, as the commands do it.
loop       Pillow opens, converts, resizes and crops one file after the other, onnxruntime runs
           batches of 32 with its own settings. The same files and the same model file.
fastembed  its own pipeline: `ImageEmbedding(name, specific_model_path=folder)`, with and without
           `parallel`, whichever is faster. It hands planes to the model, so a Transpose is put in
           front of the same graph, and its own scaling is off, because the graph does it. Its pins
           may clash with ours, so it lives in an environment of its own:
           ``uv venv peer && uv pip install --python peer/bin/python fastembed``, then
           --fastembed peer/bin/python. It has no call that registers an image model; a folder
           under the name of one it knows, with model.onnx and preprocessor_config.json, is what
           its documentation offers.

Without --model, a stack of convolutions of MobileNetV2's size (0.3 G multiply-adds, 224 pixels,
random weights) is written. --memory: the most memory that `embedkit embed` and `embedkit index`
take for 1,000 and for 20,000 files. Targets: 0.9 of the bound, 1.5 times the loop and fastembed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from benchmarks.figures import machine, save
from embedkit.imaging import Preprocess, find_images, read_pixels
from embedkit.runtime import CONTRACT_KEY, Embedder, ModelContract
from embedkit.runtime.latency import draw_photos
from embedkit.runtime.pipeline import usable_cores

__all__ = ["measure", "write_model"]

BATCH = 32
_DRAWN = 48
_MEMORY_COUNTS = (1_000, 20_000)


def measure(
    model: Path, paths: list[Path], repeats: int, fastembed: Path | None = None
) -> dict[str, Any]:
    """All ways in turn: milliseconds an image, the ratios, and how alike the vectors are."""
    with ExitStack() as opened:
        embedder = opened.enter_context(Embedder.load(model, device="cpu", threads=1))
        spec = embedder.contract.preprocess
        session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
        group = 4  # what a core runs at once, and no slower than more
        pixels = np.stack([read_pixels(path, spec) for path in paths[:group]])

        def read() -> None:
            for path in paths:
                read_pixels(path, spec)

        def run() -> None:
            for start in range(0, len(paths), group):
                embedder.embed_pixels(pixels[: len(paths) - start])

        def ours() -> np.ndarray:
            rows = [one.vector for one in embedder.embed_files(paths, batch=BATCH)]
            return np.stack([row for row in rows if row is not None])

        ways: dict[str, Callable[[], Any]] = {
            "read alone": read,
            "model alone": run,
            "embedkit": ours,
            "loop": lambda: plain_loop(session, paths, spec),
        }
        peer = opened.enter_context(Peer(fastembed, model, paths, spec)) if fastembed else None
        best: dict[str, tuple[float, float]] = {}
        vectors: dict[str, np.ndarray] = {}
        for _ in range(repeats):
            for name, way in ways.items():
                vectors[name], *took = timed(way)
                _keep_best(best, name, took)
            for name, took in peer.turn().items() if peer else ():
                _keep_best(best, name, took)
    alone = best["read alone"][1] + best["model alone"][1]
    bound = alone / usable_cores()
    wall, cpu = best["embedkit"]
    count = len(paths)
    return {
        "images": count,
        "wall_ms_per_image": {name: 1000 * took[0] / count for name, took in best.items()},
        "cpu_ms_per_image": {name: 1000 * took[1] / count for name, took in best.items()},
        "images_per_second": count / wall,
        "of_bound": bound / wall,
        "cpu_over_alone": cpu / alone,
        "cores_had": cpu / wall,
        "against_loop": best["loop"][0] / wall,
        "bound_against_loop": best["loop"][0] / bound,
        "against_fastembed": min(
            (took[0] / wall for name, took in best.items() if "fastembed" in name), default=None
        ),
        "cosine_min": float((vectors["loop"] * vectors["embedkit"]).sum(1).min()),
    }


def timed(way: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it gives, wall seconds, CPU seconds of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = way()
    return found, time.perf_counter() - wall, time.process_time() - cpu


def _keep_best(best: dict[str, tuple[float, float]], name: str, took: list[float]) -> None:
    before = best.get(name, tuple(took))
    best[name] = (min(took[0], before[0]), min(took[1], before[1]))


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


# Says a line when ready; then for every line it is sent: seconds and processor seconds of each way.
_PEER = """
import json, os, sys, time
from fastembed import ImageEmbedding

def main():
    folder, batch, cores, paths = json.loads(sys.stdin.readline())
    model = ImageEmbedding("Qdrant/resnet50-onnx", specific_model_path=folder, cuda=False)
    list(model.embed(paths[:batch], batch_size=batch))
    print("ready", flush=True)
    for _ in sys.stdin:
        took = {}
        for name, parallel in (("fastembed", None), ("fastembed parallel", cores)):
            wall, cpu = time.perf_counter(), os.times()
            found = list(model.embed(paths, batch_size=batch, parallel=parallel))
            assert len(found) == len(paths)
            took[name] = time.perf_counter() - wall, sum(os.times()[:4]) - sum(cpu[:4])
        print(json.dumps(took), flush=True)

if __name__ == "__main__":
    main()
"""


class Peer:
    """fastembed in its own environment, loaded once and asked to take its turns."""

    def __init__(self, python: Path, model: Path, paths: list[Path], spec: Preprocess) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        onnx.save(_taking_planes(model), folder / "model.onnx")
        edge = round(min(spec.width, spec.height) / spec.crop_ratio)
        config = {
            "image_processor_type": "CLIPImageProcessor",
            **{"do_resize": True, "size": {"shortest_edge": edge}, "resample": 3},
            **{"do_center_crop": True, "crop_size": {"height": spec.height, "width": spec.width}},
            **{"do_rescale": False, "do_normalize": False},
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(config))
        script = folder / "peer.py"
        script.write_text(_PEER)
        self._process = subprocess.Popen(
            [str(python), str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        self._ask([str(folder), BATCH, usable_cores(), [str(path) for path in paths]])

    def turn(self) -> dict[str, list[float]]:
        """Wall and processor seconds for all paths, by way."""
        took: dict[str, list[float]] = json.loads(self._ask("go"))
        return took

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        self._folder.cleanup()

    def _ask(self, what: Any) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit("fastembed ended; what it said stands above")
        return answer


def _taking_planes(path: Path) -> onnx.ModelProto:
    """The same graph behind a Transpose: ``(N, 3, height, width)`` in."""
    model = onnx.load(path)
    (given,) = model.graph.input
    inner = f"{given.name}_in_rows"
    for node in model.graph.node:
        for at, name in enumerate(node.input):
            if name == given.name:
                node.input[at] = inner
    model.graph.node.insert(
        0, helper.make_node("Transpose", [given.name], [inner], perm=[0, 2, 3, 1])
    )
    count, height, width, channels = (size.dim_param or size.dim_value for size in _shape(given))
    planes = helper.make_tensor_value_info(
        given.name, TensorProto.UINT8, [count, channels, height, width]
    )
    given.CopyFrom(planes)
    del model.graph.value_info[:]
    del model.graph.output[1:]
    return model


def _shape(value: onnx.ValueInfoProto) -> Any:
    return value.type.tensor_type.shape.dim


def memory(photos: list[Path]) -> dict[str, dict[str, float]]:
    """The most MiB that each command held, by command and number of files."""
    found: dict[str, dict[str, float]] = {"embed": {}, "index": {}}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        write_model(work / "model.onnx", side=32)
        for count in _MEMORY_COUNTS:
            folder = work / str(count)
            folder.mkdir()
            for number, path in enumerate(itertools.islice(itertools.cycle(photos), count)):
                (folder / f"{number:06}.jpg").symlink_to(path.resolve())
            for command, output in (("embed", "vectors.npy"), ("index", "catalog.faiss")):
                arguments = [command, str(folder), "--model", str(work / "model.onnx")]
                arguments += ["--device", "cpu", "-o", str(work / f"{count}-{output}")]
                found[command][str(count)] = _most_memory(arguments)
    return found


def _most_memory(arguments: list[str]) -> float:
    """MiB; the command runs in a process of its own, which tells what it held.

    As Linux counts it for the program itself: `getrusage` would count in what the benchmark holds.
    """
    code = (
        "import sys\nfrom pathlib import Path\nfrom embedkit.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "lines = Path('/proc/self/status').read_text().splitlines()\n"
        "print(*(one for one in lines if one.startswith('VmHWM')), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True
    )
    return int(done.stderr.split()[-2]) / 1024


def write_model(path: Path, side: int = 224) -> None:
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
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", side, side, 3])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", 128])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    contract = ModelContract(
        name="benchmark",
        embedding_dim=128,
        normalizes=True,
        metric="cosine",
        preprocess=Preprocess(height=side, width=side),
        weights_hash="0" * 64,
    )
    model.metadata_props.add(key=CONTRACT_KEY, value=contract.dumps())
    onnx.save(model, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--fastembed", type=Path, metavar="PYTHON")
    parser.add_argument("--count", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    asked = parser.parse_args()
    figures: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory() as work:
        model = asked.model or Path(work) / "model.onnx"
        if asked.model is None:
            write_model(model)
        own = list(find_images(asked.photos)) if asked.photos else []
        (Path(work) / "drawn").mkdir()
        drawn = draw_photos(Path(work) / "drawn", _DRAWN, (2000, 1500))
        for name, paths, count in (
            ("photos", own, asked.count),
            ("2000x1500", drawn, asked.count // 2),
        ):
            if not paths:
                continue
            some = list(itertools.islice(itertools.cycle(paths), count))
            found = measure(model, some, asked.repeats, asked.fastembed)
            figures[name] = found
            _show(name, found)
        if asked.memory:
            figures["memory_mib"] = found = memory(own or drawn)
            for command, most in found.items():
                print(f"{command}: " + ", ".join(f"{m:.0f} MiB at {n}" for n, m in most.items()))
    save("pipeline", figures)


def _show(name: str, found: dict[str, Any]) -> None:
    print(f"{name}: {found['images']} images, {found['images_per_second']:.1f} a second")
    for way, wall in found["wall_ms_per_image"].items():
        print(f"  {way:<20} {wall:7.2f} ms {found['cpu_ms_per_image'][way]:7.2f} ms CPU an image")
    print(
        f"  {found['of_bound']:.2f} of the bound with {found['cores_had']:.2f} cores to be had "
        f"({1 / found['cpu_over_alone']:.2f} in processor time); "
        f"{found['against_loop']:.2f} x the loop (the bound: {found['bound_against_loop']:.2f})"
        + (f", {found['against_fastembed']:.2f} x fastembed" if found["against_fastembed"] else "")
        + f"; least cosine {found['cosine_min']:.5f}"
    )


if __name__ == "__main__":
    main()
