"""`catalog.faiss`: one published file with the vectors, who they are and which model made them.

`file` has its format; here it is opened, searched and written.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import faiss
import numpy as np
import numpy.typing as npt

from embedkit import __version__
from embedkit.errors import DataError, EmbedKitError, MismatchError, UsageError
from embedkit.index.choose import AT, Building, Choice, Wanted, build_index
from embedkit.index.file import (
    SCHEMA,
    Tail,
    damaged,
    publish,
    read_header,
    read_payload,
    read_tail,
    stays_on_disk,
    write_payload,
    write_tail,
    writing,
)
from embedkit.index.kinds import apply_search, base_of, factory_of, search_parameters
from embedkit.index.learned import Learned, check_kind
from embedkit.index.names import Names
from embedkit.index.scan import scan
from embedkit.index.several import check_type, likeness
from embedkit.runtime.codebooks import Codebooks, Codes

if TYPE_CHECKING:
    from embedkit.runtime import Embedder, ModelContract

__all__ = [
    "Catalog",
    "Hit",
    "Indices",
    "Row",
    "Vectors",
    "another_model",
    "described",
    "model_file",
    "portable_path",
    "resolve_path",
    "write_catalog",
]

Vectors = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
_Found = tuple[list[float], list[int]]  # scores and positions of one query's hits, in order

_BLOCK = 4096  # rows added, and queries searched, at a time
_REBUILD = "embedkit index FOLDER -o {} --rebuild"


@dataclass(frozen=True, slots=True)
class Hit:
    """One picture found.

    Attributes:
        rank: 1 is the nearest.
        score: Higher is nearer. Cosine catalogs: the cosine, -1 to 1. L2 catalogs: minus the
            Euclidean distance.
        id: The picture's number in the catalog, never given to another; its position where the
            names are gone.
        label: The first folder below the root; empty at the top level.
        name: Its path below `root`; None where the names are gone.
        root: `Catalog.root`.
    """

    rank: int
    score: float
    id: int
    label: str = ""
    name: str | None = None
    root: Path | None = None

    @property
    def path(self) -> Path | None:
        """The picture, which may have left since; None where the names are gone."""
        # Made when asked for: to join ten paths takes longer than a small index takes to search.
        return None if self.name is None or self.root is None else self.root / self.name


class Row(NamedTuple):
    """One picture to publish: path (bytes, relative to the root), label, vector ``(D,)``.

    And its codes ``(M,)`` where the model gives codes.
    """

    id: int
    path: bytes
    label: bytes
    vector: Vectors
    codes: Codes | None = None


class Catalog:
    """A published index, open for searching; several threads may search it at once.

    Attributes:
        path: The file.
        dim: Width D of a picture's row.
        parts: How many vectors a row is, side by side: two pictures are as alike as their most
            alike vectors. 1 of most models.
        metric: ``cosine`` or ``l2``.
        has_names: Whether the file still knows who its vectors are; False after another program
            rewrote it, and then `fingerprint` is empty, `root` and `model_path` are None and hits
            carry positions only.
        fingerprint: Of the model that made the vectors; 16 hex digits.
        contract_summary: What that model said about itself: name, embedding_dim, metric, precision,
            backbone, loss, ...
        root: The folder the paths are relative to.
        model_path: Where the model's file was when the catalog was written; None where that was not
            known.
        manifest: The whole manifest.
        choice: The kind of index, how it is searched, and the recall, speed and error of scores
            that were measured when it was built; None where the names are gone, or an older
            embedkit wrote the file.
    """

    def __init__(
        self, path: Path, index: Any, tail: Tail | None, choice: Choice | None = None
    ) -> None:
        here = path.parent
        self.path = path
        self._index = index
        self._tail = tail
        self.choice = choice
        self.dim = int(index.d)
        self.metric = "l2" if index.metric_type == faiss.METRIC_L2 else "cosine"
        self.has_names = tail is not None
        self.manifest: dict[str, Any] = tail.manifest if tail else {}
        model: dict[str, Any] = self.manifest.get("model", {})
        self.fingerprint: str = model.get("fingerprint", "")
        self.contract_summary: dict[str, Any] = model.get("contract", {})
        self.parts = _checked_parts(path, self.contract_summary, self.dim, self.metric)
        file, root = model.get("file"), self.manifest.get("root")
        self.model_path = resolve_path(os.fsencode(file), here) if file else None
        self.root = resolve_path(os.fsencode(root), here) if root is not None else None

    @classmethod
    def open(cls, path: Path | str, *, mmap: bool = False, verify: bool = False) -> Catalog:
        """Open a catalog; nothing is written, so read-only media will do.

        Always checked: the type against an allow-list, part by part, every length, the names'
        checksums, and that vectors and names agree. It is searched as it was tuned when built. A
        file whose tail was lost (another program rewrote it) opens without names.

        Args:
            path: The file that `write_catalog` or ``embedkit index`` wrote.
            mmap: Map the file instead of reading it: a large catalog opens at once, and one of the
                type ivf-disk that has its names always is. Replace such a file only by renaming
                another over it; cutting it short while it is mapped ends the process.
            verify: Also compare the vectors with their checksum: one pass over the file, about 0.7
                s per GB.

        Raises:
            UsageError: There is no such file.
            MismatchError: No catalog, of an unknown kind, cut short or damaged.

        Cost: reads the file once; with `mmap` only the names, about 50 bytes a picture, to compare
        their checksums.
        """
        path = Path(os.path.realpath(path))
        try:
            with path.open("rb") as file:
                header = read_header(file, path)
                mmap = mmap or stays_on_disk(file)
                tail = read_tail(file, path, header, mapped=mmap)
                index, crc = read_payload(file, path, header, mapped=mmap, verify=verify)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise UsageError(
                f"there is no index {path}",
                facts=os.strerror(error.errno or 0),
                hint=f"embedkit index FOLDER -o {path.name}",
            ) from error
        except OSError as error:
            raise EmbedKitError(f"the index {path} cannot be read", facts=str(error)) from error
        if tail and verify and crc != tail.payload_crc:
            raise damaged(path, "its vectors do not give the checksum they were written with")
        return cls(path, index, tail, _checked_choice(path, index, tail))

    def __len__(self) -> int:
        """How many pictures it holds."""
        return int(self._index.ntotal)

    def search(
        self, vectors: npt.ArrayLike, k: int = 10, *, among: npt.ArrayLike | None = None
    ) -> list[list[Hit]]:
        """The nearest pictures of each query, nearest first.

        Scores are computed in float64 from the stored vectors, so they depend on the two vectors
        alone, not on how many queries came together; equal scores stand in the order of their ids,
        in a flat index also across the cut at `k`. A flat index stores the vectors as they are;
        what the others lose by rounding them is `Choice.score_error`, and what they miss of the
        nearest `Choice.recall`.

        Args:
            vectors: ``(Q, D)``, unit rows for a cosine catalog (as an `Embedder` gives them); Q may
                be 0.
            k: How many, at least 1; more than the catalog holds gives all it holds.
            among: Positions to choose from, each once (`positions_labelled`); None: all. Every one
                of them is looked at, whatever the kind of index.

        Returns:
            Q lists of ``min(k, len(self))`` hits; or of ``min(k, len(among))``. A graph (hnsw) may
            find fewer.

        Raises:
            MismatchError: Vectors of another width, or a stored vector that is not finite.
            UsageError: Not ``(Q, D)``, a number that is not finite, `k` below 1, or no positions of
                this catalog.

        Of several vectors per picture the score is the greatest of their cosines, and every picture
        is looked at.

        Cost: flat O(Q N D); with `among` of M positions O(Q M D) in every kind of index; with K
        vectors per picture K times that.
        """
        queries = self._checked(vectors)
        if k < 1:
            raise UsageError(f"k must be at least 1, got {k}")
        chosen = None if among is None else self._checked_positions(among)
        k = min(k, len(self) if chosen is None else len(chosen))
        if k == 0:
            return [[] for _ in queries]
        return [
            hits
            for start in range(0, len(queries), _BLOCK)
            for hits in self._hits(self._nearest(queries[start : start + _BLOCK], k, chosen))
        ]

    def vectors(self, positions: npt.ArrayLike) -> Vectors:
        """The stored vectors ``(M, D)`` at these positions, 0 to ``len(self) - 1``.

        Raises:
            UsageError: There is no such position.
        """
        chosen = self._checked_positions(positions)
        if not len(chosen):
            return np.empty((0, self.dim), np.float32)
        return np.asarray(self._index.reconstruct_batch(chosen), np.float32)

    def scores(self, query: npt.ArrayLike, positions: npt.ArrayLike) -> Vectors:
        """``(M,)``: what `search` gives the pictures at these positions for one query ``(D,)``."""
        (vector,) = self._checked(np.asarray(query)[None])
        chosen = self._checked_positions(positions)
        if not len(chosen):
            return np.empty(0, np.float32)
        return self._scores(self._exact(vector, chosen)[0])

    def positions(self, hits: Iterable[Hit]) -> Indices:
        """Where these hits of this catalog stand in it."""
        ids = np.array([hit.id for hit in hits], np.int64)
        return ids if self._tail is None else np.searchsorted(self._tail.ids, ids)

    def position_of(self, path: bytes) -> int | None:
        """Where the picture of this path, relative to `root`, stands; None: there is none.

        Cost: one pass over the names, about 50 bytes a picture.
        """
        if self._tail is None or not path:
            return None
        names, ends = self._tail.paths, self._tail.path_offsets
        pattern, start = re.compile(re.escape(path)), 0  # finds in bytes and in mapped ones
        while place := pattern.search(names, start):
            found = place.start()
            at = int(np.searchsorted(ends, found))
            if ends[at] == found and ends[at + 1] == found + len(path):
                return at
            # In the middle of a name, or the start of a longer one: the next name's start.
            start = int(ends[at + (ends[at] == found)])
        return None

    def labels(self) -> list[str]:
        """The label of every picture, by position; all empty where the names are gone."""
        if self._tail is None:
            return [""] * len(self)
        return [os.fsdecode(self._tail.label(position)) for position in range(len(self))]

    def positions_labelled(self, labels: Iterable[str]) -> Indices:
        """The positions of all pictures that have one of these labels, ascending.

        Cost: O(N), about 0.4 s a million.
        """
        wanted = set(labels)
        found = [at for at, label in enumerate(self.labels()) if label in wanted]
        return np.array(found, np.int64)

    def hit(self, position: int, *, rank: int = 1, score: float = 0.0) -> Hit:
        """The picture at a position, as a hit: who it is."""
        (at,) = self._checked_positions([position]).tolist()
        ((hit,),) = self._hits([([score], [at])])
        return replace(hit, rank=rank)

    def check_model(self, contract: ModelContract) -> None:
        """Refuse a model that did not make this catalog, of whatever width.

        Where the names are gone the model is not known, and only the width can be compared.

        Raises:
            MismatchError: It is another model; the message names both.
        """
        if self.has_names and contract.fingerprint != self.fingerprint:
            summary = self.contract_summary
            raise another_model(self.path, described(self.fingerprint, summary), contract)
        if contract.embedding_dim != self.dim:
            raise MismatchError(
                f"{self.path.name} was made by another model",
                facts=f"its vectors are {self.dim} wide, "
                f"those of {contract.name!r} {contract.embedding_dim}",
                hint=_REBUILD.format(self.path.name),
            )
        if contract.vectors != self.parts:
            raise MismatchError(
                f"{self.path.name} no longer says how many vectors a picture has",
                facts=f"{contract.name!r} gives {contract.vectors} of each",
                hint=_REBUILD.format(self.path.name),
            )

    def find_model(self) -> Path | None:
        """The file of this catalog's model: beside the catalog, else where it was; None: neither.

        Where both places hold a file, the one with the catalog's fingerprint.
        """
        return model_file(self.model_path, self.path.parent, self.fingerprint)

    def embedder(
        self, model: Path | None = None, *, device: str = "auto", backend: str = "auto"
    ) -> Embedder:
        """The model that made this catalog, loaded.

        Args:
            model: Its file; None takes `find_model`. Another model will do while ``embedkit index
                migrate`` goes on to it: its vectors are carried over the bridge between the two.
            device: As for `Embedder.load`.
            backend: As for `Embedder.load`.

        Raises:
            UsageError: None was given and none was found.
            MismatchError: What was given or found is another model.
        """
        from embedkit.index.migrate import bridged
        from embedkit.runtime import Embedder

        file = model or self.find_model()
        if file is None:
            was = f"it was {self.model_path}" if self.model_path else "where it was is not known"
            raise UsageError(
                f"the model of {self.path.name} is not to be found",
                facts=f"{described(self.fingerprint, self.contract_summary)}; {was}"
                if self.has_names
                else "this file no longer knows its model",
                hint="put the model's file beside the index, or name it: --model FILE",
            )
        whole = Embedder.load(file, device=device, backend=backend)
        embedder = whole.cut(self.dim) if self.dim in whole.contract.widths else whole
        try:
            self.check_model(embedder.contract)
        except MismatchError:
            over = bridged(self, whole)
            if over is not None:
                return over
            whole.close()
            raise
        return embedder

    def _checked(self, vectors: npt.ArrayLike) -> Vectors:
        try:
            queries = np.ascontiguousarray(vectors, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise UsageError("the vectors to search with are no array of numbers") from error
        if queries.ndim != 2:
            raise UsageError(
                f"vectors to search with must be (Q, {self.dim}), got shape {queries.shape}"
            )
        if queries.shape[1] != self.dim:
            raise MismatchError(
                f"these vectors do not belong to {self.path.name}",
                facts=f"they are {queries.shape[1]} wide, the index holds vectors of {self.dim}",
                hint="embed the query with the model that made the index",
            )
        if not np.isfinite(queries).all():
            bad = int(np.flatnonzero(~np.isfinite(queries).all(axis=1))[0])
            raise UsageError(f"query {bad} has numbers that are not finite")
        return queries

    def _checked_positions(self, positions: npt.ArrayLike) -> Indices:
        chosen = np.asarray(positions, np.int64)
        if chosen.ndim != 1 or (len(chosen) and not 0 <= chosen.min() <= chosen.max() < len(self)):
            raise UsageError(f"positions in {self.path.name} are 0 to {len(self) - 1}, one list")
        return chosen

    def _nearest(self, queries: Vectors, k: int, among: Indices | None) -> list[_Found]:
        """Scores and positions of the `k` nearest of each ``(Q, D)``, by score, then position."""
        if among is None and self.parts > 1:
            among = np.arange(len(self))
        if among is None and not isinstance(self._index, faiss.IndexFlat):
            return self._roughly_nearest(queries, k)
        return self._exactly_nearest(queries, k, among)

    def _roughly_nearest(self, queries: Vectors, k: int) -> list[_Found]:
        """What the index finds, as it was tuned; the scores of `_near`."""
        fetch = min(len(self), max(k, AT) + 1)  # never less than it was tuned for
        positions = np.asarray(self._index.search(queries, fetch)[1])
        if positions.min(initial=0) < 0:
            positions = self._widely(queries, fetch, positions)
        if positions.max(initial=0) >= len(self):
            raise damaged(self.path, "FAISS finds vectors that are not there")
        found: list[_Found] = []
        for query, row in zip(queries, positions, strict=True):
            at = row if row[-1] >= 0 else row[row >= 0]
            scores = self._scores(self._near(query, at)[0])
            order = np.lexsort((at, -scores))[:k]
            found.append((scores[order].tolist(), at[order].tolist()))
        return found

    def _widely(self, queries: Vectors, fetch: int, positions: Indices) -> Indices:
        """Search again, with the greatest effort, where fewer than `fetch` were found."""
        lacking = np.flatnonzero((positions < 0).any(axis=1))
        if isinstance(self._index, faiss.IndexHNSW):
            wide: Any = faiss.SearchParametersHNSW()  # type: ignore[attr-defined]
            wide.efSearch = min(len(self), 8 * fetch)
        elif "nprobe" in search_parameters(self._index):
            every = faiss.SearchParametersIVF()
            every.nprobe = base_of(self._index).nlist
            wide = faiss.IndexRefineSearchParameters()
            wide.k_factor, wide.base_index_params = self._index.k_factor, every
        else:
            raise damaged(self.path, "FAISS finds fewer vectors than it holds")
        positions = positions.copy()
        # faiss.contrib.torch_utils, which pytorch-metric-learning imports, puts a search without
        # `params` in this one's place.
        search = getattr(self._index, "search_numpy", self._index.search)
        found = search(queries[lacking], fetch, params=wide)[1]
        positions[lacking] = np.asarray(found)
        return positions

    def _exactly_nearest(self, queries: Vectors, k: int, among: Indices | None) -> list[_Found]:
        """The same by looking at every vector.

        FAISS ranks in float32 with sums that depend on the batch, and leaves open which of equal
        vectors it returns. So a few more than `k` are fetched and ranked again exactly; where the
        last one fetched is too near to the k-th to be told apart, more are fetched.
        """
        found: list[_Found] = [([], [])] * len(queries)
        todo = np.arange(len(queries))
        count = len(self) if among is None else len(among)
        fetch = min(count, k + k // 4 + 16)
        while len(todo):
            if among is None:
                rough, positions = self._index.search(queries[todo], fetch)
            else:
                rough, positions = scan(
                    self.vectors, among, queries[todo], fetch, self.metric, parts=self.parts
                )
            again: list[int] = []
            for row, query in enumerate(todo.tolist()):
                near, blur = self._exact(queries[query], positions[row])
                score = self._scores(near)
                order = np.lexsort((positions[row], -score))[:k]
                last = -rough[row, -1] if self.metric == "l2" else rough[row, -1]
                if fetch < count and last >= near[order[-1]] - blur:
                    again.append(query)
                    continue
                found[query] = (score[order].tolist(), positions[row][order].tolist())
            todo = np.asarray(again, dtype=np.int64)
            fetch = min(count, 8 * fetch)
        return found

    def _scores(self, near: npt.NDArray[np.float64]) -> Vectors:
        scores: Vectors = (-np.sqrt(-near) if self.metric == "l2" else near).astype(np.float32)
        return scores

    def _exact(
        self, query: Vectors, positions: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float64], float]:
        """Inner product or minus squared distance of the vectors at `positions`; FAISS's error."""
        if (positions < 0).any():
            raise damaged(self.path, "FAISS finds fewer vectors than it holds")
        near, rows = self._near(query, positions)
        # float32 sums are off by about 1e-6 of the squared lengths: this is ten times that.
        lengths = float((rows**2).sum(axis=1).max())
        return near, 1e-5 * max(float((query.astype(np.float64) ** 2).sum()), lengths)

    def _near(
        self, query: Vectors, positions: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Inner product or minus squared distance of what is at `positions`; and the vectors."""
        with np.errstate(invalid="ignore"):  # told once, as damage
            rows = np.asarray(self._index.reconstruct_batch(positions), np.float64)
            if self.parts > 1:
                near = likeness(query[None], rows, self.parts)[0]
            elif self.metric == "l2":
                near = -((rows - query) ** 2).sum(axis=1)
            else:
                near = (rows * query).sum(axis=1)
        if not np.isfinite(near).all():
            raise damaged(self.path, "it holds vectors that are not finite")
        return near, rows

    def _hits(self, found: list[_Found]) -> list[list[Hit]]:
        """Who these are, ranked as they stand."""
        if self._tail is None or self.root is None:
            return [
                [Hit(rank, *one) for rank, one in enumerate(zip(*both, strict=True), 1)]
                for both in found
            ]
        # All names at once: numpy's calls cost more than what they do for ten hits.
        every = np.array([at for _, positions in found for at in positions], np.int64)
        about = zip(*self._tail.names(every), repeat(self.root), strict=False)
        # `scores` first in the zip: at its end nothing of the next query's is taken.
        return [
            [
                Hit(rank, score, *who)
                for rank, (score, who) in enumerate(zip(scores, about, strict=False), 1)
            ]
            for scores, _ in found
        ]


def write_catalog(
    path: Path,
    rows: Iterable[Row],
    *,
    contract: ModelContract,
    root: Path,
    model: Path | None = None,
    wanted: Wanted | None = None,
    building: Building | None = None,
) -> int:
    """Publish a catalog: readers see the old file or the new one, whole, whatever happens.

    A temporary file in the same folder is written, measured, read back and forced to the disk; then
    one rename, and the folder is forced too. The same rows give the same bytes, but for the
    measured speed, and the graph of hnsw where several threads build it.

    Args:
        path: The file; replaced when there.
        rows: In ascending order of id, at least one; vectors ``(D,)``, unit length where the metric
            is cosine. They are gone through several times; an iterator is read into a list first.
        contract: Of the model that made the vectors.
        root: The folder the rows' paths are relative to. It is kept relative to the catalog where
            the two share a parent, so that they can be moved together.
        model: The model's file, kept in the same way.
        wanted: The type of index, recall and memory; None lets `build_index` choose.
        building: Called as the index is built.

    Returns:
        How many pictures were published.

    Raises:
        DataError: No rows; nothing is written.
        EmbedKitError: The file cannot be written (a full disk, no permission); the old one stands.
        MismatchError: Rows out of order or of another width than the contract's, or without the
            codes that the wanted type keeps.
        UsageError: A type that cannot hold several vectors per picture, where the model gives them.

    Memory: what `build_index` takes.
    """
    path = Path(os.path.realpath(path))
    rows = list(rows) if iter(rows) is rows else rows
    with writing(path), Names(path.parent) as names:
        for some in _in_blocks(rows):
            names.add(some)
        if names.count == 0:
            raise DataError(
                "there is no usable picture to put into an index",
                facts=f"looked in {root}",
                hint="embedkit index FOLDER, with a folder that holds pictures",
            )
        dim, books = contract.embedding_dim, contract.codebooks
        wanted = wanted or Wanted()
        check_type(contract, wanted)
        check_kind(wanted.type, contract)
        index, choice = build_index(
            lambda: (_stack(some, dim) for some in _in_blocks(rows)),
            names.count,
            dim,
            contract.metric,
            wanted if contract.vectors == 1 else replace(wanted, type="flat"),
            names=names.size,
            learned=None if books is None else Learned(books, partial(_code_blocks, rows, books)),
            building=building,
            scratch=path.parent,
        )
        manifest: dict[str, Any] = {
            "schema": SCHEMA,
            "root": os.fsdecode(portable_path(root, path.parent)),
            "model": {
                "fingerprint": contract.fingerprint,
                "file": os.fsdecode(portable_path(model, path.parent)) if model else None,
                "contract": summarize(contract),
            },
            "versions": {
                "embedkit": __version__,
                "faiss": faiss.__version__,
                "numpy": np.__version__,
            },
        }

        def write(file: BinaryIO) -> None:
            length, crc = write_payload(file, index)
            manifest["index"] = {
                **replace(choice, bytes_per_vector=round(length / names.count, 1)).to_json(),
                "wanted": wanted.dumps(),
                "type": type(index).__name__,
                "metric": contract.metric,
                "dim": contract.embedding_dim,
                "count": int(index.ntotal),
                "payload_bytes": length,
                "payload_crc32": crc,
            }
            text = json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False)
            write_tail(file, text.encode(), names.columns())

        publish(path, write)
        return int(index.ntotal)


def _checked_choice(path: Path, index: Any, tail: Tail | None) -> Choice | None:
    """See that the index is one of ours in every part, and let it search as it was tuned."""
    try:
        factory = factory_of(index)
        said: dict[str, Any] = tail.manifest["index"] if tail else {"factory": factory}
        if said["factory"] != factory:
            raise ValueError(f"its tail describes {said['factory']}, its vectors are {factory}")
        choice = Choice.from_json(said) if "kind" in said else None
        apply_search(index, choice.search if choice else search_parameters(index))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged(path, f"{error}") from error
    return choice


def _checked_parts(path: Path, summary: dict[str, Any], dim: int, metric: str) -> int:
    """How many vectors of a picture are in a row."""
    parts = summary.get("vectors", 1)
    if not isinstance(parts, int) or parts < 1 or dim % parts or (parts > 1 and metric != "cosine"):
        raise damaged(path, f"rows of {dim} numbers, compared by {metric}, are no {parts} vectors")
    return parts


def _in_blocks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    remaining = iter(rows)
    while block := list(islice(remaining, _BLOCK)):
        yield block


def portable_path(path: Path, start: Path) -> bytes:
    """How a file in `start` remembers `path`: relative where they share a folder below ``/``."""
    path, start = Path(os.path.realpath(path)), Path(os.path.realpath(start))
    shared = os.path.commonpath([path, start])
    near = shared != os.path.sep or start == Path(shared)
    return os.fsencode(os.path.relpath(path, start) if near else path)


def resolve_path(remembered: bytes, start: Path) -> Path:
    """The path that `portable_path` remembered, for a file that is in `start` now."""
    return Path(os.path.normpath(start / os.fsdecode(remembered)))


def model_file(was: Path | None, beside: Path, fingerprint: str) -> Path | None:
    """A model's file: of its name in the folder `beside`, else where it `was`; None: neither.

    Where both hold a file, the one with the fingerprint; where neither has it, the first.
    """
    if was is None:
        return None
    places = [place for place in dict.fromkeys((beside / was.name, was)) if place.is_file()]
    if len(places) < 2:
        return places[0] if places else None
    return next((place for place in places if fingerprint in _fingerprints(place)), places[0])


def summarize(contract: ModelContract) -> dict[str, Any]:
    """What an index remembers of a contract, for people and for `described`."""
    return {
        "name": contract.name,
        "embedding_dim": contract.embedding_dim,
        "metric": contract.metric,
        "normalizes": contract.normalizes,
        "precision": contract.precision,
        "backbone": contract.backbone,
        "pooling": contract.pooling,
        "loss": contract.loss,
        "preprocess": contract.preprocess.fingerprint(),
        **({"vectors": contract.vectors} if contract.vectors > 1 else {}),
    }


def described(fingerprint: str, summary: dict[str, Any]) -> str:
    """A model in a few words: ``'shoes', 128 wide, fingerprint 0123...``."""
    return (
        f"{summary.get('name', '?')!r}, {summary.get('embedding_dim', '?')} wide, "
        f"fingerprint {fingerprint}"
    )


def another_model(index: Path, own: str, contract: ModelContract) -> MismatchError:
    """The sentence for a model that is not the index's own."""
    return MismatchError(
        f"{index.name} was made by another model",
        facts=f"the index: {own}\n"
        f"this model: {described(contract.fingerprint, summarize(contract))}",
        hint="use the index's own model: --model FILE,\n"
        f"or go on to this one: embedkit index migrate {index.name} --to FILE,\n"
        f"or embed every picture again: {_REBUILD.format(index.name)}",
    )


def _fingerprints(model: Path) -> set[str]:
    """Of a model at all its widths."""
    from embedkit.runtime import read_contract

    try:
        contract = read_contract(model)
    except MismatchError:
        return set()  # no model of ours: not the one that is looked for
    return {contract.cut(width).fingerprint for width in contract.widths}


def _stack(rows: list[Row], dim: int) -> Vectors:
    for row in rows:
        if row.vector.shape != (dim,):
            raise MismatchError(
                f"a vector of shape {row.vector.shape} does not belong to a model of width {dim}",
                facts=os.fsdecode(row.path),
            )
    return np.stack([row.vector for row in rows]).astype(np.float32, copy=False)


def _code_blocks(rows: Iterable[Row], books: Codebooks) -> Iterator[Codes]:
    return (_stack_codes(some, books) for some in _in_blocks(rows))


def _stack_codes(rows: list[Row], books: Codebooks) -> Codes:
    for row in rows:
        codes = row.codes
        if codes is None or codes.shape != (books.parts,) or codes.max() >= books.words:
            raise MismatchError(
                f"a picture without {books.parts} codes below {books.words}",
                facts=os.fsdecode(row.path),
                hint=f"embed every picture again: {_REBUILD.format('NAME.faiss')}",
            )
    return np.stack([row.codes for row in rows if row.codes is not None])
