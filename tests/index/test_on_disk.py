"""An index that is built and searched on the disk is the one that FAISS would build in memory."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt
import pytest

from embedkit.errors import EmbedKitError, MismatchError, UsageError
from embedkit.index import (
    Catalog,
    Row,
    Wanted,
    compact_index,
    merge_indexes,
    remove_files,
    verify_index,
    write_catalog,
)
from embedkit.index import on_disk as disk
from embedkit.index.kinds import apply_search, base_of, factories
from embedkit.index.on_disk import DISK, DiskBuilder, new_disk_index, resident_bytes
from embedkit.index.store import Item, Run, Store, store_path
from tests.index.fakes import contract

Matrix = npt.NDArray[np.float32]

DIM = 16
METRICS = {"cosine": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    faiss.omp_set_num_threads(1)


def unit(count: int, dim: int = DIM, seed: int = 0) -> Matrix:
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    rows[:, dim // 2 :] *= 0.2
    out: Matrix = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return out


def trained(vectors: Matrix, metric: int) -> faiss.Index:
    (factory,) = factories(DISK, len(vectors), vectors.shape[1])
    index = new_disk_index(vectors.shape[1], factory, metric)
    index.train(vectors)
    return index


# The file that is laid out


@pytest.mark.parametrize(("count", "metric"), [(1500, "cosine"), (1501, "l2"), (12_000, "cosine")])
def test_it_is_byte_for_byte_what_faiss_fills_in_memory(
    count: int, metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_SORTED_AT_ONCE", 5_000)
    vectors = unit(count)
    index = trained(vectors, METRICS[metric])
    assert (base_of(index).nlist > 256) == (count > 2000)
    with DiskBuilder(index, count, tmp_path) as builder:
        for start in range(0, count, 700):
            builder.add(vectors[start : start + 700])
        built = builder.finish()
    assert list(tmp_path.iterdir()) == []
    in_memory = faiss.clone_index(index)
    in_memory.add(vectors)
    assert bytes(faiss.serialize_index(built)) == bytes(faiss.serialize_index(in_memory))


def test_empty_lists_are_no_trouble(tmp_path: Path) -> None:
    index = trained(unit(2000), METRICS["l2"])
    same = np.repeat(unit(1), 300, axis=0)
    with DiskBuilder(index, 300, tmp_path) as builder:
        builder.add(same)
        built = builder.finish()
    sizes = [base_of(built).invlists.list_size(n) for n in range(base_of(built).nlist)]
    assert sorted(sizes) == [0] * (len(sizes) - 1) + [300]
    assert np.allclose(built.reconstruct_n(0, 300), same, atol=1e-3)


def test_a_faiss_that_writes_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    index = trained(unit(1500), METRICS["l2"])
    known = faiss.serialize_index
    monkeypatch.setattr(
        faiss, "serialize_index", lambda one: np.append(known(one), np.uint8([0] * 3))
    )
    with pytest.raises(EmbedKitError, match="does not know"):
        DiskBuilder(index, 1500, None)


# As a catalog


def write(path: Path, vectors: Matrix, metric: str = "cosine", recall: float | None = None) -> Path:
    rows = [Row(3 * n, b"a/%d.jpg" % n, b"a", vector) for n, vector in enumerate(vectors)]
    about = contract(dim=vectors.shape[1], metric=metric)
    write_catalog(path, rows, contract=about, root=path.parent, wanted=Wanted(DISK, recall))
    return path


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_with_every_list_it_is_numpys_exact_search(tmp_path: Path, metric: str) -> None:
    vectors = unit(3000)
    catalog = Catalog.open(write(tmp_path / "c.faiss", vectors, metric))
    apply_search(catalog._index, {"nprobe": base_of(catalog._index).nlist, "k_factor": 1024})
    kept = catalog.vectors(np.arange(3000)).astype(np.float64)
    assert np.allclose(kept, vectors, atol=1e-3)  # 16 bits a number
    queries = unit(40, seed=1)
    for query, hits in zip(queries.astype(np.float64), catalog.search(queries, 10), strict=True):
        scores = kept @ query if metric == "cosine" else -np.linalg.norm(kept - query, axis=1)
        best = np.argsort(-scores, kind="stable")[:10]
        assert [hit.id for hit in hits] == (3 * best).tolist()
        assert [hit.score for hit in hits] == pytest.approx(scores[best].tolist(), abs=1e-6)


def test_its_vectors_and_lists_are_never_read_into_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "c.faiss", unit(2000))
    catalog = Catalog.open(path)
    mapped = Path("/proc/self/maps").read_text()
    assert str(path) in mapped
    assert catalog.vectors([1999]).shape == (1, DIM)


def test_what_it_takes_of_the_memory_is_told_before_it_is_built(tmp_path: Path) -> None:
    vectors = unit(2000)
    (factory,) = factories(DISK, 2000, DIM)
    least = resident_bytes(factory, DIM)
    assert least < 2 * DIM * 2000
    rows = [Row(n, b"%d" % n, b"", vector) for n, vector in enumerate(vectors)]
    about = contract(dim=DIM)
    path = tmp_path / "c.faiss"
    write_catalog(path, rows, contract=about, root=tmp_path, wanted=Wanted(DISK, memory=least))
    with pytest.raises(UsageError, match="no such index"):
        write_catalog(
            path, rows, contract=about, root=tmp_path, wanted=Wanted(DISK, memory=least - 1)
        )


def test_a_full_disk_is_told_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "c.faiss", unit(1200))
    before = path.read_bytes()

    def full(self: DiskBuilder, at: int, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DiskBuilder, "_write", full)
    with pytest.raises(EmbedKitError, match="cannot be written") as told:
        write(path, unit(1300))
    assert "make room" in (told.value.hint or "")
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["c.faiss"]


# Merged from shards


def shard(path: Path, numbers: range, *, seed: int = 0, weights: str = "w") -> Path:
    """A store with the pictures of these numbers, and a flat catalog."""
    about, vectors = contract(dim=DIM, weights=weights), unit(4000, seed=seed)
    items = [
        Item(b"p/%05d.jpg" % n, 1, 1, n.to_bytes(16, "big"), b"p", None, None, row.tobytes())
        for n, row in zip(numbers, vectors[numbers.start : numbers.stop], strict=True)
    ]
    failed = Item(b"p/bad-%s.jpg" % path.stem.encode(), 1, 1, None, b"p", "e", "r", None)
    with Store(store_path(path)) as store:
        store.set_run(Run(about.fingerprint, about.dumps(), b".", None))
        store.put([*items, failed])
        write_catalog(
            path, list(store.rows(DIM)), contract=about, root=path.parent, wanted=Wanted("flat")
        )
    return path


def shards(folder: Path) -> list[Path]:
    """Three of 1,000, of which the second and the third share 100."""
    spans = (range(1000), range(1000, 2000), range(1900, 2900))
    return [shard(folder / f"s{n}.faiss", span) for n, span in enumerate(spans)]


def check_whole(path: Path) -> None:
    vectors, found = unit(4000)[:2900], Catalog.open(path, verify=True)
    assert (len(found), found.choice and found.choice.kind) == (2900, DISK)
    queries = vectors[::50]
    right = 0
    for query, hits in zip(queries, found.search(queries, 10), strict=True):
        best = set(np.argsort(-(vectors @ query), kind="stable")[:10].tolist())
        right += len(best & {int((hit.name or "p/-1.jpg")[2:-4]) for hit in hits})
    assert right / (10 * len(queries)) >= 0.98


def test_shards_become_one_index_that_finds_what_numpy_finds(tmp_path: Path) -> None:
    parts, out = shards(tmp_path), tmp_path / "all.faiss"
    steps: list[tuple[str, int, int]] = []
    done = merge_indexes(out, parts, wanted=Wanted(DISK), building=lambda *step: steps.append(step))
    assert (done.parts, done.count, done.duplicates) == ([1000] * 3, 2900, 100)
    assert (done.differing, done.failures) == (0, 3)
    assert sum(done.parts) == done.count + done.duplicates
    check_whole(out)
    choice = Catalog.open(out).choice
    assert choice is not None
    assert choice.recall >= 0.99
    assert {stage for stage, _, _ in steps} >= {"merging", "training", "adding", "tuning"}


def test_it_can_be_verified_and_changed_and_stays_on_the_disk(tmp_path: Path) -> None:
    out = tmp_path / "all.faiss"
    merge_indexes(out, shards(tmp_path), wanted=Wanted(DISK))
    (tmp_path / "p").mkdir()
    assert all(check.ok for check in verify_index(out).checks)
    gone = [tmp_path / f"p/{n:05d}.jpg" for n in range(5)]
    assert remove_files(out, gone).pictures == 5
    kept = Catalog.open(out)
    assert (len(kept), kept.choice and kept.choice.kind) == (2895, DISK)
    for n in range(5, 1500):
        (tmp_path / f"p/{n:05d}.jpg").touch()
    assert compact_index(out).count == 1495
    kept = Catalog.open(out)
    assert (len(kept), kept.choice and kept.choice.kind) == (1495, DISK)
    assert verify_index(out).ok


def test_another_model_and_an_impossible_type_are_refused_and_nothing_is_left(
    tmp_path: Path,
) -> None:
    one = shard(tmp_path / "s0.faiss", range(1000))
    other = shard(tmp_path / "s1.faiss", range(1000, 2000), weights="v")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(MismatchError, match="different models"):
        merge_indexes(tmp_path / "all.faiss", [one, other], wanted=Wanted(DISK))
    with pytest.raises(UsageError, match="no such index") as told:
        merge_indexes(tmp_path / "all.faiss", [one], wanted=Wanted(DISK, memory=9))
    assert "names" not in (told.value.facts or "")
    with pytest.raises(MismatchError, match="gives no codes"):
        merge_indexes(tmp_path / "all.faiss", [one], wanted=Wanted("learned"))
    assert sorted(tmp_path.iterdir()) == before


KILLED = """
import os, sys
from pathlib import Path
import faiss
from embedkit.index import Wanted, merge, on_disk, store, file
faiss.omp_set_num_threads(1)
number, seen = int(sys.argv[1]), [0]

def dying(owner, name):
    real = getattr(owner, name)
    def step(*values, **named):
        seen[0] += 1
        if seen[0] == number:
            os._exit(9)
        return real(*values, **named)
    setattr(owner, name, step)

dying(store.Store, "put")
dying(on_disk.DiskBuilder, "add")
dying(on_disk.DiskBuilder, "finish")
dying(file, "_check_written")
dying(Path, "replace")
dying(merge, "sync_folder")
dying(file, "sync_folder")
dying(store.Store, "set_published")
folder = Path(sys.argv[2])
merge.merge_indexes(
    folder / "all.faiss", [folder / f"s{n}.faiss" for n in range(3)], wanted=Wanted("ivf-disk")
)
print(seen[0])
"""


def killed_at(step: int, folder: Path) -> int:
    """A merge in a process of its own that dies at a step; 0: it was done before."""
    return subprocess.run(
        [sys.executable, "-c", KILLED, str(step), str(folder)], check=False, capture_output=True
    ).returncode


def steps() -> Iterator[int]:
    # put x 3, published, replace, sync_folder, add, finish, _check_written, replace, sync_folder,
    # published
    yield from range(1, 14)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    shards(folder)
    return folder


@pytest.mark.slow
def test_killed_at_every_step_the_same_merge_finishes(parts: Path) -> None:
    out = parts / "all.faiss"
    before = set(parts.iterdir())
    for step in steps():
        died = killed_at(step, parts) == 9
        if out.exists():
            check_whole(out)
        with contextlib.suppress(UsageError):  # all of it was done
            merge_indexes(out, [parts / f"s{n}.faiss" for n in range(3)], wanted=Wanted(DISK))
        check_whole(out)
        left = set(parts.iterdir()) - before
        assert left == {out, store_path(out)}
        out.unlink()
        store_path(out).unlink()
    assert not died, "more steps than were counted"
