"""Where a backbone's maps become smaller, and what the modules there give while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from embedkit.errors import UsageError
from embedkit.models.backbone import Backbone, Size

__all__ = ["two_taps", "watched"]


@contextmanager
def watched(backbone: Backbone, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What these modules of the body give while the backbone runs, by name.

    A compiled backbone is run as it is written: compiled code would not see new hooks.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> torch.utils.hooks.RemovableHandle:
        module = backbone.body.get_submodule(name)
        return module.register_forward_hook(lambda _, __, given: seen.__setitem__(name, given))

    handles = [keep(name) for name in names]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def two_taps(backbone: Backbone, image_size: Size) -> dict[str, tuple[int, ...]]:
    """The last stage of each of the two sizes before the final one, and its ``(channels, h, w)``.

    Usually those of stride 8 and 16 of 32. Found by looking at an empty picture; draws no random
    numbers.

    Raises:
        UsageError: A backbone that makes no maps of three sizes, channels first.
    """
    # Of a transformer, some stages are no modules.
    modules = {name for name, _ in backbone.body.named_modules()}
    stages = [stage[0] for stage in backbone.stages if len(stage) == 1 and stage[0] in modules]
    training = backbone.training
    backbone.eval()
    with torch.no_grad(), watched(backbone, stages) as maps:
        final = backbone(torch.zeros(1, 3, *image_size))
    backbone.train(training)
    last_of_size = {
        tuple(given.shape[2:]): name for name, given in maps.items() if given.dim() == 4
    }
    # Some transformers keep the channels last until the end.
    in_order = bool(stages) and maps[stages[-1]].shape == final.shape
    if not in_order or len(last_of_size) < 3:
        raise UsageError(
            f"the backbone {backbone.name} cannot be read at three depths",
            facts=f"with pictures of {image_size[0]} x {image_size[1]} it has no maps of three "
            "sizes, channels first",
            hint="a convolutional one: --backbone resnet50, mobilenet_v2",
        )
    return {name: tuple(maps[name].shape[1:]) for name in list(last_of_size.values())[-3:-1]}
