"""A network that looks at a picture several times, each time with other channels turned up.

The channel attention of Chen, Deng, "Hybrid-Attention based Decoupled Metric Learning for Zero-Shot
Image Retrieval", CVPR 2019, arXiv:1907.11832; where the backbone is cut is ours, see `AttendedNet`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from embedkit.errors import UsageError
from embedkit.models.backbone import Backbone, Size
from embedkit.models.network import EmbeddingNet
from embedkit.models.pooling import AveragePooling, GemPooling, SecondOrderPooling
from embedkit.models.taps import two_taps

__all__ = ["AttendedNet"]

_HIDDEN = 64
# Before the sigmoid.
_OPEN = 2.0


class AttendedNet(EmbeddingNet):
    """The embedding is a unit vector of ``dim / branches`` numbers per branch, side by side.

    The backbone's map before it is made smaller for the last time (stride 16 of 32; the authors
    take it three modules earlier) is multiplied, place by place, with each branch's gates: a
    convolution 1 x 1 to 64 channels, ReLU, another back to the map's own, sigmoid. What is above
    and the pooling are shared: they run once for every branch, as one batch. Each branch has a
    linear head without a bias. All branches weigh the same in a comparison; the whole has the
    length ``sqrt(branches)``.

    Gates begin nearly open (0.88). At 0.5, as in the authors' code, what pretrained layers above
    make of the map is worse from the start. `features` are those of the backbone without gates.

    Args:
        branches: At least 2.
        image_size: Height and width of the input.

    Attributes:
        tap: Name of the module in `backbone.body` whose map is attended to.
        branches: As given.

    Raises:
        UsageError: `dim` cannot be cut into so many vectors of 2 numbers or more, or a backbone
            that makes no maps of three sizes.
    """

    def __init__(
        self,
        backbone: Backbone,
        pooling: AveragePooling | GemPooling | SecondOrderPooling,
        dim: int,
        *,
        branches: int,
        image_size: Size,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        width, left = divmod(dim, branches)
        if left or width < 2:
            raise UsageError(
                f"an embedding of {dim} numbers cannot be cut into {branches} equal branches",
                facts="a branch is a direction and needs two numbers or more",
                hint=f"--dim {branches * max(2, width + bool(left))}",
            )
        super().__init__(backbone, pooling, dim, mean=mean, std=std)
        # All heads in one, the first branch's rows first.
        self.head = nn.Linear(pooling.num_features, dim, bias=False)
        nn.init.orthogonal_(self.head.weight)
        (*_, (self.tap, (channels, *_))) = two_taps(backbone, image_size).items()
        self.branches = branches
        self.gates = nn.ModuleList(_gate(channels) for _ in range(branches))

    def forward(self, pixels: Tensor) -> Tensor:
        """``(B, H, W, 3)`` uint8 -> ``(B, D)``, in float32 or better."""
        with self._attending():
            pooled = self.features(pixels)
        # Every head reads every branch, and its own is kept: one product that quantises as usual.
        every = self.head(pooled).reshape(self.branches, pixels.shape[0], self.branches, -1)
        raw = torch.stack([every[place, :, place] for place in range(self.branches)], 1)
        if raw.dtype in (torch.float16, torch.bfloat16):
            raw = raw.float()
        length = torch.linalg.vector_norm(raw, dim=2, keepdim=True)
        unit: Tensor = raw / length.clamp(min=1e-12)
        return unit.flatten(1)

    @contextmanager
    def _attending(self) -> Iterator[None]:
        """From the tap on, the backbone works on ``branches`` times the batch."""

        def attend(_: nn.Module, __: object, given: Tensor) -> Tensor:
            return torch.cat([given * gate(given) for gate in self.gates])

        handle = self.backbone.body.get_submodule(self.tap).register_forward_hook(attend)
        try:
            yield
        finally:
            handle.remove()


def _gate(channels: int) -> nn.Sequential:
    last = nn.Conv2d(_HIDDEN, channels, 1)
    nn.init.constant_(last.bias, _OPEN)  # type: ignore[arg-type]
    return nn.Sequential(nn.Conv2d(channels, _HIDDEN, 1), nn.ReLU(), last, nn.Sigmoid())
