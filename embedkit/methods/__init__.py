"""All that ``--loss NAME`` accepts: every loss, and the methods, which are more than a loss.

One file per method; the file name is the method's name. A method may have the name of a loss, and
is then that loss with the batches it needs. See `embedkit.methods._base` for what a method is.
"""

from __future__ import annotations

from typing import Any

from embedkit import losses
from embedkit.errors import UnknownNameError, UsageError
from embedkit.methods._base import (
    Batch,
    Group,
    LearnsFrom,
    Method,
    Outcome,
    Sampler,
    Setting,
    Term,
    View,
    options_of,
)
from embedkit.methods._plain import PlainLoss
from embedkit.registry import Registry

__all__ = [
    "Batch",
    "Group",
    "LearnsFrom",
    "Method",
    "Outcome",
    "Sampler",
    "Setting",
    "Term",
    "View",
    "create",
    "is_method",
    "learns_from",
    "method_class",
    "method_names",
    "names",
    "nests",
    "options",
    "takes_memory",
]

_METHODS = Registry("method", "embedkit.methods")


def create(name: str, **options: Any) -> Method:
    """A new method; a loss that is none becomes one with PK batches.

    Args:
        name: One of `names`, or ``pml:<ClassName>``.
        options: The method's or the loss's own; what is left out keeps its default.

    Raises:
        UnknownNameError: No such name or option; the message names the nearest.
        UsageError: An option has an impossible value, or the loss cannot be trained by itself.
    """
    if not is_method(name):
        _check_name(name)
        return PlainLoss(name, options)
    kind: type[Method] = _METHODS.get(name)
    known = options_of(kind)
    for option in options:
        if option not in known:
            raise UnknownNameError(f"option of {name}", option, known)
    try:
        return kind(**options)
    except ValueError as error:
        raise UsageError(f"the method {name} cannot be made", facts=str(error)) from error


def names() -> list[str]:
    """The names of all losses and methods, sorted, plug-ins included, the ``pml:`` ones not."""
    return sorted({*losses.names(), *method_names()})


def method_names() -> list[str]:
    """Those that are more than a loss, sorted."""
    return _METHODS.names()


def method_class(name: str) -> type[Method]:
    """The class behind one of `method_names`, for its docstring.

    Raises:
        UnknownNameError: No such method.
    """
    found: type[Method] = _METHODS.get(name)
    return found


def is_method(name: str) -> bool:
    """Whether there is more to this name than a loss."""
    return name in method_names()


def options(name: str) -> dict[str, Any]:
    """The options of a method or loss and their defaults.

    Raises:
        UnknownNameError: No such name.
    """
    if is_method(name):
        return options_of(_METHODS.get(name))
    _check_name(name)
    return losses.options(name)


def learns_from(name: str) -> LearnsFrom:
    """What the data of a method or loss must have.

    Raises:
        UnknownNameError: No such name.
    """
    if is_method(name):
        kind: type[Method] = _METHODS.get(name)
        return kind.learns_from
    _check_name(name)
    return "classes"


def nests(name: str) -> bool:
    """Whether narrower widths can be learned together with the whole embedding.

    Raises:
        UnknownNameError: No such name.
    """
    if is_method(name):
        kind: type[Method] = _METHODS.get(name)
        return kind.nests
    _check_name(name)
    return True


def takes_memory(name: str) -> bool:
    """Whether a loss, or the method of a loss, can compare a batch with earlier embeddings.

    Raises:
        UnknownNameError: No such name.
    """
    if is_method(name) and name not in losses.names():
        return False
    return losses.takes_memory(name)


def _check_name(name: str) -> None:
    if not name.startswith("pml:") and name not in losses.names():
        raise UnknownNameError("loss", name, names())
