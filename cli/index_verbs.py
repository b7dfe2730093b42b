"""`embedkit index add | rm | compact | verify | merge`: what is done to an index that is there."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedkit.cli.display import Advance, AsJson, Display, Quiet, Verbose
from embedkit.cli.index import Bars, Memory, Recall, Type, from_here, kind_lines, wanted_kind
from embedkit.cli.work import Batch, Device, Workers
from embedkit.errors import MismatchError, UsageError

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["add", "compact", "merge", "rm", "verify"]

_NAMED = 5
_NOTHING = "nothing was written; this would be done"

Index = Annotated[Path, typer.Argument(metavar="INDEX", help="Made by `embedkit index`.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Tell what would be done; write nothing.")]
Model = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The index's own model (found beside it).")
]


def add(
    index: Index,
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATHS", help="Pictures, from anywhere, or folders.")
    ],
    label: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Of all of them (the folder each lies in)."),
    ] = None,
    model: Model = None,
    dry_run: DryRun = False,
    device: Device = "auto",
    batch: Batch = 32,
    workers: Workers = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Put single pictures into an index, or back into it after `rm`.

    Those from outside its folder stay in until `rm` takes them out.

    Example: embedkit index add catalog.faiss ./new/shoe.jpg --label shoe
    """
    from embedkit.index.sync import add_files, remembered_dim, remembered_model
    from embedkit.runtime import Embedder

    display = Display(as_json=as_json, quiet=quiet)
    with (
        Embedder.load(model or remembered_model(index) or _no_model(index), device=device) as own,
        ExitStack() as bars,
    ):
        advance: list[Advance] = []

        def progress(done: int, failed: int, total: int) -> None:
            if not advance:
                advance.append(bars.enter_context(display.progress("adding", total)))
            advance[0](done, failed)

        kept = remembered_dim(index)
        report = add_files(
            index,
            paths,
            own.cut(kept) if kept in own.contract.widths else own,
            label=label,
            model=model,
            batch=batch,
            workers=workers,
            dry_run=dry_run,
            progress=progress,
        )
    for path, error in report.failures:
        display.warn(f"{from_here(path)}: {error.reason}; not added")
    display.answer(
        _table(
            [
                ("named", report.found, ""),
                ("embedded", report.embedded, ""),
                ("unchanged", report.unchanged, "in the index already" * bool(report.unchanged)),
                ("moved", report.moved, "copies: not embedded again" * bool(report.moved)),
                ("failed", report.failed, ""),
            ],
            _NOTHING if dry_run else f"index     {from_here(index)}: {report.count:,} pictures",
        )
    )
    display.document(
        "index-add",
        {
            "index": str(index),
            "dry_run": dry_run,
            "named": report.found,
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


def rm(
    index: Index,
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="PATHS", help="Pictures, or folders of them."),
    ] = None,
    label: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Every picture with this label.")
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Take pictures out of an index; their files stay.

    They stay out when the folder is indexed again, until `add` takes them back.

    Example: embedkit index rm catalog.faiss ./catalog/old --label unsold
    """
    from embedkit.index.edit import remove_files

    display = Display(as_json=as_json, quiet=quiet)
    done = remove_files(index, paths or [], label=label, dry_run=dry_run)
    for path in done.files[:_NAMED]:
        display.note("out", from_here(path))
    if len(done.files) > _NAMED:
        display.note("out", f"and {len(done.files) - _NAMED:,} more")
    outside = len(done.files) - done.kept_out
    display.answer(
        _table(
            [
                ("removed", done.pictures, ""),
                ("failed", done.failures, "had failed before" * bool(done.failures)),
                ("kept out", done.kept_out, "of the folder, from now on" * bool(done.kept_out)),
                ("forgotten", outside, "had been added from elsewhere" * bool(outside)),
            ],
            _NOTHING if dry_run else f"index     {from_here(index)}: {done.count:,} pictures",
        )
    )
    display.document(
        "index-rm",
        {
            "index": str(index),
            "dry_run": dry_run,
            "files": [str(path) for path in done.files],
            "removed": done.pictures,
            "failed": done.failures,
            "kept_out": done.kept_out,
            "count": done.count,
        },
    )


def compact(
    index: Index,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Drop what is kept of files that are gone, and shrink the store.

    Needs no model. The index is written again: a damaged one is whole afterwards.

    Example: embedkit index compact catalog.faiss
    """
    from embedkit.index.edit import compact_index

    display = Display(as_json=as_json, quiet=quiet)
    done = compact_index(index, dry_run=dry_run)
    sizes = ""
    if not dry_run:
        store, file = map(_shrunk, (done.store_bytes, done.index_bytes))
        sizes = f"store     {store}\nindex     {file}; {from_here(index)}: {done.count:,} pictures"
    display.answer(
        _table(
            [
                ("kept", done.kept, "files"),
                ("dropped", len(done.dropped), "gone from the disk" * bool(done.dropped)),
            ],
            _NOTHING if dry_run else sizes,
        )
    )
    display.document(
        "index-compact",
        {
            "index": str(index),
            "dry_run": dry_run,
            "kept": done.kept,
            "dropped": [str(path) for path in done.dropped],
            "count": done.count,
            "store_bytes": list(done.store_bytes),
            "index_bytes": list(done.index_bytes),
        },
    )


def verify(
    index: Index,
    sample: Annotated[
        int,
        typer.Option(
            "--sample", min=0, metavar="N", help="Embed N pictures again and compare (0: none)."
        ),
    ] = 0,
    model: Model = None,
    device: Device = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Prove an index whole: checksums, vectors, store.

    Ends with exit 5 and the line that repairs it where it is not.

    Example: embedkit index verify catalog.faiss --sample 100
    """
    from embedkit.index.verify import verify_index

    display = Display(as_json=as_json, quiet=quiet)
    result = verify_index(index, sample=sample, model=model, device=device)
    display.answer(_checks(result.checks))
    display.document(
        "index-verify",
        {
            "index": str(index),
            "ok": result.ok,
            "checks": [
                {"name": check.name, "ok": check.ok, "facts": check.facts}
                for check in result.checks
            ],
            "repair": result.repair,
        },
    )
    if not result.ok:
        bad = [check for check in result.checks if not check.ok]
        raise MismatchError(
            f"{index} is not whole",
            facts="\n".join(f"{check.name}: {check.facts}" for check in bad),
            hint=result.repair,
        )


def merge(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new index.")],
    indexes: Annotated[
        list[Path], typer.Argument(metavar="INDEX", help="Shards, made by the same model.")
    ],
    dry_run: DryRun = False,
    type_: Type = None,
    recall: Recall = None,
    memory: Memory = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make one index of several; nothing is embedded again.

    It is of the first one's kind, unless an option names another. With --type
    ivf-disk it is built and searched on the disk, however many they are.
    Killed, run it again.

    Example: embedkit index merge all.faiss shard*.faiss --type ivf-disk
    """
    from embedkit.index import Catalog
    from embedkit.index.merge import merge_indexes

    display = Display(as_json=as_json, quiet=quiet)
    wanted = wanted_kind(type_, recall, memory)
    with Bars(display) as bar:
        done = merge_indexes(out, indexes, wanted=wanted, dry_run=dry_run, building=bar.building)
    kind = None if dry_run else Catalog.open(out, mmap=True).choice
    for reason in kind.tried if kind else ():
        display.note("tried", reason)
    lines: list[tuple[str, int, str]] = [
        ("shard", count, from_here(shard)) for shard, count in zip(indexes, done.parts, strict=True)
    ]
    remark = "files that an earlier shard has" * bool(done.duplicates)
    if done.differing:
        remark += f", {done.differing:,} of them with other content"
    lines += [
        ("twice", done.duplicates, remark),
        ("failed", done.failures, "remembered as no usable pictures" * bool(done.failures)),
        ("merged", done.count, f"below {from_here(done.root)}"),
    ]
    written = f"index     {from_here(out)}" + (kind_lines(kind) if kind else "")
    display.answer(_table(lines, _NOTHING if dry_run else written))
    display.document(
        "index-merge",
        {
            "index": str(out),
            "dry_run": dry_run,
            "parts": dict(zip(map(str, indexes), done.parts, strict=True)),
            "duplicates": done.duplicates,
            "differing": done.differing,
            "failed": done.failures,
            "count": done.count,
            "root": str(done.root),
            "kind": kind.to_json() if kind else None,
        },
    )


def _no_model(index: Path) -> Path:
    """Called where the index's model is not found: tells what is wrong with which."""
    from embedkit.index import Catalog
    from embedkit.index.sync import known_run

    known_run(index)
    if index.exists():
        Catalog.open(index, mmap=True)
    raise UsageError(
        f"the model of {index.name} is not to be found",
        hint="put the model's file beside the index, or name it: --model FILE",
    )


def _table(lines: list[tuple[str, int, str]], last: str) -> Text:
    from rich.text import Text

    text = Text()
    for name, count, remark in lines:
        text.append(f"{name:<9} ", style="bold")
        text.append(f"{count:>9,}")
        text.append(f"  {remark}\n" if remark else "\n", style="dim")
    text.append(last)
    return text


def _checks(checks: list[Any]) -> Text:
    from rich.text import Text

    text = Text()
    for check in checks:
        text.append(f"{check.name:<9} ", style="bold")
        text.append("ok   " if check.ok else "BAD  ", style="green" if check.ok else "bold red")
        text.append(f"{check.facts}\n")
    text.rstrip()
    return text


def _shrunk(lengths: tuple[int, int]) -> str:
    before, after = lengths
    return f"{before / 1e3:,.0f} kB -> {after / 1e3:,.0f} kB"
