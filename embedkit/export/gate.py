"""Is the exported file as good as the network? Measured on photos that nobody trained on."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedkit.atomic import published
from embedkit.errors import DataError, GateError, ImageError
from embedkit.evaluate import nearest, neighbour_overlap, retrieval_metrics
from embedkit.export.onnx import export_onnx
from embedkit.imaging import Pixels, Preprocess, read_pixels
from embedkit.models import EmbeddingNet
from embedkit.runtime.backends.base import Backend, Vectors
from embedkit.runtime.backends.onnxruntime import OnnxRuntimeBackend
from embedkit.runtime.contract import ModelContract

__all__ = ["BatchParity", "GateReport", "Thresholds", "check_export", "export_checked", "sample"]

# Batch 1 finds what was traced as a constant, 2 is the traced size, 7 divides nothing.
_BATCHES = (1, 2, 7)
# So many photos are run in every batch size; the others in the last one only.
_IN_EVERY_BATCH = 28
_NEIGHBOURS = 10

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Thresholds:
    """What an exported file must reach.

    Attributes:
        min_cosine: Of every vector with the network's own; 0.9999 suits fp32.
        max_drop: Most that recall@1 and MAP@R may fall, in points (hundredths).
        min_overlap: Least share of the ten nearest neighbours that must stay.
        max_length_error: Most that a vector's length may differ, relative.
    """

    min_cosine: float = 0.9999
    max_drop: float = 0.5
    min_overlap: float = 0.95
    max_length_error: float = 1e-3


@dataclass(frozen=True)
class BatchParity:
    """The file against the network at one batch size.

    Attributes:
        batch: Pictures at once.
        images: Photos compared.
        min_cosine: The worst; NaN where a vector is not finite.
        mean_cosine: Of all.
        max_difference: Largest absolute difference of one number.
        length_error: Largest relative difference of a vector's length.
    """

    batch: int
    images: int
    min_cosine: float
    mean_cosine: float
    max_difference: float
    length_error: float


@dataclass(frozen=True)
class GateReport:
    """The comparison of a file with the network it came from.

    Attributes:
        images: Held-out photos that were compared.
        skipped: Photos that could not be read, with the reason.
        thresholds: What was asked.
        batches: One per batch size.
        neighbour_overlap: Share of the ten nearest neighbours both agree on; None for one photo.
        recall_at_1: Of the network and of the file, leave-one-out on these photos; None where no
            photo has a second one of its class.
        map_at_r: Likewise.
        reasons: Why it failed, one sentence each; empty when it passed.
    """

    images: int
    skipped: tuple[tuple[Path, str], ...]
    thresholds: Thresholds
    batches: tuple[BatchParity, ...]
    neighbour_overlap: float | None
    recall_at_1: tuple[float, float] | None
    map_at_r: tuple[float, float] | None
    reasons: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.reasons

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; what is not finite becomes None."""

        def pair(values: tuple[float, float] | None) -> dict[str, float] | None:
            return None if values is None else {"torch": values[0], "file": values[1]}

        return {
            "passed": self.passed,
            "reasons": list(self.reasons),
            "images": self.images,
            "skipped": [{"path": str(path), "reason": why} for path, why in self.skipped],
            "thresholds": dataclasses.asdict(self.thresholds),
            "batches": [
                {name: value if math.isfinite(value) else None for name, value in row.items()}
                for row in map(dataclasses.asdict, self.batches)
            ],
            "neighbour_overlap@10": self.neighbour_overlap,
            "recall@1": pair(self.recall_at_1),
            "map@r": pair(self.map_at_r),
        }


def export_checked(
    network: EmbeddingNet,
    contract: ModelContract,
    path: Path,
    photos: Sequence[Path],
    labels: Sequence[str],
    *,
    thresholds: Thresholds | None = None,
    progress: Progress | None = None,
) -> tuple[ModelContract, GateReport]:
    """Write the ONNX file and publish it under its name only when the gate lets it through.

    Arguments and errors are those of `export_onnx` and `check_export`.

    Raises:
        GateError: The file is not as good as the network; it was not published, and what stood
            at `path` before still stands.
    """
    with published(path) as temporary:
        contract = export_onnx(network, contract, temporary)
        report = check_export(
            temporary, network, photos, labels, thresholds=thresholds, progress=progress
        )
        if not report.passed:
            raise GateError(
                "the exported file is not as good as the network; it was not published",
                facts="\n".join(report.reasons),
                hint="please report it; --min-cosine and --max-drop set what is asked",
            )
    return contract, report


def check_export(
    model: Path | Backend,
    network: EmbeddingNet,
    photos: Sequence[Path],
    labels: Sequence[str],
    *,
    thresholds: Thresholds | None = None,
    progress: Progress | None = None,
) -> GateReport:
    """Compare a file, run by its own runtime on the CPU, with the network on held-out photos.

    Args:
        model: An ONNX file with its contract, or anything that runs one.
        network: Where it came from.
        photos: Held-out; `sample` makes a choice of many.
        labels: One per photo.
        thresholds: What is asked; `Thresholds()` when None.
        progress: Called as ``progress(done, failed)`` while photos are read and run.

    Raises:
        DataError: Not one of the photos can be read.
        MismatchError: The file cannot be loaded or does not do what its contract says.

    Cost: each photo through the network once and through the file once, 28 of them three times;
    memory for 28 photos and all vectors.
    """
    thresholds = thresholds or Thresholds()
    backend = OnnxRuntimeBackend(model, device="cpu") if isinstance(model, Path) else model
    reference = copy.deepcopy(network).cpu().eval()
    skipped: list[tuple[Path, str]] = []
    kept: list[str] = []
    wanted: list[Vectors] = []
    got: dict[int, list[Vectors]] = {batch: [] for batch in _BATCHES}
    preprocess = backend.contract.preprocess
    for pixels, rows in _read(photos, preprocess, skipped, progress):
        wanted.append(_by_torch(reference, pixels, normalize=backend.contract.normalizes))
        for batch in _BATCHES if not kept else _BATCHES[-1:]:
            got[batch].append(_in_batches(backend, pixels, batch))
        kept += [labels[row] for row in rows]
    if isinstance(model, Path):
        backend.close()
    if not kept:
        first = f"{skipped[0][0]}: {skipped[0][1]}" if skipped else "the list is empty"
        raise DataError(
            "there is no held-out photo to check the export with",
            facts=f"{len(skipped)} of {len(photos)} could not be read; {first}",
            hint="put the photos back to where they were when the model was trained",
        )
    expected = np.concatenate(wanted)
    vectors = {batch: np.concatenate(parts) for batch, parts in got.items()}
    return _report(expected, vectors, kept, tuple(skipped), thresholds)


def sample(labels: Sequence[str], limit: int = 512) -> list[int]:
    """At most about `limit` rows, as whole small classes, so that photos keep their neighbours.

    A share of each class is taken (at least four photos), from as many classes as fit; drawn with
    a fixed seed, in the order of the rows. Everything, when it is no more than `limit`.
    """
    if len(labels) <= limit:
        return list(range(len(labels)))
    rng = np.random.default_rng(0)
    codes = np.unique(np.asarray(labels), return_inverse=True)[1]
    classes = rng.permutation(int(codes.max()) + 1)
    share = max(4, limit // len(classes))
    rows: list[int] = []
    for label in classes:
        rows += rng.permutation(np.flatnonzero(codes == label))[:share].tolist()
        if len(rows) >= limit:
            break
    return sorted(rows)


def _read(
    photos: Sequence[Path],
    preprocess: Preprocess,
    skipped: list[tuple[Path, str]],
    progress: Progress | None,
) -> Iterator[tuple[Pixels, list[int]]]:
    """Readable photos, up to 28 at once, with their rows; the others are added to `skipped`."""
    pixels: list[Pixels] = []
    rows: list[int] = []
    for row, path in enumerate(photos):
        try:
            pixels.append(read_pixels(path, preprocess))
            rows.append(row)
        except ImageError as error:
            skipped.append((path, error.reason))
            if progress:
                progress(1, 1)
        if rows and (len(rows) == _IN_EVERY_BATCH or row == len(photos) - 1):
            yield np.stack(pixels), rows
            if progress:
                progress(len(rows), 0)
            pixels, rows = [], []


def _by_torch(network: EmbeddingNet, pixels: Pixels, *, normalize: bool) -> Vectors:
    """What the file should give; the L2 norm is taken in numpy, not by the code under test."""
    with torch.inference_mode():
        raw = network(torch.from_numpy(pixels)).numpy()
    if not normalize:
        return np.asarray(raw, np.float32)
    lengths = np.linalg.norm(raw.astype(np.float64), axis=1, keepdims=True)
    return np.asarray(raw / np.maximum(lengths, 1e-12), np.float32)


def _in_batches(backend: Backend, pixels: Pixels, batch: int) -> Vectors:
    """Vectors of `pixels`, always exactly `batch` at once; photos are repeated to fill the last."""
    count = len(pixels)
    filled = pixels[np.arange(-(-count // batch) * batch) % count]
    parts = [backend.run(filled[i : i + batch]) for i in range(0, len(filled), batch)]
    return np.concatenate(parts)[:count]


def _report(
    expected: Vectors,
    vectors: dict[int, Vectors],
    labels: Sequence[str],
    skipped: tuple[tuple[Path, str], ...],
    asked: Thresholds,
) -> GateReport:
    batches = tuple(
        _parity(batch, expected[: len(given)], given) for batch, given in vectors.items()
    )
    overlap, recall, precision = None, None, None
    reasons: list[str] = []
    lost = [len(v) - int(np.isfinite(v).all(1).sum()) for v in (expected, *vectors.values())]
    if any(lost):
        origin = "the network" if lost[0] else "the file"
        reasons.append(f"{origin} gives vectors that are not finite, {max(lost)} of {len(labels)}")
    else:
        reasons += [reason for row in batches for reason in _faults(row, asked)]
        given = vectors[_BATCHES[-1]]
        if len(labels) > 1:
            near = [nearest(rows, _NEIGHBOURS) for rows in (expected, given)]
            overlap = neighbour_overlap(*near)
        metrics = [retrieval_metrics(rows, labels, ks=(1,)) for rows in (expected, given)]
        if metrics[0].queries > metrics[0].lone_queries:
            recall = metrics[0].recall[1], metrics[1].recall[1]
            precision = metrics[0].map_at_r, metrics[1].map_at_r
        reasons += _quality_faults(overlap, {"recall@1": recall, "MAP@R": precision}, asked)
    return GateReport(
        images=len(labels),
        skipped=skipped,
        thresholds=asked,
        batches=batches,
        neighbour_overlap=overlap,
        recall_at_1=recall,
        map_at_r=precision,
        reasons=tuple(reasons),
    )


def _parity(batch: int, expected: Vectors, given: Vectors) -> BatchParity:
    a, b = expected.astype(np.float64), given.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinite vectors make NaN here, and a reason later
        lengths = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
        cosine = (a * b).sum(1) / np.maximum(lengths[0] * lengths[1], 1e-30)
        length_error = np.abs(lengths[1] - lengths[0]) / np.maximum(lengths[0], 1e-30)
        difference = np.abs(a - b)
    return BatchParity(
        batch=batch,
        images=len(given),
        min_cosine=float(cosine.min()),
        mean_cosine=float(cosine.mean()),
        max_difference=float(difference.max()),
        length_error=float(length_error.max()),
    )


def _faults(row: BatchParity, asked: Thresholds) -> Iterator[str]:
    if row.min_cosine < asked.min_cosine:
        yield (
            f"batch {row.batch}: the smallest cosine with the network's vector is "
            f"{row.min_cosine:.6f}, below {asked.min_cosine}"
        )
    if row.length_error > asked.max_length_error:
        yield (
            f"batch {row.batch}: a vector's length is off by {row.length_error:.2%}, "
            f"more than {asked.max_length_error:.2%}"
        )


def _quality_faults(
    overlap: float | None, metrics: dict[str, tuple[float, float] | None], asked: Thresholds
) -> Iterator[str]:
    if overlap is not None and overlap < asked.min_overlap:
        yield (
            f"{overlap:.1%} of the {_NEIGHBOURS} nearest neighbours stay, less than "
            f"{asked.min_overlap:.1%}"
        )
    for name, pair in metrics.items():
        if pair is not None and (pair[0] - pair[1]) * 100 > asked.max_drop:
            yield (
                f"{name} falls from {pair[0]:.4f} to {pair[1]:.4f}, "
                f"more than {asked.max_drop} points"
            )
