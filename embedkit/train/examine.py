"""Before a training: which photos can be read, what is wrong with them, and is it worth beginning?

The same looks and sentences as `embedkit check`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from embedkit.data import Checkup, FactCache, PhotoSet, check_photos, gather_facts
from embedkit.data.doctor_judge import Finding
from embedkit.errors import DataError, EmbedKitError, ImageError, MismatchError
from embedkit.methods import learns_from
from embedkit.train.plan import check_data, check_names
from embedkit.train.recipe import Recipe
from embedkit.train.story import Reporter

__all__ = ["brief_check", "examine", "failure_lines", "read_failures"]

_LOOK = "embedkit check DATA --html check.html"
_INSTALL = 'pip install "embedkit[train]"'
# What is true of photos whatever is learned from them; the other findings speak of classes.
_OF_PHOTOS = {"unreadable", "copies", "near-duplicates", "leak", "flat", "small", "long"}

Failures = list[tuple[Path, ImageError]]


def examine(
    recipe: Recipe,
    photos: PhotoSet,
    tell: Reporter,
    *,
    cache: Path | None = None,
    workers: int | None = None,
) -> Checkup:
    """Look at every photo once, warn of what spoils a training, refuse what cannot work.

    Near copies are looked for with imagehash. Where that is not installed, a warning says so, and
    the counts have no number of them.

    Args:
        recipe: What is wrong with classes is no matter to a loss that does not learn from them.
        cache: Looks are taken from this file and added to it, so that a second training, or one
            that was stopped here, decodes nothing twice; None keeps nothing. A file that cannot be
            used is a warning.
        workers: Decoding threads; None: one per core.

    Raises:
        UnknownNameError: As for `make_plan`.
        DataError: Metric learning cannot work on these photos; says why.
    """
    check_names(recipe)
    check_data(recipe, photos)
    near = importlib.util.find_spec("imagehash") is not None
    if not near:
        _warn(tell, "near copies are not looked for: imagehash is missing", _INSTALL)
    with _opened(cache, tell) as kept, tell.progress("checking", len(photos)) as advance:
        facts = gather_facts(
            photos.files(), cache=kept, workers=workers, near=near, progress=advance
        )
    with tell.progress("comparing", len(photos)) as advance:
        checkup = check_photos(photos, facts, progress=advance)
    if not near:
        del checkup.counts["near_duplicates"]
    findings = _relevant(recipe, checkup)
    stops = [finding for finding in findings if finding.level == "stop"]
    if stops or not checkup.counts["readable"]:
        raise DataError(
            "metric learning cannot work on these photos",
            facts="\n".join(finding.what for finding in stops) or "not one of them can be read",
            hint="\n".join([*(finding.advice for finding in stops), _LOOK]),
        )
    warnings = [finding for finding in findings if finding.level == "warn"]
    for finding in warnings:
        _warn(tell, finding.what, finding.advice)
    if warnings:
        tell.note("look", _LOOK)
    return checkup


def brief_check(recipe: Recipe, checkup: Checkup) -> dict[str, Any]:
    """What run.json keeps of a check."""
    findings = _relevant(recipe, checkup)
    return {
        "counts": checkup.counts,
        "findings": [{"code": one.code, "level": one.level, "what": one.what} for one in findings],
    }


def failure_lines(failures: Iterable[tuple[Path, ImageError]]) -> str:
    """The lines of failed.jsonl; an empty text when there are none."""
    return "".join(
        json.dumps({"path": str(path), "code": error.code, "reason": error.reason}) + "\n"
        for path, error in failures
    )


def read_failures(run_dir: Path) -> Failures:
    """What failed.jsonl of a run names: so a resumed run need not look at the photos again.

    Raises:
        MismatchError: It is damaged.
    """
    path = run_dir / "failed.jsonl"
    if not path.exists():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [(Path(row["path"]), ImageError(row["code"], row["reason"])) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MismatchError(
            f"{path} is damaged", facts=f"{type(error).__name__}: {error}"
        ) from error


def _warn(tell: Reporter, what: str, advice: str) -> None:
    tell.warn(f"{what}\n{'':<10}-> {advice}")


@contextlib.contextmanager
def _opened(path: Path | None, tell: Reporter) -> Iterator[FactCache | None]:
    if path is None:
        yield None
        return
    try:
        opened = FactCache(path)
    except EmbedKitError as error:
        tell.warn(f"{error.what}: every photo is looked at again")
        yield None
        return
    with opened as cache:
        yield cache


def _relevant(recipe: Recipe, checkup: Checkup) -> list[Finding]:
    by_class = learns_from(recipe.loss) == "classes"
    return [one for one in checkup.findings if by_class or one.code in _OF_PHOTOS]
