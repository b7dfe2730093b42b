"""A model without an engine: a vector is a function of the bytes, and each use is counted."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
import zipfile
from collections.abc import Callable, Generator, Iterable
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt

from embedkit.errors import ImageError
from embedkit.imaging import Preprocess
from embedkit.index import Catalog
from embedkit.runtime import Embedded, ModelContract

__all__ = ["FakeEmbedder", "contract", "names_and_vectors", "truth", "vector_of"]

Vector = npt.NDArray[np.float32]


def contract(*, dim: int = 8, weights: str = "w", metric: str = "cosine") -> ModelContract:
    return ModelContract(
        name=f"fake-{weights}",
        embedding_dim=dim,
        normalizes=True,
        metric=metric,
        preprocess=Preprocess(height=16, width=16),
        weights_hash=weights,
    )


def vector_of(content: bytes, dim: int = 8) -> Vector:
    """A unit vector that only this content gives."""
    seed = int.from_bytes(hashlib.sha256(content).digest()[:8], "big")
    vector = np.random.default_rng(seed).standard_normal(dim, dtype=np.float32)
    unit: Vector = vector / np.linalg.norm(vector)
    return unit


class FakeEmbedder:
    """Files that begin with ``bad`` are no pictures; `before` is called ahead of each file."""

    def __init__(
        self,
        *,
        dim: int = 8,
        weights: str = "w",
        seconds: float = 0.0,
        before: Callable[[Path], None] | None = None,
    ) -> None:
        self.contract = contract(dim=dim, weights=weights)
        self.seconds = seconds
        self.before = before
        self.embedded: list[Path] = []

    def embed_files(
        self, paths: Iterable[Path], *, batch: int = 32, workers: int | None = None
    ) -> Generator[Embedded, None, None]:
        for path in paths:
            if self.before:
                self.before(path)
            self.embedded.append(path)
            time.sleep(self.seconds)
            try:
                content = path.read_bytes()
            except OSError as error:
                yield Embedded(path, None, ImageError("unreadable", str(error.strerror)))
                continue
            if content.startswith(b"bad"):
                yield Embedded(path, None, ImageError("not-an-image", "it is no picture"))
            else:
                yield Embedded(path, vector_of(content, self.contract.embedding_dim), None)


def truth(folder: Path, dim: int = 8) -> dict[bytes, tuple[bytes, bytes]]:
    """What an index of `folder` must hold: path -> label and vector, by walking with os.walk."""
    found = {}
    for here, _, files in os.walk(os.fsencode(folder)):
        for name in files:
            path = os.path.join(here, name)  # noqa: PTH118 - bytes
            if not os.path.isfile(path):  # noqa: PTH113 - bytes
                continue
            content = Path(os.fsdecode(path)).read_bytes()
            relative = os.path.relpath(path, os.fsencode(os.path.realpath(folder)))
            if content.startswith(b"bad"):
                continue
            label = relative.split(b"/")[0] if b"/" in relative else b""
            found[relative] = (label, vector_of(content, dim).tobytes())
    return found


def names_and_vectors(index: Path) -> dict[bytes, tuple[bytes, bytes]]:
    """What a published catalog holds, read with `faiss` and `zipfile` alone."""
    flat = faiss.read_index(str(index))
    # pytorch-metric-learning, where another test has imported it, makes FAISS answer in tensors.
    vectors = np.asarray(flat.reconstruct_n(0, flat.ntotal))
    with zipfile.ZipFile(index) as archive:
        assert archive.testzip() is None
        manifest = json.loads(archive.read("embedkit/manifest.json"))
        columns = []
        for name in ("path", "label"):
            ends = np.frombuffer(archive.read(f"embedkit/{name}_offsets.u64"), "<u8").tolist()
            blob = archive.read(f"embedkit/{name}s.bin")
            columns.append([blob[a:b] for a, b in itertools.pairwise(ends)])
    assert manifest["index"]["count"] == flat.ntotal == len(Catalog.open(index, verify=True))
    return {
        path: (label, vector.tobytes())
        for path, label, vector in zip(*columns, vectors, strict=True)
    }
