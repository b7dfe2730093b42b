"""Is the arithmetic for 100 million and a billion pictures right? Measured small, checked, scaled.

    python -m benchmarks.scale [--model M.onnx] [--photos FOLDER] [--dim 512] [--rows 8000]

Everything that grows is measured on this machine through the code that does the work:

* embedding: CPU time a picture of `embed_sources` (decode, model, journal, file), on drawn photos
  of 1600 x 1200 and a model of MobileNetV2's size, or your own of both;
* writing: time and bytes a row, for .npy with its list and for Parquet, with vectors that cost
  nothing; this is what the work of counting, resuming and publishing adds;
* an index: time and bytes a picture of the store and the catalog, built as `embedkit index` does;
* shards: how unequal the shares of a million names are.

Each of the straight lines is laid through two sizes and has to foretell a third, much larger,
within 30 %; where it does not, that is printed and the exit code is 1. Then the table: for machines
of 16 cores, what 100 million and a billion take.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.figures import machine, save
from benchmarks.pipeline import write_model
from embedkit.imaging import Preprocess, Shard
from embedkit.index import Wanted, write_catalog
from embedkit.index.catalog import Row as CatalogRow
from embedkit.index.store import Item, Run, Store
from embedkit.runtime import Embedder, ModelContract
from embedkit.runtime.latency import draw_photos
from embedkit.scale import Source, embed_sources, find_sources, local_engine

__all__ = ["Cost", "Line", "measure", "plan"]

CORES, SHARD = 16, 1_000_000
SLACK = 0.3


class Cost(NamedTuple):
    """Of some number of pictures: CPU seconds, and bytes on the disk."""

    seconds: float
    size: float


class Line(NamedTuple):
    """A fixed cost and one per picture, and how well they foretold a larger run."""

    fixed: float
    each: float
    foretold: float
    measured: float

    @property
    def error(self) -> float:
        """Share by which the larger run was missed."""
        return abs(self.foretold / self.measured - 1)


def through(sizes: list[int], costs: list[float]) -> Line:
    """The line through the first two, asked about the third."""
    each = (costs[1] - costs[0]) / (sizes[1] - sizes[0])
    fixed = max(0.0, costs[0] - each * sizes[0])
    return Line(fixed, each, fixed + each * sizes[2], costs[2])


def embedding(model: Path, photos: Path, counts: list[int], work: Path) -> list[Cost]:
    """Real pictures through a real model, named again and again up to each count."""
    names = [source.path for source in find_sources([str(photos)])]
    costs = []
    with Embedder.load(model, device="cpu") as embedder:
        for count in (2, *counts):  # the first pays for what a process does once
            asked = [names[n % len(names)] for n in range(count)]

            def run(asked: list[str] = asked) -> None:
                sources = unstamped(find_sources(["-"], listed=asked))
                embed_sources(sources, work / "e.npy", local_engine(embedder), embedder.contract)

            done = timed(run)
            costs.append(Cost(done, 0))
    return costs[1:]


def unstamped(sources: Iterator[Source]) -> Iterator[Source]:
    """So that a picture that comes again is embedded again."""
    for source in sources:
        yield Source(source.path, source.label, "", source.content)


def writing(name: str, counts: list[int], contract: ModelContract, work: Path) -> list[Cost]:
    """The file, its list and the journal, with vectors that are there already."""
    vectors = drawn(max(counts), contract.embedding_dim)

    def engine(sources: Iterable[Source]) -> Generator[tuple[Source, Any], None, None]:
        for n, source in enumerate(sources):
            yield source, vectors[n]

    costs = []
    for count in (2, *counts):
        output = work / name
        seconds = timed(
            lambda count=count, output=output: embed_sources(named(count), output, engine, contract)
        )
        size = sum(file.stat().st_size for file in work.glob(f"{output.stem}.*"))
        costs.append(Cost(seconds, size))
        for file in work.glob(f"{output.stem}.*"):
            file.unlink()
    return costs[1:]


def indexing(counts: list[int], contract: ModelContract, work: Path) -> list[Cost]:
    """The store, filled a batch at a time, and the exact catalog made of it."""
    vectors = drawn(max(counts), contract.embedding_dim)
    costs = []
    for count in (2, *counts):
        index = work / "i.faiss"

        def build(count: int = count, index: Path = index) -> None:
            for file in work.glob("i.faiss*"):
                file.unlink()
            with Store(index.with_name("i.faiss.store")) as store:
                store.set_run(Run(contract.fingerprint, contract.dumps(), b".", None))
                batch: list[Item] = []
                for n, source in enumerate(named(count)):
                    hashed = n.to_bytes(16, "big")
                    path, label = source.path.encode(), source.label.encode()
                    vector = vectors[n].tobytes()
                    batch.append(Item(path, 1, 1, hashed, label, None, None, vector))
                    if len(batch) == 256:
                        store.put(batch)
                        batch = []
                store.put(batch)
                rows: list[CatalogRow] = list(store.rows(contract.embedding_dim))
                write_catalog(index, rows, contract=contract, root=work, wanted=Wanted("flat"))

        seconds = timed(build, times=1)
        costs.append(Cost(seconds, sum(file.stat().st_size for file in work.glob("i.faiss*"))))
        for file in work.glob("i.faiss*"):
            file.unlink()
    return costs[1:]


def named(count: int) -> Iterator[Source]:
    for n in range(count):
        yield Source(f"photos/class-{n % 1000:04}/{n:012}.jpg", f"class-{n % 1000:04}", "1 1", b"")


def drawn(count: int, dim: int) -> np.ndarray:
    vectors = np.random.default_rng(0).standard_normal((count, dim), dtype=np.float32)
    unit: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def timed(work: Callable[[], object], times: int = 2) -> float:
    """CPU seconds of all threads, the best of some times."""
    spent = []
    for _ in range(times):
        started = time.process_time()
        work()
        spent.append(time.process_time() - started)
    return min(spent)


def largest_share(names: int, count: int) -> float:
    """The largest of `count` shards of so many names, over the mean."""
    owners = (Shard.owner(f"class-{n % 1000:04}/{n:012}.jpg", count) for n in range(names))
    sizes = np.bincount(np.fromiter(owners, np.int64, names), minlength=count)
    return float(sizes.max() / sizes.mean())


def measure(asked: argparse.Namespace) -> dict[str, Line]:
    """Every line that the table is made of."""
    contract = ModelContract(
        name="scale",
        embedding_dim=asked.dim,
        normalizes=True,
        metric="cosine",
        preprocess=Preprocess(),
        weights_hash="0" * 64,
    )
    sizes = [asked.rows // 4, asked.rows, asked.rows * 4]
    pictures = [asked.pictures // 4, asked.pictures, asked.pictures * 4]
    lines = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        photos, model = asked.photos, asked.model
        if photos is None:
            photos = work / "photos"
            photos.mkdir()
            draw_photos(photos, 24, (1600, 1200))
        if model is None:
            model = work / "model.onnx"
            write_model(model)
        costs = embedding(model, photos, pictures, work)
        lines["embed, CPU s"] = through(pictures, [cost.seconds for cost in costs])
        for name in ("npy", "parquet"):
            costs = writing(f"w.{name}", sizes, contract, work)
            lines[f"write {name}, CPU s"] = through(sizes, [cost.seconds for cost in costs])
            lines[f"{name}, bytes"] = through(sizes, [cost.size for cost in costs])
        # Beyond 20,000 an index is also asked, to say how fast it is; a shard is always beyond.
        sizes = [3 * asked.rows, 5 * asked.rows, 10 * asked.rows]
        costs = indexing(sizes, contract, work)
        lines["index, CPU s"] = through(sizes, [cost.seconds for cost in costs])
        lines["index, bytes"] = through(sizes, [cost.size for cost in costs])
    return lines


def plan(lines: dict[str, Line], pictures: int, machines: int) -> dict[str, float]:
    """What that many pictures take on machines of `CORES` cores, one shard a million."""
    shards = -(-pictures // SHARD)

    def total(name: str) -> float:
        return lines[name].fixed * shards + lines[name].each * pictures

    seconds = total("embed, CPU s")
    return {
        "shards": shards,
        "core_hours": seconds / 3600,
        "hours": seconds / (machines * CORES) / 3600,
        "npy_gb": total("npy, bytes") / 1e9,
        "parquet_gb": total("parquet, bytes") / 1e9,
        "index_gb": total("index, bytes") / 1e9,
        "index_core_hours": total("index, CPU s") / 3600,
        "shard_minutes": lines["embed, CPU s"].each * SHARD / CORES / 60,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8_000)
    parser.add_argument("--pictures", type=int, default=64)
    asked = parser.parse_args()
    lines = measure(asked)
    print(f"{'measured':<22} {'a picture':>12} {'a run':>10} {'foretold':>12} {'measured':>12}")
    for name, line in lines.items():
        verdict = f"{line.error:4.0%} off" + ("" if line.error <= SLACK else ": NOT A LINE")
        print(
            f"{name:<22} {line.each:12.4g} {line.fixed:10.3g} {line.foretold:12.4g} "
            f"{line.measured:12.4g} {verdict}"
        )
    share = largest_share(1_000_000, 100)
    print(f"the largest of 100 shards of a million names is {share:.3f} x the mean")
    plans: dict[str, dict[str, float]] = {}
    print(f"\n{asked.dim} numbers a picture, shards of {SHARD:,}, machines of {CORES} cores")
    for pictures, machines in ((100_000_000, 8), (1_000_000_000, 64)):
        found = plans[f"{pictures}"] = plan(lines, pictures, machines)
        print(
            f"{pictures:>13,}: {found['shards']:,} shards, {found['core_hours']:,.0f} core hours = "
            f"{found['hours']:,.0f} h on {machines} machines; a shard takes "
            f"{found['shard_minutes']:.0f} min of one\n{'':>15}"
            f"vectors {found['npy_gb']:,.0f} GB as .npy, {found['parquet_gb']:,.0f} as Parquet;\n"
            f"{'':>15}as exact indexes {found['index_gb']:,.0f} GB and "
            f"{found['index_core_hours']:,.0f} core hours more"
        )
    measured = {name: {**line._asdict(), "error": line.error} for name, line in lines.items()}
    save("scale", {"machine": machine(), "lines": measured, "share": share, "plans": plans})
    sys.exit(any(line.error > SLACK for line in lines.values()))


if __name__ == "__main__":
    main()
