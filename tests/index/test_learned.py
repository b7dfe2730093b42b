"""Learned codes in an index: distances and ids as numpy says, and every way through keeps them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sqlite3
from collections.abc import Generator, Iterable
from pathlib import Path

import faiss
import numpy as np
import pytest

from embedkit.errors import MismatchError, UsageError
from embedkit.index import Catalog, Row, SyncReport, Wanted, sync_folder, write_catalog
from embedkit.index.edit import compact_index, remove_files
from embedkit.index.learned import needs_vectors
from embedkit.index.merge import merge_indexes
from embedkit.index.migrate import migrate
from embedkit.index.store import store_path
from embedkit.index.verify import verify_index
from embedkit.runtime import Embedded, ModelContract
from embedkit.runtime.codebooks import Codebooks
from tests.index.fakes import FakeEmbedder, contract

PARTS, WIDTH = 5, 3
LEARNED = Wanted(type="learned")


def books(count: int = 16) -> Codebooks:
    words = np.random.default_rng(count).standard_normal((PARTS, count, WIDTH), dtype=np.float32)
    return Codebooks.of(words)


def coded_contract(count: int = 16, weights: str = "w") -> ModelContract:
    plain = contract(dim=PARTS * WIDTH, weights=weights, metric="l2")
    return dataclasses.replace(plain, normalizes=False, codebooks=books(count))


class Coding(FakeEmbedder):
    """Vectors and codes are functions of the bytes; the code is not of the nearest word."""

    def __init__(self, *, codes: bool = True, weights: str = "w") -> None:
        super().__init__(dim=PARTS * WIDTH)
        self.contract = coded_contract(weights=weights)
        self._codes = codes

    def embed_files(
        self, paths: Iterable[Path], *, batch: int = 32, workers: int | None = None
    ) -> Generator[Embedded, None, None]:
        for one in super().embed_files(paths, batch=batch, workers=workers):
            given = one.vector is not None and self._codes
            yield dataclasses.replace(one, codes=codes_of(one.path)) if given else one


def codes_of(path: Path) -> np.ndarray:
    seed = int.from_bytes(path.read_bytes()[-4:].rjust(4, b"0"), "big")
    return np.random.default_rng(seed).integers(0, 16, PARTS).astype(np.uint8)


def picture(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    os.utime(path, (1_700_000_000,) * 2)
    return path


def sync(root: Path, index: Path, **options: object) -> SyncReport:
    return sync_folder(root, index, Coding(), **options)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for n in range(30):
        picture(tmp_path / f"photos/class{n % 3}/{n}.jpg", f"picture {n:04}")
    return tmp_path / "photos"


@pytest.fixture
def index(folder: Path, tmp_path: Path) -> Path:
    sync(folder, tmp_path / "c.faiss", wanted=LEARNED)
    return tmp_path / "c.faiss"


def held(index: Path) -> dict[str, tuple[int, ...]]:
    """Name -> codes, found in what `faiss.read_index` unpacks."""
    bare = faiss.read_index(str(index))
    vectors = np.asarray(bare.reconstruct_n(0, bare.ntotal)).reshape(-1, PARTS, 1, WIDTH)
    apart = np.abs(vectors - books().array()).sum(axis=3)
    assert (apart.min(axis=2) == 0).all()
    catalog = Catalog.open(index, verify=True)
    names = [str(catalog.hit(at).name) for at in range(len(catalog))]
    return {name: tuple(row) for name, row in zip(names, apart.argmin(axis=2), strict=True)}


def expected(folder: Path) -> dict[str, tuple[int, ...]]:
    return {str(path.relative_to(folder)): tuple(codes_of(path)) for path in folder.rglob("*.jpg")}


@pytest.mark.parametrize("count", [256, 100, 16, 4, 2])
def test_ids_and_distances_are_those_of_loops_over_the_codes(tmp_path: Path, count: int) -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(0, count, (300, PARTS)).astype(np.uint8)
    vectors = rng.standard_normal((300, PARTS * WIDTH), dtype=np.float32)
    rows = [Row(2 * n, b"%d.jpg" % n, b"", vectors[n], codes[n]) for n in range(300)]
    about = coded_contract(count)
    write_catalog(tmp_path / "c.faiss", rows, contract=about, root=tmp_path, wanted=LEARNED)
    catalog = Catalog.open(tmp_path / "c.faiss", verify=True)
    bits = {256: 8, 100: 7, 16: 4, 4: 2, 2: 1}[count]
    assert catalog.choice is not None
    assert (catalog.choice.kind, catalog.choice.factory) == ("learned", f"PQ{PARTS}x{bits}")
    assert faiss.read_index(str(tmp_path / "c.faiss")).code_size == -(-PARTS * bits // 8)

    queries = rng.standard_normal((4, PARTS * WIDTH), dtype=np.float32)
    words = books(count).array().astype(np.float64)
    for query, hits in zip(queries, catalog.search(queries, k=7), strict=True):
        tables = [
            [float(((query[m * WIDTH : (m + 1) * WIDTH] - word) ** 2).sum()) for word in words[m]]
            for m in range(PARTS)
        ]
        far = [sum(tables[m][row[m]] for m in range(PARTS)) ** 0.5 for row in codes.tolist()]
        nearest = sorted(range(300), key=lambda n: (far[n], n))[:7]
        # Words are few: what ties across the cut may be any of them.
        assert [hit.score for hit in hits] == pytest.approx([-far[n] for n in nearest], abs=1e-6)
        assert {hit.id for hit in hits if -hit.score < far[nearest[-1]] - 1e-6} == {
            2 * n for n in nearest if far[n] < far[nearest[-1]] - 1e-6
        }
        assert all(far[hit.id // 2] == pytest.approx(-hit.score, abs=1e-6) for hit in hits)


def test_the_recall_is_that_of_exact_search_among_the_vectors(index: Path) -> None:
    catalog = Catalog.open(index)
    choice = catalog.choice
    assert choice is not None
    # The same by numpy, for the three that were asked for.
    rows = np.stack([FakeVectors.of(catalog, at) for at in range(len(catalog))]).astype(float)
    coded = catalog.vectors(np.arange(len(catalog))).astype(float)
    shares = []
    for at in np.sort(np.random.default_rng(0).permutation(30)[:3]):
        near, found = (((v - rows[at]) ** 2).sum(1) for v in (rows, coded))
        near[at] = found[at] = np.inf
        shares.append(len({*np.argsort(near)[:10]} & {*np.argsort(found)[:10]}) / 10)
    assert choice.queries == 3
    assert choice.recall == pytest.approx(np.mean(shares), abs=0.07)


class FakeVectors:
    @staticmethod
    def of(catalog: Catalog, at: int) -> np.ndarray:
        path = catalog.hit(at).path
        assert path is not None
        (one,) = Coding().embed_files([path])
        assert one.vector is not None
        return one.vector


def test_sync_moves_changes_and_deletions_keep_every_picture_its_own_codes(
    folder: Path, index: Path
) -> None:
    assert held(index) == expected(folder)
    (folder / "class0/0.jpg").rename(folder / "class1/moved.jpg")
    (folder / "class0/3.jpg").unlink()
    picture(folder / "class2/new.jpg", "picture 0777")
    picture(folder / "class1/copy.jpg", "picture 0004")
    report = sync(folder, index)
    assert (report.embedded, report.moved, report.unchanged, report.removed) == (1, 2, 28, 2)
    assert held(index) == expected(folder)
    assert verify_index(index).ok
    assert not sync(folder, index).published


def test_codes_survive_a_change_of_kind_and_back_without_embedding(
    folder: Path, index: Path
) -> None:
    report = sync(folder, index, wanted=Wanted(type="flat"))
    assert (report.embedded, report.published) == (0, True)
    flat = Catalog.open(index)
    np.testing.assert_array_equal(flat.vectors([3])[0], FakeVectors.of(flat, 3))
    assert verify_index(index).ok
    assert sync(folder, index, wanted=LEARNED).embedded == 0
    assert held(index) == expected(folder)


def test_rm_compact_and_merge_need_no_model(folder: Path, index: Path, tmp_path: Path) -> None:
    remove_files(index, [folder / "class0/0.jpg"])
    (folder / "class0/3.jpg").unlink()
    compact_index(index)
    left = expected(folder)
    del left["class0/0.jpg"]
    assert held(index) == left
    other = tmp_path / "more"
    picture(other / "x.jpg", "picture 0900")
    sync(other, tmp_path / "d.faiss", wanted=LEARNED)
    merge_indexes(tmp_path / "all.faiss", [index, tmp_path / "d.faiss"])
    whole = {f"photos/{name}": codes for name, codes in left.items()}
    assert held(tmp_path / "all.faiss") == whole | {"more/x.jpg": tuple(codes_of(other / "x.jpg"))}
    assert verify_index(tmp_path / "all.faiss").ok


def test_a_code_that_was_changed_is_found_by_verify(folder: Path, index: Path) -> None:
    with sqlite3.connect(store_path(index)) as base:
        (blob,) = base.execute("SELECT vector FROM item WHERE id = 5").fetchone()
        base.execute(
            "UPDATE item SET vector = ? WHERE id = 5", (blob[:-1] + bytes([blob[-1] ^ 1]),)
        )
    base.close()
    found = [check for check in verify_index(index).checks if not check.ok]
    assert [check.name for check in found] == ["agree"]
    assert "differs" in found[0].facts


def test_a_model_without_codes_is_refused_before_anything_is_embedded(
    folder: Path, tmp_path: Path
) -> None:
    plain = FakeEmbedder()
    for dry in (True, False):
        with pytest.raises(MismatchError, match="gives no codes") as caught:
            sync_folder(folder, tmp_path / "p.faiss", plain, wanted=LEARNED, dry_run=dry)
        assert "--loss spq" in (caught.value.facts or "")
    assert plain.embedded == []


def test_an_engine_that_gives_vectors_alone_cannot_fill_an_index(
    folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(MismatchError, match="keeps its codes too"):
        sync_folder(folder, tmp_path / "p.faiss", Coding(codes=False))


def test_it_goes_on_to_another_model_with_codes_and_to_none_without(
    folder: Path, index: Path
) -> None:
    class Opened(FakeEmbedder):
        embedding_dim = 8

    with pytest.raises(MismatchError, match="gives no codes"):
        migrate(index, Opened(), model=Path("m.onnx"))  # type: ignore[arg-type]
    other = Coding(weights="v")
    migrate(index, other, model=Path("m.onnx"))  # type: ignore[arg-type]
    assert Catalog.open(index).fingerprint == other.contract.fingerprint
    assert held(index) == expected(folder)


def test_few_pictures_are_kept_as_codes_and_not_measured(tmp_path: Path) -> None:
    picture(tmp_path / "photos/a.jpg", "picture 0001")
    sync(tmp_path / "photos", tmp_path / "c.faiss", wanted=LEARNED)
    catalog = Catalog.open(tmp_path / "c.faiss", mmap=True)
    assert catalog.choice is not None
    assert (catalog.choice.kind, catalog.choice.queries) == ("learned", 0)
    assert len(catalog.search(np.zeros((1, PARTS * WIDTH), np.float32), k=10)[0]) == 1
    with pytest.raises(UsageError, match="needs the vectors of the pictures"):
        needs_vectors("dedupe", catalog)


def test_rows_without_codes_and_a_memory_too_small_are_told(tmp_path: Path) -> None:
    vector = np.zeros(PARTS * WIDTH, np.float32)
    good = np.zeros(PARTS, np.uint8)
    for codes in (None, good[:3], good + 16):
        with pytest.raises(MismatchError, match="without 5 codes below 16"):
            write_catalog(
                tmp_path / "c.faiss",
                [Row(1, b"a.jpg", b"", vector, codes)],
                contract=coded_contract(),
                root=tmp_path,
                wanted=LEARNED,
            )
    with pytest.raises(UsageError, match="no learned index of 1 vectors fits into 500 bytes"):
        write_catalog(
            tmp_path / "c.faiss",
            [Row(1, b"a.jpg", b"", vector, good)],
            contract=coded_contract(),
            root=tmp_path,
            wanted=Wanted(type="learned", memory=500),
        )
    assert not (tmp_path / "c.faiss").exists()


def test_a_damaged_file_never_answers(index: Path) -> None:
    whole = index.read_bytes()
    payload = Catalog.open(index).manifest["index"]["payload_bytes"]
    query = np.zeros((1, PARTS * WIDTH), np.float32)
    rng = np.random.default_rng(0)
    places = [*range(90), *rng.integers(0, payload, 60).tolist(), *range(payload - 30, payload)]
    for place in places:
        broken = bytearray(whole)
        broken[place] ^= 1 << int(rng.integers(8))
        index.write_bytes(broken)
        with pytest.raises(MismatchError):
            Catalog.open(index, verify=True).search(query)
        # Without looking at the checksum it is refused too, or answers; it never crashes.
        with contextlib.suppress(MismatchError):
            Catalog.open(index).search(query)
