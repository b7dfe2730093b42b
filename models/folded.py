"""A convolution and the frozen batch normalisation behind it, trained as one convolution.

A batch normalisation that keeps its statistics is a scale and an offset per channel, and so can be
applied to the kernel, which is small, instead of to the map, which is not. The map then is neither
read and written once more in each direction nor kept for the backward pass. Weights, scales and
offsets get the gradients that they get apart, up to rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

__all__ = ["fold", "unfold"]


class _FoldedConvolution(nn.Conv2d):
    """Gives what its batch normalisation would give of it."""

    def forward(self, images: Tensor) -> Tensor:
        norm: nn.BatchNorm2d = self.__dict__["norm"]
        spread = cast(Tensor, norm.running_var) + norm.eps
        scale = norm.weight * torch.rsqrt(spread)
        offset = norm.bias - cast(Tensor, norm.running_mean) * scale
        if self.bias is not None:
            offset = offset + self.bias * scale
        # The one place where PyTorch takes a kernel and also minds the padding mode.
        folded: Tensor = self._conv_forward(images, self.weight * scale.view(-1, 1, 1, 1), offset)
        return folded


class _FoldedNorm(nn.BatchNorm2d):
    """Is applied already."""

    def forward(self, images: Tensor) -> Tensor:
        return images


def fold(body: nn.Module) -> int:
    """Let every convolution of a body apply its batch normalisation; how many now do.

    Parameters, their names and hooks stay. Only where the two plainly follow each other: as
    neighbours in an `nn.Sequential`, or by number in a ResNet's block. Normalisations that learn
    their statistics are left alone.
    """
    pairs = [pair for pair in _pairs(body) if _can_fold(*pair)]
    for convolution, norm in pairs:
        # Past `nn.Module`, which would list the normalisation a second time as a part.
        convolution.__dict__["norm"] = norm
        _become(convolution, _FoldedConvolution)
        _become(norm, _FoldedNorm)
    return len(pairs)


def unfold(body: nn.Module) -> None:
    """The network as it was before `fold`."""
    for module in body.modules():
        if isinstance(module, _FoldedConvolution):
            del module.__dict__["norm"]
            _become(module, nn.Conv2d)
        elif isinstance(module, _FoldedNorm):
            _become(module, nn.BatchNorm2d)


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    # The same object, so that its parameters, name and hooks are the same.
    module.__class__ = kind


def _pairs(body: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    for module in body.modules():
        if isinstance(module, nn.Sequential):
            yield from itertools.pairwise(module)
        elif isinstance(module, BasicBlock | Bottleneck):
            for name, part in module.named_children():
                if name.startswith("conv"):
                    yield part, module.get_submodule(name.replace("conv", "bn"))


def _can_fold(convolution: nn.Module, norm: nn.Module) -> bool:
    # Subclasses may do something else.
    return (
        type(convolution) is nn.Conv2d
        and type(norm) is nn.BatchNorm2d
        and not norm.training
        and norm.affine
        and norm.track_running_stats
    )
