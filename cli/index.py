"""`embedkit index ./catalog`"""

from __future__ import annotations

import json
import os
import re
import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedkit.cli.display import Advance, AsJson, Display, Quiet, Verbose
from embedkit.cli.work import Backend, Batch, Device, Dim, Workers
from embedkit.errors import EmbedKitError, ImageError, UsageError

if TYPE_CHECKING:
    from rich.text import Text

    from embedkit.imaging import Shard
    from embedkit.index import Choice, SyncReport, Wanted

__all__ = [
    "Bars",
    "Memory",
    "Recall",
    "Type",
    "default_model",
    "from_here",
    "index",
    "kind_lines",
    "wanted_kind",
]

_WORK, _KIND, _OUTPUT = "Work", "Kind of index (as it was, where nothing is said)", "Output"

Type = Annotated[
    str | None,
    typer.Option(
        "--type",
        metavar="NAME",
        rich_help_panel=_KIND,
        help="flat (exact), pq, ivf, ivf-disk (never in memory), hnsw, tiny, learned (an spq "
        "model's codes), or auto: measures, and takes what reaches the recall (auto).",
    ),
]

Recall = Annotated[
    float | None,
    typer.Option(
        "--recall",
        metavar="SHARE",
        rich_help_panel=_KIND,
        help="Of the true 10 nearest, how many to find (0.99).",
    ),
]

Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        rich_help_panel=_KIND,
        help="At most this when open: 500M, 2G; 0: any.",
    ),
]


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
    labels: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A CSV, path,label (the first folder's name)."),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Only share I of N, from 0, into NAME.I-of-N.faiss; then: index merge.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count what would be done; write nothing.")
    ] = False,
    type_: Type = None,
    recall: Recall = None,
    memory: Memory = None,
    low_latency: Annotated[
        bool,
        typer.Option(
            "--low-latency", rich_help_panel=_KIND, help="A graph: short for --type hnsw."
        ),
    ] = False,
    tiny: Annotated[
        bool,
        typer.Option(
            "--tiny", rich_help_panel=_KIND, help="Rough 4-bit codes: short for --type tiny."
        ),
    ] = False,
    device: Device = "auto",
    backend: Backend = "auto",
    dim: Dim = None,
    batch: Batch = 32,
    workers: Workers = None,
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
    """Make an index of a folder of photos, or bring one up to date.

    Only new and changed pictures are embedded: run it again whenever the folder changes.

    Example: embedkit index ./catalog -o catalog.faiss
    """
    from embedkit.imaging import Shard
    from embedkit.index import Catalog, remembered_dim, remembered_model, sync_folder
    from embedkit.index.labels import read_labels
    from embedkit.runtime import Embedder

    display = Display(as_json=as_json, quiet=quiet)
    wanted = wanted_kind(type_, recall, memory, low_latency=low_latency, tiny=tiny)
    folder = folder or (Path("catalog") if Path("catalog").is_dir() else Path())
    share = Shard.parse(shard) if shard else Shard()
    whole = output or Path(f"{folder.resolve().name or 'catalog'}.faiss")
    output = share.named(whole)
    file = model or remembered_model(output) or default_model()
    with (
        Embedder.load(file, device=device, backend=backend, threads=1, dim=dim) as embedder,
        ExitStack() as bars,
    ):
        kept = None if dim else remembered_dim(output)
        if kept in embedder.contract.widths:
            embedder = embedder.cut(kept)
        contract = embedder.contract
        display.note(
            "model", f"{contract.name}: {from_here(file)}, {embedder.embedding_dim} numbers"
        )
        display.note("device", embedder.device)
        bar = bars.enter_context(Bars(display))
        report = sync_folder(
            folder,
            output,
            embedder,
            model=file,
            batch=batch,
            workers=workers,
            rebuild=rebuild,
            retry=retry,
            labels=read_labels(labels, folder) if labels else None,
            wanted=wanted,
            shard=share,
            dry_run=dry_run,
            progress=bar.embedding,
            building=bar.building,
        )
    failed_list = output.with_name(output.name + ".failed.jsonl")
    if not dry_run:
        _write_failures(failed_list, folder, report.failures)
    display.warn_of(
        [f"{from_here(path)}: {error.reason}" for path, error in report.failures],
        "that are no usable pictures",
    )
    kind = None if dry_run else Catalog.open(output, mmap=True).choice
    if kind:
        for reason in kind.tried:
            display.note("tried", reason)
    text = _summary(report, folder, output, failed_list, dry_run=dry_run)
    display.answer(text.append(kind_lines(kind)) if kind else text)
    if not dry_run:
        display.note("next", _next(output, whole, share))
    display.document(
        "index", _document(report, folder, output, file, contract.fingerprint, kind, dry_run)
    )
    if report.failed:
        raise typer.Exit(3)


def from_here(path: Path) -> str:
    """A path as the user would type it: relative where it lies below the current folder."""
    full, here = Path(os.path.normpath(path.absolute())), Path.cwd()
    return str(full.relative_to(here)) if full.is_relative_to(here) else str(full)


def _next(output: Path, whole: Path, share: Shard) -> str:
    """What to type when this is done."""
    if share.count == 1:
        return f"embedkit search ./query.jpg --index {shlex.quote(from_here(output))}"
    every = f"{whole.stem}.*-of-{share.count}{whole.suffix}"
    return f"when all {share.count} are there: embedkit index merge {whole} {every}"


class Bars:
    """One bar at a time, as the stages of the work come."""

    def __init__(self, display: Display) -> None:
        self._display, self._open = display, ExitStack()
        self._stage, self._done = "", 0
        self._advance: Advance

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def embedding(self, done: int, failed: int, total: int) -> None:
        self._begin("indexing", total)
        self._advance(done, failed)

    def building(self, stage: str, done: int, total: int) -> None:
        if done < self._done:
            self._stage = ""  # the same once more
        self._begin(stage, total)
        self._advance(done - self._done, 0)
        self._done = done

    def _begin(self, stage: str, total: int) -> None:
        if stage != self._stage:
            self._open.close()
            self._advance = self._open.enter_context(self._display.progress(stage, total))
            self._stage, self._done = stage, 0


def wanted_kind(
    type_: str | None,
    recall: float | None,
    memory: str | None,
    *,
    low_latency: bool = False,
    tiny: bool = False,
) -> Wanted:
    """What the options of the kind of index say.

    Raises:
        UsageError: They contradict each other, or say what no index can be.
    """
    from embedkit.index import Wanted

    named = [type_] * (type_ is not None) + ["hnsw"] * low_latency + ["tiny"] * tiny
    if len(set(named)) > 1:
        raise UsageError(
            f"an index is of one kind, not {' and '.join(map(str, named))}",
            hint="give one of --type, --low-latency and --tiny",
        )
    return Wanted(named[0] if named else None, recall, None if memory is None else _bytes(memory))


def _bytes(size: str) -> int:
    """Of a size as people write it: 500M, 2G, 1.5GB."""
    factors = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    match = re.fullmatch(r"([0-9]+(?:[.][0-9]+)?) ?([KMGT]?)B?", size.strip().upper())
    if not match:
        raise UsageError(f"--memory takes a size, got {size!r}", hint="--memory 2G, or 500M")
    return int(float(match[1]) * factors[match[2]])


def kind_lines(kind: Choice) -> str:
    """What the index is and what was measured."""
    exact = kind.factory == "Flat"
    found = f"recall@10 {kind.recall:.3f}" if kind.queries else "too few to measure its recall"
    parts = ["finds exactly" if exact else found]
    if kind.queries_per_second is not None:
        parts.append(f"{kind.queries_per_second:,.0f} queries/s")
    parts.append(f"{kind.bytes_per_vector:,.0f} bytes a picture")
    lines = [f"kind      {kind.kind}: {', '.join(parts)}"]
    if not exact:
        lines.append(f"scores    rounded: off by up to {kind.score_error:.1g}")
    return "".join(f"\n{line}" for line in lines)


def default_model() -> Path:
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
    if report.left_out:
        lines.append(("left out", report.left_out, "removed by `embedkit index rm`"))
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
    report: SyncReport,
    folder: Path,
    output: Path,
    model: Path,
    fingerprint: str,
    kind: Choice | None,
    dry_run: bool,
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
        "left_out": report.left_out,
        "count": report.count,
        "published": report.published,
        "kind": kind.to_json() if kind else None,
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
