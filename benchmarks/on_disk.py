"""How much memory does it take to merge n shards into one index, and to search it?

    python -m benchmarks.on_disk [--shards 1,2,4,8] [--rows 10000] [--dim 128] [--type ivf]

Shards of `rows` synthetic clustered vectors are merged, once as ivf-disk and once as another kind
that is built in memory; then both are opened and asked 100 times, each in a process of its own.
Printed for each:

* memory: the most that the process held of its own (Linux: private pages, sampled every 5 ms), less
  what it held before it began. This is what has to fit, and what must not grow with n;
* with pages: the same with the pages of mapped files that happened to be in memory: the system
  takes those back when it needs them, so they grow as long as there is room;
* recall@10 against exact search, and CPU seconds.

Exit code 1 where the memory of ivf-disk for the most shards is above 1.5 x that for the fewest.

A merge is trained from at most 262,144 rows, and sorts and keeps names in steps of some MB. A toy
would be below all of that, and would show only its own growth, so these limits are made as much
smaller as `--sample` is than 262,144; with `--sample 262144` they are as they are.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from benchmarks.figures import machine, save
from embedkit.imaging import Preprocess
from embedkit.index import Catalog, Row, Wanted, kinds, merge_indexes, names, on_disk, write_catalog
from embedkit.index.store import Item, Run, Store, store_path
from embedkit.runtime import ModelContract

__all__ = ["Memory", "draw", "make_shard"]

_GROWTH = 1.5
_BATCH = 4096
_ASKED = 100
_MERGED = "all.faiss"
_BITS = 24  # numbers that differ within and between the classes; the rest is noise


class Memory:
    """Looks at this process's memory again and again; a context manager.

    Attributes:
        own: The most private pages, bytes, beyond those at the start.
        with_pages: The same with pages of mapped files.
    """

    def __init__(self) -> None:
        self.own = self.with_pages = 0
        # What was freed before and is still held would be used again, and not be seen.
        ctypes.CDLL(None).malloc_trim(0)
        self._start = _held()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.005):
            own, pages = _held()
            self.own = max(self.own, own - self._start[0])
            self.with_pages = max(self.with_pages, own + pages - sum(self._start))


def _held() -> tuple[int, int]:
    """Private and file pages, bytes."""
    said = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, pages = (int(said[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
    return own, pages


def draw(rows: int, dim: int, seed: int) -> np.ndarray:
    """Unit rows ``(rows, dim)`` of classes of about twenty, in a few directions, with noise."""
    shared = np.random.default_rng(0)
    spread = shared.standard_normal((_BITS, dim), np.float32)
    own = np.random.default_rng(seed)
    centres = own.standard_normal((max(1, rows // 20), _BITS), np.float32)
    near = centres[own.integers(0, len(centres), rows)]
    near += 0.4 * own.standard_normal((rows, _BITS), np.float32)
    vectors = near @ spread + 0.5 * own.standard_normal((rows, dim), np.float32)
    unit: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit.astype(np.float32)


def make_shard(path: Path, number: int, rows: int, dim: int) -> None:
    """A shard as `embedkit index --shard` leaves it."""
    contract = ModelContract(
        name="on-disk",
        embedding_dim=dim,
        normalizes=True,
        metric="cosine",
        preprocess=Preprocess(),
        weights_hash="0" * 64,
    )
    vectors = draw(rows, dim, number + 1)
    with Store(store_path(path)) as store:
        store.set_run(Run(contract.fingerprint, contract.dumps(), b".", None))
        for start in range(0, rows, _BATCH):
            block = vectors[start : start + _BATCH]
            names = [
                b"photos/class-%04d/%03d-%09d.jpg" % (n % 1000, number, n + start)
                for n in range(len(block))
            ]
            store.put(
                [
                    Item(name, 1, 1, name, name[7:17], None, None, row.tobytes())
                    for name, row in zip(names, block, strict=True)
                ]
            )
    # What is merged are the stores: a catalog of a few says whose they are.
    some = [Row(n, b"%d.jpg" % n, b"", vector) for n, vector in enumerate(vectors[:10])]
    write_catalog(path, some, contract=contract, root=path.parent)


def merge(folder: Path, shards: int, kind: str, sample: int) -> dict[str, Any]:
    """In this process; its figures."""
    faiss.omp_set_num_threads(1)
    smaller = sample / kinds.MAX_TRAINING
    kinds.MAX_TRAINING = sample
    on_disk._SORTED_AT_ONCE = int(on_disk._SORTED_AT_ONCE * smaller)
    names._IN_MEMORY = int(names._IN_MEMORY * smaller)
    parts = [folder / f"s{n}.faiss" for n in range(shards)]
    started = time.process_time()
    with Memory() as merging:
        done = merge_indexes(folder / _MERGED, parts, wanted=Wanted(kind))
    assert done.count == sum(done.parts) - done.duplicates
    return {
        "shards": shards,
        "kind": kind,
        "count": done.count,
        "merge_bytes": merging.own,
        "merge_bytes_with_pages": merging.with_pages,
        "cpu_seconds": time.process_time() - started,
    }


def ask(folder: Path) -> dict[str, Any]:
    """In this process; its figures. The index is gone afterwards."""
    faiss.omp_set_num_threads(1)
    out = folder / _MERGED
    with Memory() as searching:
        catalog = Catalog.open(out)
        queries = catalog.vectors(np.linspace(0, len(catalog) - 1, _ASKED).astype(np.int64))
        for query in queries:
            catalog.search(query[None], 10)
    choice = catalog.choice
    assert choice is not None
    size = out.stat().st_size
    for file in (out, store_path(out)):
        file.unlink()
    return {
        "search_bytes": searching.own,
        "search_bytes_with_pages": searching.with_pages,
        "file_bytes": size,
        "recall": choice.recall,
        "factory": choice.factory,
        "search": dict(choice.search),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", default="1,2,4,8")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--type", default="ivf", help="what ivf-disk is held against")
    parser.add_argument("--sample", type=int, default=8_000)
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        folder, shards, kind = Path(asked.work[0]), int(asked.work[1]), asked.work[2]
        print(json.dumps(merge(folder, shards, kind, asked.sample) if shards else ask(folder)))
        return
    counts = sorted(int(count) for count in asked.shards.split(","))
    figures = []
    print(
        f"{'':<22} {'merging, MB':>22} {'searching, MB':>22} {'file':>8} {'recall':>7} {'CPU':>7}"
    )
    print(f"{'':<22} {'own':>10} {'with pages':>11} {'own':>10} {'with pages':>11} {'MB':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for number in range(counts[-1]):
            make_shard(Path(folder) / f"s{number}.faiss", number, asked.rows, asked.dim)
        for kind in ("ivf-disk", asked.type):
            for count in counts:
                command = [sys.executable, "-m", "benchmarks.on_disk", "--sample"]
                command += [str(asked.sample), "--work", folder]
                one: dict[str, Any] = {}
                for step in (count, 0):  # to merge, and to search, each in a process of its own
                    done = subprocess.run(
                        [*command, str(step), kind], check=True, capture_output=True, text=True
                    )
                    one |= json.loads(done.stdout)
                figures.append(one)
                sizes = [
                    f"{one[name] / 1e6:{width},.1f}"
                    for name, width in (
                        ("merge_bytes", 10),
                        ("merge_bytes_with_pages", 11),
                        ("search_bytes", 10),
                        ("search_bytes_with_pages", 11),
                        ("file_bytes", 8),
                    )
                ]
                print(
                    f"{kind:<9} {one['count']:>12,} {' '.join(sizes)} {one['recall']:7.3f} "
                    f"{one['cpu_seconds']:6.1f}s",
                    flush=True,
                )
    disk = [one["merge_bytes"] for one in figures if one["kind"] == "ivf-disk"]
    growth = disk[-1] / disk[0]
    print(f"\n{counts[-1] / counts[0]:g} x the pictures take {growth:.2f} x the memory to merge")
    save(
        "on_disk",
        {
            "machine": machine(),
            "rows": asked.rows,
            "dim": asked.dim,
            "sample": asked.sample,
            "growth": growth,
            "figures": figures,
        },
    )
    sys.exit(growth > _GROWTH)


if __name__ == "__main__":
    main()
