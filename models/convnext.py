"""ConvNeXt: a convolutional network with a transformer's habits.

Liu et al., "A ConvNet for the 2020s", CVPR 2022, arXiv:2201.03545.
"""

from __future__ import annotations

from torch import nn
from torchvision import models

from embedkit.models.backbone import BackboneEntry, Body, Size

__all__ = ["BACKBONES"]


def _convnext_tiny(image_size: Size) -> Body:
    network = models.convnext_tiny()
    body = Body.of_features(network.features, 768)
    # torchvision normalises after its average pooling. Here it is done before, per position, so
    # that every pooling meets a map of one scale (ours). Same weights, same key.
    norm = nn.Sequential(network.classifier[0])
    body.module.add_module("classifier", norm)
    return Body(body.module, body.num_features, (*body.stages, ("classifier.0",)))


BACKBONES = (
    BackboneEntry(
        name="convnext_tiny",
        about="28M weights; strong, wants a GPU",
        paper="Liu et al., CVPR 2022, arXiv:2201.03545",
        image_size=224,
        weights="ConvNeXt_Tiny_Weights.IMAGENET1K_V1",
        build=_convnext_tiny,
    ),
)
