"""`embedkit info FILE`"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedkit.cli.display import AsJson, Display, Quiet, Verbose, printable
from embedkit.errors import EmbedKitError, GateError, UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from embedkit.cli.artefacts import Artefact

__all__ = ["info"]

_CHECK = "Check"
_MODELS = ("model", "engine")


def info(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A model, engine, run, checkpoint, index, ...")
    ],
    self_test: Annotated[
        bool,
        typer.Option(
            "--self-test",
            rich_help_panel=_CHECK,
            help="Run a model on the picture whose vector it carries.",
        ),
    ] = False,
    device: Annotated[
        str, typer.Option(metavar="NAME", rich_help_panel=_CHECK, help="cpu, cuda, cuda:1.")
    ] = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Tell what a file of embedkit is, what made it and how good it is.

    Example: embedkit info runs/last/model.onnx --self-test
    """
    from embedkit.cli.artefacts import read_artefact

    display = Display(as_json=as_json, quiet=quiet)
    if not os.path.lexists(file):
        raise UsageError(f"there is nothing named {file}", hint="embedkit info runs/last")
    artefact = read_artefact(file)
    if self_test and artefact.kind not in _MODELS:
        raise UsageError("only a model has a self-test", facts=f"{file} is {artefact.title}")
    tested = _run_self_test(file, device) if self_test else None
    lines = list(artefact.lines)
    if tested is not None:
        verdict = "passed" if tested["passed"] else "FAILED"
        lines.append(
            ("self-test", f"{verdict} on {tested['device']}: cosine {tested['cosine']:.7f}, "
             f"at least {tested['min_cosine']} is promised")
        )  # fmt: skip
    display.answer(_table(artefact, lines))
    display.document(
        "info",
        {
            "path": str(file),
            "kind": artefact.kind,
            "what": artefact.title,
            **artefact.content,
            **({"self_test": tested} if tested is not None else {}),
            "next": artefact.next or None,
        },
    )
    if tested is not None and not tested["passed"]:
        raise GateError(
            f"the model {file} does not give the vectors it was exported with",
            facts=f"cosine {tested['cosine']:.7f} on {tested['device']}, at least "
            f"{tested['min_cosine']} is promised",
            hint="copy or export the file again; if that does not help, try another --device",
        )
    if artefact.next:
        display.note("next", artefact.next)


def _run_self_test(file: Path, device: str) -> dict[str, Any]:
    from embedkit.runtime import Embedder

    with Embedder.load(file, device=device, check=False) as embedder:
        try:
            cosine = embedder.self_test()
        except EmbedKitError as error:
            if type(error) is not EmbedKitError:
                raise
            # The model ran and gave nothing usable.
            raise GateError(error.what, facts=error.facts, hint=error.hint) from error
        test = embedder.contract.self_test
        least = test.min_cosine if test else 1.0
        return {
            "device": embedder.device,
            "cosine": cosine,
            "min_cosine": least,
            "passed": cosine >= least,
        }


def _table(artefact: Artefact, lines: list[tuple[str, str]]) -> Table:
    """Labels on the left, once each; long texts wrap beside them."""
    from rich.table import Table

    table = Table(
        title=artefact.title,
        title_justify="left",
        title_style="bold",
        box=None,
        show_header=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    before = ""
    for label, text in lines:
        table.add_row("" if label == before else printable(label), printable(text))
        before = label or before
    return table
