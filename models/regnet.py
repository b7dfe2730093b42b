"""RegNets: ResNet's simplicity, widths found by search.

Radosavovic et al., "Designing Network Design Spaces", CVPR 2020, arXiv:2003.13678.
"""

from __future__ import annotations

from torch import nn
from torchvision import models

from embedkit.models.backbone import BackboneEntry, Body, Size

__all__ = ["BACKBONES"]


def _regnet_y_400mf(image_size: Size) -> Body:
    network = models.regnet_y_400mf()
    module = nn.Sequential()
    module.add_module("stem", network.stem)
    module.add_module("trunk_output", network.trunk_output)
    blocks = (f"trunk_output.block{i}" for i in range(1, 5))
    return Body(module, int(network.fc.in_features), (("stem",), *((block,) for block in blocks)))


BACKBONES = (
    BackboneEntry(
        name="regnet_y_400mf",
        about="3.9M weights",
        paper="Radosavovic et al., CVPR 2020, arXiv:2003.13678",
        image_size=224,
        weights="RegNet_Y_400MF_Weights.IMAGENET1K_V1",
        build=_regnet_y_400mf,
    ),
)
