"""`embedkit embed ./photos -o vectors.npy`"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedkit.cli.display import AsJson, Display, Quiet, Verbose
from embedkit.cli.index import default_model, from_here
from embedkit.cli.work import Backend, Batch, Device, Dim
from embedkit.errors import UsageError

if TYPE_CHECKING:
    from rich.text import Text

    from embedkit.imaging import Shard
    from embedkit.runtime import ModelContract
    from embedkit.scale import EmbedReport

__all__ = ["embed"]

_WORK, _OUTPUT = "Work", "Output"


def embed(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATHS",
            help="Files, folders, tar files; s3://, gs://, az:// addresses; - for a list on stdin.",
        ),
    ],
    model: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="An exported model (runs/last, or the one here)."),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N", help="Only share I of N, from 0; its number is put into the file's name."
        ),
    ] = None,
    web: Annotated[
        bool, typer.Option("--web", help="Take http:// and https:// addresses too.")
    ] = False,
    device: Device = "auto",
    backend: Backend = "auto",
    dim: Dim = None,
    batch: Batch = 32,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            "-j",
            min=1,
            rich_help_panel=_WORK,
            help="Threads that decode; with --ray actors (the cores).",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            rich_help_panel=_WORK,
            help="Work on a Ray cluster; auto: this machine's, else one is started here.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            rich_help_panel=_OUTPUT,
            help="NAME.npy, its rows listed in NAME.jsonl; or NAME.parquet (vectors.npy).",
        ),
    ] = None,
    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME",
            rich_help_panel=_OUTPUT,
            help="npy or parquet (by the file's ending).",
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Turn pictures into a file of vectors for programs of your own.

    Interrupted, the same command goes on. Many machines: give each its --shard.

    Example: embedkit embed ./photos --model model.onnx -o vectors.parquet
    """
    from embedkit.imaging import Shard
    from embedkit.runtime import Embedder, read_contract
    from embedkit.scale import count_files, embed_sources, find_sources, local_engine

    display = Display(as_json=as_json, quiet=quiet)
    share = Shard.parse(shard) if shard else Shard()
    file = share.named(_output(output, format_))
    sources = find_sources(paths, listed=_stdin_lines(), shard=share, web=web)
    model = model or default_model()
    contract = read_contract(model)
    contract = contract if dim is None else contract.cut(dim)
    display.note("model", f"{contract.name}: {from_here(model)}, {contract.embedding_dim} numbers")
    with ExitStack() as opened:
        if ray is None:
            embedder = opened.enter_context(
                Embedder.load(model, device=device, backend=backend, threads=1, dim=dim)
            )
            display.note("device", embedder.device)
            engine = local_engine(embedder, batch=batch, workers=workers)
        else:
            from embedkit.scale.ray import ray_engine

            engine = ray_engine(
                ray,
                model,
                device=device,
                backend=backend,
                dim=dim,
                batch=batch,
                workers=workers,
            )
            display.note("device", f"Ray, {ray}")
        advance = opened.enter_context(display.progress("embedding", count_files(paths, share)))
        report = embed_sources(
            sources,
            file,
            engine,
            contract,
            may_be_empty=share.count > 1,
            progress=advance,
        )
    for path, error in report.failures:
        display.warn(f"{path}: {error.reason}")
    if report.failed > len(report.failures):
        display.warn(f"and {report.failed - len(report.failures):,} more without a vector")
    display.answer(_summary(report, share))
    display.document("embed", _document(report, share, model, contract))
    if report.failed:
        raise typer.Exit(3)


def _output(output: Path | None, form: str | None) -> Path:
    """The file that was asked for, by its name, its format or both."""
    from embedkit.errors import UnknownNameError
    from embedkit.scale import FORMATS, format_of

    if form is not None and form not in FORMATS:
        raise UnknownNameError("format", form, FORMATS)
    if output is None:
        return Path(f"vectors.{form or 'npy'}")
    if output.is_dir():
        raise UsageError(f"{output} is a folder", hint=f"name a file: -o {output}/vectors.npy")
    if form is not None and not output.suffix:
        return output.with_name(f"{output.name}.{form}")
    if form is not None and format_of(output) != form:
        raise UsageError(
            f"{output.name} and --format {form} do not agree", hint="leave --format out"
        )
    format_of(output)
    return output


def _stdin_lines() -> Iterator[str]:
    """Lines of stdin as paths, in whatever bytes; read when they are needed."""
    for line in sys.stdin.buffer:
        name = os.fsdecode(line.rstrip(b"\r\n"))
        if name:
            yield name


def _summary(report: EmbedReport, shard: Shard) -> Text:
    from rich.text import Text

    rate = report.embedded / report.embed_seconds if report.embed_seconds > 0 else 0
    failed = f"named in {from_here(report.failed_list)}" if report.failed else ""
    lines = [
        ("found", report.found, f"in shard {shard}" if shard.count > 1 else ""),
        ("embedded", report.embedded, f"{rate:,.0f} a second" if rate else ""),
        ("known", report.known, "done before" if report.known else ""),
        ("failed", report.failed, failed),
    ]
    text = Text()
    for name, count, remark in lines:
        text.append(f"{name:<9} ", style="bold")
        text.append(f"{count:>9,}")
        text.append(f"  {remark}\n" if remark else "\n", style="dim")
    shape = " x ".join(f"{size:,}" for size in report.shape)
    text.append(f"vectors   {from_here(report.output)}: {shape} float32")
    return text.append(f", {report.seconds:,.1f} s")


def _document(
    report: EmbedReport, shard: Shard, model: Path, contract: ModelContract
) -> dict[str, Any]:
    return {
        "output": str(report.output),
        "shard": str(shard),
        "model": {"path": from_here(model), "fingerprint": contract.fingerprint},
        "found": report.found,
        "embedded": report.embedded,
        "known": report.known,
        "failed": report.failed,
        "rows": report.embedded + report.known,
        "shape": list(report.shape),
        "embedding_dim": contract.embedding_dim,
        "failed_list": str(report.failed_list) if report.failed else None,
        "seconds": round(report.seconds, 3),
        "embed_seconds": round(report.embed_seconds, 3),
        "failures": [
            {"path": path, "code": error.code, "reason": error.reason}
            for path, error in report.failures
        ],
    }
