"""Swin Transformer: attention inside shifted windows, for any input size.

Liu et al., "Swin Transformer", ICCV 2021, arXiv:2103.14030.
"""

from __future__ import annotations

from torchvision import models

from embedkit.models.backbone import BackboneEntry, Body, Size

__all__ = ["BACKBONES"]


def _swin_t(image_size: Size) -> Body:
    network = models.swin_t()
    body = Body.of_features(network.features, 768)
    body.module.add_module("norm", network.norm)
    # Inside, maps are (B, h, w, C); torchvision's own module turns them round.
    body.module.add_module("permute", network.permute)
    return Body(body.module, body.num_features, (*body.stages, ("norm",)))


BACKBONES = (
    BackboneEntry(
        name="swin_t",
        about="28M weights; a transformer for any input size",
        paper="Liu et al., ICCV 2021, arXiv:2103.14030",
        image_size=224,
        weights="Swin_T_Weights.IMAGENET1K_V1",
        build=_swin_t,
    ),
)
