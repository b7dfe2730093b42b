"""`embedkit index ./catalog`"""

from __future__ import annotations

import json
import os
import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedkit.cli.display import Advance, AsJson, Display, Quiet, Verbose
from embedkit.errors import EmbedKitError, ImageError, UsageError

if TYPE_CHECKING:
    from rich.text import Text

    from embedkit.index import SyncReport

__all__ = ["from_here", "index"]

_WORK, _OUTPUT = "Work", "Output"
_NAMED = 5


def index(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="FOLDER", help="Photos, at any depth (./catalog, else .)."),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="An exported model (the index's own, runs/last, or the one here).",
        ),
    ] = None,
    rebuild: Annotated[
        bool,
        typer.Option("--rebuild", help="Embed everything again; lets another model take over."),
    ] = False,
    retry: Annotated[
        bool, typer.Option("--retry", help="Try again the pictures that failed before.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count what would be done; write nothing.")
    ] = False,
    device: Annotated[
        str, typer.Option(rich_help_panel=_WORK, help="auto, cpu, cuda or cuda:N.")
    ] = "auto",
    batch: Annotated[
        int, typer.Option(min=1, rich_help_panel=_WORK, help="Pictures at once.")
    ] = 32,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", "-j", min=1, rich_help_panel=_WORK, help="Threads that decode (the cores)."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            rich_help_panel=_OUTPUT,
            help="The index (the folder's name + .faiss, here).",
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make a searchable index of a folder of photos, or bring one up to date.

    Only new and changed pictures are embedded: run it again whenever the folder changes.

    Example: embedkit index ./catalog -o catalog.faiss
    """
    from embedkit.index import remembered_model, sync_folder
    from embedkit.runtime import Embedder

    display = Display(as_json=as_json, quiet=quiet)
    folder = folder or (Path("catalog") if Path("catalog").is_dir() else Path())
    output = output or Path(f"{folder.resolve().name or 'catalog'}.faiss")
    file = model or remembered_model(output) or _default_model()
    with Embedder.load(file, device=device) as embedder, ExitStack() as bars:
        contract = embedder.contract
        display.note(
            "model", f"{contract.name}: {from_here(file)}, {embedder.embedding_dim} numbers"
        )
        display.note("device", embedder.device)
        advance: list[Advance] = []

        def progress(done: int, failed: int, total: int) -> None:
            if not advance:
                advance.append(bars.enter_context(display.progress("indexing", total)))
            advance[0](done, failed)

        report = sync_folder(
            folder,
            output,
            embedder,
            model=file,
            batch=batch,
            workers=workers,
            rebuild=rebuild,
            retry=retry,
            dry_run=dry_run,
            progress=progress,
        )
    failed_list = output.with_name(output.name + ".failed.jsonl")
    if not dry_run:
        _write_failures(failed_list, folder, report.failures)
    for path, error in report.failures[:_NAMED]:
        display.warn(f"{from_here(path)}: {error.reason}")
    if len(report.failures) > _NAMED:
        display.warn(f"and {len(report.failures) - _NAMED:,} more that are no usable pictures")
    display.answer(_summary(report, folder, output, failed_list, dry_run=dry_run))
    if not dry_run:
        display.note(
            "next", f"embedkit search ./query.jpg --index {shlex.quote(from_here(output))}"
        )
    display.document(
        "index", _document(report, folder, output, file, contract.fingerprint, dry_run)
    )
    if report.failed:
        raise typer.Exit(3)


def from_here(path: Path) -> str:
    """A path as the user would type it: relative where it lies below the current folder."""
    full, here = Path(os.path.normpath(path.absolute())), Path.cwd()
    return str(full.relative_to(here)) if full.is_relative_to(here) else str(full)


def _default_model() -> Path:
    last = Path("runs/last/model.onnx")
    if last.is_file():
        return last
    here = sorted(Path().glob("*.onnx"))
    if len(here) == 1:
        return here[0]
    raise UsageError(
        "which model?",
        facts="there is none in runs/last, and "
        + (f"several here: {', '.join(map(str, here))}" if here else "no .onnx file here"),
        hint="embedkit export, then run this again; or name one: --model FILE",
    )


def _summary(
    report: SyncReport, folder: Path, output: Path, failed_list: Path, *, dry_run: bool
) -> Text:
    from rich.text import Text

    rate = report.embedded / report.embed_seconds if report.embed_seconds > 0 else 0
    lines = [
        ("found", report.found, f"in {from_here(folder)}"),
        ("embedded", report.embedded, f"{rate:,.0f} a second" if rate else ""),
        ("unchanged", report.unchanged, ""),
        ("moved", report.moved, "renamed or copied: not embedded again" if report.moved else ""),
        ("failed", report.failed, f"named in {from_here(failed_list)}" if report.failed else ""),
        ("removed", report.removed, "no longer in the folder" if report.removed else ""),
    ]
    text = Text()
    if dry_run:
        text.append("nothing was written; this would be done\n", style="bold")
        lines[4] = ("failed", report.failed, "")
    for name, count, remark in lines:
        text.append(f"{name:<9} ", style="bold")
        text.append(f"{count:>9,}")
        text.append(f"  {remark}\n" if remark else "\n", style="dim")
    if not dry_run:
        state = "" if report.published else ", as it was"
        text.append(f"index     {from_here(output)}: {report.count:,} pictures{state}")
        text.append(f", {report.seconds:,.1f} s")
    text.rstrip()
    return text


def _document(
    report: SyncReport, folder: Path, output: Path, model: Path, fingerprint: str, dry_run: bool
) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "index": str(output),
        "model": {"path": from_here(model), "fingerprint": fingerprint},
        "dry_run": dry_run,
        "found": report.found,
        "embedded": report.embedded,
        "unchanged": report.unchanged,
        "moved": report.moved,
        "failed": report.failed,
        "removed": report.removed,
        "count": report.count,
        "published": report.published,
        "seconds": round(report.seconds, 3),
        "embed_seconds": round(report.embed_seconds, 3),
        "failures": [
            {"path": str(path), "code": error.code, "reason": error.reason}
            for path, error in report.failures
        ],
    }


def _write_failures(file: Path, folder: Path, failures: list[tuple[Path, ImageError]]) -> None:
    """One JSON line per failed picture, paths relative to the folder; no file where none failed."""
    root = Path(os.path.realpath(folder))
    lines = [
        json.dumps(
            {"path": str(path.relative_to(root)), "code": error.code, "reason": error.reason}
        )
        for path, error in failures
    ]
    try:
        if lines:
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        else:
            file.unlink(missing_ok=True)
    except OSError as error:
        raise EmbedKitError(
            f"the list of failures {file} cannot be written", facts=error.strerror
        ) from error
