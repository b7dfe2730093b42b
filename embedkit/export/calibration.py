"""Photos that show a network's activations at their widest, and the ranges seen on them.

The photos come from those the network was trained on, evenly from all classes; of these the ones
that lie farthest from each other in the network's own embedding space (k-center greedy: Gonzalez,
"Clustering to minimize the maximum intercluster distance", 1985), because the range of an
activation is set by unusual pictures, and the crowd in the middle adds nothing.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from embedkit.atomic import published
from embedkit.errors import DataError, ImageError
from embedkit.export.precision import Ranges
from embedkit.imaging import Pixels, read_pixels
from embedkit.runtime import read_contract
from embedkit.runtime.backends.base import Vectors
from embedkit.runtime.backends.onnxruntime import OnnxRuntimeBackend

__all__ = ["PHOTOS", "Calibration", "balanced", "calibrate", "farthest_first"]

# Ranges were wide enough with 60 photos of any kind in every network that was measured; 64 chosen
# ones are a whole number of batches.
PHOTOS = 64
# So many are looked at for each that is taken.
_CHOICE = 4
_BATCH = 8
_ANY = "surrogateescape"  # a path may be any bytes

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Calibration:
    """What was chosen and seen.

    Attributes:
        pixels: ``(M, height, width, 3)`` uint8, M <= `PHOTOS`, the most typical photo first.
        paths: M of them.
        classes: How many different labels they have.
        chosen_from: How many photos were looked at.
        ranges: Of every float tensor of the graph.
        cache: The file that makes the next time short.
        reused: Whether it came from there.
    """

    pixels: Pixels
    paths: tuple[str, ...]
    classes: int
    chosen_from: int
    ranges: Ranges
    cache: Path
    reused: bool


def calibrate(
    model: Path,
    photos: Sequence[Path],
    labels: Sequence[str],
    *,
    cache: Path,
    progress: Progress | None = None,
) -> Calibration:
    """Choose up to 64 photos and run the fp32 graph on them, or read what was done before.

    Args:
        model: The fp32 file, with its contract.
        photos: Not those the result is judged on.
        labels: One per photo.
        cache: Folder of ``calibration-<hash>.npz``, with the hash of graph, preprocessing and list
            (paths, sizes, times of change); the only such file in it. One that is damaged or of
            another hash is replaced.
        progress: Called as ``progress(done, failed)``, `PHOTOS` * 4 at most.

    Raises:
        DataError: Not one of the photos can be read.

    Cost: 256 photos through the network and 64 more with every activation looked at; the file
    holds the pixels: 10 MB at 224 x 224.
    """
    rows = balanced(labels, PHOTOS * _CHOICE)
    file = cache / f"calibration-{_key(model, [photos[row] for row in rows])}.npz"
    known = _read_cache(file)
    if known is not None:
        return known
    backend = OnnxRuntimeBackend(model, device="cpu")
    pixels, vectors, kept = [], [], []
    for row in rows:
        try:
            pixels.append(read_pixels(photos[row], backend.contract.preprocess))
        except ImageError:
            # Training has named the file and went on without it; so does this.
            if progress:
                progress(1, 1)
            continue
        vectors.append(backend.run(pixels[-1][None])[0])
        kept.append(row)
        if progress:
            progress(1, 0)
    backend.close()
    if not kept:
        raise DataError(
            "there is no photo to calibrate int8 with",
            facts=f"{len(photos)} in the list, none that can be read and is not held out",
            hint="--calibration DIR, with photos like those that will be searched",
        )
    chosen = farthest_first(np.stack(vectors), PHOTOS)
    images = np.stack([pixels[place] for place in chosen])
    result = Calibration(
        pixels=images,
        paths=tuple(str(photos[kept[place]]) for place in chosen),
        classes=len({labels[kept[place]] for place in chosen}),
        chosen_from=len(kept),
        ranges=_ranges(model, images),
        cache=file,
        reused=False,
    )
    _write_cache(result)
    return result


def balanced(labels: Sequence[str], limit: int) -> list[int]:
    """At most `limit` rows, as equally many of each class as there are; drawn with a fixed seed."""
    rng = np.random.default_rng(0)
    codes = np.unique(np.asarray(labels), return_inverse=True)[1]
    order = rng.permutation(len(codes))
    # A row's turn is how many of its class come before it.
    turn = np.zeros(len(codes), dtype=np.int64)
    seen: dict[int, int] = {}
    for row in order.tolist():
        code = int(codes[row])
        turn[row] = seen.get(code, 0)
        seen[code] = turn[row] + 1
    return [int(row) for row in order[np.argsort(turn[order], kind="stable")][:limit]]


def farthest_first(vectors: Vectors, count: int) -> list[int]:
    """At most `count` rows: the one nearest to the mean, then always the one farthest from all.

    Args:
        vectors: ``(N, D)``, N >= 1.
        count: At least 1.

    Equal distances go to the lower row; no row twice. Cost: O(count N D).
    """
    rows: npt.NDArray[np.float64] = vectors.astype(np.float64)
    chosen = [int(((rows - rows.mean(0)) ** 2).sum(1).argmin())]
    distance = np.full(len(rows), np.inf)
    while len(chosen) < min(count, len(rows)):
        distance = np.minimum(distance, ((rows - rows[chosen[-1]]) ** 2).sum(1))
        distance[chosen] = -1
        chosen.append(int(distance.argmax()))
    return chosen


def _ranges(model: Path, pixels: Pixels) -> dict[str, tuple[float, float]]:
    """Least and greatest value of every float tensor, over all pixels."""
    from onnxruntime.quantization import CalibrationDataReader, create_calibrator

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._starts = iter(range(0, len(pixels), _BATCH))

        def get_next(self) -> dict[str, Pixels] | None:
            start = next(self._starts, None)
            return None if start is None else {"pixels": pixels[start : start + _BATCH]}

    with tempfile.TemporaryDirectory(prefix="embedkit-") as folder:
        calibrator = create_calibrator(
            str(model), None, augmented_model_path=str(Path(folder) / "augmented.onnx")
        )
        calibrator.collect_data(Reader())
        seen = calibrator.compute_data()
    return {
        name: (float(np.min(data.lowest)), float(np.max(data.highest)))
        for name, data in seen.items()
    }


def _key(model: Path, photos: Sequence[Path]) -> str:
    """16 hex digits of the graph, the preprocessing and the list, each file as it is now."""
    graph = onnx.load(model)
    del graph.metadata_props[:]
    digest = hashlib.sha256(graph.SerializeToString(deterministic=True))
    digest.update(read_contract(model).preprocess.fingerprint().encode())
    for path in photos:
        try:
            state = path.stat()
            digest.update(f"{path}|{state.st_size}|{state.st_mtime_ns}\n".encode("utf-8", _ANY))
        except OSError:
            digest.update(f"{path}|gone\n".encode("utf-8", _ANY))
    return digest.hexdigest()[:16]


def _read_cache(file: Path) -> Calibration | None:
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as content:
            names = json.loads(str(content["names"]))
            lows, highs = content["lows"].tolist(), content["highs"].tolist()
            return Calibration(
                pixels=content["pixels"],
                paths=tuple(json.loads(str(content["paths"]))),
                classes=int(content["classes"]),
                chosen_from=int(content["chosen_from"]),
                ranges=dict(zip(names, zip(lows, highs, strict=True), strict=True)),
                cache=file,
                reused=True,
            )
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
        return None  # not there, or damaged: it is made again


def _write_cache(calibration: Calibration) -> None:
    lows, highs = np.array(list(calibration.ranges.values())).T
    with published(calibration.cache) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            pixels=calibration.pixels,
            paths=np.array(json.dumps(calibration.paths)),
            classes=calibration.classes,
            chosen_from=calibration.chosen_from,
            names=np.array(json.dumps(list(calibration.ranges))),
            lows=lows,
            highs=highs,
        )
    for other in calibration.cache.parent.glob("calibration-*.npz"):
        if other != calibration.cache:
            other.unlink(missing_ok=True)
