"""All pairs of a batch: who is positive to whom, distances and cosines, no NaN in any gradient.

With a `Memory` they are all pairs of a row of the batch and a row of the memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Memory",
    "distances_of_cosines",
    "first_two",
    "mean_weights",
    "pair_cosines",
    "pair_distances",
    "pair_stats",
    "per_row",
    "same_and_other",
    "share",
    "soft_maximum",
    "with_slope",
]


Memory = tuple[Tensor, Tensor]
"""``(M, D)`` rows that no gradient reaches, and their ``(M,)`` labels; the first B of them are the
batch, so that a pair of a row and itself is on the diagonal, as it is without a memory."""


def same_and_other(labels: Tensor, memory: Memory | None = None) -> tuple[Tensor, Tensor]:
    """Masks ``(B, B)``: the other rows of the anchor's class, and the rows of other classes.

    With a memory ``(B, M)``.
    """
    same = labels[:, None] == (labels if memory is None else memory[1])[None, :]
    other = ~same
    same.fill_diagonal_(False)
    return same, other


def pair_distances(
    rows: Tensor, *, query_only: bool = False, memory: Memory | None = None
) -> Tensor:
    """Euclidean distances ``(B, B)`` of ``(B, D)`` rows, or ``(B, M)`` to those of a memory.

    Rows are centred first, so that a batch about to collapse keeps its precision. Distances below
    the rounding of the matrix product (about 1e-3 of the batch's radius in float32, 1e-7 in
    float64) are exactly 0, and a distance of 0 has gradient 0. With ``query_only``, ``d[i, j]``
    moves row i alone. Cost: O(B^2 D) time, O(B^2) memory.
    """
    distances: Tensor
    if memory is None:
        distances = _PairDistances.apply(rows, query_only)
    else:
        distances = _MemoryDistances.apply(rows, memory[0])
    return distances


class _PairDistances(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, query_only: bool) -> Tensor:
        centred = rows - rows.mean(0)
        product = centred @ centred.T
        # The product's own diagonal: then equal rows cancel to rounding, whatever the summation
        # order.
        square = product.diagonal().clone()
        size = square[:, None] + square[None, :]
        distances = product.mul_(-2).add_(size)
        size.mul_(8 * torch.finfo(rows.dtype).eps)
        # 0 * NaN stays NaN: broken input is not hidden.
        distances.mul_(distances > size).sqrt_()
        ctx.save_for_backward(centred, distances)
        ctx.query_only = query_only
        return distances

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        centred, distances = ctx.saved_tensors
        pull = (slope / distances).masked_fill_(distances == 0, 0)
        if not ctx.query_only:
            pull = pull + pull.T
        # sum_j pull_ij (x_i - x_j), d(d_ij)/dx_i being (x_i - x_j) / d_ij
        return torch.addmm(pull.sum(1, keepdim=True) * centred, pull, centred, alpha=-1), None


class _MemoryDistances(torch.autograd.Function):
    """The same to other rows, which are constants."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, others: Tensor) -> Tensor:
        centre = others.mean(0)
        centred, others = rows - centre, others - centre
        size = centred.square().sum(1)[:, None] + others.square().sum(1)[None, :]
        distances = torch.addmm(size, centred, others.T, alpha=-2)
        size.mul_(8 * torch.finfo(rows.dtype).eps)
        distances.mul_(distances > size).sqrt_()
        ctx.save_for_backward(centred, others, distances)
        return distances

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        centred, others, distances = ctx.saved_tensors
        pull = (slope / distances).masked_fill_(distances == 0, 0)
        return torch.addmm(pull.sum(1, keepdim=True) * centred, pull, others, alpha=-1), None


def pair_cosines(rows: Tensor, memory: Memory | None = None) -> Tensor:
    """Dot products ``(B, B)`` of ``(B, D)`` rows: cosines when they are unit rows.

    With a memory ``(B, M)``.
    """
    if memory is not None:
        return rows @ memory[0].T
    products: Tensor = _PairProducts.apply(rows)
    return products


class _PairProducts(torch.autograd.Function):
    """x x^T, with one matrix product in backward instead of two."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return rows @ rows.T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        result: Tensor = (slope + slope.T) @ rows
        return result


def with_slope(pairs: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """``value``, whose derivative with respect to each entry of ``pairs`` is ``slope``.

    For losses whose derivative is known in closed form: nothing but ``slope`` is kept for backward.
    """
    linked: Tensor = _WithSlope.apply(pairs, value, slope)
    return linked


class _WithSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pairs: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * outer, None, None


def soft_maximum(powers: Tensor, kept: Tensor, *, dim: int = 1) -> tuple[Tensor, Tensor]:
    """Sum of ``log(1 + sum_kept exp(power))`` over the lines along ``dim``, and its slopes.

    Stable for any power. The slopes in each power take the place of ``powers``.
    """
    powers.masked_fill_(~kept, -torch.inf)
    top = powers.amax(dim, keepdim=True).clamp_(min=0)
    # Below exp(-60) a term changes no digit, and its products would be subnormal, hence slow.
    weights = torch.threshold_(powers.sub_(top), -60, -torch.inf).exp_()
    total = weights.sum(dim, keepdim=True).add_((-top).exp())
    return (top + total.log()).sum(), weights.div_(total)


def distances_of_cosines(cosines: Tensor, *, scale: float = 1.0) -> Tensor:
    """Euclidean distances of unit rows from ``scale`` times ``cosines``; no gradient."""
    return cosines.detach().mul(-2 * scale).add_(2).clamp_(min=0).sqrt_()


def share(part: Tensor, whole: Tensor) -> Tensor:
    """The entries of ``part`` that are not 0 as a share of those of ``whole``; 0 of nothing."""
    return part.count_nonzero() / whole.count_nonzero().clamp(min=1)


def per_row(mask: Tensor) -> Tensor:
    """How many entries of each row are set, ``(B, 1)``."""
    # Without the dtype the mask would be copied as int64 first, eight times its size.
    return mask.sum(1, keepdim=True, dtype=torch.int32)


def first_two(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the first and of the second image of each class that has two, class by class."""
    ordered, row = labels.sort(stable=True)
    ends = torch.ones(1, dtype=torch.bool, device=labels.device)
    starts = torch.cat([ends, ordered[1:] != ordered[:-1]])
    lasts = torch.cat([starts[1:], ends])
    (first,) = (starts & ~lasts).nonzero(as_tuple=True)
    return row[first], row[first + 1]


def mean_weights(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Per row of a mask, the weights that turn a sum into the mean over its set entries."""
    weights = mask.to(dtype)
    return weights.div_(weights.sum(1, keepdim=True).clamp_(min=1))


def pair_stats(distances: Tensor, same: Tensor, other: Tensor) -> dict[str, Tensor]:
    """Mean distance of all positive and of all negative pairs, 0 without any."""
    distances = distances.detach()
    near = torch.dot(distances.flatten(), same.flatten().to(distances.dtype))
    far = distances.sum() - distances.diagonal().sum() - near
    return {
        "positive_distance": near / same.count_nonzero().clamp(min=1),
        "negative_distance": far / other.count_nonzero().clamp(min=1),
    }
