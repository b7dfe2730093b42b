"""`search --preview` on terminals of three kinds, and where there is none."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import picture
from tests.tiny_model import write_tiny_model

pytest.importorskip("textual_image")
fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))

SHOW = """
import sys
from pathlib import Path
from embedkit.cli.display import Display
from embedkit.cli.preview import Viewer
from embedkit.report import Picture, SheetRow
sys.stdin.readline()  # the terminal has its size by now
one = Picture(Path(sys.argv[1]), "one")
viewer = Viewer.find(Display())
if viewer is not None:
    viewer.show(SheetRow(one, [one] * 7))
"""


def on_a_terminal(answers: bytes, photo: Path, columns: int = 80) -> str:
    """What is written to a terminal that answers so what it is asked.

    It has answered before it is asked, so that no busy machine makes it late.
    """
    child, terminal = pty.fork()
    if child == 0:
        environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
        for name in ("CI", "NO_COLOR", "COLUMNS"):
            environment.pop(name, None)
        os.execve(sys.executable, [sys.executable, "-c", SHOW, str(photo)], environment)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    os.write(terminal, b"\n" + answers)
    written = b""
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # so a terminal says on Linux that nobody is there any more
            piece = b""
        if not piece:
            break
        written += piece
    os.close(terminal)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text = written.decode("utf-8", "replace")
    assert status == 0, text
    return text


@pytest.mark.parametrize(
    ("answers", "sign"),
    [
        (b"", "▀"),  # blocks of colour, on a terminal that knows nothing more
        (b"\x1b[?62;4c", "\x1bP"),  # a terminal's list of abilities; 4 is sixel
        (b"\x1b[?62c\x1b_Gi=1;OK\x1b\\", "\U0010eeee"),  # kitty: the places of the picture
    ],
    ids=["blocks", "sixel", "kitty"],
)
def test_a_terminal_gets_pictures_the_way_it_can_show_them(
    tmp_path: Path, answers: bytes, sign: str
) -> None:
    photo = picture(tmp_path / "photo.png", 1)
    shown = on_a_terminal(answers, photo)
    assert sign in shown
    others = {"▀", "\x1bP", "\U0010eeee"} - {sign}
    assert not [other for other in others if other in shown]
    assert "Traceback" not in shown
    if sign == "▀":
        lines = [line for line in shown.splitlines() if sign in line]
        assert {line.count(sign) for line in lines} == {80}
        assert 12 <= len(lines) <= 14  # two lines of pictures, a sixth of 80 columns wide


def test_a_terminal_that_does_not_tell_its_size_gets_a_warning(tmp_path: Path) -> None:
    shown = on_a_terminal(b"", picture(tmp_path / "photo.png", 1), columns=0)
    assert "needs a terminal that tells its size: no pictures" in shown
    assert "▀" not in shown


def test_without_a_terminal_the_answer_is_as_ever_and_a_warning_says_so(
    here: Path, run: Any
) -> None:
    write_tiny_model(here / "model.onnx")
    picture(here / "photos/a/1.png", 1)
    assert run("index", "photos").code == 0
    plain = run("search", "photos")
    asked = run("search", "photos", "--preview")
    assert (asked.code, asked.out) == (0, plain.out)
    assert "--preview needs a terminal that shows colours" in asked.err
    done = run("search", "photos", "--preview", "--json")
    assert done.json()["results"]
    assert "preview" not in done.err


def test_a_missing_package_is_named_with_what_to_type(
    here: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedkit.cli import display

    monkeypatch.setattr(display, "_is_terminal", lambda stream: True)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setitem(sys.modules, "textual_image.renderable", None)
    done = run("search", "query.png", "--preview")
    assert done.code == 6
    assert 'pip install "embedkit[preview]"' in done.err
