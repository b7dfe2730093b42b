"""The whole gallery in order of likeness for every query, exact, in blocks of bounded memory.

Scores come from float32 matrix products, which are fast and not exact: they change in the last
digit with the shape of the block they are computed in. They decide only what they can decide. The
rounding of a sum of D products of unit rows is at most ``D * 2^-24`` (Higham, "Accuracy and
Stability of Numerical Algorithms", 3.1); whatever lies closer together than that is computed once
more in float64 and rounded to float32. So the order is that of the exact scores rounded to float32,
equal ones by gallery row, however the work is cut into blocks.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from embedkit.errors import EmbedKitError, UnknownNameError
from embedkit.evaluate.several import greatest_products

__all__ = ["Floats", "Indices", "Ranked", "Space", "rankings"]

Mask = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

METRICS = ("cosine", "l2")

# float32 scores held at once while streaming: 16 MiB, which a processor's cache can hold.
_STREAMED_AT_ONCE = 1 << 22
_STREAMED_COLUMNS = 4096
# Scores held at once where whole rows are: 32 MiB, and twice that of row numbers while ordered.
_SCORES_AT_ONCE = 1 << 23
_GALLERY_ROWS_AT_ONCE = 4096
_PAIRS_AT_ONCE = 2048
# Whole rows are ordered where the shortlist would be a good part of them anyway.
_WHOLE_ROWS_BELOW = 2048
_WHOLE_ROWS_SHARE = 8
# Places in a shortlist for what is too close to the cut to be left out.
_SPARE = 64
# More scores than this that cannot be told from the best match's: order the whole row.
_UNCLEAR = 4096


class Space:
    """Rows made comparable, and which of them can be found.

    Args:
        embeddings: ``(N, D)`` finite numbers; ``(N, K, D)`` for K vectors per picture, which are
            as alike as the most alike two of them.
        gallery: ``(N,)`` bool, the rows that can be found.
        metric: ``cosine`` compares directions; ``l2`` distances, which are taken from the rows
            minus their mean, the longest of length 1: distances are then in units of `unit`, and
            keep their digits.

    Raises:
        EmbedKitError: An embedding holds NaN or infinity.
        UnknownNameError: Another metric.
        ValueError: Another shape, or K vectors per picture to be compared by ``l2``.
    """

    def __init__(self, embeddings: npt.ArrayLike, gallery: Mask | None, metric: str) -> None:
        if metric not in METRICS:
            raise UnknownNameError("metric", metric, METRICS)
        self.metric = metric
        self.rows, self.unit = prepare(embeddings, metric)
        everything = gallery is None or bool(gallery.all())
        self.gallery: Indices = (
            np.arange(len(self.rows)) if gallery is None or everything else np.flatnonzero(gallery)
        )
        self.found = self.rows if everything else self.rows[self.gallery]
        self.position = np.full(len(self.rows), -1)
        self.position[self.gallery] = np.arange(len(self.gallery))
        self._half_squares: Floats | None = None
        if metric == "l2":
            self._half_squares = (_squares(self.found) / 2).astype(np.float32)
        # Twice what one approximate score can be off, and a little for comparing in float32.
        self.slack = np.float32(2 * (self.rows.shape[-1] + 8) * 2.0**-24)

    def approximate(
        self, rows: Indices, vectors: Floats, places: slice | Indices, out: Floats | None = None
    ) -> Floats:
        """``(b, g)`` float32 scores, off by at most half of `slack`; a row's own is -infinity.

        `vectors` are those of `rows`, taken out once for all the places they are held against.
        """
        scores = _products(vectors, self.found[places], out)
        if self._half_squares is not None:
            scores -= self._half_squares[places]
        own = self.position[rows]
        if isinstance(places, slice):
            inside = np.flatnonzero((own >= places.start) & (own < places.stop))
            scores[inside, own[inside] - places.start] = -np.inf
        else:
            at = np.searchsorted(places, own)
            inside = np.flatnonzero(places[np.minimum(at, len(places) - 1)] == own)
            scores[inside, at[inside]] = -np.inf
        return scores

    def costs(self, rows: Indices) -> Floats:
        """``(b, G)`` exact costs rounded to float32; infinity for a row's own place.

        A cost is the negative cosine, or the squared distance.
        """
        costs = np.empty((len(rows), len(self.found)), dtype=np.float32)
        vectors = self.rows[rows].astype(np.float64)
        for left in range(0, len(self.found), _GALLERY_ROWS_AT_ONCE):
            part = slice(left, left + _GALLERY_ROWS_AT_ONCE)
            found = self.found[part].astype(np.float64)
            products = _products(vectors, found)
            if self.metric == "cosine":
                costs[:, part] = -products
                continue
            sums = (vectors * vectors).sum(1)[:, None] + (found * found).sum(1)
            distances = sums - 2 * products
            # What nearly cancels has lost the digits that float32 would show.
            near, close = np.nonzero(distances < 1e-6 * sums)
            distances[near, close] = self.pair_costs(rows[near], close + left)
            costs[:, part] = distances
        own = self.position[rows]
        inside = np.flatnonzero(own >= 0)
        costs[inside, own[inside]] = np.inf
        return costs

    def pair_costs(self, rows: Indices, places: Indices) -> Floats:
        """``(P,)`` exact costs, rounded to float32, of rows with gallery places one by one."""
        costs = np.empty(len(rows), dtype=np.float32)
        for start in range(0, len(rows), _PAIRS_AT_ONCE):
            part = slice(start, start + _PAIRS_AT_ONCE)
            left = self.rows[rows[part]].astype(np.float64)
            right = self.found[places[part]].astype(np.float64)
            if left.ndim == 3:
                costs[part] = -(left @ right.transpose(0, 2, 1)).max(axis=(1, 2))
            elif self.metric == "cosine":
                costs[part] = -np.einsum("ij,ij->i", left, right)
            else:
                left -= right
                costs[part] = np.einsum("ij,ij->i", left, left)
        return costs


def _products(
    left: npt.NDArray[Any], right: npt.NDArray[Any], out: Floats | None = None
) -> npt.NDArray[Any]:
    """``(b, g)`` inner products of rows ``(b, D)`` and ``(g, D)``, or the greatest of several."""
    if left.ndim == 3:
        return greatest_products(left, right, out)
    return np.matmul(left, right.T, out=out)


@dataclass(frozen=True)
class Ranked:
    """What some queries found.

    Attributes:
        start: Place of the first of them among the queries.
        order: ``(b, min(depth, G))`` gallery places, best first. A query's own place can only
            come last, where `depth` reaches the end of the gallery.
        tied: ``(b,)`` whether two neighbours in `order` have the same score.
        first: ``(b,)`` rank of the first match, from 1; infinity where there is none. Empty when
            no codes were given.
    """

    start: int
    order: Indices
    tied: Mask
    first: npt.NDArray[np.float64]


def rankings(
    space: Space,
    rows: Indices,
    depth: int,
    block: int,
    codes: Indices | None = None,
) -> Iterator[Ranked]:
    """Let `rows` rank the gallery, a block of them at a time; an empty gallery gives nothing.

    Args:
        space: The rows.
        rows: Which of them ask. With codes: those of one class side by side are the fastest.
        depth: Ranks that are wanted.
        block: Most queries at once.
        codes: ``(N,)`` classes, for the rank of the first match.

    Cost: O(Q N D); memory some 60 MiB beside the space.
    """
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    count = len(space.found)
    if not count:
        return
    whole = count <= _WHOLE_ROWS_BELOW or depth >= count // _WHOLE_ROWS_SHARE
    columns = count if whole else max(_STREAMED_COLUMNS, 4 * depth)
    at_once = max(1, (_SCORES_AT_ONCE if whole else _STREAMED_AT_ONCE) // columns)
    if whole:
        for start in range(0, len(rows), min(block, at_once)):
            yield _by_whole_rows(
                space, rows[start : start + min(block, at_once)], depth, codes, start
            )
        return

    def job(start: int) -> Ranked:
        asking = rows[start : start + min(block, at_once)]
        return _by_shortlist(space, asking, depth, codes, start, columns)

    starts = iter(range(0, len(rows), min(block, at_once)))
    # While one block multiplies on all cores, another is sifted, which takes one core.
    workers = _workers()
    with ThreadPoolExecutor(workers, thread_name_prefix="embedkit-evaluate") as pool:
        waiting = deque(pool.submit(job, start) for start in islice(starts, workers))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(job, start) for start in islice(starts, 1))


def _workers() -> int:
    """2, or 1 for those who allow one thread."""
    allowed = {os.environ.get(name) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return 1 if "1" in allowed or os.cpu_count() == 1 else 2


# --- whole rows in float64: small galleries, deep rankings, and whatever the fast way gives up ----


def _by_whole_rows(
    space: Space, rows: Indices, depth: int, codes: Indices | None, start: int
) -> Ranked:
    costs = space.costs(rows)
    order = _smallest(costs, depth)
    found = np.take_along_axis(costs, order, axis=1)
    tied = ((found[:, 1:] == found[:, :-1]) & np.isfinite(found[:, 1:])).any(axis=1)
    first = np.empty(0)
    if codes is not None:
        wrong = codes[space.gallery] != codes[rows][:, None]
        match = np.where(wrong, np.float32(np.inf), costs)
        place = match.argmin(axis=1)[:, None]  # the first of equals, as in the order
        best = np.take_along_axis(match, place, axis=1)
        before = (costs < best).sum(1) + (
            (costs == best) & (np.arange(costs.shape[1]) < place)
        ).sum(1)
        first = np.where(np.isfinite(best[:, 0]), before + 1.0, np.inf)
    return Ranked(start, order, tied, first)


def _smallest(costs: Floats, depth: int) -> Indices:
    """Columns of the `depth` smallest of each row, ascending, equal values by column."""
    count = costs.shape[1]
    if depth >= count // 4:
        return np.argsort(costs, axis=1, kind="stable")[:, :depth]
    if depth == 0:
        return np.empty((len(costs), 0), dtype=np.int64)
    chosen = np.argpartition(costs, depth - 1, axis=1)[:, :depth]
    bound = np.take_along_axis(costs, chosen, axis=1).max(axis=1, keepdims=True)
    # Where more columns equal the bound than there are places, the partition took any of them.
    crowded = (costs <= bound).sum(axis=1) > depth
    for row in np.flatnonzero(crowded):
        below = np.flatnonzero(costs[row] < bound[row])
        equal = np.flatnonzero(costs[row] == bound[row])
        chosen[row] = np.concatenate([below, equal[: depth - len(below)]])
    chosen.sort(axis=1)
    order = np.argsort(np.take_along_axis(costs, chosen, axis=1), axis=1, kind="stable")
    return np.take_along_axis(chosen, order, axis=1)


# --- the fast way: float32 scores, a shortlist per query, float64 for what is too close ----------


def _by_shortlist(
    space: Space, rows: Indices, depth: int, codes: Indices | None, start: int, columns: int
) -> Ranked:
    count = len(space.found)
    vectors = space.rows[rows]
    short = _Shortlist(len(rows), depth, space.slack)
    rank = None if codes is None else _FirstMatch(space, rows, vectors, codes, columns)
    # Used again and again: fresh memory for every part costs as much as looking at it.
    buffer = np.empty(len(rows) * columns, np.float32)
    scratch = np.empty(len(rows) * columns, np.bool_)
    for left in range(0, count, columns):
        part = slice(left, min(left + columns, count))
        shape, size = (len(rows), part.stop - left), len(rows) * (part.stop - left)
        scores = space.approximate(rows, vectors, part, buffer[:size].reshape(shape))
        hits = short.above(scores, left, scratch[:size].reshape(shape))
        if rank is not None:
            rank.add(scores, left, short.least, hits)
        short.add(scores, left, hits)
    order, tied = short.finish(space, rows)
    first = np.empty(0)
    again = short.crowded
    if rank is not None:
        first = rank.finish(order, skip=short.crowded)
        again = again | rank.unclear
    for row in _in_blocks(np.flatnonzero(again), max(1, _SCORES_AT_ONCE // count)):
        exact = _by_whole_rows(space, rows[row], depth, codes, 0)
        order[row], tied[row] = exact.order, exact.tied
        if rank is not None:
            first[row] = exact.first
    return Ranked(start, order, tied, first)


class _Hits(NamedTuple):
    """Scores that passed the bar, row by row: ``(h,)`` each."""

    row: Indices
    column: Indices
    score: Floats

    def where(self, keep: Mask) -> _Hits:
        return _Hits(self.row[keep], self.column[keep], self.score[keep])


class _Shortlist:
    """The best scores of each query so far, and all that cannot be told from the last of them."""

    def __init__(self, rows: int, depth: int, slack: np.float32) -> None:
        self._depth, self._slack = depth, slack
        self._width = 5 * depth + _SPARE
        self._scores = np.full((rows, self._width), -np.inf, dtype=np.float32)
        self._places = np.zeros((rows, self._width), dtype=np.int64)
        self._filled = np.zeros(rows, dtype=np.int64)
        # (rows, 1): the bar.
        self.least = np.full((rows, 1), -np.inf, dtype=np.float32)
        self.crowded = np.zeros(rows, dtype=np.bool_)

    def above(self, scores: Floats, left: int, scratch: Mask) -> _Hits:
        """What of ``(rows, g)`` scores, of the gallery places from `left` on, passes the bar."""
        if left == 0:
            # The best of a quarter are a bar good enough to begin with, and found in a quarter of
            # the time.
            width = scores.shape[1]
            self.least = self._cut(scores[:, : max(self._depth, width // 4)])
        np.greater_equal(scores, self.least, out=scratch)
        flat = np.flatnonzero(scratch)
        row = flat // scores.shape[1]
        return _Hits(row, flat - row * scores.shape[1], scores.ravel()[flat])

    def add(self, scores: Floats, left: int, hits: _Hits) -> None:
        """Keep what passed the bar; the scores are of the gallery places from `left` on."""
        if self._too_many(hits).any():
            self._tighten()
            full = np.flatnonzero(self._too_many(hits))
            self.least[full] = np.maximum(self.least[full], self._cut(scores[full]))
            hits = self._still_good(hits)
            lost = self._too_many(hits)
            self.crowded |= lost
            self.least[lost] = np.inf
            hits = self._still_good(hits)
        at = self._filled[hits.row] + _number_within(hits.row)
        self._scores[hits.row, at] = hits.score
        self._places[hits.row, at] = hits.column + left
        self._filled += np.bincount(hits.row, minlength=len(self._filled))
        if self._filled.max(initial=0) > (self._depth + self._width) // 2:
            self._tighten()

    def finish(self, space: Space, rows: Indices) -> tuple[Indices, Mask]:
        """``(rows, depth)`` places in exact order, and who has a tie; not for crowded rows."""
        order = np.argsort(-self._scores, axis=1, kind="stable")
        scores = np.take_along_axis(self._scores, order, axis=1)
        places = np.take_along_axis(self._places, order, axis=1)
        real = np.isfinite(scores) & ~self.crowded[:, None]
        # Runs of scores that float32 cannot tell apart are put in order by what they really are.
        linked = np.zeros_like(real)
        linked[:, 1:] = real[:, 1:] & (scores[:, 1:] >= scores[:, :-1] - self._slack)
        # A run that begins behind the last rank changes nothing.
        linked[:, self._depth :] &= np.logical_and.accumulate(linked[:, self._depth :], axis=1)
        in_run = linked.copy()
        in_run[:, :-1] |= linked[:, 1:]
        in_run &= real
        row, column = np.nonzero(in_run)
        costs = space.pair_costs(rows[row], places[row, column])
        run = np.cumsum(~linked[row, column])
        sorted_by = np.lexsort((places[row, column], costs, run))
        places[row, column] = places[row, column][sorted_by]
        tied = np.zeros(len(rows), dtype=np.bool_)
        if len(row):
            costs = costs[sorted_by]
            equal = (costs[1:] == costs[:-1]) & (run[1:] == run[:-1]) & (column[1:] < self._depth)
            tied[row[1:][equal]] = True
        return places[:, : self._depth].copy(), tied

    def _cut(self, scores: Floats) -> Floats:
        """``(rows, 1)``: what is below is certainly not among the best `depth`."""
        at = scores.shape[1] - self._depth
        if at < 0:
            return np.full((len(scores), 1), -np.inf, dtype=np.float32)
        return np.partition(scores, at, axis=1)[:, at, None] - self._slack

    def _too_many(self, hits: _Hits) -> Mask:
        arrived = np.bincount(hits.row, minlength=len(self._filled))
        full: Mask = self._filled + arrived > self._width
        return full

    def _still_good(self, hits: _Hits) -> _Hits:
        return hits.where(hits.score >= self.least[hits.row, 0])

    def _tighten(self) -> None:
        """Raise the bar to what has been seen, and forget what is below it."""
        self.least = np.maximum(self.least, self._cut(self._scores))
        row, column = np.nonzero((self._scores >= self.least) & np.isfinite(self._scores))
        scores, places = self._scores[row, column], self._places[row, column]
        self._filled = np.bincount(row, minlength=len(self._filled))
        self._scores.fill(-np.inf)
        at = _number_within(row)
        self._scores[row, at] = scores
        self._places[row, at] = places


class _FirstMatch:
    """The rank of each query's best match, however far down it is."""

    def __init__(
        self, space: Space, rows: Indices, vectors: Floats, codes: Indices, columns: int
    ) -> None:
        self._space, self._rows = space, rows
        self._gallery_codes, self._codes = codes[space.gallery], codes[rows]
        best = self._best_matches(vectors, columns)[:, None]
        self._lone = ~np.isfinite(best[:, 0])
        best[self._lone] = np.inf
        self._surely_before = best + space.slack
        self._maybe_before = best - space.slack
        self._before = np.zeros(len(rows), dtype=np.int64)
        self._near: list[tuple[Indices, Indices]] = []
        self._near_count = np.zeros(len(rows), dtype=np.int64)
        self.unclear = np.zeros(len(rows), dtype=np.bool_)

    def _best_matches(self, vectors: Floats, columns: int) -> Floats:
        """``(b,)`` approximate scores; -infinity where there is no match."""
        wanted = np.zeros(int(self._codes.max()) + 1, dtype=np.bool_)
        wanted[self._codes] = True
        known = self._gallery_codes < len(wanted)
        places = np.flatnonzero(known)[wanted[self._gallery_codes[known]]]
        best = np.full(len(self._rows), -np.inf, dtype=np.float32)
        for left in range(0, len(places), columns):
            part = places[left : left + columns]
            scores = self._space.approximate(self._rows, vectors, part)
            scores[self._gallery_codes[part] != self._codes[:, None]] = -np.inf
            np.maximum(best, scores.max(axis=1), out=best)
        return best

    def add(self, scores: Floats, left: int, least: Floats, hits: _Hits) -> None:
        """Count what comes before the best match, and keep what may.

        The scores are of the gallery places from `left` on; `hits` are those of at least `least`,
        ``(b, 1)``. Only where the best match lies below that are all scores looked at again.
        """
        low = np.flatnonzero((self._maybe_before < least)[:, 0])
        if len(low):
            high = np.ones(len(self._rows), dtype=np.bool_)
            high[low] = False
            hits = hits.where(high[hits.row])
            below = scores if len(low) == len(scores) else scores[low]
            sure = below > self._surely_before[low]
            self._before[low] += np.count_nonzero(sure, axis=1)
            sure ^= below >= self._maybe_before[low]
            row, column = np.divmod(np.flatnonzero(sure), scores.shape[1])
            self._keep(low[row], column + left)
        before = hits.score > self._surely_before[hits.row, 0]
        self._before += np.bincount(hits.row[before], minlength=len(self._rows))
        near = ~before & (hits.score >= self._maybe_before[hits.row, 0])
        self._keep(hits.row[near], hits.column[near] + left)

    def _keep(self, row: Indices, place: Indices) -> None:
        self._near.append((row, place))
        self._near_count += np.bincount(row, minlength=len(self._rows))
        crowded = self._near_count > _UNCLEAR
        if (crowded & ~self.unclear).any():
            self.unclear |= crowded
            self._maybe_before[crowded] = self._surely_before[crowded] = np.inf

    def finish(self, order: Indices, *, skip: Mask) -> npt.NDArray[np.float64]:
        """``(b,)`` ranks from 1, infinity without a match; those of `unclear` and `skip` are not
        to be used."""
        match = self._gallery_codes[order] == self._codes[:, None]
        at = match.argmax(axis=1)
        hit = match[np.arange(len(match)), at] & ~self._lone
        rank = np.where(hit, at + 1.0, np.inf)
        open_ = ~(hit | self._lone | self.unclear | skip)
        row = np.concatenate([part[0] for part in self._near])
        place = np.concatenate([part[1] for part in self._near])
        keep = open_[row]
        row, place = row[keep], place[keep]
        costs = self._space.pair_costs(self._rows[row], place)
        in_order = np.lexsort((place, costs, row))
        row, place = row[in_order], place[in_order]
        number = _number_within(row)
        match = self._gallery_codes[place] == self._codes[row]
        # The first match of each row; rows without one among the near do not exist.
        row, number = row[match], number[match]
        at_first = np.flatnonzero(np.diff(row, prepend=-1))
        rank[row[at_first]] = self._before[row[at_first]] + number[at_first] + 1
        return rank


def _number_within(row: Indices) -> Indices:
    """0, 1, 2, ... within each run of equal numbers of an ascending array."""
    if not len(row):
        return np.empty(0, dtype=np.int64)
    begins = np.flatnonzero(np.diff(row, prepend=-1))
    lengths = np.diff(begins, append=len(row))
    numbers: Indices = np.arange(len(row)) - np.repeat(begins, lengths)
    return numbers


def _in_blocks(values: Indices, size: int) -> Iterator[Indices]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


# --- rows ----------------------------------------------------------------------------------------


def prepare(embeddings: npt.ArrayLike, metric: str) -> tuple[Floats, float]:
    """``(N, D)`` float32: unit rows, or for ``l2`` rows about their mean, the longest of length 1.

    ``(N, K, D)`` becomes unit vectors of the same shape, for ``cosine`` only.

    Beside them: what a length of 1 was before; 1 for ``cosine``, which has no length.

    Raises:
        EmbedKitError: An embedding holds NaN or infinity.
    """
    rows = np.asarray(embeddings)
    if rows.ndim == 3 and rows.shape[1] > 0:
        if metric != "cosine":
            raise ValueError("several vectors per picture are compared by their cosines only")
        unit, length = prepare(rows.reshape(-1, rows.shape[2] or 1), metric)
        return unit.reshape(rows.shape), length
    if rows.ndim != 2:
        raise ValueError(f"embeddings must be (N, D) or (N, K, D), got shape {rows.shape}")
    blocks = [
        slice(start, start + _GALLERY_ROWS_AT_ONCE)
        for start in range(0, len(rows), _GALLERY_ROWS_AT_ONCE)
    ]
    _refuse_infinite(rows, blocks)
    prepared = np.empty(rows.shape, dtype=np.float32)
    if metric == "cosine":
        for part in blocks:
            block = rows[part].astype(np.float64)
            # Dividing by the largest entry first keeps the squares from overflowing or vanishing.
            block /= np.maximum(np.abs(block).max(axis=1, initial=0, keepdims=True), 1e-300)
            prepared[part] = block / np.maximum(_lengths(block), 1e-300)
        return prepared, 1.0
    largest = max((float(np.abs(rows[part]).max(initial=0)) for part in blocks), default=0.0)
    scale = 1 / max(largest, 1e-300)
    centre = sum(
        ((rows[part].astype(np.float64) * scale).sum(axis=0) for part in blocks),
        start=np.zeros(rows.shape[1]),
    ) / max(len(rows), 1)
    lengths = (
        _lengths(rows[part].astype(np.float64) * scale - centre).max(initial=0) for part in blocks
    )
    longest = max(max(lengths, default=0.0), 1e-300)
    for part in blocks:
        prepared[part] = (rows[part].astype(np.float64) * scale - centre) / longest
    return prepared, longest / scale


def _refuse_infinite(rows: npt.NDArray[Any], blocks: list[slice]) -> None:
    finite = np.ones(len(rows), dtype=np.bool_)
    for part in blocks:
        finite[part] = np.isfinite(rows[part]).all(axis=1)
    if not finite.all():
        raise EmbedKitError(
            "some embeddings are not finite",
            facts=f"NaN or infinity in {int((~finite).sum()):,} of {len(rows):,} rows, "
            f"first in row {int(finite.argmin())}",
            hint="a lower learning rate if this is a training that went astray",
        )


def _lengths(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    lengths: npt.NDArray[np.float64] = np.sqrt((rows * rows).sum(axis=1, keepdims=True))
    return lengths


def _squares(rows: Floats) -> npt.NDArray[np.float64]:
    squares = np.empty(len(rows))
    for start in range(0, len(rows), _GALLERY_ROWS_AT_ONCE):
        block = rows[start : start + _GALLERY_ROWS_AT_ONCE].astype(np.float64)
        squares[start : start + len(block)] = (block * block).sum(axis=1)
    return squares
