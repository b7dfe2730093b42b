"""Backbones by name, with random, ImageNet or your own weights."""

from __future__ import annotations

from pathlib import Path

from embedkit.errors import UnknownNameError, UsageError
from embedkit.models import convnext, efficientnet, mobilenet, regnet, resnet, squeezenet, swin, vit
from embedkit.models.backbone import Backbone, BackboneEntry, Size
from embedkit.models.weights import download_weights, load_into, read_weights

__all__ = ["backbone_entry", "backbone_names", "create_backbone"]

_FAMILIES = (convnext, efficientnet, mobilenet, regnet, resnet, squeezenet, swin, vit)
_ENTRIES: dict[str, BackboneEntry] = {
    entry.name: entry for family in _FAMILIES for entry in family.BACKBONES
}
# Every backbone shrinks a picture 32 times or less, so a smaller one would leave no map.
_SMALLEST = 32


def backbone_names() -> list[str]:
    """All names, sorted."""
    return sorted(_ENTRIES)


def backbone_entry(name: str) -> BackboneEntry:
    """What is known about a backbone without building it.

    Raises:
        UnknownNameError: No such backbone; names the nearest.
    """
    if name not in _ENTRIES:
        raise UnknownNameError("backbone", name, _ENTRIES)
    return _ENTRIES[name]


def create_backbone(name: str, *, weights: str | Path, image_size: Size) -> Backbone:
    """A backbone in training mode.

    Args:
        name: One of `backbone_names()`.
        weights: ``"none"`` (random, from torch's global RNG), ``"imagenet"`` (torchvision's,
            downloaded once), or a `Path` to a state dict, ``.pth`` or ``.safetensors``; leftover
            classifier keys are ignored.
        image_size: Height and width of the input, each at least 32 pixels; multiples of 16 for
            vit_b_16.

    Raises:
        UnknownNameError: No such backbone.
        UsageError: An impossible image size, weights that are none of the three, or no such file.
        MismatchError: The file does not fit the backbone.
        MissingError: The ImageNet weights are not here and could not be downloaded.
    """
    entry = backbone_entry(name)
    if min(image_size) < _SMALLEST:
        raise UsageError(
            f"pictures must be at least {_SMALLEST} pixels each way",
            facts=f"the image size is {image_size[0]} x {image_size[1]}",
        )
    body = entry.build(image_size)
    if isinstance(weights, Path):
        load_into(body.module, read_weights(weights), entry, str(weights))
    elif weights == "imagenet":
        load_into(body.module, download_weights(entry), entry, f"the file of {entry.weights}")
    elif weights != "none":
        raise UsageError(
            f"weights must be 'imagenet', 'none' or a Path, got {weights!r}",
            hint="--weights imagenet, none or a file",
        )
    return Backbone(name, body)
