"""Layer-wise learning rates: the nearer a stage is to the picture, the less it has to relearn.

The idea is that of discriminative fine-tuning, Howard, Ruder, "Universal Language Model Fine-tuning
for Text Classification", ACL 2018, arXiv:1801.06146; one factor from layer to layer as in Clark et
al., "ELECTRA", ICLR 2020, arXiv:2003.10555. Ours is that a layer is a stage of the backbone, as
``--freeze`` counts them.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from embedkit.methods import Group
from embedkit.models.backbone import Backbone, stage_of

__all__ = ["split_by_stage"]


def split_by_stage(groups: Iterable[Group], backbone: Backbone, decay: float) -> list[Group]:
    """The same parameters, each once; those of stage i learn at ``decay ** (stages above i)``.

    The last stage has its group's full rate, and so has all that is no stage of the backbone. A
    group ``backbone`` becomes ``backbone/1``, ``backbone/2``, ... from the picture on.

    Args:
        decay: Above 0 up to 1, which leaves the groups as they are.
    """
    if decay == 1:
        return list(groups)
    stages = {
        parameter: stage_of(name, backbone.stages)
        for name, parameter in backbone.body.named_parameters()
    }
    last = len(backbone.stages) - 1
    split = []
    for group in groups:
        parts: dict[int | None, list[nn.Parameter]] = {}
        for parameter in group.parameters:
            parts.setdefault(stages.get(parameter), []).append(parameter)
        for stage, members in parts.items():
            name, rate = group.name, group.learning_rate
            if stage is not None:
                name, rate = f"{name}/{stage + 1}", rate * decay ** (last - stage)
            split.append(Group(name, members, rate, group.weight_decay))
    return split
