"""Any loss of pytorch-metric-learning, called like ours: ``create("pml:CircleLoss", gamma=80)``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from embedkit.errors import MissingExtraError, UnknownNameError
from embedkit.losses._base import MetricLoss
from embedkit.losses._pairs import distances_of_cosines, pair_stats, same_and_other

__all__ = ["PREFIX", "PeerLoss", "find", "peer_options"]

PREFIX = "pml:"
# Parts of that library's construction kit, which take objects, and what only serves those.
_PARTS = {
    "args",
    "kwargs",
    "collect_stats",
    "distance",
    "reducer",
    "mat_based_loss",
    "embedding_reg_weight",
    "weight_reg_weight",
}


class PeerLoss(MetricLoss):
    """A loss of pytorch-metric-learning with our precision, checks and tell-tales.

    Class vectors keep the name they have there. `normalizes` is what the loss's distance does.

    Args:
        loss: A ready loss of that library.

    Shape: ``(B, D)`` rows and ``(B,)`` labels -> scalar. Cost: the peer's own, often O(B^3), and
    O(B^2) for the tell-tales.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        distance = getattr(loss, "distance", None)
        self.normalizes = bool(getattr(distance, "normalize_embeddings", False))

    def compute(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        value: Tensor = self.loss(rows, labels.long())
        stats: dict[str, Tensor] = {}
        if self.normalizes:
            with torch.no_grad():
                distances = distances_of_cosines(rows @ rows.T)
                stats = pair_stats(distances, *same_and_other(labels))
        return value, stats


def find(name: str) -> type[nn.Module]:
    """The class behind ``pml:<ClassName>``.

    Raises:
        MissingExtraError: pytorch-metric-learning is not installed.
        UnknownNameError: It has no such loss.
    """
    try:
        from pytorch_metric_learning import losses
    except ImportError as error:
        raise MissingExtraError(
            f"The loss {name}", package="pytorch-metric-learning", extra="dev"
        ) from error
    known: dict[str, type[nn.Module]] = {
        f"{PREFIX}{key}": value
        for key, value in vars(losses).items()
        if inspect.isclass(value) and issubclass(value, nn.Module) and key.endswith("Loss")
    }
    if name not in known:
        raise UnknownNameError("loss", name, known)
    return known[name]


def peer_options(loss: type[nn.Module]) -> dict[str, Any]:
    """What the class and its parents take at creation, with defaults; None where it has none."""
    found: dict[str, Any] = {}
    for parent in inspect.getmro(loss):
        if parent is nn.Module:
            break
        for part in inspect.signature(parent).parameters.values():
            if part.name not in _PARTS and not part.name.endswith(("_regularizer", "_func")):
                required = part.default is inspect.Parameter.empty
                found.setdefault(part.name, None if required else part.default)
    return found
