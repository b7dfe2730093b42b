"""MobileNets: small and quick on a phone or a CPU.

Sandler et al., "MobileNetV2", CVPR 2018, arXiv:1801.04381.
Howard et al., "Searching for MobileNetV3", ICCV 2019, arXiv:1905.02244.
"""

from __future__ import annotations

from torchvision import models

from embedkit.models.backbone import BackboneEntry, Body, Size

__all__ = ["BACKBONES"]


def _mobilenet_v2(image_size: Size) -> Body:
    return Body.of_features(models.mobilenet_v2().features, 1280)


def _mobilenet_v3_small(image_size: Size) -> Body:
    return Body.of_features(models.mobilenet_v3_small().features, 576)


def _mobilenet_v3_large(image_size: Size) -> Body:
    return Body.of_features(models.mobilenet_v3_large().features, 960)


_V2 = "Sandler et al., CVPR 2018, arXiv:1801.04381"
_V3 = "Howard et al., ICCV 2019, arXiv:1905.02244"

BACKBONES = (
    BackboneEntry(
        name="mobilenet_v2",
        about="2.2M weights; trains on a CPU",
        paper=_V2,
        image_size=224,
        weights="MobileNet_V2_Weights.IMAGENET1K_V1",
        build=_mobilenet_v2,
    ),
    BackboneEntry(
        name="mobilenet_v3_small",
        about="0.9M weights; the quickest",
        paper=_V3,
        image_size=224,
        weights="MobileNet_V3_Small_Weights.IMAGENET1K_V1",
        build=_mobilenet_v3_small,
    ),
    BackboneEntry(
        name="mobilenet_v3_large",
        about="3.0M weights",
        paper=_V3,
        image_size=224,
        weights="MobileNet_V3_Large_Weights.IMAGENET1K_V1",
        build=_mobilenet_v3_large,
    ),
)
