"""Damaged catalogs of every kind: no crash, no foreign error, no wrong answer once verified."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.index.mutations import KINDS


def outcomes(kind: str, count: int, seed: int) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.index.mutations", kind, str(count), str(seed)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, f"{kind}, seed {seed}: {done.returncode}\n{done.stderr[-2000:]}"
    found: dict[str, int] = json.loads(done.stdout)
    assert sum(found.values()) == count
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_refused_or_harmless(kind: str) -> None:
    assert outcomes(kind, 120, 0)["refused"] > 40


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_damaged_files(kind: str) -> None:
    assert outcomes(kind, 4000, 1)["refused"] > 1500
