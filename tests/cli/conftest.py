"""What the tests of the commands share: a command line that is called, and what it answered."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest

from embedkit.cli import main as command_line


class Done(NamedTuple):
    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        """stdout, which must be exactly one document."""
        document: dict[str, Any] = json.loads(self.out)
        assert self.out.count("\n") == 1
        return document


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Any:
    """``run("search", "a.jpg", "-k", 3)``: the command in this process."""

    def call(*arguments: object) -> Done:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            command_line.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return Done(int(ended.value.code or 0), out, err)

    return call
