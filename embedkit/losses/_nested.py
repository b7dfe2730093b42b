"""One embedding of several widths: its first numbers alone are learned as an embedding too.

Paper: Kusupati, Bhatt, Rege et al., "Matryoshka Representation Learning", NeurIPS 2022,
arXiv:2205.13147. As there, all widths weigh the same, and a loss with class vectors has its own for
every width. Ours is that the mean is taken, not the sum, so that learning rates fit as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from embedkit.losses._base import MetricLoss

__all__ = ["NestedLoss"]


class NestedLoss(MetricLoss):
    """``mean over widths w of loss_w(embeddings[:, :w], labels)``.

    A loss on the unit sphere scales every prefix to length 1 by itself.

    Args:
        parts: Of each width its own loss, by width, rising; the last is the whole embedding's.

    Shape: ``(B, D)`` raw embeddings, D the last width, and what the parts take as labels -> scalar.
    Cost: that of all parts.
    """

    # As far as the parts do; one that does not says so.
    takes_memory = True

    def __init__(self, parts: Mapping[int, MetricLoss]) -> None:
        super().__init__()
        self.widths = tuple(parts)
        self.parts = nn.ModuleList(parts.values())
        self.normalizes = self._part(-1).normalizes
        self._values: Tensor | None = None

    def forward(
        self, embeddings: Tensor, labels: Tensor, memory: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """The loss of a batch; `memory` is of whole embeddings."""
        values = []
        for place, width in enumerate(self.widths):
            rows, part = embeddings[:, :width].contiguous(), self._part(place)
            if memory is None:
                values.append(part(rows, labels))
            else:
                values.append(part(rows, labels, (memory[0][:, :width].contiguous(), memory[1])))
        each = torch.stack(values)
        self._values = each.detach()
        mean: Tensor = each.mean()
        return mean

    @property
    def stats(self) -> dict[str, float]:
        """Those of the whole embedding's loss, and as ``loss_32`` the value at each width."""
        if self._values is None:
            return {}
        told = zip(self.widths, self._values.tolist(), strict=True)
        return {**self._part(-1).stats, **{f"loss_{width}": value for width, value in told}}

    def _part(self, place: int) -> MetricLoss:
        return cast(MetricLoss, self.parts[place])
