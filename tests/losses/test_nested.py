"""Every loss at several widths at once: the mean over prefixes, each with a loss of its own."""

from __future__ import annotations

import pytest
import torch

from embedkit import losses
from embedkit.losses import CrossBatchMemory, MetricLoss, NestedLoss

WIDTHS = (3, 4, 6)


def _parts(name: str) -> dict[int, MetricLoss]:
    sized = losses.needs_classes(name)
    options = {"subspaces": 1} if name == "spq" else {}
    return {
        width: losses.create(name, **options, **(
            {"num_classes": 3, "embedding_dim": width} if sized else {}
        ))
        for width in WIDTHS
    }  # fmt: skip


def _plain() -> list[str]:
    """Those that any batch of labelled images will do for, at any width."""
    return [name for name in losses.names() if not losses.special_batch(name)]


@pytest.fixture
def images() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(12, 6, dtype=torch.float64), torch.arange(12) % 3


@pytest.mark.parametrize("name", _plain())
def test_it_is_the_mean_of_the_losses_of_the_first_numbers(
    name: str, images: tuple[torch.Tensor, torch.Tensor]
) -> None:
    rows, labels = images
    torch.manual_seed(1)
    parts = _parts(name)
    nested = NestedLoss(parts)
    rows.requires_grad_()
    torch.manual_seed(2)  # some draw their negatives
    value = nested(rows, labels)
    (slope,) = torch.autograd.grad(value, rows)
    torch.manual_seed(2)
    wanted, slopes = 0.0, torch.zeros_like(slope)
    for width, part in parts.items():
        prefix = rows.detach()[:, :width].clone().requires_grad_()
        alone = part(prefix, labels)
        wanted += float(alone.detach()) / 3
        slopes[:, :width] += torch.autograd.grad(alone, prefix)[0] / 3
    assert float(value.detach()) == pytest.approx(wanted)
    torch.testing.assert_close(slope, slopes)
    assert nested.normalizes == parts[6].normalizes
    told = nested.stats
    assert told["spread"] == parts[6].stats["spread"]
    assert sum(told[f"loss_{width}"] for width in WIDTHS) / 3 == pytest.approx(wanted, rel=1e-5)


def test_each_width_has_class_vectors_of_its_own() -> None:
    nested = NestedLoss(_parts("proxy-anchor"))
    assert [tuple(part.shape) for part in nested.parameters()] == [(3, 3), (3, 4), (3, 6)]


def test_with_a_memory_every_width_sees_its_part_of_it(
    images: tuple[torch.Tensor, torch.Tensor],
) -> None:
    rows, labels = images
    nested = CrossBatchMemory(NestedLoss(_parts("contrastive")), size=8, embedding_dim=6)
    alone = {
        width: CrossBatchMemory(part, size=8, embedding_dim=width)
        for width, part in _parts("contrastive").items()
    }
    for step in range(3):
        given = rows + step
        wanted = sum(float(loss(given[:, :width], labels)) for width, loss in alone.items()) / 3
        assert float(nested(given, labels)) == pytest.approx(wanted, rel=1e-5)


def test_nothing_was_told_before_the_first_batch_and_an_empty_one_is_nothing() -> None:
    nested = NestedLoss(_parts("rll"))
    assert nested.stats == {}
    rows = torch.zeros(0, 6, requires_grad=True)
    value = nested(rows, torch.zeros(0, dtype=torch.int64))
    value.backward()
    assert float(value.detach()) == 0
    assert rows.grad is not None
