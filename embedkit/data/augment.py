"""Training noise: a random crop, resampled once to the network's input, and a mirror.

The crop is that of Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, arXiv:1409.4842.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from embedkit.imaging import Pixels, Preprocess

__all__ = ["Augment", "Cut"]

_TRIES = 10
_MOST_ENLARGED = 2.0


@dataclass(frozen=True)
class Cut:
    """A part of a photo that has not its final size yet.

    Attributes:
        pixels: ``(h, w, 3)`` uint8, a view into the photo.
        mirrored: Whether it is to be mirrored left to right.
    """

    pixels: Pixels
    mirrored: bool


@dataclass(frozen=True)
class Augment:
    """What a training photo goes through instead of `Preprocess`.

    Attributes:
        scale: Share of the picture's area the crop takes, drawn evenly from this range in (0, 1].
        ratio: Stretch of the crop against the input's shape, drawn evenly on a log scale; 1 keeps
            the picture's proportions.
        flip: Whether every second picture, by chance, is mirrored left to right.
    """

    scale: tuple[float, float] = (0.3, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be a range in (0, 1], got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must be a range above 0, got {self.ratio}")

    def __call__(self, photo: Pixels, preprocess: Preprocess, rng: np.random.Generator) -> Pixels:
        """A decoded photo, ``(height, width, 3)`` uint8, in size and filter as `preprocess`.

        Cost: one antialiased resample, O(pixels inside the crop).
        """
        # Here, because the rest of this room is used where no torch is installed.
        from embedkit.data.resample import resample

        return resample(self.cut(photo, preprocess, rng), preprocess).numpy()

    def cut(self, photo: Pixels, preprocess: Preprocess, rng: np.random.Generator) -> Cut:
        """The crop by itself, of whole pixels, for whoever resamples it elsewhere."""
        height, width = photo.shape[:2]
        box = self.box(width, height, preprocess.width / preprocess.height, rng)
        columns, rows = _whole(box[0], box[2], width), _whole(box[1], box[3], height)
        return Cut(photo[rows, columns], mirrored=self.flip and bool(rng.random() < 0.5))

    def box(
        self, width: int, height: int, shape: float, rng: np.random.Generator
    ) -> tuple[float, float, float, float]:
        """The crop of a ``width x height`` picture: left, top, right, bottom, in pixels.

        Ten draws that do not fit into the picture end in its largest centred crop of a ratio in
        range.

        Args:
            shape: Width by height of the network's input.
        """
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(_TRIES):
            area = width * height * rng.uniform(*self.scale)
            aspect = shape * math.exp(rng.uniform(low, high))
            across, down = math.sqrt(area * aspect), math.sqrt(area / aspect)
            if across <= width and down <= height:
                left, top = rng.uniform(0, width - across), rng.uniform(0, height - down)
                return left, top, min(left + across, width), min(top + down, height)
        aspect = min(max(width / height, shape * self.ratio[0]), shape * self.ratio[1])
        across, down = min(width, height * aspect), min(height, width / aspect)
        left, top = (width - across) / 2, (height - down) / 2
        return left, top, left + across, top + down

    def decode_size(self, preprocess: Preprocess) -> int:
        """The shortest side, in pixels, to which a photo may be shrunk before it is cropped.

        With it the smallest crop of the input's shape still has the input's size; where `scale`
        begins below 1/4, it is enlarged, so that photos do not have to be kept larger than twice
        the input.
        """
        enlarged = min(1 / math.sqrt(self.scale[0]), _MOST_ENLARGED)
        return math.ceil(max(preprocess.width, preprocess.height) * enlarged)


def _whole(low: float, high: float, end: int) -> slice:
    """The pixels nearest to a stretch of 0..end, at least one."""
    first = min(round(low), end - 1)
    return slice(first, max(round(high), first + 1))
