"""What a backbone is (images in, feature map out) and how one is described in its family's list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["Backbone", "BackboneEntry", "Body", "FitState", "Size", "Stages", "stage_of"]

Stages = Sequence[Sequence[str]]
"""In order from the image: key prefixes inside the body."""

Size = tuple[int, int]
"""Height and width in pixels."""

FitState = Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]
"""``fit_state(state, body)``: the same weights in the shapes of this body."""


@dataclass(frozen=True)
class Body:
    """The convolutional (or transformer) part of a torchvision network, without its classifier.

    Attributes:
        module: ``(B, 3, H, W)`` -> ``(B, num_features, h, w)``; its state-dict keys are
            torchvision's own.
        num_features: Channels of the map.
        stages: In order from the image: key prefixes of each part that can be frozen on its own.
    """

    module: nn.Module
    num_features: int
    stages: tuple[tuple[str, ...], ...]

    @classmethod
    def of_features(cls, features: nn.Sequential, num_features: int) -> Body:
        """The usual torchvision shape: one `features` sequence, each element a stage."""
        module = nn.Sequential()
        module.add_module("features", features)
        return cls(module, num_features, tuple((f"features.{i}",) for i in range(len(features))))


@dataclass(frozen=True)
class BackboneEntry:
    """One line of a family's `BACKBONES`.

    Attributes:
        name: As torchvision spells it.
        about: One line for people who choose.
        paper: Authors, venue, arXiv number.
        image_size: Side in pixels of the square input its published weights were trained for.
        weights: torchvision's name of its ImageNet weights; None where there are none.
        build: Makes the body with random weights (torch's global RNG) for an input size.
        fit_state: Adapts loaded weights to the input size; None where they do not depend on it.
    """

    name: str
    about: str
    paper: str
    image_size: int
    weights: str | None
    build: Callable[[Size], Body]
    fit_state: FitState | None = None


class Backbone(nn.Module):
    """``(B, 3, H, W)`` float, normalised -> feature map ``(B, num_features, h, w)``.

    Attributes:
        name: As in `backbone_names()`.
        num_features: Channels C of the map.
        stages: Key prefixes inside `body`, from the image on; what `freeze_stages` counts.
    """

    def __init__(self, name: str, body: Body) -> None:
        super().__init__()
        self.name = name
        self.body = body.module
        self.num_features = body.num_features
        self.stages = body.stages

    def forward(self, images: Tensor) -> Tensor:
        feature_map: Tensor = self.body(images)
        return feature_map


def stage_of(name: str, stages: Stages) -> int | None:
    """Which stage a module or parameter of a body belongs to, by its name; None: none."""
    for number, prefixes in enumerate(stages):
        if any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes):
            return number
    return None
