"""Everything that may go wrong around an index, on purpose, many times: one table, one exit code.

    python -m benchmarks.torture                 the long form, about an hour of one core
    python -m benchmarks.torture --short         about a minute
    python -m benchmarks.torture --minutes 5     the long form, cut where the time is up

kills      SIGKILL at random moments of a sync, with edits between
publish    SIGKILL at random moments of writing a catalog
points     SIGKILL ahead of every line of our code, in a sync and in each verb
disk       no room, from none to enough: by a limit in steps of 4 KiB, and on a real full disk
readers    a writer, four readers that check every answer, and a second writer that is sent away
catalogs   damaged catalogs of every kind through the loader
models     damaged model files through the loader
placements a model that wants another file, in every place and in every way the format allows

Nothing may crash, hang, be lost or be wrong in silence; what is wrong is named, and the exit code
is 1. The model is a fake that makes a vector of a file's bytes, so that every answer can be known
without the code that is tested.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import faiss
import numpy as np

from embedkit.errors import EmbedKitError, MismatchError, UsageError
from embedkit.index import Catalog, Row, sync_folder, write_catalog
from embedkit.index.edit import compact_index, remove_files
from embedkit.index.merge import merge_indexes
from embedkit.index.store import Store, store_path
from embedkit.index.sync import add_files, remove_leftovers
from embedkit.index.verify import verify_index
from tests.index.fakes import FakeEmbedder, contract, names_and_vectors, truth

__all__ = ["TRIALS", "Outcome", "main"]

BATCH = 8
_SIGNALS = {-number.value: number.name for number in signal.Signals}


@dataclass
class Outcome:
    """What one trial met: how often it tried, what was wrong, and what it saw, counted."""

    tries: int = 0
    wrong: list[str] = field(default_factory=list)
    seen: dict[str, int] = field(default_factory=dict)

    def count(self, what: str, by: int = 1) -> None:
        self.seen[what] = self.seen.get(what, 0) + by

    def check(self, right: bool, otherwise: str) -> None:
        if not right:
            self.wrong.append(otherwise)


@dataclass(frozen=True)
class Trial:
    """How a trial is run, and how often in the three lengths."""

    run: Callable[[Path, random.Random, Clock, int], Outcome]
    tiny: int
    short: int
    long: int


class Clock:
    """When to stop early."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def up(self) -> bool:
        return self._end is not None and time.monotonic() > self._end


# --- kills --------------------------------------------------------------------------------------


def kills(place: Path, rng: random.Random, clock: Clock, count: int) -> Outcome:
    """Syncs killed at random moments, the folder edited after each; the last one is left to end."""
    outcome = Outcome()
    root, index, log = place / "photos", place / "c.faiss", place / "embedded"
    root.mkdir()
    files = min(3000, 60 + 10 * count)
    for n in range(files):
        (root / f"{n}.jpg").write_bytes(b"bad" if n % 50 == 7 else b"picture %d" % n)
    started = time.monotonic()
    seconds = 0.5
    published: dict[bytes, tuple[bytes, bytes]] | None = None
    deaths = 0
    while deaths < count and not clock.up():
        outcome.tries += 1
        child = _fork(_logged_sync, root, index, log)
        time.sleep(rng.uniform(0, seconds))
        died = _kill(child)
        deaths += died
        outcome.count("killed" if died else "ended first")
        now = names_and_vectors(index) if index.exists() else None
        outcome.check(
            now in (published, truth(root)), f"try {outcome.tries}: a catalog that never was true"
        )
        published = now
        with Store(store_path(index)) as store:
            outcome.check(store.check() == "", f"try {outcome.tries}: the store is damaged")
        seconds = 1.3 * seconds if died and deaths % 4 == 0 else seconds
        seconds = min(seconds, 3.0) if died else max(0.02, 0.5 * seconds)
        _edit(root, rng, outcome.tries)
    _logged_sync(root, index, log)
    outcome.check(names_and_vectors(index) == truth(root), "the last catalog is not the folder's")
    outcome.check(verify_index(index).ok, "the last catalog does not verify")
    embedded = log.read_bytes().splitlines()
    again = len(embedded) - len(set(embedded))
    outcome.check(again <= BATCH * deaths, f"{again} pictures embedded twice in {deaths} kills")
    outcome.count("embedded twice", again)
    outcome.check(
        sync_folder(root, index, FakeEmbedder()).embedded == 0, "a settled folder was embedded"
    )
    _check_beside(outcome, index, {"photos", "embedded"})
    outcome.count("seconds", round(time.monotonic() - started))
    return outcome


def _logged_sync(root: Path, index: Path, log: Path) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(path: Path) -> None:
        content = path.read_bytes()
        if not content.startswith(b"bad"):
            os.write(handle, content + b"\n")

    sync_folder(root, index, FakeEmbedder(seconds=0.001, before=note), batch=BATCH)
    os.close(handle)


def _edit(root: Path, rng: random.Random, number: int) -> None:
    files = sorted(root.glob("*.jpg"))
    for path in rng.sample(files, min(6, len(files) // 2)):
        new = root / f"{number}-{rng.randrange(10**9)}.jpg"
        choice = rng.randrange(5)
        if choice == 0:
            path.unlink()
        elif choice == 1:
            path.write_bytes(b"edit %d %d" % (number, rng.randrange(10**9)))
        elif choice == 2:
            path.rename(new)
        elif choice == 3:
            shutil.copy(path, new)
        else:
            new.write_bytes(b"new %d %d" % (number, rng.randrange(10**9)))


# --- publish ------------------------------------------------------------------------------------


def publish(place: Path, rng: random.Random, clock: Clock, count: int) -> Outcome:
    """A process that does nothing but publish two catalogs in turn, killed again and again."""
    outcome = Outcome()
    index = place / "c.faiss"
    both = [_rows(400, 64, seed) for seed in range(2)]
    allowed = set()
    for rows in both:
        write_catalog(index, rows, contract=contract(dim=64), root=place)
        allowed.add(index.read_bytes())

    def forever() -> None:
        for rows in itertools.cycle(both):
            write_catalog(index, rows, contract=contract(dim=64), root=place)

    while outcome.tries < count and not clock.up():
        outcome.tries += 1
        child = _fork(forever)
        time.sleep(rng.uniform(0, 0.05))
        outcome.check(_kill(child), f"kill {outcome.tries}: it ended by itself")
        outcome.check(index.read_bytes() in allowed, f"kill {outcome.tries}: neither old nor new")
        left = [path for path in place.iterdir() if path != index]
        outcome.count("died inside a write", len(left))
        outcome.check(len(left) <= 1, f"kill {outcome.tries}: {left}")
        remove_leftovers(index)
        _check_beside(outcome, index, set())
    return outcome


def _rows(count: int, dim: int, seed: int) -> list[Row]:
    vectors = np.random.default_rng(seed).standard_normal((count, dim), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [
        Row(n + 1, b"class%d/%d.jpg" % (n % 7, n), b"class%d" % (n % 7), vectors[n])
        for n in range(count)
    ]


# --- points -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Act:
    """Something done to an index, and what makes it good after a death in the middle."""

    name: str
    do: Callable[[Path], object]
    again: Callable[[Path], object]


def _acts() -> list[_Act]:
    def sync(at: Path) -> object:
        return sync_folder(at / "photos", at / "c.faiss", FakeEmbedder(), batch=2)

    def anew(at: Path) -> object:
        return sync_folder(at / "photos", at / "c.faiss", FakeEmbedder(), rebuild=True)

    def add(at: Path) -> object:
        return add_files(at / "c.faiss", [at.parent / "more"], FakeEmbedder(), batch=2)

    def rm(at: Path) -> object:
        return remove_files(at / "c.faiss", [at / "photos/class0", at.parent / "else/x.jpg"])

    def rm_again(at: Path) -> object:
        with contextlib.suppress(UsageError):  # all of it is done but the publishing
            rm(at)
        return compact_index(at / "c.faiss")

    def merge(at: Path) -> object:
        return merge_indexes(at / "m.faiss", [at / "c.faiss", at / "d.faiss"])

    def merge_again(at: Path) -> object:
        with contextlib.suppress(UsageError):  # it is there already, and whole
            return merge(at)
        return None

    def compact(at: Path) -> object:
        return compact_index(at / "c.faiss")

    return [
        _Act("sync", sync, sync),
        _Act("rebuild", anew, anew),
        _Act("add", add, add),
        _Act("rm", rm, rm_again),
        _Act("compact", compact, compact),
        _Act("merge", merge, merge_again),
    ]


def points(place: Path, rng: random.Random, clock: Clock, count: int) -> Outcome:
    """Each act, killed ahead of lines of our code: `count` of them each, evenly spread."""
    outcome = Outcome()
    start = place / "start"
    _prepared(start)
    for act in _acts():
        done = place / "done"
        shutil.copytree(start, done, symlinks=True)
        _wait(_fork(_traced, act.do, done, None, place / "lines"))
        lines = int((place / "lines").read_text())
        old, new = _states(start), _states(done)
        act.again(done)
        last = _states(done)
        shutil.rmtree(done)
        step = max(1.0, lines / count)
        for number in range(min(count, lines)):
            if clock.up():
                return outcome
            line = int(number * step + rng.uniform(0, step))
            at = place / "at"
            shutil.copytree(start, at, symlinks=True)
            outcome.tries += 1
            code = _wait(_fork(_traced, act.do, at, line, place / "lines"))
            where = f"{act.name}, line {line} of {lines}"
            outcome.count(act.name if code == -signal.SIGKILL else "not reached")
            for name, state in _states(at).items():
                known = (old.get(name), new[name])
                outcome.check(state in known, f"{where}: {name} is neither old nor new")
            try:
                act.again(at)
            except EmbedKitError as error:
                outcome.wrong.append(f"{where}: not made good: {error}")
            outcome.check(_states(at) == last, f"{where}: made good, it is not the new one")
            for name in new:
                outcome.check(verify_index(at / name).ok, f"{where}: {name} does not verify")
            left = [path.name for path in at.iterdir() if ".tmp." in path.name]
            outcome.check(not left, f"{where}: left {left}")
            shutil.rmtree(at)
    return outcome


def _prepared(at: Path) -> None:
    """A settled index with edits waiting, another one, and pictures elsewhere."""
    beside = at.parent
    for path in [
        *(at / f"photos/class{n % 3}/{n}.jpg" for n in range(9)),
        *(at / f"other/{n}.jpg" for n in range(3)),
        *(beside / f"more/{n}.jpg" for n in range(3)),
        beside / "else/x.jpg",
    ]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(path))
        os.utime(path, (1_700_000_000,) * 2)
    sync_folder(at / "photos", at / "c.faiss", FakeEmbedder())
    sync_folder(at / "other", at / "d.faiss", FakeEmbedder())
    add_files(at / "c.faiss", [beside / "else/x.jpg"], FakeEmbedder())
    (at / "photos/class1/1.jpg").unlink()
    (at / "photos/class1/4.jpg").rename(at / "photos/moved.jpg")
    for n in range(3):
        (at / f"photos/new{n}.jpg").write_bytes(b"new %d" % n)


def _states(at: Path) -> dict[str, dict[bytes, tuple[bytes, bytes]]]:
    """What each catalog of a place holds; full names as if they were in one place."""
    here = os.fsencode(at)
    return {
        path.name: {name.replace(here, b""): pair for name, pair in names_and_vectors(path).items()}
        for path in sorted(at.glob("*.faiss"))
    }


def _traced(act: Callable[[Path], object], at: Path, last: int | None, told: Path) -> None:
    """Do it, dead ahead of line number `last` of the index's code; how many there were is told."""
    lines = 0

    def local(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        if event == "line":
            if lines == last:
                os.kill(os.getpid(), signal.SIGKILL)
            lines += 1
        return local

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        return local if "/embedkit/index/" in frame.f_code.co_filename else None

    sys.settrace(enter)
    try:
        act(at)
    finally:
        sys.settrace(None)
    told.write_text(str(lines))


# --- disk ---------------------------------------------------------------------------------------


def disk(place: Path, rng: random.Random, clock: Clock, count: int) -> Outcome:
    """Room for a sync from none to more than enough: first by a limit, then on a disk of 16 MB."""
    outcome = Outcome()
    limited = place / "limited"
    limited.mkdir()
    _sweep(outcome, limited, clock, count, None)
    if shutil.which("unshare") and not clock.up():
        done = subprocess.run(
            [
                "unshare",
                "-rm",
                "sh",
                "-c",
                'mount -t tmpfs -o size=16m none "$1" && exec "$2" '
                '-m benchmarks.torture --inside "$1" --count "$3"',
                "sh",
                str(place),
                sys.executable,
                str(count),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            inside = json.loads(done.stdout)
            outcome.tries += inside["tries"]
            outcome.wrong += inside["wrong"]
            for what, number in inside["seen"].items():
                outcome.count(f"{what} on a full disk", number)
        else:
            outcome.count("real disk: not allowed here")
    return outcome


def _sweep(outcome: Outcome, place: Path, clock: Clock, count: int, size: int | None) -> None:
    """Syncs of a new folder over an old catalog, each with 4 KiB more room than the last."""
    root, index = place / "photos", place / "c.faiss"
    root.mkdir()
    (root / "first.jpg").write_bytes(b"first")
    sync_folder(root, index, FakeEmbedder(dim=512))
    old = truth(root, 512)
    saved = {path: path.read_bytes() for path in (index, store_path(index))}
    for n in range(100):
        (root / f"{n}.jpg").write_bytes(b"%d" % n)
    new = truth(root, 512)
    most = 1 << 20 if size is None else 2 << 20
    step = max(4096, most // count)
    for room in range(0, most, step):
        if clock.up():
            return
        for path, content in saved.items():
            path.write_bytes(content)
        filler = place / "filler"
        if size is not None:
            _fill(filler, place, room)
        outcome.tries += 1
        code = _wait(_fork(_sync_with, root, index, room if size is None else None))
        outcome.check(code in (0, 10), f"room {room}: ended with {code}")
        outcome.count("ended" if code == 0 else "refused")
        held = names_and_vectors(index)
        outcome.check(held == (new if code == 0 else old), f"room {room}: wrong catalog")
        filler.unlink(missing_ok=True)
        left = [path.name for path in place.glob("*.tmp.*")]
        outcome.check(not left, f"room {room}: left {left}")
        sync_folder(root, index, FakeEmbedder(dim=512))
        outcome.check(names_and_vectors(index) == new, f"room {room}: not made good afterwards")
        for end in ("-wal", "-shm"):
            store_path(index).with_name(store_path(index).name + end).unlink(missing_ok=True)
    outcome.check(outcome.seen.get("ended", 0) > 0, "there was never room enough")
    outcome.check(outcome.seen.get("refused", 0) > 0, "the room was never too small")


def _sync_with(root: Path, index: Path, limit: int | None) -> None:
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        sync_folder(root, index, FakeEmbedder(dim=512), batch=4)
    except EmbedKitError as error:
        said = str(error)
        told = error.exit_code == 1 and index.name in said and error.hint
        os._exit(10 if told else 11)


def _fill(filler: Path, place: Path, room: int) -> None:
    """Take all of the disk but `room` bytes."""
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    with filler.open("wb") as file:
        file.write(bytes(max(0, free - room)))


# --- readers ------------------------------------------------------------------------------------


def readers(place: Path, rng: random.Random, clock: Clock, count: int) -> Outcome:
    """A writer that edits and syncs, four readers, and now and then a second writer."""
    outcome = Outcome()
    root, index = place / "photos", place / "c.faiss"
    root.mkdir()
    for n in range(200):
        (root / f"{n}.jpg").write_bytes(b"picture %d" % n)
    sync_folder(root, index, FakeEmbedder())
    end = time.monotonic() + count
    stop = place / "stop"

    def read(number: int) -> None:
        own = random.Random(number)
        opened = 0
        while not stop.exists():
            catalog = Catalog.open(index, verify=True, mmap=bool(own.randrange(2)))
            held = catalog.vectors([own.randrange(len(catalog)) for _ in range(5)])
            for vector, hits in zip(held, catalog.search(held, 3), strict=True):
                if not np.isclose(hits[0].score, 1, atol=1e-5) or hits[0].path is None:
                    os._exit(11)
                if not np.array_equal(catalog.vectors(catalog.positions(hits[:1]))[0], vector):
                    os._exit(12)
            opened += 1
        (place / f"reader{number}").write_text(str(opened))

    children = [_fork(read, number) for number in range(4)]
    try:
        while time.monotonic() < end and not clock.up():
            _edit(root, rng, outcome.tries)
            outcome.tries += 1
            writer = _fork(_write, root, index, 0.0)
            second = _fork(_write, root, index, 0.02)
            outcome.count(
                {0: "two in turn", 10: "second refused"}.get(_wait(second), "second: wrong answer")
            )
            outcome.check(_wait(writer) in (0, 10), "a writer failed")
    finally:
        stop.touch()
        codes = [_wait(child) for child in children]
    outcome.check(codes == [0] * 4, f"readers ended with {codes}")
    outcome.check("second: wrong answer" not in outcome.seen, "a second writer was not told why")
    sync_folder(root, index, FakeEmbedder())
    outcome.check(names_and_vectors(index) == truth(root), "the last catalog is not the folder's")
    for number in range(4):
        with contextlib.suppress(FileNotFoundError):
            outcome.count("opened", int((place / f"reader{number}").read_text()))
    return outcome


def _write(root: Path, index: Path, after: float) -> None:
    """A sync; leaves with 10 where another writer was there, as the error says."""
    time.sleep(after)
    try:
        sync_folder(root, index, FakeEmbedder(seconds=0.002))
    except EmbedKitError as error:
        os._exit(10 if "another embedkit is writing" in str(error) else 11)


# --- damaged files ------------------------------------------------------------------------------


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One of the ways a file is damaged: cut, bits, numbers, pages, pieces moved or doubled."""
    out = bytearray(data)
    at = rng.randrange(len(data))
    near = rng.randrange(min(len(data), 400))
    end = len(data) - 1 - rng.randrange(min(len(data), 2000))
    kind = rng.randrange(9)
    if kind == 0:
        return data[:at]
    if kind <= 2:
        out[at if kind == 1 else near] ^= 1 << rng.randrange(8)
    elif kind == 3:
        out[end] ^= 1 << rng.randrange(8)
    elif kind <= 5:
        start = at if kind == 4 else near
        number = rng.choice([0, 1, -1, 255, 1 << 31, (1 << 63) - 1, rng.getrandbits(63)])
        size = rng.choice([4, 8])
        out[start : start + size] = (number & (1 << 8 * size) - 1).to_bytes(size, "little")
    elif kind == 6:
        page = at & ~4095
        out[page : page + 4096] = bytes(len(out[page : page + 4096]))
    elif kind == 7:
        other = rng.randrange(len(data))
        size = rng.randrange(1, 65)
        out[at : at + size] = data[other : other + size]
    else:
        out[at:at] = rng.randbytes(rng.randrange(1, 9))
    return bytes(out)


def catalogs(place: Path, rng: random.Random, clock: Clock, count: int) -> Outcome:
    """Damaged catalogs: refused, or as good as whole; never another answer, never a crash."""
    from embedkit.index.choose import Wanted

    asked = np.stack([row.vector for row in _rows(5, 16, 99)])
    originals = []
    kinds = {"flat": 60, "pq": 1500, "ivf": 3000, "ivf-disk": 1500, "hnsw": 600, "tiny": 1500}
    for kind, rows in kinds.items():
        index = place / f"{kind}.faiss"
        write_catalog(
            index,
            _clustered(rows, 16),
            contract=contract(dim=16),
            root=place,
            wanted=Wanted(type=kind, recall=0.5),
        )
        catalog = Catalog.open(index, verify=True)
        originals.append((kind, index.read_bytes(), _answers(catalog, asked)))

    def one(seed: int) -> str:
        own = random.Random(seed)
        kind, data, expected = originals[seed % len(originals)]
        path = place / f"damaged{os.getpid()}.faiss"
        path.write_bytes(mutate(data, own))
        try:
            catalog = Catalog.open(path, verify=True, mmap=bool(seed % 3 == 0))
            found = _answers(catalog, asked)
        except MismatchError:
            return "refused"
        finally:
            path.unlink()
        if not catalog.has_names:
            # Cut right behind the vectors: it is what another program writes, and says so.
            same = [[(s, i + 1) for s, i, *_ in hits] for hits in found]
            return "without names" if same == _numbers(expected) else f"wrong: {kind}, no names"
        return "as good as whole" if found == expected else f"wrong: {kind}"

    return _batches(rng, clock, count, one)


def _clustered(count: int, dim: int) -> list[Row]:
    """Rows as a model gives them: near to one of a few dozen centres."""
    rows = _rows(count, dim, 0)
    centres = [row.vector for row in _rows(40, dim, 1)]
    found = []
    for n, row in enumerate(rows):
        vector = centres[n % 40] + 0.3 * row.vector
        found.append(row._replace(vector=(vector / np.linalg.norm(vector)).astype(np.float32)))
    return found


def _answers(catalog: Catalog, asked: Any) -> list[list[tuple[float, int, str, str]]]:
    # The place does not count: a damaged copy may lie elsewhere.
    return [
        [(hit.score, hit.id, hit.path.name if hit.path else "", hit.label) for hit in hits]
        for hits in catalog.search(asked, 10)
    ]


def _numbers(answers: list[list[tuple[float, int, str, str]]]) -> list[list[tuple[float, int]]]:
    return [[(score, number) for score, number, *_ in hits] for hits in answers]


def models(place: Path, rng: random.Random, clock: Clock, count: int) -> Outcome:
    """Damaged models: refused, another model by its own word, or as good as whole."""
    from embedkit.runtime import Embedder
    from embedkit.runtime.seal import sealed
    from tests.tiny_model import tiny_vectors, write_tiny_model

    path = place / "m.onnx"
    own_contract = write_tiny_model(path)
    data = sealed(path.read_bytes())
    pixels = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    expected = tiny_vectors(pixels)

    def one(seed: int) -> str:
        damaged = place / f"damaged{os.getpid()}.onnx"
        damaged.write_bytes(mutate(data, random.Random(seed)))
        try:
            with Embedder.load(damaged, device="cpu") as embedder:
                other = embedder.contract.fingerprint != own_contract.fingerprint
                vectors = embedder.embed_pixels(pixels)
        except EmbedKitError:
            return "refused"
        finally:
            damaged.unlink()
        if other:
            return "another model by its own word"
        if not np.isfinite(vectors).all() or vectors.shape != expected.shape:
            return "wrong: no vectors"
        worst = float((vectors * expected).sum(axis=1).min())
        return "as good as whole" if worst > 0.99 else f"wrong: cosine {worst:.2f}"

    return _batches(rng, clock, count, one)


def placements(place: Path, rng: random.Random, clock: Clock, count: int) -> Outcome:
    """Four ways to keep a tensor elsewhere, six places: none is read, by path or by contract."""
    from embedkit.runtime import Embedder, read_contract
    from tests.runtime.hostile import PLACES, WAYS, hostile_model

    outcome = Outcome()
    before = Path.cwd()
    for number, (way, where) in enumerate(itertools.product(WAYS, PLACES)):
        here = place / str(number)
        path = hostile_model(here, way, where)
        os.chdir(here / "here")
        try:
            for load in (Embedder.load, read_contract):
                outcome.tries += 1
                try:
                    load(path)
                    outcome.wrong.append(f"{way}, {where}: was read")
                except MismatchError:
                    outcome.count("refused")
        finally:
            os.chdir(before)
    return outcome


def _batches(rng: random.Random, clock: Clock, count: int, one: Callable[[int], str]) -> Outcome:
    """Try `count` seeds in forked processes with little memory; a death is laid to its seed."""
    outcome = Outcome()
    first = rng.randrange(1 << 40)
    seeds = iter(range(first, first + count))
    while (batch := list(itertools.islice(seeds, 100))) and not clock.up():
        while batch:
            reader, writer = os.pipe()
            child = _fork(_tell, writer, batch, one)
            os.close(writer)
            with os.fdopen(reader) as lines:
                said = [line.rstrip("\n") for line in lines]
            code = _wait(child)
            for seed, text in zip(batch, said, strict=False):
                outcome.tries += 1
                outcome.count(text.partition(":")[0])
                outcome.check(not text.startswith("wrong"), f"seed {seed}: {text}")
            batch = batch[len(said) :]
            if batch:
                outcome.tries += 1
                outcome.count("died")
                outcome.wrong.append(f"seed {batch[0]}: ended with {_SIGNALS.get(code, code)}")
                batch = batch[1:]
    return outcome


def _tell(writer: int, seeds: list[int], one: Callable[[int], str]) -> None:
    limit = 6 << 30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for seed in seeds:
        signal.alarm(20)  # what takes longer dies of it, by name
        try:
            said = one(seed)
        except Exception as error:
            said = f"wrong: {type(error).__name__}: {error}".replace("\n", " ")[:300]
        os.write(writer, said.encode("utf-8", "backslashreplace") + b"\n")


# --- processes ----------------------------------------------------------------------------------


def _fork(act: Callable[..., object], *arguments: object) -> int:
    """A child that does it and ends: with 0, or with 1 and the traceback."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            act(*arguments)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def _kill(child: int) -> bool:
    """Kill it; whether it was alive."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    return _wait(child) == -signal.SIGKILL


def _wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _check_beside(outcome: Outcome, index: Path, others: set[str]) -> None:
    own = {index.name, store_path(index).name}
    left = {path.name for path in index.parent.iterdir()} - own - others
    outcome.check(not left, f"left over: {sorted(left)}")


# --- all of them --------------------------------------------------------------------------------

TRIALS = {
    "kills": Trial(kills, 6, 50, 1000),
    "publish": Trial(publish, 25, 100, 2000),
    "points": Trial(points, 3, 8, 1_000_000),
    "disk": Trial(disk, 6, 12, 256),
    "readers": Trial(readers, 2, 6, 300),
    "catalogs": Trial(catalogs, 300, 2000, 20_000),
    "models": Trial(models, 150, 600, 20_000),
    "placements": Trial(placements, 1, 1, 1),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the trials and print the table; 1 where something was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--short", action="store_const", const="short", dest="length")
    length.add_argument("--tiny", action="store_const", const="tiny", dest="length")
    parser.add_argument("--minutes", type=float, help="stop after about so many")
    parser.add_argument("--only", nargs="+", choices=TRIALS, default=list(TRIALS))
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    faiss.omp_set_num_threads(1)  # threads do not outlive a fork
    if asked.inside is not None:
        outcome = Outcome()
        _sweep(outcome, asked.inside, Clock(None), asked.count, 16 << 20)
        print(json.dumps(vars(outcome)))
        return 0
    print(f"seed {asked.seed}")
    print(f"{'trial':<11}{'tries':>7}{'wrong':>7}{'s':>7}  seen", flush=True)
    wrong = []
    for number, name in enumerate(asked.only):
        trial = TRIALS[name]
        share = None if asked.minutes is None else 60 * asked.minutes / len(asked.only)
        started = time.monotonic()
        with _place() as place:
            rng = random.Random(asked.seed + number)
            outcome = trial.run(place, rng, Clock(share), getattr(trial, asked.length or "long"))
        seen = ", ".join(f"{what} {times:,}" for what, times in sorted(outcome.seen.items()))
        print(
            f"{name:<11}{outcome.tries:>7,}{len(outcome.wrong):>7,}"
            f"{time.monotonic() - started:>7.1f}  {seen}",
            flush=True,
        )
        wrong += [f"{name}: {text}" for text in outcome.wrong]
    for text in wrong[:50]:
        print(text)
    print("nothing was lost or wrong" if not wrong else f"{len(wrong):,} wrong")
    return 1 if wrong else 0


@contextlib.contextmanager
def _place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="torture-") as place:
        yield Path(os.path.realpath(place))


if __name__ == "__main__":
    sys.exit(main())
