"""From a decoded picture to the pixels the network sees: one frozen spec and its arithmetic.

The same code feeds training's validation, calibration and the runtime, so they cannot drift. The
spec travels inside every exported model. Only the geometry happens here, in Pillow, on uint8;
scaling to 0..1 and subtracting the mean are nodes of the network's own graph (`mean`, `std` are
part of the spec because they describe it).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from embedkit.errors import MismatchError

__all__ = ["Pixels", "Preprocess"]

Pixels = npt.NDArray[np.uint8]

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class Preprocess:
    """How a photo becomes ``(height, width, 3)`` uint8 RGB pixels.

    The largest centred box of the target's shape is taken, shrunk by `crop_ratio`, and resampled to
    ``height x width`` in one step with antialiasing, so no picture is distorted and none is too
    narrow or too small.

    Attributes:
        height: Rows of the network's input, pixels.
        width: Columns of the network's input, pixels.
        crop_ratio: Share of the centred box that is kept, each way, in (0, 1]; 0.875 is "resize
            256, crop 224".
        filter: ``bilinear`` or ``bicubic``, antialiased as Pillow does it.
        scaled_decode: JPEGs may be decoded at reduced size as long as at least this many source
            pixels per target pixel remain each way; 0 forbids it.
        mean: Per channel, of pixels in 0..1; subtracted inside the graph.
        std: Per channel, of pixels in 0..1; divided by inside the graph.
        orientation: EXIF orientation is ``apply``-ed, always.
        alpha: Transparent parts are shown over ``white``, always.
        color: Channels are ``RGB``, always.
    """

    height: int = 224
    width: int = 224
    crop_ratio: float = 0.875
    filter: str = "bicubic"
    scaled_decode: int = 2
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    orientation: str = "apply"
    alpha: str = "white"
    color: str = "RGB"

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"height and width must be at least 1, got {self.height}x{self.width}")
        if not 0 < self.crop_ratio <= 1:
            raise ValueError(f"crop_ratio must lie in (0, 1], got {self.crop_ratio}")
        if self.filter not in _FILTERS:
            raise ValueError(f"filter must be one of {sorted(_FILTERS)}, got {self.filter!r}")
        if self.scaled_decode < 0:
            raise ValueError(f"scaled_decode must not be negative, got {self.scaled_decode}")
        if (self.orientation, self.alpha, self.color) != ("apply", "white", "RGB"):
            raise ValueError(
                "this embedkit knows orientation='apply', alpha='white', color='RGB' only, got "
                f"{self.orientation!r}, {self.alpha!r}, {self.color!r}"
            )

    def __call__(self, image: Image.Image) -> Pixels:
        """Pixels of a decoded RGB picture, ``(height, width, 3)`` uint8.

        Cost: one antialiased resample, O(source pixels inside the box).
        """
        box = self.box(image.width, image.height)
        resized = image.resize((self.width, self.height), _FILTERS[self.filter], box=box)
        return np.asarray(resized)

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """What is kept of a ``width x height`` picture, centred: left, top, right, bottom."""
        scale = min(width / self.width, height / self.height) * self.crop_ratio
        # Rounding may carry a side one unit of the last place past the picture, which Pillow
        # refuses, so both ends are held inside it.
        box_width, box_height = min(self.width * scale, width), min(self.height * scale, height)
        left, top = (width - box_width) / 2, (height - box_height) / 2
        return left, top, min(left + box_width, width), min(top + box_height, height)

    def decode_size(self) -> int | None:
        """The least shortest side a scaled decode must leave, pixels; None: the whole picture."""
        if not self.scaled_decode:
            return None
        return int(np.ceil(self.scaled_decode * max(self.height, self.width) / self.crop_ratio))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, complete."""
        value: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return value

    @classmethod
    def from_json(cls, value: Any) -> Preprocess:
        """The spec a file carries.

        Raises:
            MismatchError: It has other fields or values than this embedkit knows.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        given = set(value) if isinstance(value, dict) else set()
        if given != known:
            raise MismatchError(
                "the model's preprocessing is not one this embedkit knows",
                facts=f"fields that differ: {', '.join(sorted(known ^ given))}",
                hint="pip install --upgrade embedkit",
            )
        try:
            return cls(**{**value, "mean": tuple(value["mean"]), "std": tuple(value["std"])})
        except (TypeError, ValueError) as error:
            raise MismatchError(
                "the model's preprocessing is not one this embedkit knows", facts=str(error)
            ) from error

    def fingerprint(self) -> str:
        """16 hex digits that change with any field."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
