"""Make an index true to a folder: only new pixels are embedded, renames are free, deletions leave.

A killed or interrupted sync loses at most one batch: the old catalog stands, and the next sync goes
on. What the user said about single files outlasts every sync: what was removed by hand stays out,
what was added from elsewhere stays in.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from embedkit.errors import DataError, ImageError, Interrupted, MismatchError, UsageError
from embedkit.imaging import IMAGE_SUFFIXES, Limits, Shard, find_images, hash_file
from embedkit.index.catalog import (
    Catalog,
    Row,
    another_model,
    described,
    model_file,
    portable_path,
    resolve_path,
    write_catalog,
)
from embedkit.index.choose import Building, Wanted
from embedkit.index.file import is_faiss, manifest_digest
from embedkit.index.learned import check_kind
from embedkit.index.several import check_type
from embedkit.index.store import (
    UNREADABLE,
    UNSETTLED,
    Choices,
    Content,
    Item,
    Run,
    Seen,
    Store,
    store_path,
    writer_lock,
)

if TYPE_CHECKING:
    from embedkit.runtime import Embedded, ModelContract

__all__ = [
    "FileEmbedder",
    "Progress",
    "SyncReport",
    "add_files",
    "folder_label",
    "is_walked",
    "known_run",
    "name_of",
    "publish_store",
    "remembered_dim",
    "remembered_model",
    "remove_leftovers",
    "sync_folder",
]

Progress = Callable[[int, int, int], None]
"""``progress(done, failed, total)``: that many more done, that many of them failed, of `total`."""

# Files hashed and looked up at a time; their vectors are embedded as one stream.
_CHUNK = 1024
# A file written less than this long before it was looked at may be written again within its own
# clock's tick.
_SETTLES_AFTER = 2_000_000_000


class FileEmbedder(Protocol):
    """What a sync needs of an `Embedder`."""

    @property
    def contract(self) -> ModelContract: ...

    def embed_files(
        self, paths: Iterable[Path], *, batch: int = ..., workers: int | None = ...
    ) -> Generator[Embedded, None, None]: ...


@dataclass(frozen=True)
class SyncReport:
    """What a sync did; ``found == embedded + unchanged + moved + failed``, always.

    Attributes:
        found: Pictures in the folder, and those that were added from elsewhere.
        embedded: New or changed ones that went through the model.
        unchanged: As they were.
        moved: Renamed ones and copies: content that was known under another name.
        failed: No usable pictures, now or remembered from before.
        removed: Pictures that left the index because their files are gone.
        left_out: Pictures in the folder that were removed by hand; not among those found.
        failures: Every failed file of the folder and why, by name.
        count: Pictures in the published catalog.
        published: Whether a catalog was written; False where the old one was true already.
        seconds: The whole sync.
        embed_seconds: The part spent on embedding.
    """

    found: int
    embedded: int
    unchanged: int
    moved: int
    failed: int
    removed: int
    left_out: int
    failures: list[tuple[Path, ImageError]]
    count: int
    published: bool
    seconds: float
    embed_seconds: float


def sync_folder(
    folder: Path,
    index: Path,
    embedder: FileEmbedder,
    *,
    model: Path | None = None,
    batch: int = 32,
    workers: int | None = None,
    rebuild: bool = False,
    retry: bool = False,
    labels: Mapping[bytes, bytes] | None = None,
    wanted: Wanted | None = None,
    shard: Shard | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    building: Building | None = None,
) -> SyncReport:
    """Bring `index` and its store to what `folder` holds.

    A file whose size and time are as remembered is not opened; otherwise its content hash decides.
    What failed is remembered and tried again when the file changes; what could not be read at all
    is tried by every sync. What `remove_files` removed stays out. What `add_files` added from
    elsewhere is followed like the folder, and is a failure, by name, while its file is gone.

    Args:
        folder: Searched at any depth.
        index: The catalog to publish; its store is `index` + ``.store``.
        embedder: Its contract says which model this is.
        model: The model's file, remembered so that searching finds it.
        batch: Pictures per run of the model, and per commit.
        workers: Threads that decode and hash; None lets the embedder choose.
        rebuild: Forget the store and embed everything again, with whatever model this is. What was
            added, removed and labelled by hand is kept where it is the same folder's.
        retry: Try again what failed before.
        labels: By name (`name_of`), in place of the first folder's name; kept for later syncs.
        wanted: The kind of index; what it does not say stays as it was said before.
        shard: Of the folder's pictures only those in it, by their names; not remembered.
        dry_run: Count what would be done and write nothing; pictures not looked into count as
            embedded.
        progress: Called as the work goes on.
        building: Called as the index is built from the vectors.

    Raises:
        DataError: No picture in the folder, or no usable one; the catalog that was there stands.
        MismatchError: The index was made by another model, or its store is damaged.
        UsageError: The index belongs to another folder that is still there, or is to be of a type
            that cannot hold the model's vectors.
        EmbedKitError: Something cannot be written, or another process is writing this index.
        Interrupted: Ctrl-C; what was embedded is kept.
    """
    started = time.monotonic()
    root, index = Path(os.path.realpath(folder)), Path(os.path.realpath(index))
    if batch < 1:
        raise UsageError(f"batch must be at least 1, got {batch}")
    _check_target(index)
    check_type(embedder.contract, wanted or Wanted())
    check_kind(wanted.type if wanted else None, embedder.contract)
    share = shard or Shard()
    if not any(share.has(name_of(file, root)) for file in find_images(root)):
        raise DataError(
            f"there is no picture in {root}" + (f" for shard {share}" if share.count > 1 else ""),
            facts="looked at any depth, by the ending of the names",
            hint="embedkit index FOLDER, with a folder that holds pictures",
        )
    sync = _Sync(root, index, embedder, batch, workers, progress, shard=share)
    file = store_path(index)
    try:
        if dry_run:
            begun = file.exists() and not rebuild
            with Store(file if begun else None, read_only=True) as store:
                if rebuild:
                    store.take_choices(_kept_choices(file, root))
                else:
                    sync.check_owner(store)
                sync.look(store, retry=retry)
            return sync.report(started, published=False)
        with writer_lock(index):
            remove_leftovers(index)
            choices = _kept_choices(file, root) if rebuild else None
            if rebuild:
                _begin_anew(file, choices)
            with Store(file) as store:
                if not rebuild:
                    sync.check_owner(store)
                if retry:
                    store.forget_failures()
                if labels:
                    store.give_labels(labels)
                said = (wanted or Wanted()).over(Wanted.loads(store.wanted()))
                check_type(embedder.contract, said)
                check_kind(said.type, embedder.contract)
                if wanted:
                    store.want(said.dumps())
                sync.run(store, model)
                return sync.report(started, published=sync.publish(store, building))
    except KeyboardInterrupt as error:
        raise _interrupted() from error


def add_files(
    index: Path,
    paths: Sequence[Path],
    embedder: FileEmbedder,
    *,
    label: str | None = None,
    model: Path | None = None,
    batch: int = 32,
    workers: int | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> SyncReport:
    """Put single files into an index, or back into it, without looking at the rest of its folder.

    A file from outside the folder is remembered under its full path and belongs to the index until
    `remove_files` takes it out; every sync looks whether it changed. One that is no usable picture
    is not remembered. Killed or interrupted, the next sync goes on.

    Args:
        index: A catalog that has its store.
        paths: Files, or folders for the pictures that are in them now.
        embedder: Of the index's own model.
        label: Of all of them. None: inside the folder as a sync gives it; elsewhere the first
            folder below the one that was given, else that folder's own name.
        model: As for `sync_folder`.
        batch: As for `sync_folder`.
        workers: As for `sync_folder`.
        dry_run: Count what would be done and write nothing.
        progress: Called as the work goes on.

    Returns:
        Counts of these files alone; `SyncReport.count` is that of the whole index.

    Raises:
        UsageError: A path is not there, or no file; nothing is changed.
        MismatchError: Another model, no store, or a damaged one.
        EmbedKitError: Something cannot be written, or another process is writing this index.
        Interrupted: Ctrl-C; what was embedded is kept.
    """
    started = time.monotonic()
    index = Path(os.path.realpath(index))
    file, root = store_path(index), resolve_path(known_run(index).root, index.parent)
    named = _labelled(paths, root, label)
    sync = _Sync(root, index, embedder, batch, workers, progress, only=list(named))
    labels = {name: os.fsencode(text) for name, text in named.items() if text is not None}
    try:
        if dry_run:
            with Store(file, read_only=True) as store:
                sync.check_owner(store)
                sync.look(store, retry=False)
            return sync.report(started, published=False)
        with writer_lock(index):
            remove_leftovers(index)
            with Store(file) as store:
                sync.check_owner(store)
                before = set(store.added())
                strangers = [name for name in named if not is_walked(name)]
                store.choose(added=strangers, neither=named)
                store.give_labels(labels)
                sync.run(store, model)
                failed = [name for name, _, _ in store.failures()]
                useless = {name for name in failed if not is_walked(name)} - before
                store.choose(neither=useless)
                store.forget(useless)
                return sync.report(started, published=sync.publish(store))
    except KeyboardInterrupt as error:
        raise _interrupted() from error


def name_of(path: Path, root: Path) -> bytes:
    """How an index calls a file: relative to its root, in full where the file lies elsewhere.

    Links among its folders are resolved, as `root` has to be; the file itself may be a link.
    """
    real = Path(os.path.realpath(path.parent)) / path.name
    return os.fsencode(real.relative_to(root) if real.is_relative_to(root) else real)


def known_run(index: Path) -> Run:
    """What an index was built from, by its store.

    Raises:
        UsageError: There is no such index.
        MismatchError: Its store is gone or damaged: it can be searched, but not changed.
    """
    file = store_path(index)
    if file.exists():
        with Store(file, read_only=True) as store:
            run = store.run()
        if run is not None:
            return run
    catalog = Catalog.open(index, mmap=True)
    folder = "FOLDER" if catalog.root is None else shlex.quote(str(catalog.root))
    raise MismatchError(
        f"the store of {index.name} is gone, and without it the index cannot be changed",
        facts=f"there is no {file}",
        hint=f"make it again: embedkit index {folder} -o {shlex.quote(str(index))}",
    )


class _Rows:
    """What is to be published, from the store anew each time it is gone through."""

    def __init__(self, store: Store, contract: ModelContract) -> None:
        self._store, self._dim = store, contract.embedding_dim
        self._parts = contract.codebooks.parts if contract.codebooks else 0

    def __iter__(self) -> Iterator[Row]:
        return self._store.rows(self._dim, self._parts)


def publish_store(store: Store, index: Path, building: Building | None = None) -> bool:
    """Write the catalog that equals the store, unless it is there and whole; whether it was not.

    Its kind is what the store was told: `Store.want`.

    Raises:
        DataError: No file of the store has a vector; the catalog that was there stands.
        EmbedKitError: It cannot be written.
    """
    from embedkit.runtime import ModelContract

    run = store.run()
    assert run is not None, "a store that is published knows what it was built from"
    if run.published and run.published == manifest_digest(index):
        return False
    contract = ModelContract.loads(run.contract)
    write_catalog(
        index,
        _Rows(store, contract),
        contract=contract,
        root=resolve_path(run.root, index.parent),
        model=resolve_path(run.model, index.parent) if run.model else None,
        wanted=Wanted.loads(store.wanted()),
        building=building,
    )
    store.set_published(manifest_digest(index))
    return True


def remembered_model(index: Path) -> Path | None:
    """The model's file of an index, begun or finished: beside it, else where it was; else None.

    None also where the index is damaged: `sync_folder` tells that.
    """
    index = Path(os.path.realpath(index))
    file = store_path(index)
    try:
        if file.exists():
            with Store(file, read_only=True) as store:
                run = store.run()
            if run is None or run.model is None:
                return None
            was = resolve_path(run.model, index.parent)
            return model_file(was, index.parent, run.fingerprint)
        return Catalog.open(index, mmap=True).find_model() if index.exists() else None
    except MismatchError:
        return None


def remembered_dim(index: Path) -> int | None:
    """The width of the vectors of an index, begun or finished; None where there is none yet.

    None also where it is damaged: `sync_folder` tells that.
    """
    index = Path(os.path.realpath(index))
    file = store_path(index)
    try:
        if file.exists():
            with Store(file, read_only=True) as store:
                run = store.run()
            return None if run is None else int(json.loads(run.contract)["embedding_dim"])
        return Catalog.open(index, mmap=True).dim if index.exists() else None
    except (MismatchError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class _Found:
    """One file whose content was looked up.

    Attributes:
        seen: As the walk met it.
        hash: Of its content; None where it could not be read, or is too long to be a picture.
        known: What its content gave before; None: it has to be embedded.
        same: Its content is what is remembered under this very name.
    """

    seen: Seen
    hash: bytes | None
    known: Content | None
    same: bool


class _Sync:
    """One sync under way: its counts, and what is done but not yet committed."""

    def __init__(
        self,
        root: Path,
        index: Path,
        embedder: FileEmbedder,
        batch: int,
        workers: int | None,
        progress: Progress | None,
        *,
        only: list[bytes] | None = None,
        shard: Shard | None = None,
    ) -> None:
        self._root = root
        self._index = index
        self._embedder = embedder
        self._batch = batch
        self._workers = workers
        self._progress = progress
        self._only = only
        self._shard = shard or Shard()
        self._labels: dict[bytes, bytes] = {}
        self._walked_at = 0
        self._total = 0
        self._found = self._embedded = self._unchanged = self._moved = self._failed = 0
        self._removed = self._left_out = self._count = 0
        self._embed_seconds = 0.0
        self._failures: dict[bytes, ImageError] = {}
        self._waiting: list[Item] = []
        self._touched: list[Seen] = []

    def check_owner(self, store: Store) -> None:
        """Refuse another model and another folder before anything is changed."""
        contract = self._embedder.contract
        if contract.metric == "cosine" and not contract.normalizes:
            raise MismatchError(
                f"the vectors of {contract.name!r} have no unit length, and are to be compared "
                "by their cosine",
                hint="export the model again with: embedkit export",
            )
        run = store.run()
        here = self._index.parent
        if run is not None:
            own, summary = run.fingerprint, json.loads(run.contract)
            was = resolve_path(run.root, here)
        elif self._index.exists():
            # A catalog without its store: its pictures are embedded again, by the same model only.
            catalog = Catalog.open(self._index, mmap=True)
            if catalog.root is None:
                raise MismatchError(
                    f"{self._index.name} does not say which model made it",
                    facts="it is a FAISS file that another program wrote",
                    hint="choose another name: -o NAME.faiss, or replace it: --rebuild",
                )
            own, summary, was = catalog.fingerprint, catalog.contract_summary, catalog.root
        else:
            return
        if own != contract.fingerprint:
            raise another_model(self._index, described(own, summary), contract)
        if was != self._root and was.is_dir():
            raise UsageError(
                f"{self._index.name} is the index of another folder",
                facts=f"the index: {was}\nthis folder: {self._root}",
                hint="give this folder an index of its own: -o NAME.faiss,\n"
                "or let it take over: --rebuild",
            )

    def look(self, store: Store, *, retry: bool) -> None:
        """Count what a run would do; a picture it would embed counts as embedded, usable or not."""
        self._walk(store)
        self._read_failures(store)
        if retry:
            self._embedded, self._failed, self._failures = self._failed, 0, {}
        met: set[bytes] = set()
        for file in (file for chunk in self._chunks(store) for file in chunk):
            known = file.known
            if known is not None and known.error is not None and not (retry and file.hash):
                self._failed += 1
                self._failures[file.seen.path] = ImageError(known.error, known.reason or "")
            elif file.same and known is not None and known.vector is not None:
                self._unchanged += 1
            elif file.hash in met or (known is not None and known.vector is not None):
                self._moved += 1
            else:
                self._embedded += 1
                if file.hash is not None:
                    met.add(file.hash)
        if self._only is None:
            self._removed = store.count_gone()
            self._count = self._found - self._failed
        else:
            self._count = store.count_usable()

    def run(self, store: Store, model: Path | None) -> None:
        """Bring the store to what the folder holds."""
        self._walk(store)
        self._set_run(store, model)
        self._labels = store.labels()
        try:
            for chunk in self._chunks(store):
                self._take(store, chunk)
        except KeyboardInterrupt:
            self._commit(store)
            raise
        self._commit(store)
        if self._only is None:
            self._removed = store.count_gone()
            store.remove_gone()
        self._count = store.count_usable()
        self._read_failures(store)

    def publish(self, store: Store, building: Building | None = None) -> bool:
        """Write the catalog, unless the one that is there equals the store and is whole."""
        if self._count == 0:
            if not self._failures:
                raise DataError(
                    f"every picture in {self._root} was removed by hand",
                    hint="embedkit index add INDEX PATHS takes them back",
                )
            name, error = next(iter(self._failures.items()))
            raise DataError(
                f"no picture in {self._root} is usable",
                facts=f"{self._found:,} looked at; the first: {os.fsdecode(name)}: {error.reason}",
                hint="embedkit index FOLDER, with a folder that holds pictures",
            )
        return publish_store(store, self._index, building)

    def report(self, started: float, *, published: bool) -> SyncReport:
        parts = self._embedded + self._unchanged + self._moved + self._failed
        assert self._found == parts, f"{self._found} found, {parts} accounted for"
        return SyncReport(
            found=self._found,
            embedded=self._embedded,
            unchanged=self._unchanged,
            moved=self._moved,
            failed=self._failed,
            removed=self._removed,
            left_out=self._left_out,
            failures=[(self._path(name), error) for name, error in sorted(self._failures.items())],
            count=self._count,
            published=published,
            seconds=time.monotonic() - started,
            embed_seconds=self._embed_seconds,
        )

    def _walk(self, store: Store) -> None:
        self._walked_at = time.time_ns()
        self._found = store.see(self._seen(store.added()))
        if self._only is None:
            self._left_out = store.leave_out()
            self._found -= self._left_out
        self._unchanged, self._failed = store.settled()
        self._total = self._found - self._unchanged - self._failed

    def _seen(self, added: list[bytes]) -> Iterator[Seen]:
        if self._only is None:
            for path in find_images(self._root):
                name = os.fsencode(path.relative_to(self._root))
                if self._shard.has(name):
                    yield Seen(name, *_stamp(path))
        for name in added if self._only is None else self._only:
            path = self._path(name)
            # The folder may have come to hold what was added when it lay elsewhere.
            if self._only is not None or not is_walked(name_of(path, self._root)):
                yield Seen(name, *_stamp(path))

    def _set_run(self, store: Store, model: Path | None) -> None:
        here = self._index.parent
        contract = self._embedder.contract
        before = store.run()
        own = before.model if before else None
        now = Run(
            fingerprint=contract.fingerprint,
            contract=contract.dumps(),
            root=portable_path(self._root, here),
            model=portable_path(model, here) if model else own,
        )
        if before is None or now != replace(before, published=""):
            store.set_run(now)

    def _chunks(self, store: Store) -> Iterator[list[_Found]]:
        """What is not settled, in the order of the walk; a chunk is hashed while another embeds."""
        pool = ThreadPoolExecutor(self._workers or os.cpu_count() or 1)

        def start(after: int) -> tuple[int, list[tuple[Seen, Future[bytes | str | None]]]]:
            rows = store.pending(after, _CHUNK)
            jobs = [(seen, pool.submit(self._hash, seen)) for _, seen in rows]
            return (rows[-1][0] if rows else after), jobs

        try:
            last, jobs = start(0)
            while jobs:
                hashed = [(seen, job.result()) for seen, job in jobs]
                last, jobs = start(last)
                yield [self._looked_up(store, seen, content) for seen, content in hashed]
        finally:
            pool.shutdown(cancel_futures=True)

    def _hash(self, seen: Seen) -> bytes | str | None:
        """The content's hash; the reason it cannot be read; None where it is too long anyway."""
        if seen.size > Limits().max_bytes:
            return None
        try:
            return bytes.fromhex(hash_file(self._path(seen.path)))
        except OSError as error:
            return error.strerror or str(error)

    def _looked_up(self, store: Store, seen: Seen, content: bytes | str | None) -> _Found:
        if isinstance(content, str):
            return _Found(seen, None, Content(None, UNREADABLE, content), same=False)
        if content is None:
            return _Found(seen, None, None, same=False)
        known = store.content(content)
        same = known is not None and store.hash_of(seen.path) == content
        return _Found(seen, content, known, same)

    def _take(self, store: Store, chunk: list[_Found]) -> None:
        """Embed what is new in a chunk; remember all of it in its order, so that ids repeat."""
        queue = deque(_first_of_each(chunk))
        if not queue:
            self._finish(store, chunk, queue, iter(()))
            return
        started = time.monotonic()
        with closing(self._embed(queue)) as results:
            self._finish(store, chunk, queue, results)
        self._embed_seconds += time.monotonic() - started

    def _finish(
        self, store: Store, chunk: list[_Found], queue: deque[_Found], results: Iterator[Embedded]
    ) -> None:
        new: dict[bytes, Content] = {}
        for file in chunk:
            known = file.known
            copy = known is not None
            if known is None and file.hash is not None and file.hash in new:
                known, copy = new[file.hash], True
            elif known is None and queue and queue[0] is file:
                queue.popleft()
                known = self._judged(next(results), file)
            elif known is None:
                # A copy of a picture that was changed under way: it has to be looked at by itself.
                known = self._judged(next(self._embed([file])), file)
            # Written to while it was read, it may have given neither the old picture nor the new
            # one.
            steady = _stamp(self._path(file.seen.path)) == (file.seen.size, file.seen.mtime_ns)
            if steady and file.hash is not None:
                new[file.hash] = known
            self._remember(file, known, copy=copy, steady=steady)
            if len(self._waiting) >= self._batch:
                self._commit(store)

    def _judged(self, result: Embedded, file: _Found) -> Content:
        return _judged(result, self._path(file.seen.path), self._embedder.contract)

    def _embed(self, files: Iterable[_Found]) -> Generator[Embedded, None, None]:
        paths = [self._path(file.seen.path) for file in files]
        return self._embedder.embed_files(paths, batch=self._batch, workers=self._workers)

    def _remember(self, file: _Found, known: Content, *, copy: bool, steady: bool) -> None:
        if known.error is not None:
            self._failed += 1
        elif not copy:
            self._embedded += 1
        elif file.same:
            self._unchanged += 1
        else:
            self._moved += 1
        if self._progress:
            self._progress(1, int(known.error is not None), self._total)
        seen = file.seen
        # A time this near to the walk may stay the same when the file is written again: look again
        # next time.
        settled = steady and self._walked_at - seen.mtime_ns > _SETTLES_AFTER
        mtime = seen.mtime_ns if settled else UNSETTLED
        if file.same and steady:
            self._touched.append(Seen(seen.path, seen.size, mtime))
            return
        self._waiting.append(
            Item(
                path=seen.path,
                size=seen.size,
                mtime_ns=mtime,
                hash=file.hash if steady and known.error != UNREADABLE else None,
                label=self._labels.get(seen.path, folder_label(seen.path)),
                error=known.error,
                reason=known.reason,
                vector=known.vector,
            )
        )

    def _commit(self, store: Store) -> None:
        store.put(self._waiting)
        self._waiting.clear()
        store.touch(self._touched)
        self._touched.clear()

    def _read_failures(self, store: Store) -> None:
        self._failures = {name: ImageError(code, reason) for name, code, reason in store.failures()}

    def _path(self, name: bytes) -> Path:
        return self._root / os.fsdecode(name)


def _first_of_each(chunk: list[_Found]) -> Iterator[_Found]:
    """Files to embed: of several with the same content only the first."""
    met: set[bytes] = set()
    for file in chunk:
        if file.known is not None or file.hash in met:
            continue
        if file.hash is not None:
            met.add(file.hash)
        yield file


def _judged(result: Embedded, path: Path, contract: ModelContract) -> Content:
    assert result.path == path, f"asked for {path}, got {result.path}"
    if result.error is not None:
        return Content(None, result.error.code, result.error.reason)
    vector = np.asarray(result.vector, dtype="<f4")
    if not np.isfinite(vector).all():
        return Content(None, "unsupported", "the model gives no finite vector for it")
    if contract.codebooks is None:
        return Content(vector.tobytes(), None, None)
    if result.codes is None:
        raise MismatchError(
            f"what runs {contract.name!r} gives vectors alone, and an index keeps its codes too",
            hint="fill the index with the .onnx file, and leave --backend out",
        )
    return Content(vector.tobytes() + result.codes.tobytes(), None, None)


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of a file; -1 and `UNSETTLED` where it has none."""
    try:
        status = path.stat()
    except OSError:
        return -1, UNSETTLED
    return status.st_size, status.st_mtime_ns


def _check_target(index: Path) -> None:
    """Refuse to write where no index belongs."""
    if not index.parent.is_dir():
        raise UsageError(
            f"there is no folder {index.parent}", hint="name a folder that is there: -o FILE"
        )
    if index.is_dir():
        raise UsageError(f"{index} is a folder", hint=f"name a file: -o {index}/catalog.faiss")
    if index.exists() and not is_faiss(index):
        raise UsageError(
            f"{index} is no index, and will not be overwritten",
            hint="choose another name: -o NAME.faiss, or delete it first",
        )


def remove_leftovers(index: Path) -> None:
    """Remove what a killed process left unfinished. Only while `writer_lock` is held."""
    for file in list(index.parent.iterdir()):
        if file.name.startswith(f"{index.name}.tmp."):
            file.unlink(missing_ok=True)


def _kept_choices(file: Path, root: Path) -> Choices | None:
    """What the user said about single files of this folder; None where there is nothing to keep."""
    if not file.exists():
        return None
    try:
        with Store(file, read_only=True) as store:
            run = store.run()
            if run is None:
                return None
            was = resolve_path(run.root, file.parent)
            return store.choices() if was == root or not was.is_dir() else None
    except MismatchError:
        return None  # damaged, or of another version: a rebuild is the way out of that


def _begin_anew(file: Path, choices: Choices | None) -> None:
    """Empty the store, in one transaction where it can be read, so that no choice is lost."""
    if choices is not None:
        with Store(file) as store:
            store.clear()
        return
    for end in ("", "-wal", "-shm", "-journal"):
        file.with_name(file.name + end).unlink(missing_ok=True)


def _interrupted() -> Interrupted:
    return Interrupted(
        "interrupted; what was embedded is kept", hint="run the same command again to go on"
    )


def is_walked(name: bytes) -> bool:
    """Whether a walk of the root meets a file of this name."""
    return not name.startswith(b"/") and Path(os.fsdecode(name)).suffix.lower() in IMAGE_SUFFIXES


def folder_label(name: bytes) -> bytes:
    """The first folder below the root; empty at its top."""
    return name.split(b"/")[0] if b"/" in name else b""


def _labelled(paths: Sequence[Path], root: Path, label: str | None) -> dict[bytes, str | None]:
    """Every file that is meant, by name, with its label; None: the one a sync would give."""
    named: dict[bytes, str | None] = {}
    for given in paths:
        if given.is_dir():
            folder = Path(os.path.realpath(given))
            found = [(file, file.relative_to(folder).parts) for file in find_images(folder)]
            if not found:
                raise UsageError(f"there is no picture in {given}")
        elif given.is_file():
            folder = Path(os.path.realpath(given.parent))
            found = [(folder / given.name, (given.name,))]
        else:
            raise UsageError(
                f"{str(given)!r} cannot be added",
                facts="it is no file" if os.path.lexists(given) else "there is no such file",
            )
        for file, parts in found:
            name = name_of(file, root)
            own = None if is_walked(name) else parts[0] if len(parts) > 1 else folder.name
            named.setdefault(name, label or own)
    if not named:
        raise UsageError("nothing was named to be added", hint="embedkit index add INDEX PATHS")
    return named
