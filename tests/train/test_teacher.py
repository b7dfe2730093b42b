"""What is learned from a teacher equals loops over the formula, and it sees what it should see."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from embedkit.data import PhotoSet
from embedkit.errors import (
    EmbedKitError,
    Interrupted,
    MismatchError,
    MissingError,
    UnknownNameError,
    UsageError,
)
from embedkit.imaging import Pixels
from embedkit.methods import Batch
from embedkit.train import Recipe, Teacher, train
from embedkit.train.checkpoint import read_checkpoint
from embedkit.train.teacher import Distillation, absolute, relative
from tests.tiny_recipe import tiny_recipe
from tests.train.listener import Listener


def _rows(width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(6, width, dtype=torch.float64, generator=generator)
    return rows.requires_grad_()


def _unit(row: Tensor) -> Tensor:
    return row / (row * row).sum().sqrt()


def _distance(one: Tensor, other: Tensor) -> Tensor:
    return ((_unit(one) - _unit(other)) ** 2).sum().sqrt()


def test_relative_is_the_mean_over_pairs_whatever_the_widths() -> None:
    student, teacher = _rows(5, 0), _rows(9, 1).detach()
    pairs = [(i, j) for i in range(6) for j in range(i)]
    expected = torch.stack(
        [
            (_distance(student[i], student[j]) - _distance(teacher[i], teacher[j])).abs()
            for i, j in pairs
        ]
    ).mean()
    _same(relative(student, teacher), expected, student)


def test_absolute_is_the_mean_distance_to_the_teacher() -> None:
    student, teacher = _rows(5, 0), _rows(5, 1).detach()
    expected = torch.stack([_distance(student[i], teacher[i]) for i in range(6)]).mean()
    _same(absolute(student, teacher), expected, student)


def _same(value: Tensor, expected: Tensor, student: Tensor) -> None:
    assert float(value.detach()) == pytest.approx(float(expected.detach()), abs=1e-9)
    (slope,) = torch.autograd.grad(value, student)
    (expected_slope,) = torch.autograd.grad(expected, student)
    assert (slope - expected_slope).abs().max() < 1e-9


@pytest.mark.parametrize("loss", [relative, absolute])
def test_a_perfect_student_and_twins_have_a_finite_gradient(loss: Any) -> None:
    student = _rows(5, 0)
    value = loss(student, student.detach())
    assert float(value.detach()) == 0
    (slope,) = torch.autograd.grad(value, student)
    assert not bool(slope.any())
    twins = student.detach()[[0, 0, 1]].float().requires_grad_()
    (slope,) = torch.autograd.grad(loss(twins, _rows(5, 1).detach()[:3].float()), twins)
    assert bool(slope.isfinite().all())
    for count in (0, 1):
        few = student.detach()[:count].requires_grad_()
        value = loss(few, few.detach())
        assert float(value.detach()) == 0
        assert torch.autograd.grad(value, few)[0].shape == (count, 5)


# --- the model that teaches ----------------------------------------------------------------------


class _Means:
    """A teacher whose embedding is the picture's mean colour and a constant; counts pictures."""

    def __init__(self, side: int = 32) -> None:
        self.side, self.seen = side, 0

    def __call__(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        assert pixels.shape[1:] == (self.side, self.side, 3)
        assert pixels.dtype == np.uint8
        self.seen += len(pixels)
        means = pixels.mean((1, 2)) / 255
        return np.concatenate([means, np.ones((len(pixels), 1))], 1).astype(np.float32)

    def teacher(self, fingerprint: str = "one") -> Teacher:
        return Teacher(self, dim=4, height=self.side, width=self.side, fingerprint=fingerprint)


def test_a_teacher_of_another_size_sees_the_students_pixels_scaled() -> None:
    means = _Means(side=16)
    distillation = Distillation(means.teacher(), distill="relative", weight=1, view="augmented")
    pixels = torch.zeros(70, 32, 24, 3, dtype=torch.uint8)
    pixels[1] = 255
    pixels[2, :16] = 100  # the upper half
    vectors = distillation.ask(pixels)
    assert means.seen == 70
    assert vectors.shape == (70, 4)
    assert vectors[1, :3].tolist() == [1, 1, 1]
    assert vectors[2, 0] == pytest.approx(50 / 255, abs=0.5 / 255)


def test_parts_of_a_batch_in_several_processes_are_refused() -> None:
    one = Distillation(_Means().teacher(), distill="relative", weight=1, view="augmented")
    pixels = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    batch = Batch(pixels, torch.arange(4), torch.zeros(4, dtype=torch.int64), None, 0, 0)
    with pytest.raises(UsageError, match="several processes"):
        one(torch.randn(4, 8), batch)


def _recipe(**changes: Any) -> Recipe:
    settings = {"loss": "contrastive", "epochs": 2, "teacher": "somewhere/teacher.onnx"}
    return tiny_recipe(**settings | changes)


def _contents(folder: Path) -> dict[str, bytes]:
    tensors = read_checkpoint(folder / "last.safetensors").tensors
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def test_a_stopped_training_goes_on_bit_for_bit_with_the_same_teacher_only(
    photos: PhotoSet, tmp_path: Path
) -> None:
    # 4 dimensions from 8: the linear map; plain photos: asked once, and not again on resume.
    recipe = _recipe(distill="both", teacher_view="plain")
    means = _Means()
    whole = train(recipe, photos, tmp_path / "whole", device="cpu", teacher=means.teacher())
    count = whole.record["data"]["splits"]["train"]["images"]
    assert means.seen == count
    assert "method/distillation.project.weight" in _contents(whole.path)
    stop = Listener(at_step={1: lambda: signal.raise_signal(signal.SIGINT)})
    again = tmp_path / "again"
    with pytest.raises(Interrupted):
        train(recipe, photos, again, device="cpu", reporter=stop, teacher=_Means().teacher())
    with pytest.raises(MismatchError, match="not the one"):
        train(recipe, photos, again, device="cpu", resume=True, teacher=means.teacher("two"))
    later = _Means()
    train(recipe, photos, again, device="cpu", resume=True, teacher=later.teacher())
    assert later.seen == 0
    assert _contents(whole.path) == _contents(again)
    assert ("teacher", "somewhere/teacher.onnx (both, weight 1, plain photos)") in stop.notes
    assert whole.network().embedding_dim == 8
    assert whole.contract().recipe["teacher"] == "teacher.onnx"


def test_an_augmented_view_is_asked_for_every_picture_of_every_step(
    photos: PhotoSet, tmp_path: Path
) -> None:
    means = _Means()
    recipe = _recipe(epochs=1)
    run = train(recipe, photos, tmp_path / "run", device="cpu", teacher=means.teacher())
    assert means.seen == 2 * 6
    row = (run.path / "metrics.jsonl").read_text()
    assert "teacher_loss" in row


def test_what_is_wrong_is_said_before_the_training(photos: PhotoSet, tmp_path: Path) -> None:
    def refused(
        error: type[EmbedKitError], match: str, given: Teacher | None, **changes: Any
    ) -> None:
        with pytest.raises(error, match=match):
            train(_recipe(**changes), photos, tmp_path / "run", device="cpu", teacher=given)
        assert not (tmp_path / "run").exists()

    teacher = _Means().teacher()
    refused(MissingError, "is not here", None)
    refused(UsageError, "names none", teacher, teacher=None)
    refused(UnknownNameError, "relativ", teacher, distill="relativ")
    refused(UnknownNameError, "view", teacher, teacher_view="raw")
