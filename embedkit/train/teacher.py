"""``--teacher FILE``: embeddings of a better model as a second thing to learn from.

Yu, Yazici, Liu, van de Weijer, Cheng, Ramisa, "Learning Metrics from Teachers: Compact Networks for
Image Embedding", CVPR 2019, arXiv:1904.03624. Rows of student and teacher are scaled to length 1.

- ``relative``: the mean over the pairs of a batch of | ||s_i - s_j|| - ||t_i - t_j|| |; widths may
  differ. The authors' code has the Frobenius norm of all B x B differences instead, which grows
  with B; 10 times our mean is about their 0.3 for CUB at B = 32.
- ``absolute``: the mean of ||s_i - t_i||; where the widths differ, s_i goes through a linear map
  first, which exists in training only.
- ``both``: their sum.

A teacher is shown the pixels the student sees, scaled to its own size: with ``augmented``, as in
the paper, those of the step, so that it runs in every step; with ``plain``, the photos without
augmentation, once at the beginning, and its embeddings (4 N D bytes) are kept in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from embedkit.errors import UnknownNameError, UsageError
from embedkit.imaging import Pixels
from embedkit.losses._base import unit_rows
from embedkit.methods import Batch, Group, Setting, View
from embedkit.models import EmbeddingNet

__all__ = [
    "DISTILLS",
    "TEACHER_VIEWS",
    "Distillation",
    "Teacher",
    "absolute",
    "check_distillation",
    "relative",
]

DISTILLS = ("relative", "absolute", "both")
"""What is learned from a teacher."""

TEACHER_VIEWS = ("augmented", "plain")
"""What a teacher is shown."""

_RELATIVE_WEIGHT = 10.0
_AT_ONCE = 64
_SAME = 1e-12


@dataclass(frozen=True)
class Teacher:
    """A model as this room sees it: it need not be of PyTorch.

    Attributes:
        embed: ``(B, height, width, 3)`` uint8 to ``(B, dim)`` float32.
        dim: Width of its embeddings.
        height: Of its pixels.
        width: Of its pixels.
        fingerprint: Tells it from any other; a training is resumed with the same.
    """

    embed: Callable[[Pixels], npt.NDArray[np.float32]]
    dim: int
    height: int
    width: int
    fingerprint: str


def check_distillation(distill: str, view: str) -> None:
    """Refuse other words than `DISTILLS` and `TEACHER_VIEWS`.

    Raises:
        UnknownNameError: Names the nearest.
    """
    if distill not in DISTILLS:
        raise UnknownNameError("way to learn from a teacher", distill, DISTILLS)
    if view not in TEACHER_VIEWS:
        raise UnknownNameError("view of a teacher", view, TEACHER_VIEWS)


def relative(student: Tensor, teacher: Tensor) -> Tensor:
    """How far distances within the batch differ.

    Args:
        student: ``(B, D)`` raw.
        teacher: ``(B, E)`` raw; E need not be D.

    Returns:
        A scalar of 0 to 2; 0 for one row or none. Equal rows have no gradient. Cost: O(B² (D + E)).
    """
    apart = (_distances(unit_rows(student)) - _distances(unit_rows(teacher))).abs()
    pairs = len(student) * (len(student) - 1) // 2
    return apart.triu(1).sum() / max(pairs, 1)


def absolute(student: Tensor, teacher: Tensor) -> Tensor:
    """How far rows are from the teacher's.

    Args:
        student: ``(B, D)`` raw.
        teacher: ``(B, D)`` raw.

    Returns:
        A scalar of 0 to 2; 0 for no row.
    """
    apart = _root((unit_rows(student) - unit_rows(teacher)).square().sum(1))
    return apart.sum() / max(len(student), 1)


class Distillation(nn.Module):
    """The term that is added to a training's loss.

    Args:
        teacher: Asked in every step or once.
        distill: One of `DISTILLS`.
        weight: Of the whole term.
        view: One of `TEACHER_VIEWS`.

    Attributes:
        vectors: ``(N, dim)`` of the training photos, with the view ``plain``.
        stats: Of the last step.
    """

    vectors: Tensor

    def __init__(self, teacher: Teacher, *, distill: str, weight: float, view: str) -> None:
        super().__init__()
        self.teacher, self.distill, self.weight, self.view = teacher, distill, weight, view
        self.stats: dict[str, float] = {}

    def prepare(self, setting: Setting, network: EmbeddingNet) -> None:
        """Make what the widths and the view ask for."""
        self.project: nn.Module = nn.Identity()
        if self.distill != "relative" and network.embedding_dim != self.teacher.dim:
            self.project = nn.Linear(network.embedding_dim, self.teacher.dim, bias=False)
            nn.init.orthogonal_(self.project.weight)
        if self.view == "plain":
            self.register_buffer("vectors", torch.zeros(len(setting.labels), self.teacher.dim))

    def groups(self, learning_rate: float) -> list[Group]:
        """The linear map learns as the head does."""
        return [Group("teacher", self.parameters(), learning_rate)]

    def begin_epoch(self, epoch: int, view: View) -> None:
        """Ask once, where once is enough."""
        if self.view == "plain" and epoch == 0:
            self.vectors.copy_(view.through(self.ask))

    def ask(self, pixels: Tensor) -> Tensor:
        """``(B, dim)`` of ``(B, H, W, 3)`` uint8 of any size, on the same device."""
        parts = [self._ask(part) for part in torch.split(pixels.cpu(), _AT_ONCE)]
        return torch.cat(parts).to(pixels.device)

    def forward(self, embeddings: Tensor, batch: Batch) -> Tensor:
        """The term of a batch.

        Args:
            embeddings: ``(B, D)`` raw.
            batch: With the pixels the student saw.
        """
        if self.view == "augmented" and len(batch.pixels) != len(batch.rows):
            raise UsageError(
                "in several processes a teacher cannot follow the augmentation",
                facts="each process has the pixels of its own part of the batch only",
                hint="--teacher-view plain",
            )
        teacher = self.vectors[batch.rows] if self.view == "plain" else self.ask(batch.pixels)
        with torch.autocast(embeddings.device.type, enabled=False):
            student = embeddings.float()
            value = student.new_zeros(())
            if self.distill != "absolute":
                value = value + _RELATIVE_WEIGHT * relative(student, teacher)
            if self.distill != "relative":
                value = value + absolute(self.project(student), teacher)
        self.stats = {"teacher_loss": float(value.detach())}
        return self.weight * value

    def _ask(self, pixels: Tensor) -> Tensor:
        size = self.teacher.height, self.teacher.width
        if pixels.shape[1:3] != size:
            planes = pixels.permute(0, 3, 1, 2).float()
            scaled = functional.interpolate(planes, size, mode="bilinear", antialias=True)
            pixels = scaled.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        return torch.from_numpy(self.teacher.embed(pixels.contiguous().numpy()))


def _distances(rows: Tensor) -> Tensor:
    """``(B, B)`` of unit rows."""
    return _root(2 - 2 * rows @ rows.T)


def _root(squares: Tensor) -> Tensor:
    """The square root, with no gradient where it is (nearly) 0, which would be infinite."""
    return torch.where(squares > _SAME, squares.clamp(min=_SAME).sqrt(), 0.0)
