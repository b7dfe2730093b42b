"""A network that embeds a picture at three depths of the backbone and puts the three side by side.

As in Wang et al., "Ranked List Loss for Deep Metric Learning", CVPR 2019, arXiv:1903.03238, whose
network (GoogLeNet with BatchNorm) is cut after two fixed modules; how other backbones are cut is
ours, see `BranchedNet`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from embedkit.errors import UsageError
from embedkit.models.backbone import Backbone, Size
from embedkit.models.network import EmbeddingNet
from embedkit.models.pooling import AveragePooling, GemPooling, SecondOrderPooling
from embedkit.models.taps import two_taps, watched

__all__ = ["BranchedNet", "branch_widths"]

_CHANNELS, _HIDDEN = 128, 1024


class BranchedNet(EmbeddingNet):
    """Raw embeddings high, low, middle, in this order, in one row.

    High is the usual pooling and head. Low and middle read the backbone where its map is about to
    be made smaller for the last time but one, and for the last time (stride 8 and 16 of 32). Each:
    average pooling to a map of at most 4 x 4, a convolution 1 x 1 to 128 channels, BatchNorm, ReLU,
    a layer of 1024, BatchNorm, ReLU, and its own linear head. No head has a bias. The branches'
    BatchNorm is new and learns its statistics also where those of the backbone are frozen.

    Args:
        dim: Width of all three together; see `branch_widths`.
        image_size: Height and width of the input; the branches fit no other.

    Attributes:
        taps: Names of the modules in `backbone.body` that low and middle read.

    Raises:
        UsageError: Fewer than three numbers, or a backbone that makes no maps of three sizes.
    """

    def __init__(
        self,
        backbone: Backbone,
        pooling: AveragePooling | GemPooling | SecondOrderPooling,
        dim: int,
        *,
        image_size: Size,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        if dim < 3:
            raise UsageError(f"three branches need three numbers, got {dim}", hint="--dim 384")
        super().__init__(backbone, pooling, dim, mean=mean, std=std)
        high, low, middle = branch_widths(dim)
        self.head = nn.Linear(pooling.num_features, high, bias=False)
        nn.init.orthogonal_(self.head.weight)
        shapes = two_taps(backbone, image_size)
        self.taps = tuple(shapes)
        first, second = shapes.values()
        self.low = _branch(first, low)
        self.middle = _branch(second, middle)

    def forward(self, pixels: Tensor) -> Tensor:
        """``(B, H, W, 3)`` uint8 -> raw embedding ``(B, D)``."""
        # The branches come after the whole backbone: an exported graph is then in that order too.
        with watched(self.backbone, self.taps) as maps:
            pooled = self.features(pixels)
        low, middle = (maps[name] for name in self.taps)
        return torch.cat([self.head(pooled), self.low(low), self.middle(middle)], 1)

    def train(self, mode: bool = True) -> BranchedNet:
        super().train(mode)
        self.low.train(mode)
        self.middle.train(mode)
        return self


def branch_widths(dim: int) -> tuple[int, int, int]:
    """Numbers of high, low and middle: a third of `dim` each, what is left over to the first."""
    third, left = divmod(dim, 3)
    return third + (left > 0), third + (left > 1), third


def _branch(shape: tuple[int, ...], width: int) -> nn.Sequential:
    """From a map ``(channels, h, w)`` to ``(B, width)``."""
    channels, *sides = shape
    windows = [_windows(side) for side in sides]
    places = math.prod(count for count, _, _ in windows)
    head = nn.Linear(_HIDDEN, width, bias=False)
    nn.init.orthogonal_(head.weight)
    return nn.Sequential(
        nn.AvgPool2d(
            (windows[0][1], windows[1][1]),
            stride=(windows[0][2], windows[1][2]),
        ),
        nn.Conv2d(channels, _CHANNELS, 1, bias=False),
        nn.BatchNorm2d(_CHANNELS),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(_CHANNELS * places, _HIDDEN, bias=False),
        nn.BatchNorm1d(_HIDDEN),
        nn.ReLU(),
        head,
    )


def _windows(side: int) -> tuple[int, int, int]:
    """How many windows, how wide and how far apart, so that they cover `side` and no more.

    The paper's are 5 wide and 3 apart on 14 and 7, which leaves 4 and 2; no map is left larger.
    """
    count = min(4, max(1, math.ceil((side - 5) / 3) + 1))
    apart = side // count
    return count, side - apart * (count - 1), apart
