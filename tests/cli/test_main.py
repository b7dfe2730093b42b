"""The command line as a whole: help, versions, errors in three lines, exit codes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer.main

from embedkit.cli import main as command_line
from embedkit.cli.display import Display, printable, show_error
from embedkit.errors import EmbedKitError, MismatchError

COMMANDS = [
    "train",
    "eval",
    "compare",
    "export",
    "bench",
    "info",
    "index",
    "search",
    "embed",
    "dedupe",
    "cluster",
    "verify",
    "serve",
    "atlas",
    "check",
    "data",
    "list",
    "doctor",
    "demo",
]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "embedkit.cli.main", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={"COLUMNS": "80", "PATH": "", "HOME": "/nonexistent"},
    )


def test_alone_it_shows_the_commands_to_start_with() -> None:
    done = run()
    assert done.returncode == 0
    assert "embedkit train ./photos --loss rll" in done.stdout
    assert len(done.stdout.splitlines()) <= 24


def test_help_lists_every_command_with_a_line_each() -> None:
    done = run("--help")
    assert done.returncode == 0
    for name in COMMANDS:
        (line,) = [line for line in done.stdout.splitlines() if line.split()[:1] == [name]]
        assert len(line.split()) > 3
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_each_group_of_a_commands_help_fits_a_screen_and_it_ends_with_an_example(name: str) -> None:
    done = run(name, "--help")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    for group in done.stdout.split("╰"):
        assert len(group.splitlines()) <= 24 + 12  # the first group follows the description
    assert "Example" in done.stdout
    assert f"embedkit {name}" in done.stdout


def test_version_names_the_engines() -> None:
    done = run("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("embedkit ")
    assert "faiss-cpu" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["serch"], "Did you mean 'search'"),
        (["search", "x.jpg", "--indx", "y"], "--index"),
        (["search"], "QUERY"),
    ],
)
def test_a_typing_error_is_one_clear_answer_with_exit_2(
    arguments: list[str], expected: str
) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert expected in done.stderr
    assert "--help" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


class _Command:
    """Stands in for the application and fails as told."""

    def __init__(self, failure: BaseException) -> None:
        self.failure = failure

    def __call__(self, *_: object, **__: object) -> None:
        raise self.failure


@pytest.mark.parametrize(
    ("failure", "code", "words"),
    [
        (MismatchError("it is another model", facts="a b", hint="use b"), 5, "try: use b"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero"),
    ],
)
def test_every_failure_becomes_a_sentence_and_its_exit_code(
    failure: BaseException,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command_line, "app", _Command(failure))
    with pytest.raises(SystemExit) as left:
        command_line.main([])
    assert left.value.code == code
    said = capsys.readouterr()
    assert words in said.err
    assert "Traceback" not in said.err
    assert said.out == ""


def test_an_error_is_shown_in_three_parts(capsys: pytest.CaptureFixture[str]) -> None:
    show_error(EmbedKitError("what", facts="one\ntwo", hint="first\nsecond"))
    assert capsys.readouterr().err == ("error: what\n  one\n  two\n  try: first\n       second\n")


def test_hostile_names_cannot_speak_to_the_terminal() -> None:
    assert printable("a\x1b[2Jb\r\x00") == "a\\x1b[2Jb\\r\\x00"
    assert printable("caf\udce9") == "caf\\udce9"
    assert printable("写真 é\n") == "写真 é\n"


def test_json_is_alone_on_stdout_and_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    loud, silent = Display(as_json=True), Display(as_json=True, quiet=True)
    for display in (loud, silent):
        display.note("data", "4 images")
        display.warn("one is odd")
        display.answer("a table")
        display.document("test", {"n": 1})
        with display.progress("reading", total=2) as advance:
            advance(2, 1)
    said = capsys.readouterr()
    assert said.out == '{"schema": "embedkit.test/1", "n": 1}\n' * 2
    assert said.err == "data      4 images\nwarning   one is odd\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_built_alone_is_the_one_of_the_whole(name: str) -> None:
    whole = typer.main.get_command(command_line.app)
    alone = typer.main.get_command(command_line._only(name))
    assert list(alone.commands) == [name]
    one, other = whole.commands[name], alone.commands[name]
    assert [option.name for option in one.params] == [option.name for option in other.params]
    assert one.help == other.help
    assert list(getattr(one, "commands", ())) == list(getattr(other, "commands", ()))
