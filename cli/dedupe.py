"""`embedkit dedupe catalog.faiss`"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from embedkit.cli.display import AsJson, Display, Quiet, Verbose
from embedkit.cli.index import from_here
from embedkit.cli.search import default_index, shown_path
from embedkit.cli.work import Device, Dim
from embedkit.errors import DataError, UsageError

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["dedupe"]

# Strict: of 60 grocery photos by the grocery model, 59 stay above it when saved again as JPEG of
# quality 90 and all when enlarged, 11 at quality 75, none at half the size; of 1,309 different
# photos one pair reaches it, 58 reach 0.95. What a model sees as the same is for the user to set.
_LEAST = 0.98


class _Pictures(NamedTuple):
    """What is compared: files (None where the index lost the names) and how to get vectors."""

    files: list[Path | None]
    vectors: Callable[[Any], Any] | None  # row numbers (M,) -> (M, D); None: only content counts
    metric: str
    failed: list[tuple[Path, str]]


class _Member(NamedTuple):
    number: int
    score: float | None  # against the first of the group; None where there are no vectors
    same: bool  # the first one's content


def dedupe(
    source: Annotated[
        Path | None,
        typer.Argument(metavar="SOURCE", help="An index, or a folder (the only index here)."),
    ] = None,
    min_score: Annotated[
        float | None,
        typer.Option(
            metavar="SCORE", show_default=False, help=f"Least of a near-duplicate pair ({_LEAST})."
        ),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Only files of the same content; needs no model.")
    ] = False,
    model: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Of a folder: embed it with this (runs/last)."),
    ] = None,
    device: Device = "auto",
    dim: Dim = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """List pictures that are the same or nearly so, in groups. Nothing is deleted.

    The score is that of `embedkit search`; a group hangs together over such pairs.

    Example: embedkit dedupe catalog.faiss --min-score 0.97
    """
    import numpy as np

    from embedkit.index.duplicates import linked_groups, same_content

    display = Display(as_json=as_json, quiet=quiet)
    source = source or default_index()
    if dim is not None and (exact or not source.is_dir()):
        raise UsageError(
            "--dim is of a model that embeds a folder",
            facts="with --exact none does" if exact else f"{source} has its vectors already",
            hint="leave --dim out",
        )
    if source.is_dir():
        pictures = _of_folder(source, None if exact else _model(model), device, dim, display)
    else:
        pictures = _of_index(source, exact=exact)
    count = len(pictures.files)
    least = None if pictures.vectors is None else _least(min_score, pictures.metric)
    same, gone = same_content(pictures.files)
    with display.progress("comparing", count) as advance:
        roots = linked_groups(
            pictures.vectors,
            count,
            0.0 if least is None else least,
            metric=pictures.metric,
            links=[(np.full(len(one) - 1, one[0]), np.array(one[1:])) for one in same],
            progress=lambda rows: advance(rows, 0),
        )
    groups = _groups(roots.tolist(), same, pictures)
    more = sum(len(group) - 1 for group in groups)
    if gone:
        display.warn(f"{len(gone):,} files are gone: not compared by content")
    for path, reason in pictures.failed:
        display.warn(f"{from_here(path)}: {reason}; skipped")
    for number, group in enumerate(groups, start=1):
        display.answer(_table(number, group, pictures))
    rule = "the same content" + ("" if least is None else f", or score {least:g} or more")
    number_of = "1 group" if len(groups) == 1 else f"{len(groups):,} groups"
    display.answer(f"{count:,} pictures: {number_of} with {more:,} to spare ({rule})")
    display.document(
        "dedupe",
        {
            "pictures": count,
            "min_score": least,
            "metric": pictures.metric,
            "to_spare": more,
            "groups": [
                [
                    {
                        "path": _json_path(pictures.files[one.number]),
                        "score": None if one.score is None else round(one.score, 6),
                        "same_content": one.same,
                    }
                    for one in group
                ]
                for group in groups
            ],
            "gone": [_json_path(pictures.files[number]) for number in gone],
            "failed": [{"path": str(path), "reason": reason} for path, reason in pictures.failed],
        },
    )
    if pictures.failed:
        raise typer.Exit(3)


def _model(given: Path | None) -> Path:
    file = given or Path("runs/last/model.onnx")
    if not file.is_file():
        raise UsageError(
            "which model?" if given is None else f"there is no model {given}",
            facts="near duplicates of a folder are found by their vectors",
            hint="--model FILE; or --exact, which compares content alone",
        )
    return file


def _least(given: float | None, metric: str) -> float:
    if given is None and metric == "l2":
        raise UsageError(
            "which score makes two pictures near duplicates?",
            facts="this index compares by distance, which has another scale for every model",
            hint="--min-score -0.2 (minus the distance), or --exact",
        )
    return _LEAST if given is None else given


def _of_index(file: Path, *, exact: bool) -> _Pictures:
    from embedkit.index import Catalog
    from embedkit.index.learned import needs_vectors
    from embedkit.index.several import needs_one_vector

    catalog = Catalog.open(file)
    if not exact:
        needs_one_vector("dedupe without --exact", catalog)
        needs_vectors("dedupe without --exact", catalog)
    files = [catalog.hit(position).path for position in range(len(catalog))]
    return _Pictures(files, None if exact else catalog.vectors, catalog.metric, [])


def _of_folder(
    folder: Path, model: Path | None, device: str, dim: int | None, display: Display
) -> _Pictures:
    """All pictures below a folder; with a model, those that can be read, and their vectors."""
    import numpy as np

    from embedkit.imaging import find_images
    from embedkit.index.several import refuse_several
    from embedkit.runtime import Embedder

    files = list(find_images(folder))
    if not files:
        raise DataError(f"the folder {folder} holds no picture", hint="embedkit dedupe FOLDER")
    if model is None:
        return _Pictures(list(files), None, "cosine", [])
    good: list[Path | None] = []
    rows: list[Any] = []
    failed: list[tuple[Path, str]] = []
    with (
        Embedder.load(model, device=device, threads=1, dim=dim) as embedder,
        display.progress("embedding", len(files)) as advance,
    ):
        contract = embedder.contract
        refuse_several("dedupe without --exact", contract.name, contract.vectors)
        for one in embedder.embed_files(files):
            if one.error is not None:
                failed.append((one.path, one.error.reason))
            else:
                good.append(one.path)
                rows.append(one.vector)
            advance(1, int(one.error is not None))
        metric, width = contract.metric, embedder.embedding_dim
    vectors = np.stack(rows) if rows else np.empty((0, width), np.float32)
    return _Pictures(good, lambda numbers: vectors[numbers], metric, failed)


def _groups(roots: list[int], same: list[list[int]], pictures: _Pictures) -> list[list[_Member]]:
    """Groups of two or more in order of their first picture, each in order of its pictures."""
    members: dict[int, list[int]] = {}
    for number, root in enumerate(roots):
        members.setdefault(root, []).append(number)
    content = {number: group[0] for group in same for number in group}
    groups = []
    for numbers in members.values():
        if len(numbers) > 1:
            first = content.get(numbers[0], numbers[0])
            groups.append(
                [
                    _Member(number, score, content.get(number, number) == first)
                    for number, score in zip(numbers, _scores(numbers, pictures), strict=True)
                ]
            )
    return groups


def _scores(numbers: list[int], pictures: _Pictures) -> list[float | None]:
    """Each against the first."""
    import numpy as np

    if pictures.vectors is None:
        return [None] * len(numbers)
    rows = pictures.vectors(np.array(numbers)).astype(np.float64)
    by_distance = pictures.metric == "l2"
    scores = -np.linalg.norm(rows - rows[0], axis=1) if by_distance else rows @ rows[0]
    return [float(score) for score in scores]


def _table(number: int, group: list[_Member], pictures: _Pictures) -> Text:
    from rich.text import Text

    text = Text(f"group {number}", style="bold")
    text.append(f"  {len(group):,} pictures", style="not bold dim")
    for at, one in enumerate(group):
        mark = "" if at == 0 else "same" if one.same else f"{one.score:.4f}"
        text.append(f"\n  {mark:>7}  ", style="not bold dim")
        text.append(shown_path(pictures.files[one.number], one.number), style="not bold")
    return text


def _json_path(file: Path | None) -> str | None:
    return None if file is None else from_here(file)
