"""From a feature map to one vector: average, generalised mean, or second-order."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from embedkit.errors import UnknownNameError

__all__ = ["AveragePooling", "GemPooling", "SecondOrderPooling", "create_pooling", "pooling_names"]


class AveragePooling(nn.Module):
    """``(B, C, h, w)`` -> ``(B, C)``: the mean over positions, in float32 or better."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, feature_map: Tensor) -> Tensor:
        return _at_least_float32(feature_map).mean((2, 3))


class GemPooling(nn.Module):
    """``(B, C, h, w)`` -> ``(B, C)``: the generalised mean ``(mean x^p)^(1/p)``, p learned.

    Radenovic et al., "Fine-tuning CNN Image Retrieval with No Human Annotation", TPAMI 2019,
    arXiv:1711.02512, where p starts at 3 and values are clamped at `epsilon` from below: what is
    negative in the map counts as nothing. p = 1 is the mean, a large p the maximum; p is one for
    all channels and held in 1..10.

    Each channel is divided by its own maximum before the power and multiplied afterwards, which
    changes no value and keeps ``x^p`` and its mean inside the range of float16.
    """

    def __init__(self, num_features: int, *, p: float = 3.0, epsilon: float = 1e-6) -> None:
        super().__init__()
        self.num_features = num_features
        self.epsilon = epsilon
        self.p = nn.Parameter(torch.tensor([p]))

    def forward(self, feature_map: Tensor) -> Tensor:
        x = _at_least_float32(feature_map).clamp(min=self.epsilon)
        p = self.p.to(x.dtype).clamp(1, 10)
        # The result does not depend on the scale, so its gradient is zero and need not be followed.
        scale = x.detach().amax((2, 3), keepdim=True)
        mean = (x / scale).pow(p).mean((2, 3))
        return mean.pow(1 / p) * scale.flatten(1)


class SecondOrderPooling(nn.Module):
    """``(B, C, h, w)`` -> ``(B, R (R + 1) / 2)`` unit rows: which features occur together.

    Ours, in the spirit of SCHE (Suh et al., CVPR 2019), whose exact form is not known to us: a
    1 x 1 convolution to R channels gives G ``(B, R, hw)``; M = G G^T / hw; the upper triangle of M;
    signed square root; L2. M is not centred, so that a map of one position is no special case.
    Cost: O(B R^2 hw) time and memory.

    Args:
        num_features: C of the map.
        reduced: R; 32 gives 528 numbers.
    """

    index: Tensor

    def __init__(self, num_features: int, *, reduced: int = 32, epsilon: float = 1e-6) -> None:
        super().__init__()
        self.num_features = reduced * (reduced + 1) // 2
        self.epsilon = epsilon
        self.reduce = nn.Conv2d(num_features, reduced, kernel_size=1, bias=False)
        nn.init.orthogonal_(self.reduce.weight)
        rows, columns = torch.triu_indices(reduced, reduced)
        self.register_buffer("index", rows * reduced + columns, persistent=False)

    def forward(self, feature_map: Tensor) -> Tensor:
        reduced = _at_least_float32(self.reduce(feature_map)).flatten(2)
        # A broadcast product and a mean, no matrix product: autocast leaves these in float32.
        moments = (reduced.unsqueeze(1) * reduced.unsqueeze(2)).mean(3)
        upper = moments.flatten(1).index_select(1, self.index)
        # x / sqrt(|x| + epsilon) is the signed square root with a finite slope at 0.
        return functional.normalize(upper / (upper.abs() + self.epsilon).sqrt(), dim=1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


_POOLINGS: dict[str, type[AveragePooling] | type[GemPooling] | type[SecondOrderPooling]] = {
    "avg": AveragePooling,
    "gem": GemPooling,
    "second-order": SecondOrderPooling,
}


def pooling_names() -> list[str]:
    """All names, sorted."""
    return sorted(_POOLINGS)


def create_pooling(
    name: str, num_features: int
) -> AveragePooling | GemPooling | SecondOrderPooling:
    """``(B, num_features, h, w)`` -> ``(B, F)``; F is the result's `num_features`.

    Raises:
        UnknownNameError: No such pooling; names the nearest.
    """
    if name not in _POOLINGS:
        raise UnknownNameError("pooling", name, _POOLINGS)
    return _POOLINGS[name](num_features)
