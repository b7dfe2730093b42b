"""One cold `embedkit search` of a large catalog, against the sum of what it cannot do without.

    python -m benchmarks.search_latency --model model.onnx --photo query.jpg [--count 1000000]

The catalog holds generated vectors of the model's width under names of 50 letters. Each part is
timed in a fresh process, with compiled Python at hand: a Python that imports what a search needs,
Typer reading a command of one argument and one option (it imports pydantic for that), the model's
session, decoding and embedding the photo, mapping or reading the FAISS file alone, one FAISS
search. Processor seconds, the median of several; target: the whole is at most 1.3 x their sum.

Then the warm one: `Catalog.search` against FAISS alone on the same file, one query at a time and 32
at once, in turns, processor seconds, the median; target: at most 1.1 x. What ours does more is the
same for every size of catalog: it scores what was found again, exactly, and says who it is.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np

from benchmarks.figures import machine, save
from benchmarks.index import synthetic
from embedkit.index import Catalog, Row, Wanted, write_catalog
from embedkit.index.kinds import apply_search
from embedkit.runtime import read_contract

__all__ = ["seconds", "warm"]

_IMPORTS = "import typer, rich.console, numpy, PIL.Image, faiss, onnxruntime"
_FAISS = "import faiss; i = faiss.read_index({index!r}, {flags})"
_COMMAND = """
def one(photo: Path, index: Path = Path("x")): pass
app = typer.Typer(add_completion=False)
app.command()(one)
app(["a.jpg", "--index", "b"], standalone_mode=False)
"""
_PARTS = {
    "imports": ("", _IMPORTS),
    "command line": (f"{_IMPORTS}\nfrom pathlib import Path", _COMMAND),
    "session": (_IMPORTS, "s = onnxruntime.InferenceSession({model!r})"),
    "index": (_IMPORTS, _FAISS),
    "one search": (
        f"{_IMPORTS}; {_FAISS}",
        "i.search(numpy.ones((1, i.d), numpy.float32) / i.d ** 0.5, 11)",
    ),
    "photo": (
        "from embedkit.runtime import Embedder; e = Embedder.load({model!r})",
        "e.embed([{photo!r}])",
    ),
}


def seconds(command: list[str]) -> float:
    """Processor seconds of a process and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--photo", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--type", default="auto")
    parser.add_argument("--runs", type=int, default=5)
    asked = parser.parse_args()
    contract = read_contract(asked.model)
    with tempfile.TemporaryDirectory() as temporary:
        index = Path(temporary) / "catalog.faiss"
        vectors = synthetic(asked.count, contract.embedding_dim)
        rows = _Rows(vectors)
        write_catalog(
            index,
            rows,
            contract=contract,
            root=Path(temporary),
            model=asked.model.absolute(),
            wanted=Wanted(type=asked.type),
        )
        choice = Catalog.open(index, mmap=True).choice
        # Compiled once, by the warm-up, wherever the environment keeps Python from doing so.
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = f"{temporary}/compiled"
        names = {"model": str(asked.model), "photo": str(asked.photo), "index": str(index)}
        search = [sys.executable, "-m", "embedkit.cli.main", "search", names["photo"]]
        search += ["--index", names["index"], "--model", names["model"], "--device", "cpu"]
        figures: dict[str, float] = {}
        for flags, extra, name in ((512, ["--mmap"], "mapped"), (0, ["--read"], "read")):
            seconds([*search, *extra])
            whole = statistics.median(seconds([*search, *extra]) for _ in range(asked.runs))
            parts = {
                part: _part(
                    before.format(flags=flags, **names),
                    work.format(flags=flags, **names),
                    asked.runs,
                )
                for part, (before, work) in _PARTS.items()
            }
            total = sum(parts.values())
            figures |= {
                f"{name} whole": whole,
                f"{name} parts": total,
                f"{name} ratio": whole / total,
            }
            figures |= {f"{name} {part}": value for part, value in parts.items()}
            print(f"{name}: {whole:.2f} s, its parts {total:.2f} s, ratio {whole / total:.2f}")
            print("  " + ", ".join(f"{part} {value:.2f}" for part, value in parts.items()))
        for at_once in (1, 32):
            found = warm(index, at_once)
            figures |= {f"warm {at_once} {name}": value for name, value in found.items()}
            print(
                f"warm, {at_once} at once: {found['embedkit']:.0f} us a query, FAISS alone "
                f"{found['faiss']:.0f}, ratio {found['ratio']:.2f}"
            )
    figures = {key: round(value, 3) for key, value in figures.items()}
    kind = choice.to_json() if choice else None
    save("search_latency", {"machine": machine(), "count": asked.count, "kind": kind, **figures})


def _part(before: str, work: str, runs: int) -> float:
    """Processor seconds of `work` in a fresh process, those of `before` left aside.

    Where there is nothing before, of the whole process: Python's start and end are parts too.
    """
    if not before:
        return statistics.median(seconds([sys.executable, "-c", work]) for _ in range(runs))
    code = f"import time\n{before}\nt = time.process_time()\n{work}\nprint(time.process_time() - t)"
    found = [
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        for _ in range(runs)
    ]
    return statistics.median(float(one.stdout) for one in found)


def warm(index: Path, at_once: int, rounds: int = 15) -> dict[str, float]:
    """Microseconds of processor time a query, ours and FAISS's alone on one thread."""
    catalog, bare = Catalog.open(index), faiss.read_index(str(index))
    assert catalog.choice is not None
    apply_search(bare, catalog.choice.search)
    faiss.omp_set_num_threads(1)
    queries = catalog.vectors(np.arange(0, len(catalog), len(catalog) // 96)[:96])
    groups = [queries[start : start + at_once] for start in range(0, 96, at_once)]
    took: dict[str, list[float]] = {"embedkit": [], "faiss": []}
    for _ in range(rounds):
        for name, search in (("embedkit", catalog.search), ("faiss", bare.search)):
            before = time.process_time()
            for group in groups:
                search(group, 10)
            took[name].append(1e6 * (time.process_time() - before) / len(queries))
    found = {name: statistics.median(values) for name, values in took.items()}
    return {**found, "ratio": found["embedkit"] / found["faiss"]}


class _Rows:
    """Rows made as they are asked for, as often as they are."""

    def __init__(self, vectors: np.ndarray) -> None:
        self._vectors = vectors

    def __iter__(self):  # type: ignore[no-untyped-def]
        for n, row in enumerate(self._vectors):
            name = b"class%05d/a-photograph-with-a-name-as-they-are-%07d.jpg" % (
                n % 5000,
                n,
            )
            yield Row(n, name, name[:10], row)


if __name__ == "__main__":
    main()
