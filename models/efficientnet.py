"""EfficientNets: much accuracy per multiplication.

Tan and Le, "EfficientNet", ICML 2019, arXiv:1905.11946.
Tan and Le, "EfficientNetV2", ICML 2021, arXiv:2104.00298.
"""

from __future__ import annotations

from torchvision import models

from embedkit.models.backbone import BackboneEntry, Body, Size

__all__ = ["BACKBONES"]


def _efficientnet_b0(image_size: Size) -> Body:
    return Body.of_features(models.efficientnet_b0().features, 1280)


def _efficientnet_v2_s(image_size: Size) -> Body:
    return Body.of_features(models.efficientnet_v2_s().features, 1280)


BACKBONES = (
    BackboneEntry(
        name="efficientnet_b0",
        about="4.0M weights",
        paper="Tan and Le, ICML 2019, arXiv:1905.11946",
        image_size=224,
        weights="EfficientNet_B0_Weights.IMAGENET1K_V1",
        build=_efficientnet_b0,
    ),
    BackboneEntry(
        name="efficientnet_v2_s",
        about="20M weights",
        paper="Tan and Le, ICML 2021, arXiv:2104.00298",
        image_size=384,
        weights="EfficientNet_V2_S_Weights.IMAGENET1K_V1",
        build=_efficientnet_v2_s,
    ),
)
