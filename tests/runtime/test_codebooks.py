"""Codebooks in the contract: what they stand for, and that nobody changes or fakes them unseen."""

from __future__ import annotations

import base64
import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from embedkit.errors import MismatchError
from embedkit.imaging import Preprocess
from embedkit.runtime.codebooks import Codebooks
from embedkit.runtime.contract import ModelContract


def words(parts: int = 2, count: int = 3, width: int = 4, seed: int = 0) -> np.ndarray:
    shape = parts, count, width
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def contract(**changed: Any) -> ModelContract:
    given: dict[str, Any] = {
        "name": "coded",
        "embedding_dim": 8,
        "normalizes": False,
        "metric": "l2",
        "preprocess": Preprocess(height=16, width=16),
        "weights_hash": "w",
        "codebooks": Codebooks.of(words()),
    }
    return ModelContract(**(given | changed))


def test_codes_stand_for_the_words_they_name() -> None:
    books, codes = Codebooks.of(words()), np.array([[0, 2], [1, 1], [2, 0]], np.uint8)
    wanted = [[*words()[0, a], *words()[1, b]] for a, b in codes.tolist()]
    np.testing.assert_array_equal(books.vectors(codes), np.array(wanted))
    assert books.vectors(codes[:0]).shape == (0, 8)
    np.testing.assert_array_equal(books.array(), words())
    assert books.dim == 8


def test_a_contract_carries_them_and_its_fingerprint_is_theirs_too() -> None:
    own = contract()
    assert ModelContract.loads(own.dumps()) == own
    other = contract(codebooks=Codebooks.of(words(seed=1)))
    plain = contract(codebooks=None)
    assert len({own.fingerprint, other.fingerprint, plain.fingerprint}) == 3
    assert "codebooks" not in json.loads(plain.dumps())


def test_words_that_were_changed_since_are_found() -> None:
    document = json.loads(contract().dumps())
    other = Codebooks.of(words(seed=1))
    document["codebooks"]["numbers"] = other.numbers
    with pytest.raises(MismatchError, match="was altered after it was written"):
        ModelContract.loads(json.dumps(document))


@pytest.mark.parametrize(
    "books",
    [
        None,
        [],
        "words",
        {"parts": 2},
        {"parts": 2, "words": 3, "width": 4, "numbers": "no base64"},
        {"parts": 2, "words": 3, "width": 4, "numbers": 7},
        {"parts": 2, "words": 3, "width": 4, "numbers": base64.b64encode(bytes(8)).decode()},
        {"parts": 2.0, "words": 3, "width": 4, "numbers": base64.b64encode(bytes(96)).decode()},
        {"parts": True, "words": 6, "width": 4, "numbers": base64.b64encode(bytes(96)).decode()},
        {"parts": 0, "words": 3, "width": 4, "numbers": ""},
        {"parts": 2, "words": 3, "width": 4, "numbers": base64.b64encode(b"\xff" * 96).decode()},
        {"parts": 1, "words": 1, "width": 24, "numbers": base64.b64encode(bytes(96)).decode()},
        {"parts": 1, "words": 257, "width": 1, "numbers": base64.b64encode(bytes(1028)).decode()},
        {"parts": 1, "words": 3, "width": 4, "numbers": base64.b64encode(bytes(48)).decode()},
    ],
)
def test_nonsense_in_their_place_is_refused(books: Any) -> None:
    document = json.loads(contract().dumps())
    document["codebooks"] = books
    with pytest.raises(MismatchError, match="contract is damaged"):
        ModelContract.loads(json.dumps(document))


def test_codes_are_compared_by_distance_only() -> None:
    with pytest.raises(ValueError, match="by l2, and by nothing else"):
        contract(metric="cosine")
    assert dataclasses.replace(contract(), codebooks=None, metric="cosine").codebooks is None
