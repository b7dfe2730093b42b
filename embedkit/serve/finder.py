"""What a server can find: pictures of a catalog like an upload, a vector, or one of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from embedkit.errors import ImageError, UnknownNameError, UsageError
from embedkit.imaging import Limits, Pixels, decode
from embedkit.index import Catalog, Hit
from embedkit.index.threshold import Thresholds
from embedkit.runtime import ModelContract

__all__ = ["WHOLE", "Box", "Finder", "shown"]

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Box:
    """A region of an upright picture, in shares of its width and height: 0 <= left < right <= 1."""

    left: float = 0.0
    top: float = 0.0
    right: float = 1.0
    bottom: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.left < self.right <= 1 and 0 <= self.top < self.bottom <= 1):
            raise UsageError(
                "a box is left,top,right,bottom in shares of the picture",
                facts=f"got {self.left:g},{self.top:g},{self.right:g},{self.bottom:g}",
                hint="0.25,0.25,0.75,0.75 is the middle",
            )


WHOLE = Box()


class Finder:
    """A catalog and the model it belongs to; several threads may ask it at once.

    Args:
        catalog: What is searched.
        contract: Of the model that embeds queries for it.
        limits: What an uploaded or stored picture may ask for.

    Attributes:
        thresholds: What a score is worth; None where the model was not calibrated.
        labels: How many pictures each label has, the labels in order.
    """

    def __init__(
        self, catalog: Catalog, contract: ModelContract, *, limits: Limits | None = None
    ) -> None:
        self.catalog = catalog
        self.contract = contract
        self.limits = limits or Limits()
        self.thresholds = Thresholds.for_search(contract)
        self._labelled = _by_label(catalog)
        self.labels = {label: len(at) for label, at in self._labelled.items()}

    def pixels(self, source: bytes | Path, box: Box = WHOLE) -> Pixels:
        """What the network sees of a region of a picture: ``(height, width, 3)`` uint8.

        The whole picture gives exactly what ``embedkit index`` saw of it.

        Raises:
            ImageError: It is no usable picture.
        """
        preprocess = self.contract.preprocess
        least = preprocess.decode_size()
        if least is not None and box != WHOLE:
            # A JPEG may be decoded smaller as long as the region keeps the pixels it needs.
            least = math.ceil(least / min(box.right - box.left, box.bottom - box.top))
        image = decode(source, shortest_side=least, limits=self.limits)
        if box != WHOLE:
            left = min(math.floor(box.left * image.width), image.width - 1)
            top = min(math.floor(box.top * image.height), image.height - 1)
            right = max(math.ceil(box.right * image.width), left + 1)
            bottom = max(math.ceil(box.bottom * image.height), top + 1)
            image = image.crop((left, top, right, bottom))
        return preprocess(image)

    def position(self, number: int) -> int | None:
        """Where the picture with this id stands in the catalog; None: there is none."""
        (at,) = self.catalog.positions([Hit(1, 0.0, number)]).tolist()
        if not 0 <= at < len(self.catalog):
            return None
        return int(at) if self.catalog.hit(at).id == number else None

    def position_named(self, path: str) -> int | None:
        """As `position`, by the path that `name` gives."""
        return self.catalog.position_of(path.encode("utf-8", "surrogatepass"))

    def vector(self, position: int) -> Vector:
        """The stored vector ``(D,)`` of a picture, of unit length where the metric is cosine."""
        return self.usable(self.catalog.vectors([position])[0])

    def usable(self, numbers: npt.ArrayLike) -> Vector:
        """A vector ``(D,)`` to search with: brought to unit length where the metric is cosine.

        Raises:
            UsageError: Of another width, not finite, or without a direction.
        """
        given = np.asarray(numbers, np.float64)
        if given.shape != (self.catalog.dim,):
            raise UsageError(
                f"a vector of this catalog has {self.catalog.dim} numbers",
                facts=f"got {given.size}",
            )
        most = float(np.abs(given).max())
        if not math.isfinite(most):
            raise UsageError("the vector has numbers that are not finite")
        if self.catalog.metric == "cosine":
            # Several vectors of one picture stand side by side.
            parts = given.reshape(self.catalog.parts, -1)
            largest = np.abs(parts).max(axis=1, keepdims=True)
            if not largest.all():
                raise UsageError("the vector has no direction: all its numbers are 0")
            parts = parts / largest  # so that no square overflows or vanishes
            given = (parts / np.linalg.norm(parts, axis=1, keepdims=True)).ravel()
        elif most > np.finfo(np.float32).max:
            raise UsageError("the vector has numbers that a float32 cannot hold")
        return given.astype(np.float32)

    def search(
        self,
        vector: Vector,
        k: int,
        *,
        labels: Sequence[str] = (),
        without: int | None = None,
    ) -> list[Hit]:
        """The `k` nearest of one vector ``(D,)``, nearest first.

        Args:
            vector: See `usable`.
            k: At least 1.
            labels: Only pictures with one of these; none: all.
            without: The position of a picture that is left out: the one that asks.

        Raises:
            UnknownNameError: No picture has that label.
        """
        among = self._among(labels) if labels else None
        hits = self.catalog.search(vector[None], k + (without is not None), among=among)[0]
        if without is not None:
            itself = self.catalog.hit(without).id
            hits = [hit for hit in hits if hit.id != itself][:k]
        return [replace(hit, rank=rank) for rank, hit in enumerate(hits, start=1)]

    def verdict(self, score: float) -> str | None:
        """``match``, ``unsure`` or ``none``; None where the model was not calibrated."""
        return self.thresholds.verdict(score) if self.thresholds else None

    def name(self, hit: Hit) -> str | None:
        """What the catalog calls a picture: its path below the folder, or the full one of a file
        that was added from elsewhere; None where the names are gone.
        """
        return None if hit.name is None else shown(hit.name)

    def label(self, hit: Hit) -> str:
        """As `labels` has it."""
        return shown(hit.label)

    def file(self, position: int) -> Path:
        """The file of a picture of the catalog.

        Raises:
            ImageError: The catalog names none, or climbs out of its folder, as none of ours does.
        """
        path = self.catalog.hit(position).path
        if path is None or ".." in path.parts:
            raise ImageError("unreadable", "the catalog names no file for it")
        return path

    def _among(self, labels: Sequence[str]) -> npt.NDArray[np.int64]:
        for label in labels:
            if label not in self._labelled:
                near = [name for name in self._labelled if label.casefold() in name.casefold()]
                raise UnknownNameError("label", label, near[:20] or list(self._labelled)[:20])
        found = [self._labelled[label] for label in dict.fromkeys(labels)]
        among: npt.NDArray[np.int64] = np.sort(np.concatenate(found))
        return among


def shown(text: str) -> str:
    """Text that UTF-8 can carry: what is none of it appears as an escape."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _by_label(catalog: Catalog) -> dict[str, npt.NDArray[np.int64]]:
    found: dict[str, list[int]] = {}
    for at, label in enumerate(catalog.labels()):
        found.setdefault(label, []).append(at)
    return {shown(label): np.array(found[label], np.int64) for label in sorted(found) if label}
