"""The options of the commands that run an exported model: where, how, and how much at once."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["Backend", "Batch", "Device", "Dim", "Workers"]

_WORK = "Work"

Device = Annotated[
    str,
    typer.Option(metavar="NAME", rich_help_panel=_WORK, help="auto, cpu, cuda or cuda:N."),
]

Backend = Annotated[
    str,
    typer.Option(
        "--backend",
        metavar="NAME",
        rich_help_panel=_WORK,
        help="onnxruntime, onnxruntime-tensorrt or tensorrt (auto).",
    ),
]

Dim = Annotated[
    int | None,
    typer.Option(
        "--dim",
        metavar="N",
        min=1,
        rich_help_panel=_WORK,
        help="Only the first N numbers, of a model trained with --nested.",
    ),
]

Batch = Annotated[int, typer.Option(min=1, rich_help_panel=_WORK, help="Pictures at once.")]

Workers = Annotated[
    int | None,
    typer.Option(
        "--workers", "-j", min=1, rich_help_panel=_WORK, help="Threads that decode (the cores)."
    ),
]
