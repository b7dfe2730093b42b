"""What a person or a program sees: answers on stdout, all else on stderr, errors in three lines.

Rich is imported on first use, so that ``embedkit --help`` starts at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedkit.errors import EmbedKitError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["Advance", "AsJson", "Display", "Quiet", "Verbose", "printable", "show_error"]

_NAMED = 5

Advance = Callable[[int, int], None]
"""``advance(done, failed)``: that many more are done, of which that many failed."""


def _set_verbose(context: typer.Context, value: bool) -> bool:
    if value:
        context.find_root().obj["verbose"] = True
    return value


AsJson = Annotated[
    bool, typer.Option("--json", help="One JSON document on stdout.", rich_help_panel="Output")
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Only errors on stderr.", rich_help_panel="Output")
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="Show the traceback of an error.",
        callback=_set_verbose,
        rich_help_panel="Output",
    ),
]


class Display:
    """The streams of one command.

    Args:
        as_json: Answers are one JSON document; tables are not shown.
        quiet: Notes, warnings and bars are left out.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet

    def note(self, label: str, text: str) -> None:
        """A line of the running story on stderr: ``data      4,120 images, 186 classes``."""
        if not self.quiet:
            self._stderr().print(f"{label:<9} ", end="", style="bold", markup=False)
            self._stderr().print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Something the user should know although the work goes on."""
        if not self.quiet:
            self._stderr().print("warning   ", end="", style="bold yellow", markup=False)
            self._stderr().print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def warn_of(self, troubles: Sequence[str], rest: str) -> None:
        """The first five by name, the others as a number: ``and 7 more <rest>``."""
        for trouble in troubles[:_NAMED]:
            self.warn(trouble)
        if len(troubles) > _NAMED:
            self.warn(f"and {len(troubles) - _NAMED:,} more {rest}")

    def answer(self, renderable: RenderableType) -> None:
        """The command's answer for people, on stdout; nothing under ``--json``."""
        if not self.as_json:
            self._stdout().print(renderable, markup=False, highlight=False, soft_wrap=True)

    @property
    def shows_colour(self) -> bool:
        """Whether answers go to a terminal, whose owner likes colours."""
        return _is_terminal(sys.stdout)

    @property
    def columns(self) -> int:
        """How wide an answer may be."""
        return self._stdout().width

    def document(self, command: str, content: dict[str, Any]) -> None:
        """The command's answer for programs, on stdout; nothing without ``--json``."""
        if self.as_json:
            text = json.dumps({"schema": f"embedkit.{command}/1", **content}, ensure_ascii=True)
            sys.stdout.write(text + "\n")

    @contextmanager
    def progress(self, what: str, total: int | None = None) -> Iterator[Advance]:
        """One bar with rate, time left and failures; silent where there is no terminal.

        Yields ``advance(done, failed)``.
        """
        if self.quiet or not _is_terminal(sys.stderr):
            yield lambda done, failed: None
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[failures]}", style="yellow"),
        )
        with Progress(*columns, console=self._stderr(), transient=True) as bars:
            task = bars.add_task(what, total=total, rate="", failures="")
            failures = 0

            def advance(done: int, failed: int) -> None:
                nonlocal failures
                failures += failed
                speed = bars.tasks[0].speed
                bars.update(
                    task,
                    advance=done,
                    rate=f"{speed:,.0f}/s" if speed else "",
                    failures=f"{failures} failed" if failures else "",
                )

            yield advance

    def _stderr(self) -> Console:
        return _console("stderr")

    def _stdout(self) -> Console:
        return _console("stdout")


def show_error(error: EmbedKitError) -> None:
    """What happened, the facts, what to type: on stderr, never wrapped."""
    color = _is_terminal(sys.stderr)
    lead = "\x1b[1;31merror:\x1b[0m" if color else "error:"
    lines = [f"{lead} {printable(error.what)}"]
    if error.facts:
        lines += [f"  {printable(line)}" for line in error.facts.splitlines()]
    if error.hint:
        first, *rest = error.hint.splitlines()
        lines += [f"  try: {printable(first)}", *(f"       {printable(line)}" for line in rest)]
    sys.stderr.write("\n".join(lines) + "\n")


def printable(text: str) -> str:
    """Text safe for a terminal: names that are no UTF-8 and control characters become escapes."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c == "\n" or c.isprintable() else repr(c)[1:-1] for c in text)


def _is_terminal(stream: Any) -> bool:
    plain = os.environ.get("NO_COLOR") or os.environ.get("CI") or os.environ.get("TERM") == "dumb"
    return bool(stream.isatty() and not plain)


def _console(stream: str) -> Console:
    from rich.console import Console

    file = getattr(sys, stream)
    return Console(file=file, force_terminal=_is_terminal(file), highlight=False)
