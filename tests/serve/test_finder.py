"""What a vector must be to search with."""

from __future__ import annotations

import numpy as np
import pytest

from embedkit.errors import UsageError
from embedkit.serve.finder import Finder
from tests.serve.place import Place


def test_each_of_several_vectors_side_by_side_gets_unit_length(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    finder = Finder(place.catalog, place.embedder.contract)
    numbers = np.arange(1, place.catalog.dim + 1, dtype=np.float64)
    whole = finder.usable(numbers)
    assert np.linalg.norm(whole) == pytest.approx(1)
    monkeypatch.setattr(place.catalog, "parts", 2)
    first, second = np.split(finder.usable(numbers), 2)
    half = place.catalog.dim // 2
    assert first == pytest.approx(numbers[:half] / np.sqrt((numbers[:half] ** 2).sum()))
    assert second == pytest.approx(numbers[half:] / np.sqrt((numbers[half:] ** 2).sum()))
    with pytest.raises(UsageError, match="no direction"):
        finder.usable([0.0] * half + [1.0] * half)


@pytest.mark.parametrize("size", [1e-300, 1e300])
def test_tiny_and_huge_numbers_keep_their_direction(place: Place, size: float) -> None:
    finder = Finder(place.catalog, place.embedder.contract)
    numbers = np.ones(place.catalog.dim)
    assert finder.usable(size * numbers) == pytest.approx(numbers / np.linalg.norm(numbers))
