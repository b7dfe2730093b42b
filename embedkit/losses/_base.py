"""What every loss shares: the call, its precision, its tell-tales, checks of options and inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

from embedkit.errors import UsageError

__all__ = ["MetricLoss", "check_choice", "check_number", "check_whole", "unit_rows"]


class MetricLoss(nn.Module):
    """A number that is low when a batch's embeddings agree with its labels.

    A loss writes `compute` and gets the call from here: the arithmetic runs in float32 whatever
    autocast says, or in float64 when handed float64; rows arrive normalised when `normalizes`
    says so; an empty batch is 0 and differentiable.

    Attributes:
        normalizes: The loss lives on the unit sphere and scales rows to length 1 itself; the
            exported model then ends in the same scaling.
        needs_classes: The loss holds one or more vectors per class in the parameter ``proxies``
            ``(num_classes, embedding_dim)`` and takes both numbers at creation.
        special_batch: What a batch must be, in words, when labelled images of some classes are
            not enough: such a loss is no use in a training that draws batches by class. Empty for
            most.
        certainty: What the formula is known from: ``"paper"``, ``"secondary source"``, or
            ``"reconstruction"`` where parts of it are ours.
        takes_memory: The loss compares pairs, and can compare a batch's rows with rows of earlier
            batches: its `compute` has a third argument, ``memory``.
    """

    normalizes: bool = True
    needs_classes: ClassVar[bool] = False
    certainty: ClassVar[str] = "paper"
    special_batch: ClassVar[str] = ""
    takes_memory: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self._told: tuple[list[str], Tensor] | None = None

    def compute(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The value and its tell-tales, detached; ``rows`` is float32 or float64, never empty."""
        raise NotImplementedError

    def forward(
        self, embeddings: Tensor, labels: Tensor, memory: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: ``(B, D)`` raw network outputs, any floating dtype, B may be 0.
            labels: ``(B,)`` integers of any width and value; classes of the training set, 0 to
                ``num_classes - 1``, where `needs_classes`.
            memory: ``(M, D)`` raw outputs for earlier images and their ``(M,)`` labels, where
                `takes_memory`. Then each row of the batch is an anchor, all rows of batch and
                memory are what it is compared with, and only the anchor receives a gradient.

        Returns:
            A finite, differentiable scalar for finite input; a batch with nothing to learn gives 0.

        Raises:
            UsageError: A shape or dtype is wrong, a label is no class, or the loss takes no memory.
        """
        self._check(embeddings, labels)
        if memory is not None and not self.takes_memory:
            raise UsageError(f"{type(self).__name__} cannot use the embeddings of earlier batches")
        with torch.autocast(embeddings.device.type, enabled=False):
            rows = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
            if len(rows) == 0:
                self._told = None
                return self._nothing(rows)
            rows = unit_rows(rows) if self.normalizes else rows
            if memory is None:
                value, told = self.compute(rows, labels)
            else:
                earlier = memory[0].detach().to(rows.dtype)
                earlier = unit_rows(earlier) if self.normalizes else earlier
                seen = torch.cat([rows.detach(), earlier]), torch.cat([labels, memory[1]])
                value, told = cast(_ComparesPairs, self).compute(rows, labels, seen)
            with torch.no_grad():
                self._keep({**told, "spread": _spread(rows.detach())})
        return value

    @property
    def stats(self) -> dict[str, float]:
        """Tell-tales of the last call, empty before the first and after an empty batch.

        ``spread`` is always there: the root mean square distance of the rows to their mean, as a
        share of their length, 0 (all rows equal: collapsed) to 1. Most losses add
        ``positive_distance`` and ``negative_distance``, means over all such pairs, and
        ``active_positives`` and ``active_negatives``, the shares of pairs that still produce a
        gradient; all are 0 when there is no such pair. Reading costs one device synchronisation;
        calling the loss costs none for it.
        """
        if self._told is None:
            return {}
        names, values = self._told
        return dict(zip(names, values.tolist(), strict=True))

    def _keep(self, told: Mapping[str, Tensor]) -> None:
        self._told = (list(told), torch.stack([value.float() for value in told.values()]))

    def _nothing(self, rows: Tensor) -> Tensor:
        """0, linked to the input and every parameter, so that backward and DDP find all."""
        value = rows.sum() * 0
        for parameter in self.parameters():
            value = value + parameter.sum().to(value.dtype) * 0
        return value

    def _check(self, embeddings: Tensor, labels: Tensor) -> None:
        if embeddings.dim() != 2 or not embeddings.is_floating_point():
            raise UsageError(
                "the embeddings of a loss must be a floating point tensor (B, D)",
                facts=f"got {embeddings.dtype} of shape {tuple(embeddings.shape)}",
            )
        self._check_labels(embeddings, labels)

    def _check_labels(self, embeddings: Tensor, labels: Tensor) -> None:
        whole = not (
            labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool
        )
        if labels.shape != embeddings.shape[:1] or not whole:
            raise UsageError(
                "the labels of a loss must be integers, one per embedding",
                facts=f"got {labels.dtype} of shape {tuple(labels.shape)} "
                f"for {len(embeddings)} embeddings",
            )
        if labels.device != embeddings.device:
            raise UsageError(
                "the labels must be on the device of the embeddings",
                facts=f"labels on {labels.device}, embeddings on {embeddings.device}",
            )


class _ComparesPairs(Protocol):
    def compute(
        self, rows: Tensor, labels: Tensor, memory: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Mapping[str, Tensor]]: ...


def unit_rows(rows: Tensor) -> Tensor:
    """``(N, D)`` rows scaled to length 1; a row of (nearly) no length stays as it is."""
    scaled: Tensor = _UnitRows.apply(rows)
    return scaled


class _UnitRows(torch.autograd.Function):
    """x / |x|, keeping only the result and the lengths for backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        # Below 1e-12 there is no direction; dividing would turn rounding into a gradient of 1e12.
        length = torch.where(length > 1e-12, length, 1.0)
        scaled = rows / length
        ctx.save_for_backward(scaled, length)
        return scaled

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        scaled, length = ctx.saved_tensors
        along = (slope * scaled).sum(1, keepdim=True)
        result: Tensor = torch.addcmul(slope, scaled, along, value=-1).div_(length)
        return result


def _spread(rows: Tensor) -> Tensor:
    size = torch.linalg.vector_norm(rows).square() / len(rows)
    centre = rows.mean(0).square().sum()
    spread: Tensor = ((size - centre).clamp(min=0) / size.clamp(min=1e-30)).sqrt()
    return spread


def check_number(
    name: str,
    value: object,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    above: float = -math.inf,
) -> float:
    """``value`` as a float when it is a finite number in ``[least, most]`` and greater than
    ``above``.

    Raises:
        ValueError: It is not; the sentence names the range.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
        if math.isfinite(number) and least <= number <= most and number > above:
            return number
    limits = [
        *([f"at least {least:g}"] if least > -math.inf else []),
        *([f"greater than {above:g}"] if above > -math.inf else []),
        *([f"at most {most:g}"] if most < math.inf else []),
    ]
    raise ValueError(
        f"{name} must be a number{' ' if limits else ''}{' and '.join(limits)}, got {value!r}"
    )


def check_whole(name: str, value: object, *, least: int) -> int:
    """``value`` when it is an integer of at least ``least``.

    Raises:
        ValueError: It is not.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= least:
        return value
    raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_choice(name: str, value: object, choices: Sequence[Any]) -> Any:
    """``value`` when it is one of ``choices``, of the same type.

    Raises:
        ValueError: It is not; the sentence lists them.
    """
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return choice
    listed = " or ".join(repr(choice) for choice in choices)
    raise ValueError(f"{name} must be {listed}, got {value!r}")
