"""Prove an index whole: every byte, every vector, the store beside it, and the model if it is here.

Nothing is written; read-only media will do.
"""

from __future__ import annotations

import os
import random
import shlex
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from embedkit.errors import MismatchError
from embedkit.imaging import hash_file
from embedkit.index.catalog import Catalog, Row, Vectors, resolve_path
from embedkit.index.file import manifest_digest
from embedkit.index.learned import LEARNED
from embedkit.index.store import Item, Run, Store, store_path, writer_lock
from embedkit.runtime.contract import ModelContract

__all__ = ["Check", "Verified", "verify_index"]

_BLOCK = 4096
# A unit vector in float32 is off by about 1e-7 times the root of its width.
_UNIT = 1e-3
# The same picture through the same model on another processor: 0.99999 and better was seen.
_SAME = 0.999
# Of an index that keeps codes: what is told back is near to what was stored, on the whole.
_CODED = 0.8


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: its name, whether it is as it should be, and what was found."""

    name: str
    ok: bool
    facts: str


@dataclass(frozen=True)
class Verified:
    """What `verify_index` found.

    Attributes:
        checks: In the order they were made; what cannot be looked at for an earlier fault is left
            out.
        repair: The command that makes it whole; None where it is.
    """

    checks: list[Check]
    repair: str | None

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in self.checks)


def verify_index(
    index: Path,
    *,
    sample: int = 0,
    model: Path | None = None,
    device: str = "auto",
    seed: int = 0,
) -> Verified:
    """Look at everything an index says and holds.

    The checksum of the vectors, the lists of names, every vector finite and of unit length where
    the metric is cosine; the store's own structure, and that it holds the same pictures, labels and
    vectors under the same numbers; that the counts add up; how many files are still there; and,
    where all of that is sound, that `sample` pictures give the stored vectors again.

    Args:
        index: A catalog; where it is damaged or gone, its store alone is looked at.
        sample: Pictures to embed again, drawn from those whose files did not change.
        model: The file of the index's model; None looks for it, see `Catalog.embedder`.
        device: That embeds.
        seed: Of the draw.

    Raises:
        UsageError: There is neither a catalog nor a store, or the model is not found.
        EmbedKitError: Another process is writing the index, or it cannot be read.

    Cost: one pass over the file and one over the store, one look at each picture's file.
    """
    index = Path(os.path.realpath(index))
    if index.with_name(index.name + ".lock").exists():
        with writer_lock(index):
            pass  # nobody is writing: it was left by a process that was killed
    look = _Look(index)
    look.at_file()
    look.at_vectors()
    look.at_store()
    look.at_pictures()
    if sample:
        look.at_sample(sample, model, device, seed)
    return Verified(look.checks, look.repair())


class _Look:
    """One verification under way: what was found, and what is to be repaired from what."""

    def __init__(self, index: Path) -> None:
        self.checks: list[Check] = []
        self._index = index
        self._catalog: Catalog | None = None
        self._run: Run | None = None
        self._has_store = store_path(index).exists()
        self._bad: set[str] = set()

    def at_file(self) -> None:
        if not self._index.exists() and self._has_store:
            self._say("file", False, "there is none; only its store is here")
            return
        try:
            self._catalog = Catalog.open(self._index, verify=True)
        except MismatchError as error:
            self._say("file", False, "; ".join(filter(None, [error.what, error.facts])))
            return
        found = f"{len(self._catalog):,} pictures, {self._catalog.dim} numbers each"
        if self._catalog.has_names:
            self._say("file", True, f"{found}; every checksum agrees")
        else:
            facts = f"{found}, without names: another program rewrote it"
            self._say("file", False, facts)

    def at_vectors(self) -> None:
        if self._catalog is None:
            return
        wrong, least, most = 0, np.inf, 0.0
        for start in range(0, len(self._catalog), _BLOCK):
            end = min(start + _BLOCK, len(self._catalog))
            vectors = self._catalog.vectors(np.arange(start, end))
            finite = np.isfinite(vectors).all(axis=1)
            wrong += int((~finite).sum())
            lengths = np.linalg.norm(vectors[finite].astype(np.float64), axis=1)
            least, most = min(least, lengths.min(initial=np.inf)), max(most, lengths.max(initial=0))
        if wrong:
            self._say("vectors", False, f"{wrong:,} hold numbers that are not finite")
        elif self._catalog.metric == "cosine" and _is_exact(self._catalog):
            facts = f"all finite, lengths {least:.6f} to {most:.6f}"
            self._say("vectors", abs(least - 1) < _UNIT and abs(most - 1) < _UNIT, facts)
        else:
            self._say("vectors", True, f"all finite, lengths {least:.4f} to {most:.4f}")

    def at_store(self) -> None:
        file = store_path(self._index)
        if not self._has_store:
            self._say("store", True, "none is here: the index can be searched, not changed")
            return
        try:
            with Store(file, read_only=True) as store:
                self._check_store(store)
        except MismatchError as error:
            self._say("store", False, "; ".join(filter(None, [error.what, error.facts])))

    def _check_store(self, store: Store) -> None:
        said = store.check()
        if said:
            self._say("store", False, f"SQLite finds: {said}")
            return
        self._run = store.run()
        if self._run is None:
            self._say("store", False, "it does not say what it was built from")
            return
        usable, failed = store.count_usable(), store.count_failed()
        facts = f"{usable:,} pictures, {failed:,} that are no usable ones"
        files = sum(1 for _ in store.paths())
        self._say("store", files == usable + failed, f"{facts}, of {files:,} files")
        if self._catalog is None or not self._catalog.has_names:
            return
        if self._run.fingerprint != self._catalog.fingerprint:
            self._say("agree", False, "the store and the file were made by different models")
        elif not self._run.published or self._run.merging:
            facts = f"the store holds {usable:,} pictures, the file {len(self._catalog):,}"
            self._say("agree", False, f"a run did not end, the file is older: {facts}")
            self._bad.add("unfinished")
        elif self._run.published != manifest_digest(self._index):
            self._say("agree", False, "the file is not the one that was written from the store")
        else:
            difference = _difference(self._catalog, store, ModelContract.loads(self._run.contract))
            self._say(
                "agree",
                not difference,
                difference or "the file and its store hold the same pictures, labels and vectors",
            )

    def at_pictures(self) -> None:
        if self._catalog is None or self._catalog.root is None:
            return
        gone = sum(
            not os.path.lexists(self._catalog.hit(at).path or "")
            for at in range(len(self._catalog))
        )
        there = len(self._catalog) - gone
        facts = f"{there:,} of {len(self._catalog):,} are where they were"
        self._say("pictures", True, facts + (f", {gone:,} have gone since" if gone else ""))

    def at_sample(self, sample: int, model: Path | None, device: str, seed: int) -> None:
        file = store_path(self._index)
        if self._run is None or self._catalog is None or self._bad:
            return
        root = resolve_path(self._run.root, self._index.parent)
        with Store(file, read_only=True) as store:
            names = [name for name, _, usable in store.paths() if usable]
            random.Random(seed).shuffle(names)
            unchanged = (
                item for item in map(store.known, names) if item and _is_as_was(item, root)
            )
            drawn = list(islice(unchanged, sample))
        if not drawn:
            self._say("model", True, "no picture is as it was: none was embedded again")
            return
        paths = [root / os.fsdecode(item.path) for item in drawn]
        worst, unreadable = 1.0, 0
        with self._catalog.embedder(model, device=device) as embedder:
            for item, result in zip(drawn, embedder.embed_files(paths), strict=True):
                if result.vector is None:
                    unreadable += 1
                    continue
                # Behind the numbers there may be codes.
                stored = np.frombuffer(item.vector or b"", "<f4", self._catalog.dim)
                worst = min(worst, _cosine(stored, np.asarray(result.vector)))
        facts = f"{len(drawn):,} embedded again, least cosine {worst:.6f}"
        if unreadable:
            facts += f", {unreadable:,} not readable now"
        self._say("model", worst >= _SAME and not unreadable, facts)

    def repair(self) -> str | None:
        """The command that makes it whole; None where it is."""
        if not self._bad:
            return None
        name = shlex.quote(str(self._index))
        root = None
        if self._run is not None:
            root = resolve_path(self._run.root, self._index.parent)
        elif self._catalog is not None:
            root = self._catalog.root
        folder = "FOLDER" if root is None else shlex.quote(str(root))
        if "unfinished" in self._bad:
            return f"embedkit index {folder} -o {name}"
        if self._run is not None and self._bad <= {"file", "agree"}:
            return f"embedkit index compact {name}"
        return f"embedkit index {folder} -o {name} --rebuild"

    def _say(self, name: str, ok: bool, facts: str) -> None:
        self.checks.append(Check(name, bool(ok), facts))
        if not ok:
            self._bad.add(name)


def _difference(catalog: Catalog, store: Store, contract: ModelContract) -> str:
    """Where the file and its store differ first; empty where they do not."""
    books = contract.codebooks
    coded = books is not None and catalog.choice is not None and catalog.choice.kind == LEARNED
    exact = coded or _is_exact(catalog)
    rows = store.rows(catalog.dim, books.parts if books else 0)
    at, likeness = 0, 0.0
    while block := list(islice(rows, _BLOCK)):
        if at + len(block) > len(catalog):
            break
        stored = np.stack([row.vector for row in block])
        if coded and books is not None:
            stored = books.vectors(np.stack([row.codes for row in block if row.codes is not None]))
        published = catalog.vectors(np.arange(at, at + len(block)))
        names = _named(catalog, at, block)
        if names:
            return names
        # Bits, because what is not a number equals nothing.
        differ = stored.view(np.int32) != published.view(np.int32)
        if exact and differ.any():
            bad = int(differ.any(axis=1).argmax())
            return f"the vector of {os.fsdecode(block[bad].path)} differs"
        if not exact:
            likeness += sum(map(_cosine, stored, published))
        at += len(block)
    if at != len(catalog) or next(rows, None) is not None:
        return f"the file holds {len(catalog):,} pictures, its store another number"
    if not exact and likeness < _CODED * len(catalog):
        return f"the file's codes are not those of its vectors: mean cosine {likeness / at:.3f}"
    return ""


def _named(catalog: Catalog, at: int, block: list[Row]) -> str:
    assert catalog.root is not None, "only compared with a file that has its names"
    for position, row in enumerate(block, start=at):
        hit = catalog.hit(position)
        wanted = (row.id, catalog.root / os.fsdecode(row.path), os.fsdecode(row.label))
        if (hit.id, hit.path, hit.label) != wanted:
            return f"picture {position} is {hit.path} in the file, {wanted[1]} in its store"
    return ""


def _is_exact(catalog: Catalog) -> bool:
    """Whether the file keeps the vectors themselves, and not codes of them."""
    return catalog.choice is None or catalog.choice.score_error == 0


def _is_as_was(item: Item, root: Path) -> bool:
    """Whether a file holds what was embedded; its content is looked at where its time differs."""
    path = root / os.fsdecode(item.path)
    try:
        status = path.stat()
        if status.st_size != item.size:
            return False
        if status.st_mtime_ns == item.mtime_ns:
            return True
        return item.hash is not None and hash_file(path) == item.hash.hex()
    except OSError:
        return False


def _cosine(one: Vectors, other: Vectors) -> float:
    wide, broad = one.astype(np.float64), other.astype(np.float64)
    lengths = float(np.linalg.norm(wide) * np.linalg.norm(broad))
    return float(wide @ broad) / lengths if lengths > 0 else 0.0
