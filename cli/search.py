"""`embedkit search ./query.jpg --index catalog.faiss`"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from embedkit.cli.display import AsJson, Display, Quiet, Verbose, printable
from embedkit.cli.index import from_here
from embedkit.errors import DataError, EmbedKitError, ImageError, UsageError

if TYPE_CHECKING:
    from rich.text import Text

    from embedkit.index import Catalog, Hit

__all__ = ["search"]

_OUTPUT, _WORK = "Output", "Work"
_LABEL_WIDTH = 24


class _Query(NamedTuple):
    path: Path
    below: Path | None  # the folder it was found in, where a folder was given


def search(
    query: Annotated[
        list[Path],
        typer.Argument(metavar="QUERY", help="Pictures to look for, or folders of them."),
    ],
    index: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Made by `embedkit index` (the only .faiss file here)."),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Hits per query.")] = 10,
    model: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The index's model (found beside it, or where it was)."),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", rich_help_panel=_OUTPUT, help="Also a page with the pictures."
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(rich_help_panel=_WORK, help="auto, cpu, cuda or cuda:N.")
    ] = "auto",
    mmap: Annotated[
        bool,
        typer.Option(
            "--mmap",
            rich_help_panel=_WORK,
            help="Map a large index instead of reading and verifying all of it.",
        ),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Find the pictures of an index that look most like QUERY.

    Example: embedkit search ./query.jpg --index catalog.faiss --html hits.html
    """
    import numpy as np

    from embedkit.index import Catalog

    started = time.monotonic()
    display = Display(as_json=as_json, quiet=quiet)
    failed: list[tuple[Path, ImageError]] = []
    queries = _expand(query, failed)
    catalog = Catalog.open(index or _default_index(), mmap=mmap, verify=not mmap)
    if not catalog.has_names:
        display.warn(
            f"{catalog.path.name} was rewritten by another program: hits are numbers without names"
        )
    found: list[_Query] = []
    vectors: list[Any] = []
    with catalog.embedder(model, device=device) as embedder:
        contract = embedder.contract
        with display.progress("queries", len(queries)) as advance:
            results = embedder.embed_files(one.path for one in queries)
            for one, result in zip(queries, results, strict=True):
                if result.error is not None:
                    failed.append((one.path, result.error))
                else:
                    found.append(one)
                    vectors.append(result.vector)
                advance(1, int(result.error is not None))
    if not found:
        raise _nothing_to_look_for(failed)
    hits = catalog.search(np.stack(vectors), k)
    milliseconds = round(1000 * (time.monotonic() - started), 1)
    for path, error in failed:
        display.warn(f"{path}: {error.reason}; skipped")
    for one, list_of_hits in zip(found, hits, strict=True):
        display.answer(_table(one.path, list_of_hits))
    if html is not None:
        _write_page(html, catalog, found, hits)
        display.note("page", from_here(html))
    display.document(
        "search",
        {
            "model": {"name": contract.name, "fingerprint": contract.fingerprint},
            "index": {
                "path": from_here(catalog.path),
                "count": len(catalog),
                "dim": catalog.dim,
                "metric": catalog.metric,
                "root": None if catalog.root is None else from_here(catalog.root),
            },
            "elapsed_ms": milliseconds,
            "results": [
                {"query": str(one.path), "hits": [_hit(hit) for hit in list_of_hits]}
                for one, list_of_hits in zip(found, hits, strict=True)
            ],
            "failed": [
                {"path": str(path), "code": error.code, "reason": error.reason}
                for path, error in failed
            ],
        },
    )
    if failed:
        raise typer.Exit(3)


def _expand(given: list[Path], failed: list[tuple[Path, ImageError]]) -> list[_Query]:
    """Every picture to look for; a folder stands for all that are in it."""
    from embedkit.imaging import find_images

    queries: list[_Query] = []
    for path in given:
        if not path.is_dir():
            queries.append(_Query(path, None))
            continue
        pictures = list(find_images(path))
        queries += [_Query(picture, path) for picture in pictures]
        if not pictures:
            failed.append((path, ImageError("not-an-image", "the folder holds no picture")))
    if not queries:
        raise _nothing_to_look_for(failed)
    return queries


def _nothing_to_look_for(failed: list[tuple[Path, ImageError]]) -> DataError:
    path, error = failed[0]
    if len(failed) == 1:
        return DataError(
            f"{path} is no picture to look for", facts=error.reason, hint="embedkit search PICTURE"
        )
    return DataError(
        f"none of {len(failed):,} queries is a usable picture",
        facts=f"the first: {path}: {error.reason}",
        hint="embedkit search PICTURE",
    )


def _default_index() -> Path:
    here = sorted(Path().glob("*.faiss"))
    if len(here) == 1:
        return here[0]
    raise UsageError(
        "which index?",
        facts=f"several are here: {', '.join(map(str, here))}"
        if here
        else "there is no .faiss file here",
        hint="--index FILE" if here else "embedkit index FOLDER makes one",
    )


def _hit(hit: Hit) -> dict[str, Any]:
    return {
        "rank": hit.rank,
        "score": round(hit.score, 6),
        "id": hit.id,
        "path": None if hit.path is None else from_here(hit.path),
        "label": hit.label,
    }


def _table(query: Path, hits: list[Hit]) -> Text:
    from rich.text import Text

    width = min(_LABEL_WIDTH, max((len(_line(hit.label)) for hit in hits), default=0))
    text = Text(_line(str(query)), style="bold")
    for hit in hits:
        name = f"picture {hit.id}" if hit.path is None else _line(from_here(hit.path))
        label = _line(hit.label)
        label = label if len(label) <= width else label[: width - 1] + "…"
        text.append(f"\n{hit.rank:>4}  ", style="not bold dim")
        text.append(f"{hit.score:7.4f}  ", style="not bold")
        text.append(f"{label:<{width}}  " if width else "", style="not bold cyan")
        text.append(name, style="not bold")
    return text


def _line(text: str) -> str:
    return printable(text).replace("\n", "\\n")


def _write_page(file: Path, catalog: Catalog, queries: list[_Query], hits: list[list[Hit]]) -> None:
    from embedkit.report import Picture, SheetRow, contact_sheet

    rows = (
        SheetRow(
            Picture(one.path, str(one.path), _label(one, catalog)),
            [
                Picture(
                    hit.path,
                    f"picture {hit.id}" if hit.path is None else from_here(hit.path),
                    hit.label,
                    hit.score,
                )
                for hit in list_of_hits
            ],
        )
        for one, list_of_hits in zip(queries, hits, strict=True)
    )
    count = "1 query" if len(queries) == 1 else f"{len(queries):,} queries"
    model = catalog.contract_summary.get("name", "a model")
    page = contact_sheet(
        rows,
        title=f"{catalog.path.stem}: {count}",
        subtitle=f"{len(catalog):,} pictures in {catalog.path.name}, embedded by {model}",
    )
    try:
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise EmbedKitError(f"the page {file} cannot be written", facts=error.strerror) from error


def _label(query: _Query, catalog: Catalog) -> str:
    """The first folder below what was given, or below the catalog's root where it is in there."""
    real = Path(os.path.realpath(query.path))
    root = Path(os.path.realpath(query.below)) if query.below else catalog.root
    if root is None or not real.is_relative_to(root):
        return ""
    parts = real.relative_to(root).parts
    return parts[0] if len(parts) > 1 else ""
