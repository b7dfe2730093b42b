"""Every error says what, why and what to type, and owns a documented exit code."""

from __future__ import annotations

import pytest

from embedkit import errors
from embedkit.errors import EmbedKitError, MissingExtraError, UnknownNameError

CODES = {
    "EmbedKitError": 1,
    "UsageError": 2,
    "UnknownNameError": 2,
    "DataError": 2,
    "ImageError": 2,
    "NotFiniteError": 1,
    "GateError": 4,
    "MismatchError": 5,
    "MissingError": 6,
    "MissingExtraError": 6,
    "Interrupted": 130,
}


def test_the_exit_codes_are_the_documented_ones_and_no_error_is_undocumented() -> None:
    assert {name: getattr(errors, name).exit_code for name in errors.__all__} == CODES
    assert errors.__doc__ is not None
    for name, code in CODES.items():
        (line,) = [line for line in errors.__doc__.splitlines() if f"{name} " in line]
        assert line.split(name)[1].split()[0] == str(code)


def test_the_three_parts_are_kept_apart_and_joined_in_order() -> None:
    error = EmbedKitError("it broke", facts="1 of 2", hint="try again")
    assert (error.what, error.facts, error.hint) == ("it broke", "1 of 2", "try again")
    assert str(error) == "it broke\n1 of 2\ntry again"
    assert str(EmbedKitError("it broke")) == "it broke"


@pytest.mark.parametrize(
    ("typed", "hint"),
    [("rl", "did you mean 'rll'?"), ("tripplet", "did you mean 'triplet'?"), ("zzz", None)],
)
def test_an_unknown_name_gets_the_nearest_real_one_and_the_list(
    typed: str, hint: str | None
) -> None:
    error = UnknownNameError("loss", typed, ["triplet", "rll"])
    assert error.hint == hint
    assert error.facts == "known: rll, triplet"
    assert repr(typed) in error.what


def test_a_missing_extra_gives_the_pip_line() -> None:
    error = MissingExtraError("The onnxruntime backend", package="onnxruntime", extra="cpu")
    assert error.hint == 'pip install "embedkit[cpu]"'
