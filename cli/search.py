"""`embedkit search ./query.jpg --index catalog.faiss`"""

from __future__ import annotations

import math
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from embedkit.cli.display import AsJson, Display, Quiet, Verbose, printable
from embedkit.cli.index import from_here
from embedkit.cli.preview import Viewer
from embedkit.cli.rerank_option import read_rerank
from embedkit.cli.work import Backend, Device
from embedkit.errors import DataError, ImageError, UsageError

if TYPE_CHECKING:
    from rich.text import Text

    from embedkit.index import Catalog, Hit
    from embedkit.index.rerank import Expansion, Reciprocal, Reranked
    from embedkit.index.threshold import Thresholds
    from embedkit.report import SheetRow

__all__ = ["default_index", "search", "shown_path"]

_CHOICE, _OUTPUT, _WORK = "Which hits", "Output", "Work"
_LABEL_WIDTH = 24
# Bytes of an index from which on reading and verifying takes longer than the rest of a search.
_LARGE = 64 << 20
# So much larger than what the thresholds were set on: say that strangers come nearer there.
_MUCH_LARGER = 20


class Combine(StrEnum):
    mean = "mean"
    any = "any"


class _Query(NamedTuple):
    path: Path
    below: Path | None  # the folder it was found in, where a folder was given


@dataclass(frozen=True)
class _Answer:
    """One list of hits, and what it answers: one query, or several together."""

    name: str
    queries: list[_Query]
    hits: list[Reranked]
    thresholds: Thresholds | None

    def verdict(self, score: float) -> str | None:
        return self.thresholds.verdict(score) if self.thresholds else None

    @property
    def best(self) -> str | None:
        """The best verdict of any hit; None where the model gives none."""
        if self.thresholds is None:
            return None
        return self.thresholds.verdict(max((one.hit.score for one in self.hits), default=-math.inf))

    @property
    def found(self) -> bool:
        return bool(self.hits) and self.best != "none"


def search(
    query: Annotated[
        list[Path],
        typer.Argument(metavar="QUERY", help="Pictures, folders of them; - reads paths."),
    ],
    index: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Made by `embedkit index` (the only .faiss file here)."),
    ] = None,
    k: Annotated[int, typer.Option("-k", metavar="COUNT", min=1, help="Hits per query.")] = 10,
    model: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="The index's model (found beside it, or where it was)."),
    ] = None,
    combine: Annotated[
        Combine | None,
        typer.Option(
            rich_help_panel=_CHOICE, help="All queries as one: their mean, or the best of any."
        ),
    ] = None,
    group_by: Annotated[
        str | None,
        typer.Option(
            metavar="label", rich_help_panel=_CHOICE, help="The best hit of each of -k labels."
        ),
    ] = None,
    filter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="label=NAME", rich_help_panel=_CHOICE, help="Only these; may be repeated."
        ),
    ] = None,
    min_score: Annotated[
        str | None,
        typer.Option(
            metavar="SCORE",
            rich_help_panel=_CHOICE,
            help="Leave out lower ones; auto: whose verdict is none.",
        ),
    ] = None,
    fail_if_none: Annotated[
        bool,
        typer.Option(
            "--fail-if-none", rich_help_panel=_CHOICE, help="Exit 1 where nothing was found."
        ),
    ] = False,
    rerank: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            rich_help_panel=_CHOICE,
            help="Order again: aqe[:k=10,alpha=3] or "
            "kreciprocal[:depth=100, k1=20,k2=6,lambda=0.3].",
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", rich_help_panel=_OUTPUT, help="Also a page with the pictures."
        ),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", rich_help_panel=_OUTPUT, help="The same as one picture (.png)."
        ),
    ] = None,
    preview: Annotated[
        bool,
        typer.Option(
            "--preview", rich_help_panel=_OUTPUT, help="Show the pictures in the terminal."
        ),
    ] = False,
    device: Device = "auto",
    backend: Backend = "auto",
    mmap: Annotated[
        bool | None,
        typer.Option(
            "--mmap/--read",
            rich_help_panel=_WORK,
            show_default=False,
            help="Map the index, or read and verify all of it (maps from 64 MB).",
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Find the pictures of an index that look most like QUERY.

    A calibrated model says of each hit: match, unsure or none.

    Several --index (one folder, several models) give the mean of their scores.

    Example: embedkit search ./query.jpg --index catalog.faiss --html hits.html
    """
    started = time.monotonic()
    display = Display(as_json=as_json, quiet=quiet)
    if png is not None and png.suffix.lower() != ".png":
        raise UsageError("--png takes a file that ends in .png", hint="--png hits.png")
    viewer = Viewer.find(display) if preview else None
    files = index or [default_index()]
    models = _one_each(model, files)
    least, labels, method = _least(min_score), _labels(filter), _rerank(rerank)
    _check_together(len(files), combine, group_by, labels, rerank)
    failed: list[tuple[Path, ImageError]] = []
    queries = _expand(query, failed)
    catalogs = [_open(file, mmap) for file in files]
    for catalog in catalogs:
        if not catalog.has_names:
            display.warn(
                f"{catalog.path.name} was rewritten by another program: hits are numbers "
                "without names"
            )
    with ExitStack() as stack:
        embedders = [
            stack.enter_context(catalog.embedder(file, device=device, backend=backend))
            for catalog, file in zip(catalogs, models, strict=True)
        ]
        contract = embedders[0].contract
        for catalog, embedder in zip(catalogs, embedders, strict=True):
            if catalog.has_names and embedder.contract.fingerprint != catalog.fingerprint:
                display.warn(
                    f"{catalog.path.name} is still of another model: searched over the bridge that "
                    "embedkit index migrate measured"
                )
        thresholds = _thresholds(embedders, catalogs[0], least, display)
        found, vectors = _embed(queries, embedders, failed, display)
    if not found:
        raise _nothing_to_look_for(failed)
    lists = _search(catalogs, vectors, k, combine, bool(group_by), labels, method, display)
    if least == "auto" and thresholds:
        least = thresholds.unsure
    if isinstance(least, float):
        lists = [[one for one in hits if one.hit.score >= least] for hits in lists]
    answers = _named(found, combine, lists, thresholds)
    milliseconds = round(1000 * (time.monotonic() - started), 1)
    for path, error in failed:
        display.warn(f"{path}: {error.reason}; skipped")
    for answer in answers:
        display.answer(_table(answer, least))
        if viewer is not None:
            viewer.show(_row(answer, catalogs[0]))
    if html is not None:
        _write_page(html, catalogs[0], answers)
        display.note("page", from_here(html))
    if png is not None:
        _write_picture(png, catalogs[0], answers)
        display.note("picture", from_here(png))
    display.document(
        "search",
        {
            "model": {"name": contract.name, "fingerprint": contract.fingerprint},
            "index": _index_json(catalogs[0]),
            "indexes": [from_here(catalog.path) for catalog in catalogs],
            "thresholds": None
            if thresholds is None
            else {"match": thresholds.match, "unsure": thresholds.unsure},
            "min_score": least,
            "rerank": rerank,
            "elapsed_ms": milliseconds,
            "results": [_answer_json(answer, reranked=method is not None) for answer in answers],
            "failed": [
                {"path": str(path), "code": error.code, "reason": error.reason}
                for path, error in failed
            ],
        },
    )
    if fail_if_none and not any(answer.found for answer in answers):
        raise typer.Exit(1)
    if failed:
        raise typer.Exit(3)


# --- what was typed ------------------------------------------------------------------------------


def default_index() -> Path:
    """The only index in the current folder."""
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


def _open(file: Path, mmap: bool | None) -> Catalog:
    """Small ones are verified, which nobody notices; large ones are searched at once."""
    from embedkit.index import Catalog

    if mmap is None:
        mmap = file.is_file() and file.stat().st_size >= _LARGE
    return Catalog.open(file, mmap=mmap, verify=not mmap)


def _one_each(models: list[Path] | None, files: list[Path]) -> list[Path | None]:
    if models is None:
        return [None] * len(files)
    if len(models) != len(files):
        raise UsageError(
            "each index has its own model",
            facts=f"{len(files)} --index and {len(models)} --model were given",
            hint="--index a.faiss --model a.onnx --index b.faiss --model b.onnx",
        )
    return list(models)


def _least(text: str | None) -> float | str | None:
    if text is None or text == "auto":
        return text
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise UsageError(
            f"--min-score takes a number or auto, got {text!r}", hint="--min-score 0.6"
        )
    return number


def _labels(given: list[str] | None) -> list[str]:
    labels = []
    for text in given or []:
        name, equals, label = text.partition("=")
        if name != "label" or not equals:
            raise UsageError(f"--filter takes label=NAME, got {text!r}", hint="--filter label=shoe")
        labels.append(label)
    return labels


def _rerank(text: str | None) -> Expansion | Reciprocal | None:
    """``aqe``, ``kreciprocal:k1=10``, ..."""
    if text is None:
        return None
    from embedkit.index.rerank import Expansion, Reciprocal

    name, values = read_rerank(text)
    if name == "aqe":
        return Expansion(neighbours=int(values["k"]), alpha=values["alpha"])
    depth, k1, k2 = (int(values[key]) for key in ("depth", "k1", "k2"))
    return Reciprocal(depth, k1, k2, weight=values["lambda"])


def _check_together(
    indexes: int,
    combine: Combine | None,
    group_by: str | None,
    labels: list[str],
    rerank: str | None,
) -> None:
    if group_by not in (None, "label"):
        raise UsageError(f"--group-by takes label, got {group_by!r}", hint="--group-by label")
    if combine is Combine.any and rerank:
        raise UsageError(
            "--combine any and --rerank do not go together",
            facts="what re-ranked lists are ordered by cannot be compared between queries",
            hint="--combine mean",
        )
    if indexes > 1 and (rerank or labels):
        raise UsageError(
            "--rerank and --filter work on one index",
            facts=f"{indexes} were given, to be searched by the mean of their scores",
        )


def _expand(given: list[Path], failed: list[tuple[Path, ImageError]]) -> list[_Query]:
    """Every picture to look for; a folder stands for all in it, ``-`` for the paths on stdin."""
    from embedkit.imaging import find_images

    queries: list[_Query] = []
    for path in [one for name in given for one in (_from_stdin() if name == Path("-") else [name])]:
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


def _from_stdin() -> list[Path]:
    """One path a line; where there are zero bytes (`find -print0`) they part the paths."""
    data = sys.stdin.buffer.read()
    parts = data.split(b"\0") if b"\0" in data else data.splitlines()
    paths = [Path(os.fsdecode(part)) for part in parts if part]
    if not paths:
        raise UsageError("there are no paths on stdin", hint="ls *.jpg | embedkit search -")
    return paths


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


# --- the work ------------------------------------------------------------------------------------


def _thresholds(
    embedders: list[Any], catalog: Catalog, least: float | str | None, display: Display
) -> Thresholds | None:
    """Those of the model; none for a mean of several models."""
    from embedkit.index.threshold import Thresholds

    if len(embedders) > 1:
        if least == "auto":
            raise UsageError(
                "--min-score auto works with one index",
                facts="the mean score of several models has no thresholds",
                hint="--min-score NUMBER",
            )
        return None
    contract = embedders[0].contract
    thresholds = Thresholds.for_search(contract)
    if thresholds is None and least == "auto":
        raise UsageError(
            f"the model {contract.name!r} carries no thresholds",
            facts="embedkit export sets them where there are 100 held-out photos or more, of two "
            "classes or more",
            hint="embedkit export RUN, then --model with the new file (the index stays);\n"
            "or give a number: --min-score 0.6",
        )
    if thresholds and thresholds.queries and len(catalog) > _MUCH_LARGER * thresholds.queries:
        display.note(
            "verdicts",
            f"set among {thresholds.queries:,} pictures; strangers come nearer among "
            f"{len(catalog):,}",
        )
    return thresholds


def _embed(
    queries: list[_Query],
    embedders: list[Any],
    failed: list[tuple[Path, ImageError]],
    display: Display,
) -> tuple[list[_Query], list[Any]]:
    """The queries that can be read, and for each model their vectors ``(Q, D)``."""
    import numpy as np

    columns: list[list[Any]] = [[] for _ in embedders]
    found: list[_Query] = []
    with display.progress("queries", len(queries)) as advance:
        streams = [one.embed_files(query.path for query in queries) for one in embedders]
        for query, *results in zip(queries, *streams, strict=True):
            error = next((one.error for one in results if one.error is not None), None)
            if error is not None:
                failed.append((query.path, error))
            else:
                found.append(query)
                for column, one in zip(columns, results, strict=True):
                    column.append(one.vector)
            advance(1, int(error is not None))
    return found, [np.stack(column) for column in columns] if found else []


def _search(
    catalogs: list[Catalog],
    vectors: list[Any],
    k: int,
    combine: Combine | None,
    by_label: bool,
    labels: list[str],
    method: Expansion | Reciprocal | None,
    display: Display,
) -> list[list[Reranked]]:
    """One list for each query, or one for all of them together."""
    from embedkit.index.answer import best_of_any, grouped, labelled, mean_query, plain
    from embedkit.index.fuse import Fusion
    from embedkit.index.rerank import Reranked
    from embedkit.index.several import needs_one_vector

    if combine is Combine.mean:
        for one in catalogs:
            needs_one_vector("--combine mean", one)
        vectors = [
            mean_query(rows, one.metric) for rows, one in zip(vectors, catalogs, strict=True)
        ]
    if len(catalogs) == 1:
        among = labelled(catalogs[0], labels) if labels else None
        find = plain(catalogs[0], vectors[0], among, method)
        most = len(catalogs[0]) if among is None else len(among)
    else:
        fusion = Fusion(catalogs)
        if fusion.left_out:
            display.warn(f"{fusion.left_out:,} pictures are not in every index: left out")
        most = fusion.shared

        def find(count: int) -> list[list[Reranked]]:
            return [
                [Reranked(hit, hit.score) for hit in hits] for hits in fusion.search(vectors, count)
            ]

    lists = grouped(find, k, most) if by_label else find(k)
    return [best_of_any(lists, k, by_label=by_label)] if combine is Combine.any else lists


def _named(
    found: list[_Query],
    combine: Combine | None,
    lists: list[list[Reranked]],
    thresholds: Thresholds | None,
) -> list[_Answer]:
    if combine is None:
        return [
            _Answer(str(one.path), [one], hits, thresholds)
            for one, hits in zip(found, lists, strict=True)
        ]
    how = "the mean" if combine is Combine.mean else "any"
    name = f"{how} of {len(found):,} queries" if len(found) > 1 else str(found[0].path)
    return [_Answer(name, found, lists[0], thresholds)]


# --- answers -------------------------------------------------------------------------------------


def _index_json(catalog: Catalog) -> dict[str, Any]:
    return {
        "path": from_here(catalog.path),
        "count": len(catalog),
        "dim": catalog.dim,
        "metric": catalog.metric,
        "root": None if catalog.root is None else from_here(catalog.root),
    }


def _answer_json(answer: _Answer, *, reranked: bool) -> dict[str, Any]:
    def hit(one: Reranked) -> dict[str, Any]:
        about = {
            "rank": one.hit.rank,
            "score": round(one.hit.score, 6),
            "verdict": answer.verdict(one.hit.score),
            "id": one.hit.id,
            "path": None if one.hit.path is None else from_here(one.hit.path),
            "label": one.hit.label,
        }
        return about | ({"rerank_value": round(one.value, 6)} if reranked else {})

    return {
        "query": answer.name,
        "queries": [str(query.path) for query in answer.queries],
        "verdict": answer.best,
        "hits": [hit(one) for one in answer.hits],
    }


def _table(answer: _Answer, least: float | str | None) -> Text:
    from rich.text import Text

    hits = [one.hit for one in answer.hits]
    width = min(_LABEL_WIDTH, max((len(_line(hit.label)) for hit in hits), default=0))
    text = Text(_line(answer.name), style="bold")
    if answer.best is not None:
        text.append(f"  {answer.best}", style=_COLOURS[answer.best])
    if not hits:
        reason = f"nothing scores {least:.4f} or more" if isinstance(least, float) else "nothing"
        text.append(f"\n      {reason}", style="not bold dim")
    for hit in hits:
        name = shown_path(hit.path, hit.id)
        label = _line(hit.label)
        label = label if len(label) <= width else label[: width - 1] + "…"
        text.append(f"\n{hit.rank:>4}  ", style="not bold dim")
        text.append(f"{hit.score:7.4f}  ", style="not bold")
        verdict = answer.verdict(hit.score)
        if verdict is not None:
            text.append(f"{verdict:<6}  ", style=f"not bold {_COLOURS[verdict]}")
        text.append(f"{label:<{width}}  " if width else "", style="not bold cyan")
        text.append(name, style="not bold")
    return text


_COLOURS = {"match": "green", "unsure": "yellow", "none": "dim"}


def shown_path(path: Path | None, number: int) -> str:
    """A picture's name on one line: its path from here, or its number where names are gone."""
    return f"picture {number}" if path is None else _line(from_here(path))


def _line(text: str) -> str:
    return printable(text).replace("\n", "\\n")


def _write_page(file: Path, catalog: Catalog, answers: list[_Answer]) -> None:
    from embedkit.atomic import published
    from embedkit.report import contact_sheet

    rows = (_row(answer, catalog) for answer in answers)
    page = contact_sheet(rows, title=_title(catalog, answers), subtitle=_subtitle(catalog))
    with published(file) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _write_picture(file: Path, catalog: Catalog, answers: list[_Answer]) -> None:
    from embedkit.atomic import published
    from embedkit.report import contact_picture

    rows = [_row(answer, catalog) for answer in answers]
    image = contact_picture(rows, title=_title(catalog, answers), subtitle=_subtitle(catalog))
    with published(file) as temporary:
        image.save(temporary, "PNG")


def _row(answer: _Answer, catalog: Catalog) -> SheetRow:
    """An answer as the contact sheets show it."""
    from embedkit.report import Picture, SheetRow

    def shown(hit: Hit) -> Picture:
        name = f"picture {hit.id}" if hit.path is None else from_here(hit.path)
        return Picture(hit.path, name, hit.label, hit.score, answer.verdict(hit.score) or "")

    first = answer.queries[0]
    query = Picture(first.path, answer.name, _label(first, catalog), verdict=answer.best or "")
    return SheetRow(query, [shown(one.hit) for one in answer.hits])


def _title(catalog: Catalog, answers: list[_Answer]) -> str:
    total = sum(len(answer.queries) for answer in answers)
    return f"{catalog.path.stem}: {'1 query' if total == 1 else f'{total:,} queries'}"


def _subtitle(catalog: Catalog) -> str:
    model = catalog.contract_summary.get("name", "a model")
    return f"{len(catalog):,} pictures in {catalog.path.name}, embedded by {model}"


def _label(query: _Query, catalog: Catalog) -> str:
    """The first folder below what was given, or below the catalog's root where it is in there."""
    real = Path(os.path.realpath(query.path))
    root = Path(os.path.realpath(query.below)) if query.below else catalog.root
    if root is None or not real.is_relative_to(root):
        return ""
    parts = real.relative_to(root).parts
    return parts[0] if len(parts) > 1 else ""
