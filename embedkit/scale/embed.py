"""Any number of pictures to one file of vectors: counted, resumable, in flat memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from embedkit.errors import DataError, ImageError, Interrupted, UsageError
from embedkit.runtime import Embedder, ModelContract
from embedkit.runtime.pipeline import Row, embed_stream
from embedkit.scale.journal import Journal
from embedkit.scale.source import Source
from embedkit.scale.write import (
    FORMATS,
    beside,
    vectors_shape,
    write_failures,
    write_npy,
    write_parquet,
)

__all__ = ["EmbedReport", "Engine", "embed_sources", "format_of", "local_engine"]

Result = tuple[Source, Row | ImageError]
Engine = Callable[[Iterable[Source]], Generator[Result, None, None]]
"""Each source once, with its vector or its error, in any order; takes them lazily."""

_NAMED = 5
# Between two commits; what is lost when the process is killed.
_COMMIT_SECONDS = 1.0


@dataclass(frozen=True)
class EmbedReport:
    """What was done; ``found == embedded + known + failed``, always.

    Attributes:
        found: Pictures that were met, each as often as it was named.
        embedded: Those that went through the model now.
        known: Those an interrupted run had done, or that were named twice.
        failed: Those without a vector.
        failures: The first few of them.
        output: The file of vectors.
        shape: Of the vectors in it: ``embedded + known`` rows of D numbers, or in ``.npy`` of K
            vectors where the model gives several per picture.
        failed_list: Names all that failed; not there where none did.
        seconds: All of it.
        embed_seconds: The part spent on embedding.
    """

    found: int
    embedded: int
    known: int
    failed: int
    failures: list[tuple[str, ImageError]]
    output: Path
    shape: tuple[int, ...]
    failed_list: Path
    seconds: float
    embed_seconds: float


def format_of(output: Path) -> str:
    """Of `FORMATS`, by the ending.

    Raises:
        UsageError: It is another ending.
    """
    form = output.suffix.lower().removeprefix(".")
    if form not in FORMATS:
        raise UsageError(
            f"{output} has no ending that says its format",
            facts=f"known: {', '.join('.' + name for name in FORMATS)}",
            hint="-o vectors.npy, or -o vectors.parquet",
        )
    return form


def local_engine(embedder: Embedder, *, batch: int = 32, workers: int | None = None) -> Engine:
    """Embeds in this process: threads fetch and decode while the model runs."""
    preprocess = embedder.contract.preprocess

    def engine(sources: Iterable[Source]) -> Generator[Result, None, None]:
        return embed_stream(
            sources,
            read=lambda source: source.pixels(preprocess),
            run=embedder.embed_pixels,
            batch=batch,
            workers=workers,
            runs=embedder.runs_at_once(workers),
        )

    return engine


def embed_sources(
    sources: Iterator[Source],
    output: Path,
    engine: Engine,
    contract: ModelContract,
    *,
    may_be_empty: bool = False,
    progress: Callable[[int, int], None] = lambda done, failed: None,
) -> EmbedReport:
    """Embed every source and write the vectors, in the order of the sources.

    Until it is whole, the work stands in ``<output>.unfinished``; the same call goes on from there.
    A picture whose stamp has changed since is embedded again.

    Args:
        sources: As `find_sources` gives them.
        output: ``.npy`` (with a ``.jsonl`` beside it) or ``.parquet``; replaced when whole.
        engine: What embeds: `local_engine`, or that of `embedkit.scale.ray`.
        contract: Of the model.
        may_be_empty: Where there are no sources, write no rows instead of refusing.
        progress: ``progress(done, failed)``, that many more, as the work goes on.

    Raises:
        UsageError: No such format, or no folder for the output.
        DataError: No picture was found, or none is usable.
        MismatchError: There is unfinished work of another model, or it is damaged.
        EmbedKitError: Something cannot be written, or another process is writing it.
        Interrupted: Ctrl-C; what was embedded is kept.
    """
    started = time.monotonic()
    form = format_of(output)
    if output.parts[0].endswith(":"):  # what a path makes of s3://bucket/vectors.npy
        raise UsageError(
            "vectors are written to a file on this machine, and copied elsewhere afterwards",
            facts=f"{output} is an address",
            hint=f"-o {output.name}",
        )
    if not output.parent.is_dir():
        raise UsageError(f"there is no folder {output.parent}", hint="name one that is there: -o")
    first = list(islice(sources, 1))
    if not first and not may_be_empty:
        raise DataError(
            "there is no picture to embed",
            facts="looked at any depth, by the ending of the names",
            hint="name folders or files that are pictures",
        )
    work = output.with_name(output.name + ".unfinished")
    with Journal(work, contract.fingerprint) as journal:
        run = _Run(journal, progress)
        try:
            run.embed(chain(first, sources), engine)
        except KeyboardInterrupt as error:
            journal.commit()
            raise Interrupted(
                "interrupted; what was embedded is kept", hint="run the same command again to go on"
            ) from error
        embed_seconds = time.monotonic() - started
        failed_list = beside(output, ".failed.jsonl")
        failures = list(islice(journal.failures(), _NAMED))
        rows = journal.count()
        assert rows == run.embedded + run.known, f"{rows} rows of {run.embedded} + {run.known}"
        assert run.found == rows + run.failed, f"{run.found} found, {rows} + {run.failed} came"
        write_failures(failed_list, journal.failures())
        if run.found and rows == 0:
            journal.remove()
            raise DataError(
                "no picture is usable",
                facts=f"{run.found:,} looked at; the first: {failures[0][0]}: "
                f"{failures[0][1].reason}",
                hint=f"all are named in {failed_list}",
            )
        if form == "npy":
            write_npy(output, journal.lines(), rows, contract)
        else:
            write_parquet(output, journal.lines(), contract)
        journal.remove()
    return EmbedReport(
        run.found,
        run.embedded,
        run.known,
        run.failed,
        failures,
        output,
        vectors_shape(output, rows, contract),
        failed_list,
        time.monotonic() - started,
        embed_seconds,
    )


class _Run:
    """One pass over the sources: its counts."""

    def __init__(self, journal: Journal, progress: Callable[[int, int], None]) -> None:
        self._journal, self._progress = journal, progress
        self.found = self.embedded = self.known = self.failed = 0

    def embed(self, sources: Iterator[Source], engine: Engine) -> None:
        committed = time.monotonic()
        with closing(engine(self._to_do(sources))) as results:
            for source, result in results:
                bad = isinstance(result, ImageError)
                self.failed += bad
                self.embedded += not bad
                self._journal.put(source, result)
                self._progress(1, int(bad))
                if time.monotonic() - committed > _COMMIT_SECONDS:
                    self._journal.commit()
                    committed = time.monotonic()
        self._journal.commit()

    def _to_do(self, sources: Iterator[Source]) -> Iterator[Source]:
        for source in sources:
            self.found += 1
            known = self._journal.see(source)
            if known is None:
                yield source.held()
                continue
            bad = known is not True
            self.failed += bad
            self.known += not bad
            self._progress(1, int(bad))
