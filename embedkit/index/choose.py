"""Which index a catalog gets: built, measured against exact search on its own vectors, then kept.

Some stored vectors are held out of training and looked for, themselves left aside. What searches
exactly says what should be found; the search parameter is raised until the wanted share of it is.
What cannot reach that share is passed over for what can: 4-bit codes work on the vectors of trained
models and collapse on random ones, and only measuring tells.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from embedkit.errors import UnknownNameError, UsageError
from embedkit.index.kinds import (
    apply_search,
    base_of,
    bytes_per_vector,
    factories,
    factory_of,
    training_rows,
)
from embedkit.index.learned import LEARNED, Learned, add_codes, learned_index
from embedkit.index.on_disk import DISK, DiskBuilder, new_disk_index, resident_bytes

__all__ = ["AT", "TYPES", "Building", "Choice", "Wanted", "build_index"]

Vectors = npt.NDArray[np.float32]
Positions = npt.NDArray[np.int64]

TYPES = ("auto", "flat", "pq", "ivf", DISK, "hnsw", "tiny", LEARNED)
"""What can be asked for."""

Building = Callable[[str, int, int], None]
"""``building(stage, done, total)``: where the building of an index is."""

AT = 10
"""Recall is measured among this many nearest."""

_SMALL = 1_000  # below it, nothing is worth training
_NUMBERED = 10_000_000  # up to it, whom to draw is drawn among all numbers
_COMPARED = 2 * AT  # below it there is nobody to look for
_FLAT_TO, _PQ_TO = 20_000, 2_000_000
_QUERIES = 500
_DEPTH = 64  # neighbours kept of each, so that all that tie with the last are among them
_TIMED = 200  # queries timed one by one
_K_FACTORS = (1, 2, 4, 8, 16, 32, 64)
_EF_SEARCH = (16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Wanted:
    """What an index is to be; None: not said.

    Attributes:
        type: One of `TYPES`; else auto.
        recall: Share of the true `AT` nearest that search must find, above 0 to 1; else 0.99.
        memory: Bytes that the index and its names may take when open; 0, and else: no limit.

    Raises:
        UsageError: An unknown type, or a number out of range.
    """

    type: str | None = None
    recall: float | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        if self.type is not None and self.type not in TYPES:
            raise UnknownNameError("type of index", self.type, TYPES)
        if self.recall is not None and not 0 < self.recall <= 1:
            raise UsageError(f"the recall must be above 0 and at most 1, got {self.recall}")
        if self.memory is not None and self.memory < 0:
            raise UsageError(f"the memory cannot be {self.memory} bytes")

    def over(self, other: Wanted) -> Wanted:
        """This, and what `other` says where this says nothing."""
        said = {name: value for name, value in asdict(self).items() if value is not None}
        return replace(other, **said)

    def dumps(self) -> str:
        """JSON that `loads` reads."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def loads(cls, text: str) -> Wanted:
        """From `dumps`; of an empty text nothing is said."""
        return cls(**json.loads(text)) if text else cls()


@dataclass(frozen=True)
class Choice:
    """What an index became, and what was measured on it.

    Attributes:
        kind: One of `kinds.KINDS`.
        factory: The same as FAISS spells it.
        search: The parameters it is searched with; empty where there are none.
        recall: Share of the true `AT` nearest that search finds; 1 of a flat one, which is exact.
        queries: How many held-out vectors that was measured on; 0: not measured.
        queries_per_second: Asked one at a time, on the machine that built it; None: not measured.
        score_error: The largest difference met between a score and the exact one; 0: exact.
        bytes_per_vector: Of the index in memory and on the disk, without the names.
        tried: What was passed over and why, in the order it was tried; a sentence each.
    """

    kind: str
    factory: str
    search: Mapping[str, int]
    recall: float
    queries: int
    queries_per_second: float | None
    score_error: float
    bytes_per_vector: float = 0.0
    tried: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "search": dict(self.search), "tried": list(self.tried)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Choice:
        """From a manifest that holds `to_json`, among other things."""
        values = {name: document[name] for name in cls.__dataclass_fields__}
        return cls(**{**values, "tried": tuple(values["tried"])})


def build_index(
    blocks: Callable[[], Iterator[Vectors]],
    count: int,
    dim: int,
    metric: str,
    wanted: Wanted,
    *,
    names: int = 0,
    learned: Learned | None = None,
    building: Building | None = None,
    scratch: Path | None = None,
) -> tuple[Any, Choice]:
    """Build the index that is wanted, tuned.

    auto takes the first that fits the memory and reaches the recall: flat to 20,000 vectors; then
    pq, beyond two million ivf, and where they fall short flat, sq8, tiny; where all of them do, or
    do not fit, ivf-disk, of which nearly nothing has to fit. A type that was asked for
    is built and tuned whatever it reaches, in the most faithful form that fits. Fewer than 1,000
    vectors are kept flat, unless their codes were learned.

    Seeded, and chosen by recall alone, never by time: the same vectors give the same index, also
    with another number of threads, but for hnsw, whose graph depends on which thread comes first,
    and for the last bits of sums that a BLAS library splits by threads.

    Args:
        blocks: Gives the `count` vectors afresh at each call, in blocks ``(n, D)``, unit length
            where the metric is cosine.
        count: At least 1.
        dim: D.
        metric: ``cosine`` or ``l2``.
        wanted: What is not said is auto, recall 0.99 and no limit.
        names: Bytes of the memory that the names take.
        learned: The model's codes; needed for the type learned, and for no other.
        building: Called as the work goes on.
        scratch: A folder with room for an index that grows on the disk, in files without a name;
            None: the system's.

    Returns:
        The FAISS index, its search parameters set, and the choice.

    Raises:
        UsageError: Nothing fits the memory.

    Memory: the index (twice while FAISS grows it; two where auto tries a second), one block, and
    the rows it is trained from: 20,000, for ivf up to 262,144; of ivf-disk the rows and the block
    alone. The vectors are gone through once to train and once for each index that is tried.
    """
    type_, recall = wanted.type or "auto", wanted.recall or 0.99
    fits = _Fits(count, dim, wanted.memory or 0, names)
    work = _Work(blocks, count, dim, metric, building, scratch)
    if type_ == LEARNED:
        assert learned is not None, "check_kind() sees to it"
        index = work.coded(learned)
        fits.check(index.code_size * count + 4 * index.pq.centroids.size(), LEARNED)
        return index, work.compared(index)
    small = count < _SMALL
    kinds = ("flat",) if small else _order(count) if type_ == "auto" else (type_,)
    tried = (
        [f"{type_} is not worth it for {count:,} vectors"]
        if small and type_ not in ("auto", "flat")
        else []
    )
    best: tuple[Any, Choice] | None = None
    for kind in kinds:
        factory = fits.first(kind)
        if factory is None:
            tried.append(f"{kind} takes {fits.said(kind)}, more than is allowed")
            continue
        index = work.build(kind, factory)
        found = work.timed(index) if kind == "flat" else work.tuned(index, kind, factory, recall)
        if best is None or found.recall > best[1].recall:
            best = index, found
        if found.recall >= recall:
            break
        tried.append(
            f"{kind} finds {found.recall:.3f} of the {AT} nearest, {recall:g} is wanted"
            if found.queries
            else f"{kind} cannot be measured: too many vectors are alike"
        )
    if best is None:
        raise fits.refused(kinds)
    index, found = best
    return index, replace(found, tried=tuple(tried))


def _order(count: int) -> tuple[str, ...]:
    """What auto tries, in turn."""
    if count <= _FLAT_TO:
        return ("flat", "pq", "sq8", "tiny", DISK)
    first = ("pq",) if count <= _PQ_TO else ("ivf", "pq")
    return (*first, "flat", "sq8", "tiny", DISK)


class _Fits:
    """What fits the memory."""

    def __init__(self, count: int, dim: int, memory: int, names: int) -> None:
        self._count, self._dim, self._memory, self._names = count, dim, memory, names

    def first(self, kind: str) -> str | None:
        """The most faithful form of a kind that fits; None: none does."""
        forms = factories(kind, self._count, self._dim)
        return next(
            (one for one in forms if not self._memory or self._takes(kind, one) <= self._memory),
            None,
        )

    def check(self, size: int, kind: str) -> None:
        """Refuse what is larger than the memory."""
        takes = size + self._names
        if self._memory and takes > self._memory:
            raise UsageError(
                f"no {kind} index of {self._count:,} vectors fits into {_size(self._memory)}",
                facts=f"it takes {_size(takes)}",
                hint=f"--memory {-(-takes // 1_000_000) + 1}M",
            )

    def said(self, kind: str) -> str:
        return _size(self._least(kind))

    def refused(self, kinds: tuple[str, ...]) -> UsageError:
        least = min(kinds, key=self._least)
        disk = least == DISK
        return UsageError(
            f"no such index of {self._count:,} vectors fits into {_size(self._memory)}",
            facts=f"the smallest, {least}, takes {_size(self._least(least))}"
            + (f", {_size(self._names)} of it for names" if self._names and not disk else ""),
            hint=f"--memory {-(-self._least(least) // 1_000_000) + 1}M"
            + ("" if disk or "tiny" in kinds else ", or --type tiny"),
        )

    def _least(self, kind: str) -> int:
        return min(self._takes(kind, one) for one in factories(kind, self._count, self._dim))

    def _takes(self, kind: str, factory: str) -> int:
        if kind == DISK:
            return resident_bytes(factory, self._dim)  # its names stay on the disk, too
        each = bytes_per_vector(factory, self._count, self._dim)
        return int(each * self._count) + self._names


class _Work:
    """Trains, fills and measures indexes of the same vectors."""

    def __init__(
        self,
        blocks: Callable[[], Iterator[Vectors]],
        count: int,
        dim: int,
        metric: str,
        building: Building | None,
        scratch: Path | None,
    ) -> None:
        self._blocks, self._count, self._dim = blocks, count, dim
        self._metric = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
        self._building = building or (lambda stage, done, total: None)
        self._scratch = scratch
        self._truth: _Truth | None = None

    def build(self, kind: str, factory: str) -> Any:
        """Trained and filled; unless it is flat, what exact search finds is known afterwards."""
        if kind == "flat":
            l2 = self._metric == faiss.METRIC_L2
            flat = faiss.IndexFlatL2(self._dim) if l2 else faiss.IndexFlatIP(self._dim)
            for block, _ in self._each("adding"):
                flat.add(block)
            return flat
        new = new_disk_index if kind == DISK else faiss.index_factory
        index = new(self._dim, factory, self._metric)
        asked, training = self._held_out(training_rows(kind, self._count))
        queries, rows = self._read(asked, training)
        self._building("training", 0, 1)
        index.train(rows)
        self._building("training", 1, 1)
        del rows
        truth = self._truth or _Truth(queries, asked, self._metric)
        if kind == DISK:
            with DiskBuilder(index, self._count, self._scratch) as disk:
                self._fill(disk.add, truth)
                return disk.finish()
        self._fill(index.add, truth)
        return index

    def _fill(self, add: Callable[[Vectors], None], truth: _Truth) -> None:
        for block, start in self._each("adding"):
            add(block)
            if self._truth is None:
                truth.see(block, start)
        self._truth = truth

    def coded(self, learned: Learned) -> Any:
        """Filled with the model's codes; nothing is trained."""
        index = learned_index(learned.books)
        done = 0
        for codes in learned.codes():
            add_codes(index, codes)
            done += len(codes)
            self._building("adding", done, self._count)
        return index

    def compared(self, index: Any) -> Choice:
        """An index of codes beside exact search among the vectors that they stand for."""
        if self._count < _COMPARED:
            return Choice(LEARNED, factory_of(index), {}, 0.0, 0, None, 0.0)
        asked = self._held_out(0)[0]
        self._truth = _Truth(self._read(asked)[0], asked, self._metric)
        for block, start in self._each("comparing"):
            self._truth.see(block, start)
        return self.tuned(index, LEARNED, factory_of(index), 1.0)

    def timed(self, index: Any) -> Choice:
        """A flat one: it finds everything, and takes as long as it takes."""
        speed = None
        if self._count > _FLAT_TO:
            speed = _speed(index, np.asarray(index.reconstruct_n(0, _TIMED)))
        return Choice("flat", "Flat", {}, 1.0, 0, speed, 0.0)

    def tuned(self, index: Any, kind: str, factory: str, recall: float) -> Choice:
        """The least effort that finds the wanted share; the most, where none does."""
        truth = self._truth
        assert truth is not None, "build() sees to it"
        settings: dict[str, int] = {}
        if kind in ("ivf", DISK):
            lists = base_of(index).nlist
            probes = [1 << n for n in range(lists.bit_length()) if 1 << n < lists] + [lists]
            settings = self._least(index, {"k_factor": _K_FACTORS[-1]}, "nprobe", probes, recall)
        if kind in ("pq", "ivf", DISK):
            settings = self._least(index, settings, "k_factor", _K_FACTORS, recall)
        if kind == "hnsw":
            settings = self._least(index, settings, "efSearch", _EF_SEARCH, recall)
        share, error = truth.judge(index)
        return Choice(
            kind=kind,
            factory=factory,
            search=settings,
            recall=share,
            queries=truth.usable,
            queries_per_second=_speed(index, truth.queries[:_TIMED]),
            score_error=error,
        )

    def _least(
        self, index: Any, others: dict[str, int], name: str, values: Any, recall: float
    ) -> dict[str, int]:
        """The smallest value that finds the wanted share, set; the largest, where none does."""
        assert self._truth is not None
        for number, value in enumerate(values):
            self._building("tuning", number, len(values))
            settings = {**others, name: int(value)}
            apply_search(index, settings)
            if self._truth.judge(index)[0] >= recall:
                break
        self._building("tuning", len(values), len(values))
        return settings

    def _held_out(self, rows: int) -> tuple[Positions, Positions]:
        """Positions to look for, and to train from: two sets that share none."""
        queries = min(_QUERIES, self._count // 10)
        rows = min(rows, self._count - queries)
        draw, wanted = np.random.default_rng(0), queries + rows
        # To number everybody would take more than all the rest, were they a hundred million.
        few = self._count <= _NUMBERED
        drawn = (
            draw.permutation(self._count)[:wanted]
            if few
            else draw.choice(self._count, wanted, replace=False)
        )
        return np.sort(drawn[:queries]), np.sort(drawn[queries:])

    def _read(self, *wanted: Positions) -> list[Vectors]:
        """The vectors at some positions, ascending; of several sets in one go."""
        sets = [np.empty((len(positions), self._dim), np.float32) for positions in wanted]
        for block, start in self._each("reading"):
            for positions, rows in zip(wanted, sets, strict=True):
                first, last = np.searchsorted(positions, (start, start + len(block)))
                rows[first:last] = block[positions[first:last] - start]
        return sets

    def _each(self, stage: str) -> Iterator[tuple[Vectors, int]]:
        start = 0
        for block in self._blocks():
            yield block, start
            start += len(block)
            self._building(stage, start, self._count)
        assert start == self._count, f"{self._count} vectors, then {start}"


class _Truth:
    """What exact search finds for some of the vectors, each left aside for itself.

    Equal scores are as good as each other: whatever ties with the last of the true ones counts. A
    query with more ties than are kept says nothing and is left out.
    """

    def __init__(self, queries: Vectors, own: Positions, metric: int) -> None:
        self.queries = queries
        self._own, self._metric = own, metric
        # Sums in float32 are off by less: what is nearer together than this ties.
        self._blur = 2e-6 * (queries**2).sum(axis=1)
        self._sign = -1 if metric == faiss.METRIC_L2 else 1
        self._scores = np.empty((len(own), 0), np.float32)
        self._found = np.empty((len(own), 0), np.int64)

    def see(self, block: Vectors, start: int) -> None:
        """Take in the next vectors."""
        depth = min(_DEPTH + 1, len(block))
        scores, found = faiss.knn(self.queries, block, depth, metric=self._metric)
        found = np.asarray(found) + start
        scores = np.where(found == self._own[:, None], -np.inf, self._sign * np.asarray(scores))
        scores = np.hstack([self._scores, scores])
        found = np.hstack([self._found, found])
        order = np.argsort(-scores, axis=1, kind="stable")[:, :_DEPTH]
        self._scores = np.take_along_axis(scores, order, axis=1)
        self._found = np.take_along_axis(found, order, axis=1)

    @property
    def usable(self) -> int:
        """How many queries say something."""
        return int(self._clear().sum())

    def judge(self, index: Any) -> tuple[float, float]:
        """Share of the true nearest that `index` finds, and the largest error of its scores.

        0 where no query says anything.
        """
        scores, found = index.search(self.queries, AT + 1)
        scores, found = self._sign * np.asarray(scores), np.asarray(found)
        # Without the query itself: first those that count, as they came.
        order = np.argsort(found == self._own[:, None], axis=1, kind="stable")[:, :AT]
        found = np.take_along_axis(found, order, axis=1)
        scores = np.take_along_axis(scores, order, axis=1)
        true = self._scores >= self._last()[:, None]
        same = (found[:, :, None] == self._found[:, None, :]) & true[:, None, :]
        clear = self._clear()
        if not clear.any():
            return 0.0, 0.0
        share = np.minimum(same.any(axis=2).sum(axis=1), AT)[clear].mean() / AT
        query, place, at = np.nonzero(same)
        errors = np.abs(self._score(scores[query, place]) - self._score(self._scores[query, at]))
        return round(float(share), 4), float(errors.max(initial=0.0))

    def _last(self) -> Vectors:
        """The least score that counts as one of the nearest."""
        last: Vectors = self._scores[:, AT - 1] - self._blur
        return last

    def _clear(self) -> npt.NDArray[np.bool_]:
        clear: npt.NDArray[np.bool_] = self._scores[:, -1] < self._last()
        return clear

    def _score(self, near: Vectors) -> Vectors:
        """As `Catalog.search` says it: distances, not their squares."""
        return -np.sqrt(np.maximum(-near, 0)) if self._sign < 0 else near


def _speed(index: Any, queries: Vectors) -> float:
    """Queries a second, asked one at a time."""
    index.search(queries[:1], AT + 1)
    started = time.perf_counter()
    for row in range(len(queries)):
        index.search(queries[row : row + 1], AT + 1)
    seconds = time.perf_counter() - started
    return float(f"{len(queries) / max(seconds, 1e-9):.3g}")


def _size(size: float) -> str:
    for unit in ("bytes", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
