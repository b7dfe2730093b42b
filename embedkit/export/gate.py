"""Is the exported file as good as the network? Measured on photos that nobody trained on."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from embedkit.atomic import published
from embedkit.errors import DataError, GateError, ImageError
from embedkit.evaluate import (
    Difference,
    calibrate,
    greatest_cosines,
    nearest,
    neighbour_overlap,
    paired_differences,
    query_results,
    split_rows,
)
from embedkit.export.onnx import export_onnx
from embedkit.export.parity import stage_errors
from embedkit.imaging import Pixels, Preprocess, read_pixels
from embedkit.models import EmbeddingNet
from embedkit.models.quantized import QuantizedNet
from embedkit.runtime.backends.base import Backend, CodingBackend, Vectors
from embedkit.runtime.backends.onnxruntime import OnnxRuntimeBackend
from embedkit.runtime.codebooks import Codes
from embedkit.runtime.contract import ModelContract, Prefix
from embedkit.runtime.prefix import cut

__all__ = ["BatchParity", "GateReport", "HeldOut", "Thresholds", "check_export", "compare"]
__all__ += ["export_checked", "publish_checked", "read_held_out", "sample"]

# Batch 1 finds what was traced as a constant, 2 is the traced size, 7 divides nothing.
_BATCHES = (1, 2, 7)
# So many photos are run in every batch size; the others in the last one only.
_IN_EVERY_BATCH = 28
_NEIGHBOURS = 10
# For finding the stage that is off; rounding of float32 stays below 1e-5.
_PICTURES, _SAME, _NAMED = 4, 1e-3, 5

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Thresholds:
    """What an exported file must reach; the defaults are for fp32.

    Attributes:
        min_cosine: Of every vector with the network's own.
        max_drop: Most that recall@1 and MAP@R may fall, in points (hundredths).
        min_overlap: Least share of the ten nearest neighbours that must stay.
        max_length_error: Most that a vector's length may differ, relative.
        min_codes: Least share of a model's codes that must be the network's own.
    """

    min_cosine: float = 0.9999
    max_drop: float = 0.5
    min_overlap: float = 0.95
    max_length_error: float = 1e-3
    min_codes: float = 0.99

    @classmethod
    def of(
        cls, precision: str, *, min_cosine: float | None = None, max_drop: float = 0.5
    ) -> Thresholds:
        """What fits `fp32`, `fp16` or `int8`.

        A rounded vector may point elsewhere by a little and find the same photos, so a reduced
        precision is judged by neighbours and recall. Its least cosine only catches what is broken:
        0.99 for fp16 (sound networks gave 0.9999 or more) and 0.9 for int8 (sound ones 0.95 to
        0.999). Of the ten neighbours 0.95 and 0.85 must stay: within a class many lie equally near.
        Raw vectors (no L2 norm) may also change their length, by 1 % and 10 %. A code changes where
        two words are chosen almost alike: 0.97 and 0.8 of them must stay (fp32: 0.99).

        Args:
            precision: Of the file.
            min_cosine: In the place of the precision's own.
            max_drop: In points.
        """
        cosine, overlap, length, codes = {
            "fp32": (cls.min_cosine, cls.min_overlap, cls.max_length_error, cls.min_codes),
            "fp16": (0.99, 0.95, 0.01, 0.97),
            "int8": (0.9, 0.85, 0.1, 0.8),
        }[precision]
        return cls(cosine if min_cosine is None else min_cosine, max_drop, overlap, length, codes)


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
        index_overlap: Share of the network's ten neighbours that stay when the file's vectors
            search the network's; None for one photo.
        recall_at_1: Of the network, of the file, and the paired bootstrap interval of the change,
            leave-one-out on these photos; None where no photo has a second one of its class.
        map_at_r: Likewise.
        reasons: Why it failed, one sentence each; empty when it passed.
        equal_codes: Share of the network's codes that the file gives too; None without codes.
    """

    images: int
    skipped: tuple[tuple[Path, str], ...]
    thresholds: Thresholds
    batches: tuple[BatchParity, ...]
    neighbour_overlap: float | None
    index_overlap: float | None
    recall_at_1: Difference | None
    map_at_r: Difference | None
    reasons: tuple[str, ...]
    equal_codes: float | None = None

    @property
    def passed(self) -> bool:
        return not self.reasons

    @property
    def min_cosine(self) -> float:
        """The worst of all batch sizes; NaN where a vector is not finite."""
        return float(np.min([row.min_cosine for row in self.batches]))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; what is not finite becomes None."""

        def change(figure: Difference | None) -> dict[str, float] | None:
            if figure is None:
                return None
            return {
                "torch": figure.before,
                "file": figure.after,
                "change": figure.after - figure.before,
                "low": figure.interval.low,
                "high": figure.interval.high,
            }

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
            "index_overlap@10": self.index_overlap,
            "recall@1": change(self.recall_at_1),
            "map@r": change(self.map_at_r),
            "equal_codes": self.equal_codes,
        }


@dataclass(frozen=True)
class HeldOut:
    """Photos nobody trained on, and what the network makes of them: read once, for every rung.

    Attributes:
        pixels: ``(N, height, width, 3)`` uint8, N >= 1.
        vectors: ``(N, D)``, the network's own.
        labels: N of them.
        skipped: Photos that could not be read, with the reason.
        metric: By which vectors are compared, ``cosine`` or ``l2``.
        parts: How many vectors of one photo stand side by side in a row, as the contract's
            ``vectors`` says; a search then compares each with each.
        codes: ``(N, M)``, the network's own; None of a network without codebooks.
    """

    pixels: Pixels
    vectors: Vectors
    labels: tuple[str, ...]
    skipped: tuple[tuple[Path, str], ...]
    metric: str
    parts: int = 1
    codes: Codes | None = None

    @cached_property
    def neighbours(self) -> npt.NDArray[np.int64]:
        """The ten nearest of each photo, by the network."""
        return nearest(self.compared(self.vectors), _NEIGHBOURS, metric=self.metric)

    def compared(self, vectors: Vectors) -> Vectors:
        """Rows ``(N, D)`` as a search compares them: ``(N, K, D / K)`` where there are K parts."""
        return split_rows(vectors, self.parts)

    def cut(self, dim: int, *, normalizes: bool) -> HeldOut:
        """The same photos by the first `dim` numbers of their vectors."""
        vectors = cut(self.vectors, dim, normalizes=normalizes)
        return dataclasses.replace(self, vectors=vectors)


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

    Arguments and errors are those of `read_held_out` and `publish_checked`.
    """
    held_out = read_held_out(network, contract, photos, labels, progress=progress)
    return publish_checked(network, contract, path, held_out, thresholds=thresholds)


def publish_checked(
    network: EmbeddingNet,
    contract: ModelContract,
    path: Path,
    held_out: HeldOut,
    *,
    thresholds: Thresholds | None = None,
    progress: Progress | None = None,
) -> tuple[ModelContract, GateReport]:
    """`export_checked` on photos that were read before.

    Raises:
        GateError: The file is not as good as the network; it was not published, and what stood
            at `path` before still stands.
    """
    with published(path) as temporary:
        compared = held_out.compared(held_out.vectors)
        scores = calibrate(compared, held_out.labels, metric=held_out.metric)
        calibrated = dataclasses.replace(
            contract,
            thresholds=scores,
            prefixes=tuple(_calibrated(one, contract, held_out) for one in contract.prefixes),
        )
        contract = export_onnx(network, calibrated, temporary)
        report = compare(temporary, held_out, thresholds=thresholds, progress=progress)
        if not report.passed:
            raise GateError(
                "the exported file is not as good as the network; it was not published",
                facts="\n".join([*report.reasons, _where(temporary, network, held_out)]),
                hint="please report it; --min-cosine and --max-drop set what is asked",
            )
    return contract, report


def _calibrated(prefix: Prefix, contract: ModelContract, held_out: HeldOut) -> Prefix:
    narrow = held_out.cut(prefix.dim, normalizes=contract.normalizes)
    scores = calibrate(narrow.vectors, narrow.labels, metric=narrow.metric)
    return dataclasses.replace(prefix, thresholds=scores)


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
        progress: Called as ``progress(done, failed)`` while photos are read.

    Raises:
        DataError: Not one of the photos can be read.
        MismatchError: The file cannot be loaded or does not do what its contract says.

    Cost: each photo through the network once and through the file once, 28 of them three times;
    memory for the pixels of all photos.
    """
    backend = OnnxRuntimeBackend(model, device="cpu") if isinstance(model, Path) else model
    held_out = read_held_out(network, backend.contract, photos, labels, progress=progress)
    report = compare(backend, held_out, thresholds=thresholds)
    if isinstance(model, Path):
        backend.close()
    return report


def read_held_out(
    network: EmbeddingNet,
    contract: ModelContract,
    photos: Sequence[Path],
    labels: Sequence[str],
    *,
    progress: Progress | None = None,
) -> HeldOut:
    """Photos as the contract's pixels, and the network's vectors; what is unreadable is skipped.

    Args:
        network: On any device, in any mode; used as it evaluates, and left as it is.
        contract: Of the file that will be compared.
        photos: Held-out.
        labels: One per photo.
        progress: Called as ``progress(done, failed)``.

    Raises:
        DataError: Not one of the photos can be read.
    """
    reference = copy.deepcopy(network).cpu().eval()
    skipped: list[tuple[Path, str]] = []
    kept: list[str] = []
    images: list[Pixels] = []
    vectors: list[Vectors] = []
    codes: list[Codes] = []
    for pixels, rows in _read(photos, contract.preprocess, skipped, progress):
        images.append(pixels)
        vectors.append(_by_torch(reference, pixels, normalize=contract.normalizes))
        if isinstance(reference, QuantizedNet):
            codes.append(_codes_by_torch(reference, pixels))
        kept += [labels[row] for row in rows]
    if not kept:
        first = f"{skipped[0][0]}: {skipped[0][1]}" if skipped else "the list is empty"
        raise DataError(
            "there is no held-out photo to check the export with",
            facts=f"{len(skipped)} of {len(photos)} could not be read; {first}",
            hint="put the photos back to where they were when the model was trained",
        )
    return HeldOut(
        pixels=np.concatenate(images),
        vectors=np.concatenate(vectors),
        labels=tuple(kept),
        skipped=tuple(skipped),
        metric=contract.metric,
        parts=contract.vectors,
        codes=np.concatenate(codes) if codes else None,
    )


def compare(
    model: Path | Backend,
    held_out: HeldOut,
    *,
    thresholds: Thresholds | None = None,
    progress: Progress | None = None,
) -> GateReport:
    """The gate itself: run a file on the held-out photos, and measure what a search would notice.

    Arguments and errors are those of `check_export`; `progress` counts photos.
    """
    backend = OnnxRuntimeBackend(model, device="cpu") if isinstance(model, Path) else model
    pixels = held_out.pixels
    got: dict[int, Vectors] = {}
    for batch in _BATCHES[:-1]:
        got[batch] = _in_batches(backend, pixels[:_IN_EVERY_BATCH], batch)
    parts = []
    codes: list[Codes] = []
    for start in range(0, len(pixels), _IN_EVERY_BATCH):
        piece = pixels[start : start + _IN_EVERY_BATCH]
        parts.append(_in_batches(backend, piece, _BATCHES[-1]))
        if held_out.codes is not None and isinstance(backend, CodingBackend):
            codes.append(backend.run_coded(piece)[1])
        if progress:
            progress(len(parts[-1]), 0)
    got[_BATCHES[-1]] = np.concatenate(parts)
    if isinstance(model, Path):
        backend.close()
    report = _report(held_out, got, thresholds or Thresholds())
    for prefix in backend.contract.prefixes:
        report = _with_prefix(report, prefix.dim, held_out, got, backend.contract.normalizes)
    return report if held_out.codes is None else _with_codes(report, held_out.codes, codes)


def _with_prefix(
    report: GateReport,
    dim: int,
    held_out: HeldOut,
    vectors: dict[int, Vectors],
    normalizes: bool,
) -> GateReport:
    """The report of a model of several widths: a narrower one is asked what the whole is."""
    narrow = held_out.cut(dim, normalizes=normalizes)
    given = {batch: cut(v, dim, normalizes=normalizes) for batch, v in vectors.items()}
    own = _report(narrow, given, report.thresholds)
    reasons = [f"of the first {dim} numbers alone: {reason}" for reason in own.reasons]
    return dataclasses.replace(report, reasons=(*report.reasons, *reasons))


def _with_codes(report: GateReport, own: Codes, given: list[Codes]) -> GateReport:
    """The report of a model that gives codes, which count as its vectors do."""
    share = float((np.concatenate(given) == own).mean()) if given else 0.0
    asked = report.thresholds.min_codes
    reason = f"{share:.2%} of the codes are the network's own, less than {asked:.0%}"
    reasons = report.reasons if share >= asked else (*report.reasons, reason)
    return dataclasses.replace(report, equal_codes=share, reasons=reasons)


def _where(model: Path, network: EmbeddingNet, held_out: HeldOut) -> str:
    """Which parts hurt, in a line."""
    errors = stage_errors(onnx.load(model), network, held_out.pixels[:_PICTURES])
    off = [f"{stage} {error:.2g}" for stage, error in errors.items() if error > _SAME]
    if not off:
        return "all stages but the last agree: it is there, or in pooling, head or norm"
    return f"relative error of the stages that differ, in order: {', '.join(off[:_NAMED])}"


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


def _codes_by_torch(network: QuantizedNet, pixels: Pixels) -> Codes:
    """Of the rows before quantisation, chosen in numpy, not by the code under test."""
    with torch.inference_mode():
        rows = network.unquantized(torch.from_numpy(pixels))
        shares = network.quantizer.shares(rows).numpy()
    return np.asarray(shares.argmax(2), np.uint8)


def _in_batches(backend: Backend, pixels: Pixels, batch: int) -> Vectors:
    """Vectors of `pixels`, always exactly `batch` at once; photos are repeated to fill the last."""
    count = len(pixels)
    filled = pixels[np.arange(-(-count // batch) * batch) % count]
    parts = [backend.run(filled[i : i + batch]) for i in range(0, len(filled), batch)]
    return np.concatenate(parts)[:count]


def _report(held_out: HeldOut, vectors: dict[int, Vectors], asked: Thresholds) -> GateReport:
    expected, labels, metric = held_out.vectors, held_out.labels, held_out.metric
    batches = tuple(
        _parity(batch, expected[: len(given)], given, parts=held_out.parts)
        for batch, given in vectors.items()
    )
    overlap, in_index, recall, precision = None, None, None, None
    reasons: list[str] = []
    lost = [len(v) - int(np.isfinite(v).all(1).sum()) for v in (expected, *vectors.values())]
    if any(lost):
        origin = "the network" if lost[0] else "the file"
        reasons.append(f"{origin} gives vectors that are not finite, {max(lost)} of {len(labels)}")
    else:
        reasons += [reason for row in batches for reason in _faults(row, asked)]
        given = vectors[_BATCHES[-1]]
        if len(labels) > 1:
            near = nearest(held_out.compared(given), _NEIGHBOURS, metric=metric)
            overlap = neighbour_overlap(held_out.neighbours, near)
            in_index = neighbour_overlap(
                held_out.neighbours, _nearest_in(held_out, given, near.shape[1])
            )
        results = [
            query_results(held_out.compared(v), labels, ks=(1,), metric=metric)
            for v in (expected, given)
        ]
        if (results[0].matches > 0).any():
            changes = paired_differences(results[0], results[1], ks=(1,))
            recall, precision = changes["recall@1"], changes["map@r"]
        reasons += _quality_faults(overlap, in_index, asked)
        reasons += _drops({"recall@1": recall, "MAP@R": precision}, asked)
    return GateReport(
        images=len(labels),
        skipped=held_out.skipped,
        thresholds=asked,
        batches=batches,
        neighbour_overlap=overlap,
        index_overlap=in_index,
        recall_at_1=recall,
        map_at_r=precision,
        reasons=tuple(reasons),
    )


def _nearest_in(
    held_out: HeldOut, queries: Vectors, k: int, block: int = 1024
) -> npt.NDArray[np.int64]:
    """``(N, k)`` of the network's rows nearest to each query, leaving out the query's own row."""
    gallery, several = held_out.vectors, held_out.parts > 1
    if held_out.metric == "cosine":
        gallery, queries = (
            v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-30)
            for v in (gallery, queries)
        )
    squares = (gallery.astype(np.float64) ** 2).sum(1)
    found = []
    for start in range(0, len(queries), block):
        asking = queries[start : start + block]
        scores = (
            # In float32, so that what only rounding tells apart ties, as it does elsewhere.
            greatest_cosines(held_out.compared(asking), held_out.compared(gallery)).astype(
                np.float32
            )
            if several
            else 2.0 * (asking @ gallery.T) - squares
        )
        scores[np.arange(len(scores)), start + np.arange(len(scores))] = -np.inf
        found.append(np.argsort(-scores, axis=1, kind="stable")[:, :k])
    return np.concatenate(found)


def _parity(batch: int, expected: Vectors, given: Vectors, *, parts: int) -> BatchParity:
    # Of several vectors per photo each by itself.
    a, b = (rows.astype(np.float64).reshape(parts * len(rows), -1) for rows in (expected, given))
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
    overlap: float | None, in_index: float | None, asked: Thresholds
) -> Iterator[str]:
    for share, where in ((overlap, ""), (in_index, " when it searches an fp32 index")):
        if share is not None and share < asked.min_overlap:
            yield (
                f"{share:.1%} of the {_NEIGHBOURS} nearest neighbours stay{where}, less than "
                f"{asked.min_overlap:.1%}"
            )


def _drops(figures: dict[str, Difference | None], asked: Thresholds) -> Iterator[str]:
    for name, figure in figures.items():
        if figure is not None and (figure.before - figure.after) * 100 > asked.max_drop:
            yield (
                f"{name} falls from {figure.before:.4f} to {figure.after:.4f}, "
                f"more than {asked.max_drop} points"
            )
