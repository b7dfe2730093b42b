"""Vision Transformer: the picture as a sentence of 16 x 16 patches, whose tokens make the map.

Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, arXiv:2010.11929.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision import models

from embedkit.errors import MismatchError, UsageError
from embedkit.models.backbone import BackboneEntry, Body, Size

__all__ = ["BACKBONES"]

_PATCH = 16
_POSITIONS = "encoder.pos_embedding"


class _PatchMap(nn.Module):
    """Patch tokens of the last layer, laid out as a map; the class token only helps inside.

    Args:
        network: torchvision's network, whose parts are taken over.
        grid: Rows and columns of patches.
    """

    def __init__(self, network: nn.Module, grid: Size) -> None:
        super().__init__()
        self.conv_proj = network.get_submodule("conv_proj")
        self.class_token = network.get_parameter("class_token")
        self.encoder = network.get_submodule("encoder")
        self.grid = grid

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, 16 * rows, 16 * columns)`` -> ``(B, C, rows, columns)``."""
        patches = self.conv_proj(images)
        if tuple(patches.shape[2:]) != self.grid:
            raise UsageError(
                f"this network was made for {self._pixels(self.grid)} pixels",
                facts=f"it was given {self._pixels((patches.shape[2], patches.shape[3]))}",
            )
        tokens = patches.flatten(2).transpose(1, 2)
        first = self.class_token.expand(tokens.shape[0], -1, -1)
        tokens = self.encoder(torch.cat([first, tokens], dim=1))[:, 1:]
        feature_map: Tensor = tokens.transpose(1, 2).unflatten(2, self.grid)
        return feature_map

    @staticmethod
    def _pixels(grid: Size) -> str:
        return f"{grid[0] * _PATCH} x {grid[1] * _PATCH}"


def _vit_b_16(image_size: Size) -> Body:
    height, width = image_size
    if height % _PATCH or width % _PATCH:
        near = " x ".join(str(max(1, round(side / _PATCH)) * _PATCH) for side in image_size)
        raise UsageError(
            f"vit_b_16 cuts the picture into {_PATCH}-pixel patches, so each side is a multiple",
            facts=f"the image size is {height} x {width}",
            hint=f"an image size of {near}",
        )
    module = _PatchMap(models.vit_b_16(), (height // _PATCH, width // _PATCH))
    positions = _resize_positions(module.get_parameter(_POSITIONS).detach(), module.grid)
    module.encoder.pos_embedding = nn.Parameter(positions)
    layers = len(module.encoder.get_submodule("layers"))  # type: ignore[arg-type]
    stages = (
        ("conv_proj", "class_token", _POSITIONS),
        *((f"encoder.layers.encoder_layer_{i}",) for i in range(layers)),
        ("encoder.ln",),
    )
    return Body(module, 768, stages)


def _fit_positions(state: dict[str, Tensor], body: nn.Module) -> dict[str, Tensor]:
    """The position table of another input size, interpolated; of the same count, as it is."""
    positions = state.get(_POSITIONS)
    if positions is None or positions.shape == body.get_parameter(_POSITIONS).shape:
        return state
    patches = positions.shape[1] - 1 if positions.ndim == 3 else 0
    if patches < 1 or math.isqrt(patches) ** 2 != patches:
        raise MismatchError(
            "the position table of these weights fits no square picture",
            facts=f"{_POSITIONS} is {tuple(positions.shape)}; expected (1, 1 + patches, 768)",
        )
    return {**state, _POSITIONS: _resize_positions(positions, body.grid)}  # type: ignore[arg-type]


def _resize_positions(positions: Tensor, grid: Size) -> Tensor:
    """``(1, 1 + s * s, C)`` learned on a square grid -> ``(1, 1 + rows * columns, C)``, bicubic."""
    first, table = positions[:, :1], positions[:, 1:]
    side = math.isqrt(table.shape[1])
    if (side, side) == grid:
        return positions
    square = table.transpose(1, 2).reshape(1, -1, side, side)
    resized = functional.interpolate(square.float(), grid, mode="bicubic", align_corners=False)
    return torch.cat([first, resized.flatten(2).transpose(1, 2).to(first.dtype)], dim=1)


BACKBONES = (
    BackboneEntry(
        name="vit_b_16",
        about="86M weights; a transformer, wants a GPU and pretrained weights",
        paper="Dosovitskiy et al., ICLR 2021, arXiv:2010.11929",
        image_size=224,
        weights="ViT_B_16_Weights.IMAGENET1K_V1",
        build=_vit_b_16,
        fit_state=_fit_positions,
    ),
)
