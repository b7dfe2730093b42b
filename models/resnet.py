"""ResNets: the backbones most retrieval papers report on.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, ResNet

from embedkit.models.backbone import BackboneEntry, Body, Size

__all__ = ["BACKBONES"]

_PAPER = "He et al., CVPR 2016, arXiv:1512.03385"
_PARTS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")


def _build(make: Callable[[], nn.Module], image_size: Size) -> Body:
    network = make()
    module = nn.Sequential()
    for part in _PARTS:
        module.add_module(part, network.get_submodule(part))
    stages = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))
    return Body(module, int(network.get_submodule("fc").in_features), stages)  # type: ignore[arg-type]


def _resnet10() -> nn.Module:
    network: nn.Module = ResNet(BasicBlock, [1, 1, 1, 1])
    return network


def _entry(
    name: str, about: str, make: Callable[[], nn.Module], weights: str | None
) -> BackboneEntry:
    return BackboneEntry(name, about, _PAPER, 224, weights, partial(_build, make))


# The V1 weights are the ones the metric-learning papers start from.
BACKBONES = (
    _entry("resnet10", "5M weights, one block per stage; for demos and tests", _resnet10, None),
    _entry("resnet18", "11M weights", models.resnet18, "ResNet18_Weights.IMAGENET1K_V1"),
    _entry("resnet34", "21M weights", models.resnet34, "ResNet34_Weights.IMAGENET1K_V1"),
    _entry(
        "resnet50",
        "24M weights; the usual choice",
        models.resnet50,
        "ResNet50_Weights.IMAGENET1K_V1",
    ),
    _entry("resnet101", "43M weights", models.resnet101, "ResNet101_Weights.IMAGENET1K_V1"),
)
