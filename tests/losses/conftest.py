"""The batches every loss is tried on, and the comparison with a formula written as loops."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

Row = list[complex]
# Rows that move, the same rows held still, labels -> the formula's value.
Formula = Callable[[list[Row], list[list[float]], list[int]], complex]

STEP = 1e-40


def _rows(count: int, seed: int, width: int = 4) -> list[list[float]]:
    source = random.Random(seed)
    return [[source.gauss(0, 1) for _ in range(width)] for _ in range(count)]


def _batches() -> dict[str, tuple[list[list[float]], list[int]]]:
    main = _rows(9, 0)
    labels = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    near = [
        [value + 0.4 * noise for value, noise in zip(main[3 * (i // 3)], row, strict=True)]
        for i, row in enumerate(_rows(9, 1))
    ]
    return {
        "main": (main, labels),
        "tight classes": (near, labels),
        "mixed order": (main, [2, 0, 1, 1, 0, 2, 2, 1, 0]),
        "uneven classes": (main, [0, 0, 0, 0, 1, 1, 2, 2, 2]),
        "singleton class": (main[:7], [0, 0, 0, 1, 1, 1, 2]),
        "duplicates within a class": ([*main[:1], *main[:1], *main[2:]], labels),
        "duplicates across classes": ([*main[:3], *main[:1], *main[4:]], labels),
        "one class": (main[:5], [1] * 5),
        "no positives": (main[:3], [0, 1, 2]),
        "two of a class": (main[:2], [1, 1]),
        "two of two classes": (main[:2], [0, 1]),
        "constant row": ([*main[:4], [0.7] * 4, *main[5:]], labels),
        "zero row": ([*main[:4], [0.0] * 4, *main[5:]], labels),
        "collapsed": ([main[0]] * 6, [0, 0, 1, 1, 2, 2]),
    }


BATCHES = _batches()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "batch" in metafunc.fixturenames:
        metafunc.parametrize("batch", [pytest.param(b, id=name) for name, b in BATCHES.items()])


class Loops:
    """Plain Python on complex numbers: Im f(x + ih) / h is the exact derivative."""

    @staticmethod
    def sqrt(value: complex) -> complex:
        """With slope 0 at 0."""
        return value**0.5 if value.real > 0 else 0j

    @staticmethod
    def positive(value: complex) -> complex:
        return value if value.real > 0 else 0j

    @staticmethod
    def dot(a: Sequence[complex], b: Sequence[complex]) -> complex:
        return sum((p * q for p, q in zip(a, b, strict=True)), 0j)

    @classmethod
    def squared(cls, a: Sequence[complex], b: Sequence[complex]) -> complex:
        gap = [p - q for p, q in zip(a, b, strict=True)]
        return cls.dot(gap, gap)

    @classmethod
    def distance(cls, a: Sequence[complex], b: Sequence[complex]) -> complex:
        return cls.sqrt(cls.squared(a, b))

    @classmethod
    def unit(cls, row: Sequence[complex]) -> Row:
        length = cls.sqrt(cls.dot(row, row))
        return [value / length for value in row] if length else list(row)

    @staticmethod
    def mean(values: Sequence[complex]) -> complex:
        """0 of nothing."""
        return sum(values, 0j) / max(len(values), 1)

    @staticmethod
    def positives(labels: list[int], i: int) -> list[int]:
        return [j for j in range(len(labels)) if j != i and labels[j] == labels[i]]

    @staticmethod
    def negatives(labels: list[int], i: int) -> list[int]:
        return [j for j in range(len(labels)) if labels[j] != labels[i]]

    @staticmethod
    def gradient(
        formula: Callable[[list[Row]], complex], rows: list[list[float]]
    ) -> tuple[float, list[list[float]]]:
        """Value and exact gradient of a formula."""
        moved: list[Row] = [[complex(value) for value in row] for row in rows]
        value = complex(formula(moved)).real
        slopes = []
        for row in moved:
            slope = []
            for k in range(len(row)):
                row[k] += STEP * 1j
                slope.append(complex(formula(moved)).imag / STEP)
                row[k] -= STEP * 1j
            slopes.append(slope)
        return value, slopes


@pytest.fixture(scope="session")
def loops() -> type[Loops]:
    return Loops


@pytest.fixture(scope="session")
def agrees() -> Callable[..., None]:
    """``agrees(loss, formula, batch)``: same value and gradient to 1e-9, in float64.

    The formula gets the moving rows, the same rows held still, and the labels; with a loss that has
    ``proxies``, those moving come fourth, and their gradient is compared too.
    """

    def check(
        loss: Any, formula: Callable[..., complex], batch: tuple[list[list[float]], list[int]]
    ) -> None:
        rows, labels = batch
        x = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
        proxies: Tensor | None = getattr(loss, "proxies", None)
        whole = all(isinstance(label, int) for label in labels)
        y = torch.tensor(labels, dtype=torch.long if whole else torch.float64)
        value = loss(x, y)
        value.backward()
        given = [] if proxies is None else [proxies.detach().flatten(0, -2).tolist()]
        expected, slopes = Loops.gradient(lambda moved: formula(moved, rows, labels, *given), rows)
        assert value.item() == pytest.approx(expected, abs=1e-9, rel=1e-9)
        assert x.grad is not None
        torch.testing.assert_close(
            x.grad, torch.tensor(slopes, dtype=torch.float64), atol=1e-9, rtol=1e-9
        )
        if proxies is None:
            return
        _, slopes = Loops.gradient(lambda moved: formula(rows, rows, labels, moved), given[0])
        assert proxies.grad is not None
        torch.testing.assert_close(
            proxies.grad.double().flatten(0, -2),
            torch.tensor(slopes, dtype=torch.float64),
            atol=1e-9,
            rtol=1e-9,
        )

    return check
