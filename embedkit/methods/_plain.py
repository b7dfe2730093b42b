"""A loss alone, as a method: batches by class, of the recipe's choice."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedkit import losses
from embedkit.data import HardClassSampler, VariedPKSampler
from embedkit.errors import UnknownNameError, UsageError
from embedkit.losses import MetricLoss
from embedkit.losses._base import unit_rows
from embedkit.methods._base import Method, Sampler, Setting, View
from embedkit.models import EmbeddingNet

__all__ = ["PlainLoss", "nearest_classes"]

_BLOCK = 1024


class PlainLoss(Method):
    """Any loss of `embedkit.losses`, for batches of labelled images drawn by class.

    For batches of classes that are alike, each class's nearest are found at the beginning of every
    epoch, by the mean embeddings of all.

    Raises:
        UnknownNameError: No such option.
        UsageError: The loss is no use with such batches.
    """

    near: Tensor
    nests = True

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
        self.loss = self.loss_of(setting, network.embedding_dim)
        self._hard = setting.recipe.batches == "hard-classes"
        if self._hard:
            count = len(setting.classes)
            self._members = [np.flatnonzero(setting.labels == one) for one in range(count)]
            most = min(setting.recipe.classes_per_batch // 2, count - 1)
            # Until the first epoch those that follow.
            near = (torch.arange(count)[:, None] + torch.arange(1, most + 1)) % count
            self.register_buffer("near", near)

    def loss_of(self, setting: Setting, width: int) -> MetricLoss:
        sized = losses.needs_classes(self._name)
        return losses.create(
            self._name,
            num_classes=len(setting.classes) if sized else None,
            embedding_dim=width if sized else None,
            **self._options,
        )

    def sampler(self, setting: Setting, steps: int | None) -> Sampler:
        recipe = setting.recipe
        if recipe.batches == "pk":
            return super().sampler(setting, steps)
        if recipe.batches == "varied":
            return VariedPKSampler(
                setting.labels,
                classes_per_batch=recipe.classes_per_batch,
                images_per_class=recipe.images_per_class,
                seed=recipe.seed,
                steps=steps,
            )
        return HardClassSampler(
            setting.labels,
            near=lambda: self.near.cpu().numpy(),
            classes_per_batch=recipe.classes_per_batch,
            images_per_class=recipe.images_per_class,
            seed=recipe.seed,
            steps=steps,
        )

    def begin_epoch(self, epoch: int, view: View) -> None:
        if self._hard:
            rows = view.embeddings()
            rows = unit_rows(rows) if self.normalizes else rows
            means = torch.stack([rows[members].mean(0) for members in self._members])
            self.near.copy_(nearest_classes(means, self.near.shape[1]))


def nearest_classes(means: Tensor, count: int) -> Tensor:
    """``(C, count)``: of each of ``(C, D)`` class means the nearest others, the nearest first.

    Equal ones in order of number. Cost: O(C^2 D) time, O(C) memory.
    """
    found = []
    for start in range(0, len(means), _BLOCK):
        apart = torch.cdist(means[start : start + _BLOCK], means)
        own = torch.arange(len(apart))
        apart[own, start + own] = torch.inf
        found.append(apart.argsort(dim=1, stable=True)[:, :count])
    return torch.cat(found)
