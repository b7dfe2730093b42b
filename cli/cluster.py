"""`embedkit cluster catalog.faiss`"""

from __future__ import annotations

import csv
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embedkit.cli.display import AsJson, Display, Quiet, Verbose
from embedkit.cli.index import from_here
from embedkit.cli.search import default_index, shown_path
from embedkit.errors import UsageError

if TYPE_CHECKING:
    from rich.text import Text

    from embedkit.index import Catalog
    from embedkit.index.catalog import Indices

__all__ = ["cluster"]

_SHOWN = 10


class Method(StrEnum):
    links = "links"
    kmeans = "kmeans"
    hdbscan = "hdbscan"


def cluster(
    index: Annotated[
        Path | None,
        typer.Argument(metavar="INDEX", help="Made by `embedkit index` (the only one here)."),
    ] = None,
    method: Annotated[
        Method | None,
        typer.Option(help="kmeans where --clusters is given, else links."),
    ] = None,
    clusters: Annotated[
        int | None, typer.Option(metavar="COUNT", min=1, help="kmeans: how many.")
    ] = None,
    min_score: Annotated[
        float | None,
        typer.Option(
            metavar="SCORE",
            help="links: least of a linked pair (match, by the model's thresholds).",
        ),
    ] = None,
    min_size: Annotated[
        int, typer.Option(metavar="COUNT", min=2, help="hdbscan: pictures of the smallest.")
    ] = 5,
    model: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="links: the index's model, for its thresholds."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="The CSV (the index's name + .clusters.csv)."
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Sort an index into clusters, as a CSV: path,cluster.

    Clusters are numbered from 0, the largest first; -1 belongs to none.
    links: over pairs that are alike enough; kmeans: a given number;
    hdbscan: dense places (needs scikit-learn).

    Example: embedkit cluster catalog.faiss --clusters 50 -o clusters.csv
    """
    from embedkit.index import Catalog
    from embedkit.index.cluster import (
        ALONE,
        cluster_by_density,
        cluster_by_links,
        cluster_by_means,
    )

    display = Display(as_json=as_json, quiet=quiet)
    method = method or (Method.links if clusters is None else Method.kmeans)
    file = index or default_index()
    if (method is Method.kmeans) != (clusters is not None):
        raise UsageError(
            "--clusters belongs to kmeans, which needs it", hint="embedkit cluster --clusters 50"
        )
    catalog = Catalog.open(file)
    least: float | None = None
    if method is Method.links:
        least = _match(catalog, model) if min_score is None else min_score
        with display.progress("comparing", len(catalog)) as advance:
            found = cluster_by_links(catalog, least, progress=lambda rows: advance(rows, 0))
    elif clusters is not None:
        found = cluster_by_means(catalog, clusters)
    else:
        found = cluster_by_density(catalog, min_size)
    output = output or file.with_name(file.name + ".clusters.csv")
    _write(output, catalog, found)
    display.answer(_summary(catalog, found, ALONE))
    display.note("saved", from_here(output))
    numbers = found.tolist()
    display.document(
        "cluster",
        {
            "index": from_here(catalog.path),
            "method": str(method),
            "min_score": least,
            "pictures": len(numbers),
            "clusters": max(numbers, default=-1) + 1,
            "alone": numbers.count(ALONE),
            "sizes": [numbers.count(one) for one in range(max(numbers, default=-1) + 1)],
            "csv": from_here(output),
        },
    )


def _match(catalog: Catalog, model: Path | None) -> float:
    """The score from which two pictures are called the same by the catalog's model."""
    from embedkit.index.threshold import Thresholds
    from embedkit.runtime import read_contract

    file = model or catalog.find_model()
    thresholds = None
    if file is not None:
        contract = read_contract(file)
        catalog.check_model(contract)
        thresholds = Thresholds.for_search(contract)
    if thresholds is None:
        raise UsageError(
            "from which score on do two pictures belong together?",
            facts="the index's model is not here"
            if file is None
            else f"the model {file} carries no thresholds",
            hint="--min-score 0.8, or --clusters 50",
        )
    return thresholds.match


def _write(output: Path, catalog: Catalog, found: Indices) -> None:
    """Paths as they are in the folder of the index, so that the file can be joined with others."""
    from embedkit.atomic import published

    with (
        published(output) as temporary,
        temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["path", "cluster"])
        for position, number in enumerate(found.tolist()):
            path = catalog.hit(position).path
            rows.writerow([f"picture {position}" if path is None else from_here(path), number])


def _summary(catalog: Catalog, found: Indices, alone: int) -> Text:
    """The largest clusters, each with its size and its first picture."""
    import numpy as np
    from rich.text import Text

    inside = found[found != alone]
    count = int(inside.max(initial=-1)) + 1
    text = Text(f"{count:,} clusters", style="bold")
    text.append(
        f"  {len(inside):,} of {len(found):,} pictures, {len(found) - len(inside):,} in none",
        style="not bold",
    )
    for number in range(min(count, _SHOWN)):
        members = np.flatnonzero(found == number)
        first = catalog.hit(int(members[0]))
        text.append(f"\n{number:>4}  {len(members):>8,}  ", style="not bold dim")
        text.append(shown_path(first.path, first.id), style="not bold")
    if count > _SHOWN:
        text.append(f"\n      and {count - _SHOWN:,} smaller ones", style="not bold dim")
    return text
