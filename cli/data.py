"""`embedkit data prepare cub ./cub`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from embedkit.cli.display import AsJson, Display, Quiet, Verbose
from embedkit.errors import UnknownNameError

__all__ = ["data"]

_OUTPUT = "Output"


def data(
    task: Annotated[str, typer.Argument(metavar="prepare", help="The only task so far.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="cub, cars, sop, inshop or inat.")],
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="FOLDER", help="Where it goes, or lies already (./data/NAME)."),
    ] = None,
    strict_counts: Annotated[
        bool, typer.Option("--strict-counts", help="Refuse counts other than the papers'.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Fetch a benchmark set from its official address for train.

    Example: embedkit data prepare cub ./data/cub
    """
    from embedkit.cli.index import from_here
    from embedkit.data.prepare import downloads, prepare

    if task != "prepare":
        raise UnknownNameError("task", task, ["prepare"])
    display = Display(as_json=as_json, quiet=quiet)
    folder = folder or Path("data") / name
    told: set[str] = set()

    def progress(file: str, done: int, total: int | None) -> None:
        if file not in told:
            told.add(file)
            display.note("file", file + (f", {total / 1e6:,.0f} MB" if total else ""))

    for file in downloads(name):
        display.note("source", file.url or file.page)
    protocol, manifest = prepare(name, folder, strict=strict_counts, progress=progress)
    photos = protocol.photos
    for sentence in protocol.differences:
        display.warn(f"other counts than in the papers: {sentence}")
    parts = {part: photos.split.count(part) for part in ("train", "test")}
    display.note("data", ", ".join(f"{count:,} {part}" for part, count in parts.items()))
    display.note("next", f"embedkit train {from_here(manifest)}")
    display.answer(from_here(manifest))
    display.document(
        "data",
        {
            "name": name,
            "manifest": from_here(manifest),
            "images": len(photos),
            "classes": len(photos.classes()),
            "splits": parts,
            "differences": list(protocol.differences),
        },
    )
