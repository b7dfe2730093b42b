"""`embedkit check ./photos`"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedkit.cli.display import AsJson, Display, Quiet, Verbose, printable
from embedkit.cli.work import Dim, Workers
from embedkit.errors import DataError, EmbedKitError, UsageError

if TYPE_CHECKING:
    from rich.text import Text

    from embedkit.data import Checkup, FactCache
    from embedkit.data.doctor import TwinPair
    from embedkit.data.doctor_csg import Complexity

__all__ = ["check"]


_OUTPUT, _WORK = "Output", "Work"
_NAMED = 5
_COLOURS = {
    "good": "green",
    "usable": "yellow",
    "cannot work": "red",
    "stop": "red",
    "warn": "yellow",
    "note": "",
}
_PAIRS: dict[str, Callable[[TwinPair], bool]] = {
    "label-conflict": lambda pair: pair.labels_differ,
    "leak": lambda pair: pair.splits_differ,
    "copies": lambda pair: pair.exact,
    "near-duplicates": lambda pair: not pair.exact,
}


class NoiseKind(StrEnum):
    symmetric = "symmetric"
    asymmetric = "asymmetric"


def check(
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="DATA",
            help="Photos: a folder per class, folders train, val, test of such, or a CSV "
            "(./data/train, ./data or .).",
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="An exported model: also how tangled the classes are in it."
        ),
    ] = None,
    near: Annotated[
        int | None,
        typer.Option(
            metavar="BITS",
            help="Bits of 256 in which near duplicates may differ, 0 to 96 (40).",
        ),
    ] = None,
    inject_noise: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Do not check: write a CSV in which this share of the training labels is wrong "
            "(-o), for experiments.",
        ),
    ] = None,
    noise_kind: Annotated[
        NoiseKind,
        typer.Option(
            metavar="KIND",
            help="symmetric: to any other class; asymmetric: each class to one other, the next by "
            "name in its category.",
        ),
    ] = NoiseKind.symmetric,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            rich_help_panel=_OUTPUT,
            help="Of --inject-noise: a CSV, or a folder for noisy.csv.",
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", rich_help_panel=_OUTPUT, help="Also a page with the pairs to look at."
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_WORK,
            help="Remembers photos by path, size and time (in your cache folder).",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(rich_help_panel=_WORK, help="Of --model: auto, cpu, cuda or cuda:N.")
    ] = "auto",
    dim: Dim = None,
    workers: Workers = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Look for what spoils training: broken files, twins, leaks.

    Stopped and started again, it goes on where it was: what was seen of a photo is kept.

    Example: embedkit check ./photos --html check.html
    """
    if near is not None and not 0 <= near <= 96:
        raise UsageError(f"--near must lie in 0 to 96, got {near}", hint="--near 40")

    if (inject_noise is None) != (output is None):
        raise UsageError(
            "--inject-noise and -o go together", hint="--inject-noise 0.2 -o noisy.csv"
        )
    if inject_noise is not None and output is not None:
        display = Display(as_json=as_json, quiet=quiet)
        _inject(data, inject_noise, noise_kind, seed, output, display)
        return
    if noise_kind != NoiseKind.symmetric:
        raise UsageError(
            "--noise-kind is of --inject-noise",
            hint="--inject-noise 0.2 --noise-kind asymmetric -o noisy.csv",
        )

    if dim is not None and model is None:
        raise UsageError("--dim is of a model, and none was named", hint="--model FILE")

    from embedkit.data import check_photos, gather_facts, read_photos, resolve_source
    from embedkit.data.doctor import NEAR_BITS

    display = Display(as_json=as_json, quiet=quiet)
    photos = read_photos(resolve_source(data))
    with _cache(cache, display) as kept, display.progress("looking", len(photos)) as advance:
        facts = gather_facts(photos.files(), cache=kept, workers=workers, progress=advance)
    with display.progress("comparing", len(photos)) as advance:
        bits = NEAR_BITS if near is None else near
        checkup = check_photos(photos, facts, near_bits=bits, progress=advance)
    csg = None if model is None else _complexity(checkup, model, device, dim, seed, display)
    document = {**checkup.to_json(), "complexity": None if csg is None else csg.to_json()}
    if html is not None:
        _write_page(html, document, display)
    display.answer(_answer(checkup, csg))
    display.document("check", document)
    if checkup.verdict == "cannot work":
        stops = [finding for finding in checkup.findings if finding.level == "stop"]
        raise DataError(
            "metric learning cannot work on these photos",
            facts="\n".join(finding.what for finding in stops),
            hint="\n".join(finding.advice for finding in stops),
        )
    if checkup.failures():
        raise typer.Exit(3)


def _inject(
    data: Path | None, rate: float, kind: NoiseKind, seed: int, output: Path, display: Display
) -> None:
    """Write the CSV with wrong labels; no photo is opened."""
    from embedkit.data import inject_noise, read_photos, resolve_source, write_noisy

    source = resolve_source(data)
    photos = read_photos(source)
    path = output if output.suffix.lower() == ".csv" else output / "noisy.csv"
    if path.exists() and source.exists() and path.samefile(source):
        raise UsageError(f"{path} is the data itself", hint="-o with another name")
    noisy, flipped = inject_noise(photos, rate=rate, kind=kind, seed=seed)
    write_noisy(path, noisy, photos.labels)
    count = noisy.split.count("train")
    display.answer(
        f"{len(flipped):,} of {count:,} training labels are wrong now, in {path}; "
        f"{len(noisy) - count:,} photos of val and test are as they were"
    )
    display.note("next", f"embedkit train {path} --noise proselflc")
    display.document(
        "check",
        {
            "csv": str(path),
            "flipped": [str(noisy.paths[row]) for row in flipped],
            "train": count,
            "kind": kind.value,
            "seed": seed,
        },
    )


@contextlib.contextmanager
def _cache(path: Path | None, display: Display) -> Iterator[FactCache | None]:
    """The cache that was asked for, or the usual one, without which the work goes on as well."""
    from embedkit.data import FactCache
    from embedkit.data.doctor_facts import default_cache

    try:
        opened = FactCache(path or default_cache())
    except EmbedKitError as error:
        if path is not None:
            raise
        display.warn(f"{error.what}: nothing is remembered for the next time (--cache FILE)")
        yield None
        return
    with opened as cache:
        display.note("cache", str(cache.path))
        yield cache


def _complexity(
    checkup: Checkup, model: Path, device: str, dim: int | None, seed: int, display: Display
) -> Complexity | None:
    """CSG of the readable photos; None, and a warning, where two classes cannot be compared."""
    import numpy as np

    from embedkit.data.doctor_csg import complexity
    from embedkit.runtime import Embedder

    photos = checkup.photos
    broken = {path for path, _ in checkup.failures()}
    rows = [row for row, path in enumerate(photos.paths) if path not in broken]
    if checkup.verdict == "cannot work":
        display.warn("the classes cannot be compared, so the model was not asked")
        return None
    files, labels, vectors = photos.files(), [], []
    with (
        Embedder.load(model, device=device, threads=1, dim=dim) as embedder,
        display.progress("embedding", len(rows)) as advance,
    ):
        embedded = embedder.embed_files(files[row] for row in rows)
        for row, result in zip(rows, embedded, strict=True):
            # A file that has just been read may be gone by now; the check has done its work.
            if result.vector is not None:
                labels.append(photos.labels[row])
                vectors.append(result.vector)
            advance(1, int(result.vector is None))
    return complexity(np.stack(vectors), labels, seed=seed)


def _write_page(path: Path, document: dict[str, Any], display: Display) -> None:
    from embedkit.atomic import published
    from embedkit.report import check_page

    text = check_page(document, title=f"Check of {Path(document['root']).name}")
    with published(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    display.note("page", str(path))


def _answer(checkup: Checkup, csg: Complexity | None) -> Text:
    """The verdict, then every finding with its advice, the worst first, and the nearest pairs."""
    from rich.text import Text

    counts, answer = checkup.counts, Text()
    answer.append(f"{checkup.verdict:<9}", style=f"bold {_COLOURS[checkup.verdict]}")
    answer.append(
        f" {counts['readable']:,} photos of {counts['classes']:,} classes; "
        f"{counts['unreadable']:,} unreadable, {counts['copies']:,} copies, "
        f"{counts['near_duplicates']:,} nearly the same as another"
    )
    for finding in checkup.findings:
        answer.append(f"\n{finding.level:<9}", style=_COLOURS[finding.level])
        answer.append(f" {printable(finding.what)}\n{'':<9} -> {finding.advice}")
        for line in _examples(finding.code, checkup):
            answer.append(f"\n{'':<12} {printable(line)}", style="dim")
    if csg is not None:
        answer.append(f"\n{'csg':<9}", style="bold")
        answer.append(
            f" {csg.csg:.3f} ({csg.low:.3f} to {csg.high:.3f}); 0 is separable, and it is to be "
            f"compared only with the same model; {csg.own:.0%} of the neighbours are of one's own "
            "class"
        )
        for pair in csg.confusions[:_NAMED]:
            line = f"{pair.a} and {pair.b}: similarity {pair.similarity:.2f}"
            answer.append(f"\n{'':<12} {printable(line)}", style="dim")
    return answer


def _examples(code: str, checkup: Checkup) -> list[str]:
    """The first few of what a finding speaks of, one per line, and how many more there are."""
    paths = checkup.photos.paths
    if code == "unreadable":
        lines = [f"{path}: {error.reason}" for path, error in checkup.failures()]
    elif code == "flat":
        lines = [str(paths[row]) for row in checkup.flat]
    elif code in _PAIRS:
        lines = [
            f"{paths[pair.a]}  {paths[pair.b]}"
            for pair in checkup.twins
            if not pair.recoloured and _PAIRS[code](pair)
        ]
    else:
        return []
    more = ["... more in --json and --html"] if len(lines) > _NAMED else []
    return lines[:_NAMED] + more
