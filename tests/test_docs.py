"""What the README, help and the hints of errors tell people to type is what the program takes."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from embedkit.cli.main import app
from tests.tiny_model import write_tiny_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAM: Any = typer.main.get_command(app)
FOLDERS = (".ci", "benchmarks", "cli", "docs", "embedkit", "examples", "models", "tests")


# --- what is written -----------------------------------------------------------------------------


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Language and content of each fenced block."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def inline(text: str) -> list[str]:
    """Every `piece of code` outside of the blocks, on one line."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(piece.split()) for piece in re.findall(r"`([^`]+)`", prose)]


def typed(line: str) -> Iterator[list[str]]:
    """The arguments of each embedkit command in a line for a shell; a sample output has none."""
    line = line.split(" # ")[0].removeprefix("$ ")
    for part in re.split(r"&&|;| \| ", line):
        words = shlex.split(part, comments=False) if _is_command(part) else []
        if words:
            yield [word for word in words[1:] if not re.match(r"\d?>", word)]


def _is_command(part: str) -> bool:
    return re.match(r"(\S*/)?embedkit( |$)", part.strip()) is not None


def commands(text: str) -> list[list[str]]:
    """Every embedkit command in blocks and in the text, without the name of the program."""
    found = []
    for language, content in blocks(text):
        if language != "python":
            for line in content.replace("\\\n", " ").splitlines():
                found += list(typed(line))
    for piece in inline(text):
        # `cub|cars` offers a choice; the first of it is as good as any.
        found += list(typed(re.sub(r"(?<=\w)(\|[\w-]+)+", "", piece)))
    return [words for words in found if words]


def paths(text: str) -> set[str]:
    """Every file or folder of this repository that the text names."""
    starts = "|".join(map(re.escape, FOLDERS))
    code = "\n".join([*inline(text), *(content for _, content in blocks(text))])
    named = set(re.findall(rf"(?<![\w./-])(?:{starts})/[\w./-]*", code))
    modules = re.findall(r"python -m (benchmarks\.\w+)", code)
    return named | {f"{name.replace('.', '/')}.py" for name in modules}


def figures(text: str) -> Iterator[tuple[str, str, str]]:
    """File, place in it and the number shown, of each ``<!-- figure FILE: A / B -->1.6``."""
    yield from re.findall(r"<!-- figure (\S+): (.+?) -->\W*?([\d,]*\.?\d+)", text)


# --- what is true --------------------------------------------------------------------------------


def parse(words: list[str]) -> None:
    """Take the words as the program would, and do nothing.

    Raises:
        typer.TyperException: The program refuses them.
    """
    name, rest = words[0], words[1:]
    if name.startswith("-"):
        PROGRAM.make_context("embedkit", words, resilient_parsing=True)
        return
    command = PROGRAM.commands.get(name)
    if command is None:
        raise typer.BadParameter(f"there is no command {name!r}")
    if rest and rest[0] in getattr(command, "commands", ()):
        command, rest = command.commands[rest[0]], rest[1:]
    try:
        command.make_context(name, rest, obj={"verbose": False})
    except typer.Exit:  # --help
        return


def options(command: Any) -> set[str]:
    own = {name for parameter in command.params for name in parameter.opts}
    return own.union(*map(options, getattr(command, "commands", {}).values()))


def value(file: str, place: str) -> float:
    """A number of a results file; ``*`` is the mean over a list."""
    found = json.loads((ROOT / "benchmarks" / "results" / file).read_text())
    return _at(found, place.split(" / "))


def _at(found: Any, steps: list[str]) -> float:
    if not steps:
        return float(found)
    step, *rest = steps
    if step == "*":
        return sum(_at(one, rest) for one in found) / len(found)
    return _at(found[int(step)] if isinstance(found, list) else found[step], rest)


def is_shown_right(shown: str, true: float) -> bool:
    """Whether a figure is the number, rounded to the decimals that are shown."""
    decimals = len(shown.partition(".")[2])
    return abs(float(shown.replace(",", "")) - true) <= 0.5 * 10**-decimals + 1e-9


# --- the README ----------------------------------------------------------------------------------


def test_every_command_in_the_readme_is_one_the_program_takes() -> None:
    refused = []
    for words in commands(README):
        try:
            parse(words)
        except typer.TyperException as error:
            refused.append(f"embedkit {shlex.join(words)}: {error.format_message()}")
    assert len(commands(README)) > 5
    assert refused == []


def test_the_readme_names_every_command_and_no_other() -> None:
    called = {words[0] for words in commands(README) if not words[0].startswith("-")}
    named = called | {piece.split()[0] for piece in inline(README) if piece.strip()}
    assert called <= set(PROGRAM.commands)
    assert set(PROGRAM.commands) - named == set()


def test_every_option_the_readme_names_is_one_of_the_program() -> None:
    known = options(PROGRAM)
    named = {piece.split()[0] for piece in inline(README) if piece.startswith("--")}
    assert named <= known


def test_every_file_the_readme_names_is_there() -> None:
    assert paths(README)
    assert [path for path in sorted(paths(README)) if not (ROOT / path).exists()] == []


def test_every_script_the_readme_runs_has_the_options_it_is_given() -> None:
    code = [*inline(README), *(line for _, block in blocks(README) for line in block.splitlines())]
    for line in code:
        if found := re.search(r"python (-m benchmarks\.\w+|(?:examples|docs)/[\w./]+)(.*)", line):
            script = found[1].removeprefix("-m ")
            file = script if "/" in script else f"{script.replace('.', '/')}.py"
            source = (ROOT / file).read_text(encoding="utf-8")
            assert [one for one in re.findall(r"--[a-z-]+", found[2]) if one not in source] == []


def test_every_figure_with_a_mark_is_the_one_that_was_measured() -> None:
    wrong = [
        f"{file}: {place} is {value(file, place)}, not {shown}"
        for file, place, shown in figures(README)
        if not is_shown_right(shown, value(file, place))
    ]
    assert len(list(figures(README))) == README.count("<!-- figure ")
    assert wrong == []


def test_the_python_in_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np
    from PIL import Image

    from embedkit import Embedder
    from embedkit.index import sync_folder

    write_tiny_model(tmp_path / "model.onnx")
    noise = np.random.default_rng(0)
    for name in ("mug/1.jpg", "mug/2.jpg", "bag/1.jpg"):
        file = tmp_path / "catalog" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(file)
    (tmp_path / "query.jpg").write_bytes((tmp_path / "catalog" / "mug" / "2.jpg").read_bytes())
    with Embedder.load(tmp_path / "model.onnx", device="cpu") as embedder:
        sync_folder(
            tmp_path / "catalog",
            tmp_path / "catalog.faiss",
            embedder,
            model=tmp_path / "model.onnx",
        )
    monkeypatch.chdir(tmp_path)
    code = [content for language, content in blocks(README) if language == "python"]
    assert code
    for content in code:
        exec(compile(content, "README.md", "exec"), {})
    assert "mug" in capsys.readouterr().out


# --- help, and the hints of errors ---------------------------------------------------------------


@pytest.mark.parametrize("name", list(PROGRAM.commands))
def test_the_example_in_a_commands_help_is_one_it_takes(name: str) -> None:
    command = PROGRAM.commands[name]
    for one in [command, *getattr(command, "commands", {}).values()]:
        (example,) = re.findall(r"Example: (embedkit [^\n]*)", one.help)
        (words, *_) = typed(example)
        parse(words)


def hints() -> Iterator[tuple[str, str]]:
    """Every ``hint=`` in the sources, and where; what is filled in later is an X."""
    for folder in ("embedkit", "cli", "models"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.keyword) and node.arg == "hint":
                    yield f"{file.relative_to(ROOT)}:{node.value.lineno}", _words(node.value)


def _words(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_words(part) for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _words(left) + _words(right)
        case ast.IfExp(body=body, orelse=other):
            return f"{_words(body)}\n{_words(other)}"
        case _:
            return "X"


def test_every_hint_names_a_command_and_options_that_exist() -> None:
    wrong, checked = [], 0
    for where, hint in hints():
        for name, rest in re.findall(r"(?<![\w-])embedkit ([a-z]+)([^\n;,]*)", hint):
            checked += 1
            known = options(PROGRAM.commands[name]) if name in PROGRAM.commands else set()
            given = set(re.findall(r"(?<=\s)--[a-z][a-z-]*", rest))
            if not known or given - known:
                wrong.append(f"{where}: {hint}")
    assert checked > 20
    assert wrong == []


# --- the checks themselves -----------------------------------------------------------------------


def test_a_wrong_line_is_found() -> None:
    text = "\n".join(
        [
            "Run `embedkit serch x.jpg`, or `embedkit data prepare cub|cars`:",
            "```",
            "$ embedkit search q.jpg --indx c.faiss | head && .venv/bin/embedkit demo 2>log",
            "next      embedkit nothing",
            "python -m benchmarks.gone",
            "```",
        ]
    )
    found = [
        ["search", "q.jpg", "--indx", "c.faiss"],
        ["demo"],
        ["serch", "x.jpg"],
        ["data", "prepare", "cub"],
    ]
    assert commands(text) == found
    for words, accepted in zip(found, (False, True, False, True), strict=True):
        if accepted:
            parse(words)
        else:
            with pytest.raises(typer.TyperException):
                parse(words)
    assert paths(text) == {"benchmarks/gone.py"}


def test_a_figure_is_compared_in_the_decimals_it_shows() -> None:
    ((file, place, shown),) = figures("<!-- figure install.json: light_mb -->1,225 MB")
    assert (file, place, shown) == ("install.json", "light_mb", "1,225")
    assert is_shown_right("1,225", 1224.8)
    assert is_shown_right(".441", 0.44057)
    assert not is_shown_right(".44", 0.4462)
    assert value("grocery.json", "embedkit / * / map@r") == pytest.approx(
        sum(value("grocery.json", f"embedkit / {seed} / map@r") for seed in range(3)) / 3
    )


def test_the_reference_refuses_arguments_that_are_not_there_and_silence() -> None:
    pdoc = pytest.importorskip("pdoc.doc", reason="pip install 'embedkit[docs]'")
    spec = importlib.util.spec_from_file_location("build_docs", ROOT / "docs" / "build.py")
    assert spec
    assert spec.loader
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)

    def right(x: int) -> int:
        """Doubled.

        Args:
            x: Any number, as in:
                y: not an argument

        Returns:
            z: no argument either.
        """
        return 2 * x

    def wrong(x: int) -> int:
        """Doubled.

        Args:
            size: Of what?
        """
        return 2 * x

    def silent() -> None: ...

    made = {"right": right, "wrong": wrong, "silent": silent}
    page: Any = SimpleNamespace(
        fullname="room",
        docstring="A room.",
        obj=SimpleNamespace(__all__=list(made)),
        members={name: pdoc.Function("room", name, one, ("", "")) for name, one in made.items()},
    )
    assert list(build.faults(page)) == [
        "room.wrong: the docstring describes 'size', which is no argument of it",
        "room.silent: no docstring",
    ]
