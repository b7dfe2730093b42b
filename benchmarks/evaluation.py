"""Exact evaluation against faiss's flat search of the same depth: time as a ratio, peak memory.

    python -m benchmarks.evaluation [--sizes 20000,200000] [--dim 512] [--queries Q]

Vectors of classes of 10 with noise. Each size runs in a process of its own, so
that its peak is its own; faiss searches the same vectors for the same top ranks (the largest R, and
the query itself) with IndexFlatIP in the same process, after the peak was read. Both use as many
threads as OMP_NUM_THREADS says. ``--queries`` lets only the first classes ask, Q rows of both: the
ratio is that of blocks of queries against the whole gallery, whatever their number.
Targets at 200,000 x 512: at most 1.3 x faiss's time, at most 1.5 GiB resident.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from typing import Any

import numpy as np

from benchmarks.figures import machine, save
from embedkit.evaluate import query_results

__all__ = ["draw", "measure"]

_PER_CLASS = 10


def draw(count: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows ``(count, dim)`` float32 and their labels, in no order of classes."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(count) // _PER_CLASS)
    centres = rng.standard_normal((count // _PER_CLASS + 1, dim), dtype=np.float32)
    rows = rng.standard_normal((count, dim), dtype=np.float32)
    noise = np.float32(1.9)
    for start in range(0, count, 4096):
        part = slice(start, start + 4096)
        rows[part] = centres[labels[part]] + noise * rows[part]
        rows[part] /= np.linalg.norm(rows[part], axis=1, keepdims=True)
    return rows, labels


def measure(count: int, dim: int, queries: int) -> dict[str, Any]:
    """Ours, its peak memory, then faiss's."""
    rows, labels = draw(count, dim)
    query = labels < queries // _PER_CLASS
    before = _peak()
    began = time.perf_counter()
    results = query_results(rows, labels, ks=(1, 2, 4, 8), query=query)
    ours = time.perf_counter() - began
    peak = _peak()
    depth = max(8, int(results.matches.max())) + 1

    import faiss

    index = faiss.IndexFlatIP(dim)
    index.add(rows)
    asking = rows[query]
    began = time.perf_counter()
    index.search(asking, depth)
    theirs = time.perf_counter() - began
    metrics = results.metrics((1,))
    return {
        "count": count,
        "dim": dim,
        "queries": len(asking),
        "depth": depth,
        "recall@1": metrics.recall[1],
        "mrr": metrics.mrr,
        "seconds": {"embedkit": ours, "faiss": theirs},
        "time_ratio": ours / theirs,
        "peak_mib": {"before": before, "evaluated": peak},
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _in_own_process(count: int, dim: int, queries: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.evaluation", "--one"]
    command += [str(count), "--dim", str(dim), "--queries", str(queries)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="20000,200000")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one is not None:
        print(json.dumps(measure(asked.one, asked.dim, asked.queries)))
        return
    runs = []
    for count in map(int, asked.sizes.split(",")):
        found = _in_own_process(count, asked.dim, min(count, asked.queries or count))
        runs.append(found)
        seconds = found["seconds"]
        print(
            f"{count:,} x {asked.dim}, {found['queries']:,} queries: {seconds['embedkit']:.1f} s, "
            f"faiss {seconds['faiss']:.1f} s, ratio {found['time_ratio']:.2f}; "
            f"peak {found['peak_mib']['evaluated']:,.0f} MiB"
        )
    threads = os.environ.get("OMP_NUM_THREADS", "one per core")
    save("evaluation", {"machine": machine(), "threads": threads, "runs": runs})


if __name__ == "__main__":
    main()
