"""Damage catalogs in every way and open them: a process of its own, since a crash would end it.

    python -m tests.index.mutations KIND COUNT SEED

Prints how many were refused, answered as before, or answered otherwise without being verified; ends
with a traceback where a damaged file gave an error that is none of ours, or a verified one another
answer.
"""

from __future__ import annotations

import dataclasses
import json
import random
import resource
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

import faiss
import numpy as np

from embedkit.errors import EmbedKitError
from embedkit.index import Catalog, Row, Wanted, write_catalog
from embedkit.index import choose as choosing
from embedkit.index.catalog import Vectors
from embedkit.runtime.codebooks import Codebooks
from tests.index.fakes import contract

KINDS = ("flat", "pq", "ivf", "ivf-disk", "hnsw", "tiny", "sq8", "learned")
_HEAD = 400  # bytes in which a payload says what follows


def make(path: Path, kind: str) -> Vectors:
    """A catalog of 1,500 vectors, of any kind; the vectors ``(1500, 16)``."""
    draw = np.random.default_rng(0)
    rows = draw.standard_normal((1500, 16)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    named = [Row(n, b"c/%d.jpg" % n, b"c", row) for n, row in enumerate(rows)]
    about = contract(dim=16)
    if kind == "learned":
        words = Codebooks.of(draw.standard_normal((4, 16, 4), dtype=np.float32))
        about = contract(dim=16, metric="l2")
        about = dataclasses.replace(about, normalizes=False, codebooks=words)
        codes = draw.integers(0, 16, (1500, 4)).astype(np.uint8)
        named = [row._replace(codes=code) for row, code in zip(named, codes, strict=True)]
    wanted = Wanted(type=None if kind == "sq8" else kind)
    if kind == "sq8":  # only auto falls back to it
        choosing._order = lambda count: ("sq8",)
    write_catalog(path, named, contract=about, root=path.parent, wanted=wanted)
    return rows


def damage(whole: bytes, payload: int, draw: random.Random) -> bytes:
    """One of: cut short, a bit or a number changed anywhere or in the head, a page of zeros."""
    content = bytearray(whole)
    head = min(_HEAD, payload)
    match draw.randrange(7):
        case 0:
            return bytes(content[: draw.randrange(len(content))])
        case 1:
            content[draw.randrange(head)] ^= 1 << draw.randrange(8)
        case 2:
            content[draw.randrange(payload)] ^= 1 << draw.randrange(8)
        case 3:
            content[draw.randrange(payload, len(content))] ^= 1 << draw.randrange(8)
        case 4:
            at = draw.randrange(head - 8)
            number = draw.choice((0, 1_000_000, 1 << 31, 1 << 40, (1 << 63) - 1))
            content[at : at + 8] = number.to_bytes(8, "little")
        case 5:
            at = draw.randrange(payload - 8)
            content[at : at + 8] = draw.getrandbits(64).to_bytes(8, "little")
        case _:
            at = draw.randrange(payload)
            end = min(at + 4096, payload)
            content[at:end] = bytes(end - at)
    return bytes(content)


def main(kind: str, count: int, seed: int) -> None:
    faiss.omp_set_num_threads(1)
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.faiss"
        queries = make(path, kind)[[0, 7, 700]]
        whole = path.read_bytes()
        catalog = Catalog.open(path)
        payload = catalog.manifest["index"]["payload_bytes"]
        expected = catalog.search(queries, 10)
        del catalog
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
        draw = random.Random(f"{kind} {seed}")
        for number in range(count):
            content = damage(whole, payload, draw)
            verify, mmap = number % 3 == 0, number % 3 == 1
            path.unlink()  # what is mapped stays whole
            path.write_bytes(content)
            signal.alarm(10)
            try:
                opened = Catalog.open(path, verify=verify, mmap=mmap)
                found = opened.search(queries, 10)
            except EmbedKitError:
                outcomes["refused"] += 1
                continue
            same = found == expected
            nameless = not opened.has_names
            assert same or nameless or not verify, f"{kind}, {number}: another answer, verified"
            outcomes["same" if same else "other"] += 1
        signal.alarm(0)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
