"""The losses, by the names a recipe uses: ``create("rll", margin=0.4)(embeddings, labels)``.

One file per loss; the file name is the loss's name. Importing this package imports none of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from embedkit.errors import UnknownNameError, UsageError
from embedkit.losses._base import MetricLoss
from embedkit.losses._memory import CrossBatchMemory
from embedkit.losses._nested import NestedLoss
from embedkit.registry import Registry

__all__ = [
    "CrossBatchMemory",
    "MetricLoss",
    "NestedLoss",
    "create",
    "loss_class",
    "names",
    "needs_classes",
    "options",
    "special_batch",
    "takes_memory",
]

_LOSSES = Registry("loss", "embedkit.losses")
_SIZES = ("num_classes", "embedding_dim")


def create(
    name: str, *, num_classes: int | None = None, embedding_dim: int | None = None, **options: Any
) -> MetricLoss:
    """A new loss.

    Args:
        name: One of `names`, or ``pml:<ClassName>`` for a loss of pytorch-metric-learning.
        num_classes: Classes of the training set, for a loss with class vectors and for no other.
        embedding_dim: Width of the embeddings, for the same losses.
        options: The loss's own options; what is left out keeps its default, see `options`.

    Raises:
        UnknownNameError: No such loss or no such option; the message names the nearest.
        UsageError: An option has an impossible value, or the two sizes are missing or out of place.
    """
    entry = _find(name)
    for option in options:
        if option not in entry.options:
            raise UnknownNameError(f"option of {name}", option, entry.options)
    sizes = {"num_classes": num_classes, "embedding_dim": embedding_dim}
    given = {key: value for key, value in sizes.items() if value is not None}
    if entry.needs_classes and len(given) < len(sizes):
        missing = " and ".join(key for key in sizes if key not in given)
        raise UsageError(
            f"the loss {name} holds a vector per class and needs {missing}",
            hint=f"create({name!r}, num_classes=..., embedding_dim=...)",
        )
    if given and not entry.needs_classes:
        raise UsageError(
            f"the loss {name} has no class vectors and takes no {' and no '.join(given)}",
            facts=f"options of {name}: {', '.join(entry.options) or 'none'}",
        )
    try:
        return entry.make(**given, **options)
    except ValueError as error:
        raise UsageError(f"the loss {name} cannot be made", facts=str(error)) from error


def names() -> list[str]:
    """The names of all losses, sorted, plug-ins included, the ``pml:`` ones not."""
    return _LOSSES.names()


def loss_class(name: str) -> type[MetricLoss]:
    """The class behind one of `names`, for its docstring.

    Raises:
        UnknownNameError: No such loss.
    """
    found: type[MetricLoss] = _LOSSES.get(name)
    return found


def options(name: str) -> dict[str, Any]:
    """The options of a loss and their defaults, without the two sizes of a loss with class vectors.

    Raises:
        UnknownNameError: No such loss.
    """
    return dict(_find(name).options)


def needs_classes(name: str) -> bool:
    """Whether `create` wants ``num_classes`` and ``embedding_dim`` for this loss.

    Raises:
        UnknownNameError: No such loss.
    """
    return _find(name).needs_classes


def special_batch(name: str) -> str:
    """What a batch of this loss must be beyond labelled images, in words; empty for most.

    Raises:
        UnknownNameError: No such loss.
    """
    return _find(name).special_batch


def takes_memory(name: str) -> bool:
    """Whether the loss can compare a batch with embeddings of earlier ones.

    Raises:
        UnknownNameError: No such loss.
    """
    return _find(name).takes_memory


@dataclass(frozen=True)
class _Entry:
    make: Callable[..., MetricLoss]
    options: dict[str, Any]
    needs_classes: bool
    special_batch: str = ""
    takes_memory: bool = False


def _find(name: str) -> _Entry:
    if name.startswith("pml:"):
        return _find_peer(name)
    loss = _LOSSES.get(name)
    parameters = inspect.signature(loss).parameters.values()
    options = {part.name: part.default for part in parameters if part.name not in _SIZES}
    return _Entry(
        loss,
        options,
        bool(loss.needs_classes),
        str(loss.special_batch),
        bool(getattr(loss, "takes_memory", False)),
    )


def _find_peer(name: str) -> _Entry:
    from embedkit.losses import _pml

    peer = _pml.find(name)
    options = _pml.peer_options(peer)
    sized = "embedding_size" in options
    sizes = {"num_classes": "num_classes", "embedding_dim": "embedding_size"} if sized else {}

    def make(**given: Any) -> MetricLoss:
        known = {sizes.get(key, key): value for key, value in given.items()}
        try:
            return _pml.PeerLoss(peer(**known))
        except (TypeError, AssertionError) as error:
            raise UsageError(f"the loss {name} cannot be made", facts=str(error)) from error

    own = {key: value for key, value in options.items() if key not in sizes.values()}
    return _Entry(make, own, sized)
