"""The index against autofaiss, hnswlib and usearch: recall@10, queries a second, bytes, build time.

    python -m benchmarks.index [--quick] [--sizes 100000x512,1000000x128]
    python -m benchmarks.index --sizes 100000x512 --photos FOLDER --model model.onnx

One thread throughout; each engine in a process of its own, on the same vectors and queries, which
are not in the index. hnswlib and usearch are built as they come (M 16) and searched with the least
effort that finds 0.99 of the 10 nearest of other queries, as embedkit tunes itself; autofaiss tunes
itself for 10 ms a query. embedkit is timed through `Catalog.search`, with names and exact scores,
and beside it FAISS alone on the same file. Two sets of vectors:

* synthetic: classes of twenty in 24 dimensions of meaning, with noise in all of them.
* real, with ``--photos``: a model's vectors of random crops of photos, a tenth to the whole of one.
  The model's width must be the size's. Figures are kept in ``index-photos.json``.

autofaiss needs numpy 1, which no extra does: give this an environment of its own, with
``pip install . autofaiss hnswlib usearch "pyarrow<21"``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.figures import machine, save

__all__ = ["ENGINES", "measure"]

Vectors = npt.NDArray[np.float32]
Search = Callable[[Vectors, int], npt.NDArray[np.int64]]

ENGINES = (
    "embedkit auto",
    "embedkit ivf",
    "embedkit hnsw",
    "embedkit tiny",
    "faiss flat",
    "autofaiss",
    "hnswlib",
    "usearch",
)
_K, _WANTED = 10, 0.99
_TUNING, _ASKED = 500, 1000
_EFFORTS = (16, 32, 64, 128, 256, 512)


def synthetic(count: int, dim: int) -> Vectors:
    """Unit rows ``(count, dim)``: super-classes, classes of twenty in them, noise."""
    rng = np.random.default_rng(0)
    classes = max(1, count // 20)
    above = rng.standard_normal((max(1, classes // 25), 24), dtype=np.float32)
    centres = above[rng.integers(0, len(above), classes)]
    centres += 0.7 * rng.standard_normal(centres.shape, dtype=np.float32)
    basis = rng.standard_normal((24, dim), dtype=np.float32)
    rows = np.empty((count, dim), np.float32)
    for start in range(0, count, 50_000):
        part = rows[start : start + 50_000]
        near = centres[rng.integers(0, classes, len(part))]
        near += 0.35 * rng.standard_normal(near.shape, dtype=np.float32)
        part[:] = near @ basis + 0.5 * rng.standard_normal(part.shape, dtype=np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return rows


def of_photos(folder: Path, model: Path, count: int) -> tuple[Vectors, str]:
    """Vectors ``(count, D)`` of random crops, as many of every photo, and what they are."""
    from PIL import Image

    from embedkit import Embedder
    from embedkit.imaging import decode

    embedder = Embedder.load(model)
    photos = sorted(folder.rglob("*.jpg"))
    rng = np.random.default_rng(0)
    each = -(-count // len(photos))

    def crops(path: Path) -> list[Image.Image]:
        photo = decode(path)
        parts = []
        for share in rng.uniform(0.1, 1, each) ** 0.5:
            width, height = (max(16, round(share * side)) for side in photo.size)
            left = rng.integers(0, max(1, photo.width - width + 1))
            top = rng.integers(0, max(1, photo.height - height + 1))
            parts.append(photo.crop((left, top, left + width, top + height)))
        return parts

    rows = np.concatenate([embedder.embed(crops(path)) for path in photos])
    rows = rows[rng.permutation(len(rows))[:count]]
    return rows, f"{count:,} random crops of {len(photos):,} photos"


def measure(engine: str, folder: Path) -> dict[str, Any]:
    """Build one engine on the vectors in `folder`, tune it, ask it."""
    rows = np.load(folder / "rows.npy")
    tuning, asked = np.load(folder / "tuning.npy"), np.load(folder / "asked.npy")
    before = _peak()
    started = time.perf_counter()
    search, facts, tune = _BUILD[engine.split()[0]](engine, rows, folder)
    if tune:
        for effort in _EFFORTS:
            tune(effort)
            facts["effort"] = effort
            if _recall(search(tuning, _K), np.load(folder / "tuning_truth.npy")) >= _WANTED:
                break
    facts["build_seconds"] = round(time.perf_counter() - started, 2)
    facts["peak_mib_beside_vectors"] = round(_peak() - before)
    facts["recall@10"] = round(_recall(search(asked, _K), np.load(folder / "truth.npy")), 4)
    facts["ms_per_query"] = round(1000 * _one_by_one(search, asked), 4)
    facts["queries_per_second"] = round(_together(search, asked), 1)
    return facts


def _embedkit(engine: str, rows: Vectors, folder: Path) -> tuple[Search, dict[str, Any], None]:
    import faiss

    from embedkit.imaging import Preprocess
    from embedkit.index import Catalog, Row, Wanted, write_catalog
    from embedkit.runtime import ModelContract

    faiss.omp_set_num_threads(1)
    kind = engine.split()[1]
    named = _Rows(lambda n, row: Row(n, b"class%d/photo%d.jpg" % (n % 997, n), b"class", row), rows)
    about = ModelContract(
        name="benchmark",
        embedding_dim=rows.shape[1],
        normalizes=True,
        metric="cosine",
        preprocess=Preprocess(height=32, width=32),
        weights_hash="none",
    )
    path = folder / f"{kind}.faiss"
    write_catalog(path, named, contract=about, root=folder, wanted=Wanted(type=kind))
    catalog = Catalog.open(path)
    choice = catalog.choice
    assert choice is not None
    asked = np.load(folder / "asked.npy")
    bare = faiss.read_index(str(path))

    def alone(queries: Vectors, k: int) -> npt.NDArray[np.int64]:
        found: npt.NDArray[np.int64] = bare.search(queries, k)[1]
        return found

    def search(queries: Vectors, k: int) -> npt.NDArray[np.int64]:
        return np.array([[hit.id for hit in hits] for hits in catalog.search(queries, k)])

    facts = {
        "factory": choice.factory,
        "search": dict(choice.search),
        "tried": list(choice.tried),
        "recall_said": choice.recall,
        "bytes_per_vector": choice.bytes_per_vector,
        # Turn about, so that what else the machine does meets both.
        "times_bare_faiss": round(_ratio(search_hits(catalog), alone, asked), 3),
    }
    return search, facts, None


def search_hits(catalog: Any) -> Search:
    """`Catalog.search` as it is, for timing: its hits are not looked into."""
    found: Search = catalog.search
    return found


class _Rows:
    """Rows made as they are asked for, as often as they are."""

    def __init__(self, make: Callable[[int, Vectors], Any], rows: Vectors) -> None:
        self._make, self._rows = make, rows

    def __iter__(self) -> Any:
        return (self._make(n, row) for n, row in enumerate(self._rows))


def _flat(engine: str, rows: Vectors, folder: Path) -> tuple[Search, dict[str, Any], None]:
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    return lambda queries, k: index.search(queries, k)[1], {"bytes_per_vector": 4.0 * index.d}, None


def _autofaiss(engine: str, rows: Vectors, folder: Path) -> tuple[Search, dict[str, Any], None]:
    import autofaiss
    import faiss

    faiss.omp_set_num_threads(1)
    index, _ = autofaiss.build_index(
        rows,
        save_on_disk=False,
        metric_type="ip",
        max_index_memory_usage="4G",
        current_memory_available="12G",
        max_index_query_time_ms=10,
        nb_cores=1,
        verbose=40,
    )
    size = len(faiss.serialize_index(index)) / len(rows)
    facts = {"factory": type(index).__name__, "bytes_per_vector": round(size, 1)}
    return lambda queries, k: index.search(queries, k)[1], facts, None


def _hnswlib(
    engine: str, rows: Vectors, folder: Path
) -> tuple[Search, dict[str, Any], Callable[[int], None]]:
    import hnswlib

    index = hnswlib.Index("ip", rows.shape[1])
    index.init_index(len(rows), M=16, ef_construction=200, random_seed=1)
    index.set_num_threads(1)
    index.add_items(rows, num_threads=1)

    def search(queries: Vectors, k: int) -> npt.NDArray[np.int64]:
        return index.knn_query(queries, k, num_threads=1)[0].astype(np.int64)

    return search, {"bytes_per_vector": round(index.index_file_size() / len(rows), 1)}, index.set_ef


def _usearch(
    engine: str, rows: Vectors, folder: Path
) -> tuple[Search, dict[str, Any], Callable[[int], None]]:
    from usearch.index import Index

    index = Index(ndim=rows.shape[1], metric="ip", dtype="f32", connectivity=16)
    index.add(np.arange(len(rows)), rows, threads=1)

    def search(queries: Vectors, k: int) -> npt.NDArray[np.int64]:
        found = np.asarray(index.search(queries, k, threads=1).keys, np.int64)
        return found.reshape(len(queries), k)

    def tune(effort: int) -> None:
        index.expansion_search = effort

    return search, {"bytes_per_vector": round(index.serialized_length / len(rows), 1)}, tune


_BUILD: dict[str, Callable[[str, Vectors, Path], tuple[Search, dict[str, Any], Any]]] = {
    "embedkit": _embedkit,
    "faiss": _flat,
    "autofaiss": _autofaiss,
    "hnswlib": _hnswlib,
    "usearch": _usearch,
}


def _recall(found: npt.NDArray[np.int64], truth: npt.NDArray[np.int64]) -> float:
    same = (found[:, :, None] == truth[:, None, :]).any(axis=2)
    return float(same.sum() / truth.size)


def _one_by_one(search: Search, queries: Vectors) -> float:
    """Seconds, the median of queries asked one at a time."""
    seconds = []
    for row in range(min(300, len(queries))):
        started = time.perf_counter()
        search(queries[row : row + 1], _K)
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))


def _together(search: Search, queries: Vectors) -> float:
    """Queries a second of the best of three batches."""
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        search(queries, _K)
        best = min(best, time.perf_counter() - started)
    return len(queries) / best


def _ratio(one: Search, other: Search, queries: Vectors) -> float:
    """Median time of a query by `one` over that by `other`, asked turn about."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for row in range(300):
        for search, times in zip((one, other), seconds, strict=True):
            started = time.perf_counter()
            search(queries[row : row + 1], _K)
            times.append(time.perf_counter() - started)
    return float(np.median(seconds[0]) / np.median(seconds[1]))


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _compare(name: str, vectors: Vectors, engines: list[str]) -> dict[str, Any]:
    """Every engine on the same vectors, one process each; what fails is named and left out."""
    import faiss

    rows, others = vectors[: -_TUNING - _ASKED], vectors[-_TUNING - _ASKED :]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        np.save(folder / "rows.npy", rows)
        for part, queries in (("tuning", others[:_TUNING]), ("asked", others[_TUNING:])):
            np.save(folder / f"{part}.npy", queries)
            truth = "truth" if part == "asked" else "tuning_truth"
            found = faiss.knn(queries, rows, _K, metric=faiss.METRIC_INNER_PRODUCT)[1]
            np.save(folder / f"{truth}.npy", found)
        count, dim = rows.shape
        del rows, others, vectors
        print(f"{name}: {count:,} x {dim}")
        figures: dict[str, Any] = {}
        for engine in engines:
            command = [sys.executable, "-m", "benchmarks.index", "--one", engine, str(folder)]
            single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, env={**os.environ, **single}
            )
            if done.returncode:
                figures[engine] = {"failed": (done.stderr.strip().splitlines() or ["?"])[-1]}
                print(f"  {engine:<14} failed: {figures[engine]['failed']}")
                continue
            one = figures[engine] = json.loads(done.stdout.splitlines()[-1])
            print(
                f"  {engine:<14} recall@10 {one['recall@10']:.4f}  "
                f"{one['queries_per_second']:>9,.0f} q/s  {one['ms_per_query']:>8.3f} ms a query  "
                f"{one['bytes_per_vector']:>7,.0f} bytes  built in {one['build_seconds']:>7,.1f} s"
                + (f"  x{one['times_bare_faiss']} FAISS" if "times_bare_faiss" in one else "")
            )
    return {"vectors": name, "count": count, "dim": dim, "engines": figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="30,000 x 64 only: about a minute")
    parser.add_argument("--sizes", default="100000x512,1000000x128")
    parser.add_argument("--photos", type=Path, help="a folder of JPEG photos to crop")
    parser.add_argument("--model", type=Path, help="the model that embeds the crops")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(asked.one[0], Path(asked.one[1]))))
        return
    engines = asked.engines.split(",")
    sizes = (
        [(30_000, 64)]
        if asked.quick
        else [tuple(map(int, size.split("x"))) for size in asked.sizes.split(",")]
    )
    extra = _TUNING + _ASKED
    figures = {
        "machine": machine(),
        "peers": {
            name: version(name) for name in ("autofaiss", "hnswlib", "usearch") if _there(name)
        },
        "runs": (runs := []),
    }
    for count, dim in sizes:
        if asked.photos:
            vectors, name = of_photos(asked.photos, asked.model, count + extra)
            if vectors.shape[1] != dim:
                parser.error(f"the model gives {vectors.shape[1]} numbers, not {dim}")
        else:
            vectors, name = synthetic(count + extra, dim), "synthetic"
        runs.append(_compare(name, vectors, engines))
        # After each, for a run takes an hour.
        save(
            "index" + ("-quick" if asked.quick else "") + ("-photos" if asked.photos else ""),
            figures,
        )


def _there(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


if __name__ == "__main__":
    main()
