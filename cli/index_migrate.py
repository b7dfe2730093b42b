"""`embedkit index migrate catalog.faiss --to new.onnx`"""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedkit.cli.display import Advance, AsJson, Display, Quiet, Verbose
from embedkit.cli.index import from_here
from embedkit.cli.work import Batch, Device, Dim, Workers

if TYPE_CHECKING:
    from embedkit.index.migrate import Bridge, Losses

__all__ = ["migrate"]

_WORK = "Work"


def migrate(
    index: Annotated[Path, typer.Argument(metavar="INDEX", help="Made by `embedkit index`.")],
    to: Annotated[Path, typer.Option(metavar="MODEL", help="The new model, exported.")],
    sample: Annotated[
        int,
        typer.Option(
            metavar="COUNT", min=100, help="Pictures that both models embed to fit the bridge."
        ),
    ] = 2000,
    device: Device = "auto",
    dim: Dim = None,
    batch: Batch = 32,
    workers: Workers = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Bring an index to another model; it is searched all the while.

    First a bridge is fitted, and what it costs is measured: from then on
    `embedkit search --model NEW` works too. Then everything is embedded again
    beside the index, and takes its place in the end. Killed, run it again.

    Example: embedkit index migrate catalog.faiss --to new.onnx
    """
    from embedkit.index.migrate import LEAST_PICTURES
    from embedkit.index.migrate import migrate as work
    from embedkit.runtime import Embedder

    display = Display(as_json=as_json, quiet=quiet)
    bridges: list[Bridge | None] = []

    def fitted(bridge: Bridge | None) -> None:
        bridges.append(bridge)
        if bridge is None:
            display.warn(
                f"no bridge: it takes {LEAST_PICTURES} pictures that can be read, and models that "
                "compare by the cosine; until all is embedded the old model searches"
            )
            return
        display.answer(_table(bridge.losses))
        name = shlex.quote(from_here(index))
        display.note(
            "bridge",
            f"{bridge.kind}; until all is embedded again: "
            f"embedkit search ./query.jpg --index {name} --model {shlex.quote(from_here(to))}",
        )

    with Embedder.load(to, device=device, threads=1, dim=dim) as embedder, ExitStack() as bars:
        contract = embedder.contract
        display.note("model", f"{contract.name}: {from_here(to)}, {contract.embedding_dim} numbers")
        advance: list[Advance] = []

        def progress(done: int, failed: int, total: int) -> None:
            if not advance:
                advance.append(bars.enter_context(display.progress("embedding", total)))
            advance[0](done, failed)

        report = work(
            index,
            embedder,
            model=to,
            sample=sample,
            batch=batch,
            workers=workers,
            fitted=fitted,
            progress=progress,
        )
    display.warn_of(
        [f"{from_here(path)}: {error.reason}" for path, error in report.failures],
        "that are no usable pictures",
    )
    display.answer(f"index     {from_here(index)}: {report.count:,} pictures by {contract.name}")
    display.document(
        "index-migrate",
        {
            "index": from_here(index),
            "model": {"name": contract.name, "fingerprint": contract.fingerprint},
            "bridge": _bridge_json(bridges[0]) if bridges and bridges[0] else None,
            "found": report.found,
            "embedded": report.embedded,
            "unchanged": report.unchanged,
            "moved": report.moved,
            "failed": report.failed,
            "count": report.count,
            "failures": [
                {"path": str(path), "code": error.code, "reason": error.reason}
                for path, error in report.failures
            ],
        },
    )
    if report.failed:
        raise typer.Exit(3)


def _table(losses: Losses) -> str:
    """What a search with the new model finds before everything is embedded again."""
    lines = [
        f"measured on {losses.queries:,} pictures the bridge was not fitted on",
        f"  neighbours of the old model found over the bridge   {losses.overlap:7.1%}",
    ]
    if losses.before == losses.before:
        lines += [
            f"  recall@1, old model                                 {losses.before:7.4f}",
            f"  recall@1, new model over the bridge                 {losses.bridge:7.4f}",
            f"  recall@1, new model when all is embedded again      {losses.after:7.4f}",
        ]
    return "\n".join(lines)


def _bridge_json(bridge: Bridge) -> dict[str, Any]:
    def known(value: float) -> float | None:
        return None if value != value else value

    losses = bridge.losses
    return {
        "kind": bridge.kind,
        "queries": losses.queries,
        "neighbour_overlap@10": losses.overlap,
        "recall@1": {
            "old": known(losses.before),
            "bridge": known(losses.bridge),
            "new": known(losses.after),
        },
    }
