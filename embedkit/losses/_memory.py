"""Cross-batch memory: compare a batch also with the embeddings of the batches before it.

Paper: Wang, Zhang, Huang, Scott, "Cross-Batch Memory for Embedding Learning", CVPR 2020,
arXiv:1912.06798. As there, the memory is a queue that holds the current batch too, its rows are
constants, and its term is added to the batch's own. Ours is that it is used from the first step,
with as much as is in it; the paper begins after 1,000 steps, when embeddings drift slowly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from embedkit.errors import UsageError
from embedkit.losses._base import MetricLoss

__all__ = ["CrossBatchMemory"]


class CrossBatchMemory(MetricLoss):
    """``loss(batch) + loss(batch against batch and memory)``, then the batch is remembered.

    Args:
        loss: One that `takes_memory`.
        size: Embeddings to remember, at least 1; the oldest make room.
        embedding_dim: Width of the embeddings.

    Shape: ``(B, D)`` and ``(B,)`` labels -> scalar, as of `loss`. The queue is in buffers, so a
    checkpoint holds it. Cost: that of `loss`, and O(B (B + size) D) time, O(B (B + size)) memory.

    Raises:
        UsageError: `loss` cannot be compared with a memory.
    """

    rows: Tensor
    labels: Tensor
    count: Tensor

    def __init__(self, loss: MetricLoss, *, size: int, embedding_dim: int) -> None:
        super().__init__()
        if not loss.takes_memory:
            raise UsageError(f"{type(loss).__name__} cannot use the embeddings of earlier batches")
        self.loss, self.normalizes = loss, loss.normalizes
        self.register_buffer("rows", torch.zeros(size, embedding_dim))
        self.register_buffer("labels", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self._told_of_memory: Tensor | None = None

    def forward(
        self, embeddings: Tensor, labels: Tensor, memory: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """The loss of a batch; `memory` is this object's own."""
        there = min(int(self.count), len(self.rows))
        held = (self.rows[:there], self.labels[:there])
        against = self.loss(embeddings, labels, held)
        value: Tensor = self.loss(embeddings, labels) + against
        self._told_of_memory = against.detach()
        self._remember(embeddings.detach(), labels)
        return value

    @property
    def stats(self) -> dict[str, float]:
        """Those of the loss within the batch, and ``memory_loss``, the part of the memory."""
        told = {} if self._told_of_memory is None else {"memory_loss": float(self._told_of_memory)}
        return {**self.loss.stats, **told}

    def _remember(self, embeddings: Tensor, labels: Tensor) -> None:
        size = len(self.rows)
        newest = slice(max(len(labels) - size, 0), None)
        rows, labels = embeddings[newest], labels[newest]
        places = (self.count + torch.arange(len(rows), device=self.rows.device)) % size
        self.rows[places] = rows.to(self.rows.dtype)
        self.labels[places] = labels.to(self.labels.dtype)
        self.count += len(rows)
