"""A contract of several vectors per picture: said, remembered, believed only where it can be."""

from __future__ import annotations

import dataclasses
import json

import pytest

from embedkit.errors import MismatchError
from embedkit.runtime import ModelContract
from embedkit.runtime.words import network_in_words
from tests.tiny_model import tiny_contract


def test_it_is_written_read_and_part_of_the_fingerprint() -> None:
    one = tiny_contract(dim=8)
    two = dataclasses.replace(one, vectors=2)
    assert ModelContract.loads(two.dumps()) == two
    assert (
        len({one.fingerprint, two.fingerprint, dataclasses.replace(one, vectors=4).fingerprint})
        == 3
    )
    assert network_in_words(two).endswith(
        "2 vectors of 4 numbers, compared by the greatest of their cosines"
    )


def test_a_model_of_one_vector_is_written_as_before_there_were_more() -> None:
    assert "vectors" not in json.loads(tiny_contract().dumps())


@pytest.mark.parametrize("said", [0, -2, 3, 9, "2", 2.0, None])
def test_a_number_that_cannot_be_is_damage(said: object) -> None:
    document = json.loads(dataclasses.replace(tiny_contract(dim=8), vectors=2).dumps())
    document["vectors"] = said
    with pytest.raises(MismatchError, match="contract is damaged"):
        ModelContract.loads(json.dumps(document))


def test_another_number_than_was_written_is_an_alteration() -> None:
    document = json.loads(dataclasses.replace(tiny_contract(dim=8), vectors=2).dumps())
    document["vectors"] = 4
    with pytest.raises(MismatchError, match="altered after it was written"):
        ModelContract.loads(json.dumps(document))


@pytest.mark.parametrize("changes", [{"metric": "l2", "normalizes": False}, {"normalizes": False}])
def test_several_are_compared_by_cosine_or_not_at_all(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="compared by their cosines"):
        dataclasses.replace(tiny_contract(dim=8), vectors=2, **changes)  # type: ignore[arg-type]
