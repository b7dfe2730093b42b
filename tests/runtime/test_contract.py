"""What a model says about itself survives its file, and nothing else is believed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np
import pytest

from embedkit.errors import MismatchError
from embedkit.imaging import Preprocess
from embedkit.runtime import ModelContract, SelfTest


def _contract(**changes: Any) -> ModelContract:
    contract = ModelContract(
        name="grocery",
        embedding_dim=3,
        normalizes=True,
        metric="cosine",
        preprocess=Preprocess(height=32, width=48),
        weights_hash="ab" * 32,
        kept_float=("head", "norm"),
        self_test=SelfTest(seed=7, vector=(0.1, -0.2, 1 / 3)),
        loss="rll",
        loss_options={"alpha": 1.2},
        data={"classes": 12},
        quality={
            "fp32": {"recalld4318a76476196577e1029ba28db8596e00aed61980393de609e190e3eef9e8a": 0.9}
        },
        thresholds={"match": 0.7},
    )
    return dataclasses.replace(contract, **changes)


def test_a_contract_survives_its_text_bit_for_bit() -> None:
    for contract in (_contract(), _contract(self_test=None), _contract(name="имя 写真")):
        text = contract.dumps()
        assert "\n" not in text
        assert ModelContract.loads(text) == contract
        assert ModelContract.loads(text).dumps() == text


def test_the_fingerprint_follows_what_decides_a_vector_and_nothing_else() -> None:
    same = [
        _contract(name="other"),
        _contract(precision="int8", kept_float=()),
        _contract(self_test=None),
        _contract(quality={}, thresholds={}, loss="triplet"),
    ]
    other = [
        _contract(weights_hash="cd" * 32),
        _contract(preprocess=Preprocess(height=32, width=49)),
        _contract(embedding_dim=4),
        _contract(metric="l2"),
        _contract(normalizes=False),
    ]
    assert {one.fingerprint for one in same} == {_contract().fingerprint}
    assert len({one.fingerprint for one in other} | {_contract().fingerprint}) == len(other) + 1


def test_numbers_that_json_has_no_word_for_are_never_written() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        _contract(thresholds={"match": float("nan")}).dumps()


@pytest.mark.parametrize(
    ("field", "value"),
    [("metric", "dot"), ("embedding_dim", 0)],
)
def test_an_impossible_contract_cannot_be_made(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        _contract(**{field: value})


def _altered(**changes: Any) -> str:
    return json.dumps({**json.loads(_contract().dumps()), **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"weights_hash": "cd" * 32},
        {"embedding_dim": 4},
        {"metric": "l2"},
        {"normalizes": False},
        {"fingerprint": "0" * 16},
        {"preprocess": Preprocess(height=33, width=48).to_json()},
    ],
)
def test_an_altered_document_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(MismatchError, match="altered after it was written"):
        ModelContract.loads(_altered(**changes))


@pytest.mark.parametrize("schema", ["embedkit.model/2", "", None, 1, "another"])
def test_another_schema_is_refused_with_the_line_to_type(schema: Any) -> None:
    with pytest.raises(MismatchError, match="written by another embedkit") as caught:
        ModelContract.loads(_altered(schema=schema))
    assert caught.value.hint is not None
    assert "pip install --upgrade embedkit" in caught.value.hint


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "5", '"text"', "{}", "[" * 100_000, '{"schema": "embedkit.model/1"}'],
)
def test_a_text_that_is_no_contract_is_refused(text: str) -> None:
    with pytest.raises(MismatchError, match="no contract that can be read"):
        ModelContract.loads(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"embedding_dim": 0},
        {"embedding_dim": "3"},
        {"metric": "dot"},
        {"metric": None},
        {"preprocess": {}},
        {"preprocess": 5},
        {"preprocess": {**Preprocess().to_json(), "crop_ratio": 7}},
        {"kept_float": 5},
        {"self_test": 5},
        {"self_test": {"seed": 1}},
        {"self_test": {"seed": 1, "vector": ["x"], "min_cosine": 0.9}},
        {"a_new_field": 1},
    ],
)
def test_a_damaged_document_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(MismatchError):
        ModelContract.loads(_altered(**changes))


@pytest.mark.parametrize(
    "name",
    [
        *("schema", "fingerprint", "name", "embedding_dim", "normalizes", "metric"),
        *("preprocess", "weights_hash", "kept_float", "self_test"),
    ],
)
def test_a_document_without_a_field_that_matters_is_refused(name: str) -> None:
    document = json.loads(_contract().dumps())
    del document[name]
    with pytest.raises(MismatchError):
        ModelContract.loads(json.dumps(document))


@pytest.mark.parametrize(
    ("seed", "size", "digest"),
    [
        (0, (4, 5), "2fee240e9dfcc09d7cfc7cd7a8d9072af50112ac0389c16a7df19af7ef4b731f"),
        (1, (224, 224), "d4318a76476196577e1029ba28db8596e00aed61980393de609e190e3eef9e8a"),
    ],
)
def test_the_self_test_picture_is_the_same_bytes_on_every_machine(
    seed: int, size: tuple[int, int], digest: str
) -> None:
    pixels = SelfTest(seed=seed, vector=()).pixels(Preprocess(height=size[0], width=size[1]))
    assert pixels.shape == (1, *size, 3)
    assert pixels.dtype == np.uint8
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == digest


def test_self_test_pictures_differ_by_seed_and_are_no_flat_colour() -> None:
    spec = Preprocess(height=32, width=32)
    pictures = [SelfTest(seed=seed, vector=()).pixels(spec) for seed in range(5)]
    assert len({picture.tobytes() for picture in pictures}) == 5
    assert all(picture.std() > 20 for picture in pictures)
