"""`embedkit atlas catalog.faiss`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedkit.cli.display import AsJson, Display, Quiet, Verbose
from embedkit.cli.index import from_here
from embedkit.cli.search import default_index
from embedkit.errors import DataError, UsageError

if TYPE_CHECKING:
    from embedkit.index.catalog import Catalog, Hit, Indices

__all__ = ["atlas"]

_MEGABYTE = 1_000_000


def atlas(
    index: Annotated[
        Path | None,
        typer.Argument(metavar="INDEX", help="Made by `embedkit index` (the only one here)."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The page (INDEX as .atlas.html)."),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also a still picture of the map.")
    ] = None,
    thumbnails: Annotated[
        int,
        typer.Option(metavar="MB", min=0, help="Most that all thumbnails take; 0: none."),
    ] = 20,
    limit: Annotated[
        int,
        typer.Option(metavar="COUNT", min=1, help="Of more pictures, this many evenly chosen."),
    ] = 50_000,
    seed: Annotated[int, typer.Option(metavar="SEED", min=0, help="Of the map's layout.")] = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Draw a map of an index to look around in, as one page.

    Pictures that are alike stand together. The page opens offline: hover or
    tap to see, lasso or search to list files, click a label to see it alone.
    Thumbnails are as large as --thumbnails lets them be: 96 to 32 pixels.

    Example: embedkit atlas catalog.faiss -o atlas.html --png atlas.png
    """
    import numpy as np

    from embedkit.index import Catalog
    from embedkit.index.several import needs_one_vector
    from embedkit.report.atlas import atlas_page, atlas_picture
    from embedkit.report.atlas_layout import lay_out
    from embedkit.report.sprites import make_sprites

    if png is not None and png.suffix.lower() != ".png":
        raise UsageError("--png takes a file that ends in .png", hint="--png atlas.png")
    display = Display(as_json=as_json, quiet=quiet)
    file = index or default_index()
    output = output or file.with_suffix(".atlas.html")
    catalog = Catalog.open(file)
    if not len(catalog):
        raise DataError(f"{file.name} holds no pictures", hint="embedkit index FOLDER")
    needs_one_vector("an atlas", catalog)
    shown = np.linspace(0, len(catalog) - 1, min(limit, len(catalog))).round().astype(np.int64)
    display.note("index", f"{from_here(catalog.path)}: {len(catalog):,} pictures")
    if len(shown) < len(catalog):
        display.note("shown", f"{len(shown):,} of them, evenly chosen; --limit changes that")
    display.note("layout", "half a minute for 50,000 pictures; the first time a minute more")
    points = lay_out(catalog.vectors(shown), seed=seed)
    hits = _hits(catalog, shown)
    with display.progress("pictures", len(hits) if thumbnails else 0) as advance:
        sprites = make_sprites([hit.path for hit in hits], thumbnails * _MEGABYTE, progress=advance)
    display.warn_of(
        [f"{_name(hits[at])}: {error.reason}; no thumbnail" for at, error in sprites.failed],
        "without a thumbnail",
    )
    with_thumbnail = int((sprites.places >= 0).sum())
    title, labels = f"Atlas of {catalog.path.stem}", [hit.label for hit in hits]
    page = atlas_page(
        points,
        [_name(hit) for hit in hits],
        labels,
        sprites,
        title=title,
        subtitle=_subtitle(catalog, len(hits), with_thumbnail),
    )
    size = _write(output, page.encode("utf-8"))
    display.note("page", f"{from_here(output)}, {size / _MEGABYTE:.1f} MB")
    if png is not None:
        _write_picture(png, atlas_picture(points, labels, title=title))
        display.note("picture", from_here(png))
    said = f"{len(hits):,} pictures, {len(set(labels)):,} labels, {with_thumbnail:,} thumbnails"
    if sprites.side:
        said += f" of {sprites.side} pixels"
    display.answer(f"{said}: open {from_here(output)} in a browser")
    display.document(
        "atlas",
        {
            "index": from_here(catalog.path),
            "pictures": len(catalog),
            "shown": len(hits),
            "labels": len(set(labels)),
            "thumbnails": with_thumbnail,
            "thumbnail_side": sprites.side,
            "failed": [
                {"path": _name(hits[at]), "code": error.code, "reason": error.reason}
                for at, error in sprites.failed
            ],
            "page": from_here(output),
            "bytes": size,
            "png": None if png is None else from_here(png),
            "seed": seed,
        },
    )
    if sprites.failed:
        raise typer.Exit(3)


def _hits(catalog: Catalog, positions: Indices) -> list[Hit]:
    return [catalog.hit(at) for at in positions.tolist()]


def _name(hit: Hit) -> str:
    return f"picture {hit.id}" if hit.path is None else from_here(hit.path)


def _subtitle(catalog: Catalog, shown: int, with_thumbnail: int) -> str:
    model = catalog.contract_summary.get("name", "a model")
    some = "" if shown == len(catalog) else f"{shown:,} of "
    lacking = shown - with_thumbnail
    without = f", {lacking:,} without a thumbnail" if lacking else ""
    return f"{some}{len(catalog):,} pictures in {catalog.path.name}, embedded by {model}{without}"


def _write(path: Path, content: bytes) -> int:
    from embedkit.atomic import published

    with published(path) as temporary:
        temporary.write_bytes(content)
    return len(content)


def _write_picture(path: Path, image: Any) -> None:
    from embedkit.atomic import published

    with published(path) as temporary:
        image.save(temporary, "PNG", optimize=True)
