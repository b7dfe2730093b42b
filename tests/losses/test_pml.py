"""Losses of pytorch-metric-learning through our door."""

from __future__ import annotations

import sys

import pytest
import torch

from embedkit.errors import MissingExtraError, UnknownNameError, UsageError
from embedkit.losses import create, names, needs_classes, options

losses = pytest.importorskip("pytorch_metric_learning.losses")


def test_the_value_is_the_peers_own() -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(12, 8), torch.arange(12) // 3
    ours = create("pml:CircleLoss", gamma=20)
    assert ours(x, labels).item() == pytest.approx(losses.CircleLoss(gamma=20)(x, labels).item())
    assert ours.normalizes
    assert ours.stats["positive_distance"] > 0


def test_the_sizes_reach_a_loss_with_class_vectors_and_its_parameters_learn() -> None:
    assert needs_classes("pml:CosFaceLoss")
    assert not needs_classes("pml:CircleLoss")
    loss = create("pml:CosFaceLoss", num_classes=4, embedding_dim=8, scale=16)
    loss(torch.randn(8, 8), torch.arange(8) % 4).backward()
    assert all(parameter.grad is not None for parameter in loss.parameters())
    with pytest.raises(UsageError, match="needs num_classes and embedding_dim"):
        create("pml:CosFaceLoss")


def test_half_precision_and_int32_labels_are_taken() -> None:
    x, labels = torch.randn(12, 8).half().requires_grad_(), (torch.arange(12) // 3).int()
    value = create("pml:NTXentLoss")(x, labels)
    value.backward()
    assert value.dtype == torch.float32
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_options_are_values_and_not_construction_kits() -> None:
    assert options("pml:NTXentLoss") == {"temperature": 0.07}
    assert set(options("pml:CosFaceLoss")) == {"margin", "scale"}


def test_unknown_names_and_options_are_named() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'pml:CircleLoss'"):
        create("pml:CirclLoss")
    with pytest.raises(UnknownNameError, match="did you mean 'gamma'"):
        create("pml:CircleLoss", gama=1)
    assert not any(name.startswith("pml:") for name in names())


def test_a_loss_that_cannot_be_made_from_values_says_so() -> None:
    with pytest.raises(UsageError, match="cannot be made"):
        create("pml:ManifoldLoss")


def test_without_the_package_the_pip_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning", None)
    with pytest.raises(MissingExtraError, match="pip install"):
        create("pml:CircleLoss")
