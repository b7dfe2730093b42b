"""The option `--backend` of the commands that run an exported model."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["Backend"]

Backend = Annotated[
    str,
    typer.Option(
        "--backend",
        metavar="NAME",
        rich_help_panel="Work",
        help="onnxruntime, onnxruntime-tensorrt or tensorrt (auto).",
    ),
]
