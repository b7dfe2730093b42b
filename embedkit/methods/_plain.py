"""A loss alone, as a method: PK batches, nothing between epochs."""

from __future__ import annotations

from typing import Any

from embedkit import losses
from embedkit.errors import UnknownNameError, UsageError
from embedkit.methods._base import Method, Setting
from embedkit.models import EmbeddingNet

__all__ = ["PlainLoss"]


class PlainLoss(Method):
    """Any loss of `embedkit.losses`, for batches of labelled images drawn by class.

    Raises:
        UnknownNameError: No such option.
        UsageError: The loss is no use with such batches.
    """

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        super().__init__()
        special = losses.special_batch(name)
        if special:
            raise UsageError(
                f"the loss {name} cannot be trained by this command",
                facts=f"it takes {special}, and this command draws batches by class",
                hint=f"--loss rll; in Python: embedkit.losses.create({name!r})",
            )
        known = losses.options(name)
        for option in options:
            if option not in known:
                raise UnknownNameError(f"option of {name}", option, known)
        self._name, self._options = name, options

    def prepare(self, setting: Setting, network: EmbeddingNet) -> None:
        sized = losses.needs_classes(self._name)
        self.loss = losses.create(
            self._name,
            num_classes=len(setting.classes) if sized else None,
            embedding_dim=network.embedding_dim if sized else None,
            **self._options,
        )
