"""`embedkit doctor --require cuda`"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embedkit.cli.display import AsJson, Display, Quiet, Verbose, printable
from embedkit.errors import MissingError, UnknownNameError

if TYPE_CHECKING:
    from rich.table import Table

    from embedkit.cli.environment import Finding

__all__ = ["doctor"]

# What can be asked for, and the findings that must be in order for it.
_NEEDS = {
    "cpu": ("onnxruntime",),
    "cuda": ("NVIDIA driver", "onnxruntime", "CUDA"),
    "trt": ("NVIDIA driver", "tensorrt", "cuda-bindings"),
    "rtx": ("tensorrt-rtx",),
    "train": ("torch", "the rest"),
}
_STYLES = {"ok": "green", "warn": "yellow", "bad": "red", "absent": "dim"}


def doctor(
    require: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME", help="Exit 6 unless these work: cpu, cuda, trt, rtx, train."
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Look at this machine: packages, CPU, GPU, disk.

    Example: embedkit doctor --require cuda,trt
    """
    from embedkit.cli.environment import BAD, OK, WARN, examine

    wanted = list(dict.fromkeys(name.strip() for name in require.split(","))) if require else []
    for name in wanted:
        if name not in _NEEDS:
            raise UnknownNameError("requirement", name, _NEEDS)
    display = Display(as_json=as_json, quiet=quiet)
    findings = list(examine(Path.cwd()))
    lacking = {
        name: [one for one in findings if one.name in needs and one.status != OK]
        for name, needs in _NEEDS.items()
    }
    display.answer(_table(findings))
    display.document(
        "doctor",
        {
            "findings": [dataclasses.asdict(one) for one in findings],
            "works": {name: not lacks for name, lacks in lacking.items()},
            "required": wanted,
            "missing": [name for name in wanted if lacking[name]],
        },
    )
    fine = [name for name, lacks in lacking.items() if not lacks]
    display.note("works", ", ".join(fine) or "nothing that can run a model")
    broken = sum(one.status == BAD for one in findings)
    poor = sum(one.status == WARN for one in findings)
    if broken or poor:
        display.note("look at", f"{broken} bad, {poor} warnings")
    for name in wanted:
        if lacking[name]:
            raise MissingError(
                f"{name} was required and does not work here",
                facts="\n".join(f"{one.name}: {one.told}" for one in lacking[name]),
                hint=next((one.hint for one in lacking[name] if one.hint), None),
            )


def _table(findings: Sequence[Finding]) -> Table:
    """A line each, and what to type below those that need it."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("group", "name", "status"):
        table.add_column(column, no_wrap=True)
    table.add_column("found", overflow="fold")
    group = ""
    for one in findings:
        told = Text(printable(one.told))
        if one.hint:
            told.append(f"\n{printable(one.hint)}", style="bold" if one.status != "absent" else "")
        table.add_row(
            Text("" if one.group == group else one.group, style="bold"),
            printable(one.name),
            Text(one.status, style=_STYLES[one.status]),
            told,
        )
        group = one.group
    return table
