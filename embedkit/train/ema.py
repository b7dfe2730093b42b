"""A running average of the weights, which is often better than the weights of any one step.

Polyak, Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992; exponential, as in
Tarvainen, Valpola, "Mean teachers are better role models", NeurIPS 2017, arXiv:1703.01780.
"""

from __future__ import annotations

import copy

import torch

from embedkit.models import EmbeddingNet

__all__ = ["WeightAverage"]


class WeightAverage:
    """A second network whose weights follow those of the first.

    Each step takes it ``1 - decay`` of the way. In the first steps decay is ``(1 + step) / (10 +
    step)`` where that is less, so that untrained weights are soon forgotten. It is a function of
    the step alone: the network is all there is to save.

    Args:
        network: Is copied.
        decay: 0 (no average) up to below 1.

    Attributes:
        network: The average, in evaluation mode.
    """

    def __init__(self, network: EmbeddingNet, decay: float) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, network: EmbeddingNet, step: int) -> None:
        """Follow `network` after this many steps, from 1; BatchNorm's statistics as well."""
        decay = min(self._decay, (1 + step) / (10 + step))
        theirs = network.state_dict()
        for name, value in self.network.state_dict().items():
            if value.is_floating_point():
                value.lerp_(theirs[name], 1 - decay)
            else:
                value.copy_(theirs[name])
