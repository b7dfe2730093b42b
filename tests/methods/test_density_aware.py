"""Density-aware: mean shift and loss against loops, and a centre that a stray does not move."""

from __future__ import annotations

import math

import pytest
import torch

from embedkit.methods.density_aware import DenseCentreLoss, densest


def shifted(rows: list[list[float]], shifts: int) -> list[float]:
    def apart(a: list[float], b: list[float]) -> float:
        return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))

    centre = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    width = sorted(apart(row, centre) for row in rows)[(len(rows) - 1) // 2]
    for _ in range(shifts if width else 0):
        weights = [math.exp(-(apart(row, centre) ** 2) / (2 * width**2)) for row in rows]
        centre = [
            sum(w * x for w, x in zip(weights, column, strict=True)) / sum(weights)
            for column in zip(*rows, strict=True)
        ]
    return centre


@pytest.mark.parametrize("count", [1, 2, 7, 8])
@pytest.mark.parametrize("shifts", [0, 1, 5])
def test_the_centre_is_mean_shift_written_as_loops(count: int, shifts: int) -> None:
    rows = torch.randn(count, 3, generator=torch.Generator().manual_seed(count)).double()
    wanted = torch.tensor(shifted(rows.tolist(), shifts), dtype=torch.float64)
    assert torch.allclose(densest(rows, shifts=shifts), wanted, atol=1e-12)


def test_equal_rows_are_their_own_centre() -> None:
    row = torch.tensor([0.6, 0.8])
    assert torch.allclose(densest(row.repeat(5, 1), shifts=5), row)


def test_a_stray_moves_the_mean_more_than_the_densest_place() -> None:
    rows = torch.cat([torch.tensor([[1.0, 0.0]]) + 0.05 * torch.eye(2), torch.eye(2)[:1]])
    rows = torch.cat([rows, torch.tensor([[-1.0, 0.0]])])
    home = torch.tensor([1.0, 0.0])
    assert (densest(rows, shifts=5) - home).norm() < 0.2 * (rows.mean(0) - home).norm()


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_the_loss_is_the_formula_written_as_loops(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    raw = torch.randn(7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(7) % classes
    loss = DenseCentreLoss(classes, 3, margin=0.4).double()
    loss.centres.copy_(torch.randn(classes, 3, generator=generator))
    terms = []
    for row, label in zip(raw / raw.norm(dim=1, keepdim=True), labels.tolist(), strict=True):
        squares = [(row - centre).square().sum() for centre in loss.centres]
        far = [one for number, one in enumerate(squares) if number != label]
        if far:
            terms.append((squares[label] - torch.stack(far).min() + 0.4).clamp(min=0))
    wanted = sum(terms) / 7 if terms else raw.sum() * 0
    (slope,) = torch.autograd.grad(wanted, raw)
    given = loss(raw, labels)
    assert given.item() == pytest.approx(wanted.item(), abs=1e-9)
    assert torch.allclose(torch.autograd.grad(given, raw)[0], slope, atol=1e-9)
    assert all(math.isfinite(value) for value in loss.stats.values())
