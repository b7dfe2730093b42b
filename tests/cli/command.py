"""What the tests of the commands share: a command line that is called, and what it answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from embedkit.cli import main as command_line

__all__ = ["Done", "embedkit", "picture"]


class Done(NamedTuple):
    """How a command ended and what it wrote."""

    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        """stdout, which must be exactly one document."""
        document: dict[str, Any] = json.loads(self.out)
        assert self.out.count("\n") == 1
        return document


def embedkit(*arguments: object) -> int:
    """The exit code of ``embedkit ...`` in this process."""
    with pytest.raises(SystemExit) as ended:
        command_line.main([str(argument) for argument in arguments])
    assert ended.value.code is None or isinstance(ended.value.code, int)
    return ended.value.code or 0


def picture(path: Path, seed: int) -> Path:
    """A small picture of coloured clouds, another one for each seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(small).resize((40, 32)).save(path)
    return path
