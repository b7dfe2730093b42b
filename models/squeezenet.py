"""SqueezeNets: less than a million weights.

Iandola et al., "SqueezeNet", 2016, arXiv:1602.07360.
"""

from __future__ import annotations

from torchvision import models

from embedkit.models.backbone import BackboneEntry, Body, Size

__all__ = ["BACKBONES"]

_PAPER = "Iandola et al., 2016, arXiv:1602.07360"


def _squeezenet1_0(image_size: Size) -> Body:
    return Body.of_features(models.squeezenet1_0().features, 512)


def _squeezenet1_1(image_size: Size) -> Body:
    return Body.of_features(models.squeezenet1_1().features, 512)


BACKBONES = (
    BackboneEntry(
        name="squeezenet1_0",
        about="0.7M weights",
        paper=_PAPER,
        image_size=224,
        weights="SqueezeNet1_0_Weights.IMAGENET1K_V1",
        build=_squeezenet1_0,
    ),
    BackboneEntry(
        name="squeezenet1_1",
        about="0.7M weights, a third of the work of 1.0",
        paper=_PAPER,
        image_size=224,
        weights="SqueezeNet1_1_Weights.IMAGENET1K_V1",
        build=_squeezenet1_1,
    ),
)
