"""Which index: what is measured is true, what falls short is passed over, what does not fit too."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt
import pytest

from embedkit.errors import DataError, MismatchError, UsageError
from embedkit.index import Catalog, Choice, Row, Wanted, write_catalog
from embedkit.index import choose as choosing
from embedkit.index.choose import TYPES, build_index
from embedkit.index.kinds import (
    apply_search,
    bytes_per_vector,
    factories,
    factory_of,
    search_parameters,
)
from embedkit.index.on_disk import DISK, new_disk_index
from tests.index.fakes import contract

Matrix = npt.NDArray[np.float32]

TRAINED = ("pq", "ivf", "ivf-disk", "hnsw", "tiny")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    faiss.omp_set_num_threads(1)


def unit(rows: npt.NDArray[np.floating]) -> Matrix:
    out: Matrix = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return out


def clustered(count: int, dim: int, seed: int = 0) -> Matrix:
    """Classes of about twenty in a few directions, with noise: like a trained model's vectors."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(1, count // 20), 12))
    near = centres[rng.integers(0, len(centres), count)] + 0.3 * rng.standard_normal((count, 12))
    return unit(near @ rng.standard_normal((12, dim)) + 0.3 * rng.standard_normal((count, dim)))


def random(count: int, dim: int, seed: int = 0) -> Matrix:
    return unit(np.random.default_rng(seed).standard_normal((count, dim)))


def build(vectors: Matrix, wanted: Wanted, *, metric: str = "cosine") -> tuple[faiss.Index, Choice]:
    def blocks():  # type: ignore[no-untyped-def]
        return (vectors[at : at + 1000] for at in range(0, len(vectors), 1000))

    return build_index(blocks, len(vectors), vectors.shape[1], metric, wanted)


def write(
    path: Path, vectors: Matrix, wanted: Wanted | None = None, metric: str = "cosine"
) -> Path:
    rows = [Row(2 * n, b"a/%d.jpg" % n, b"a", vector) for n, vector in enumerate(vectors)]
    about = contract(dim=vectors.shape[1], metric=metric)
    write_catalog(path, rows, contract=about, root=path.parent, wanted=wanted)
    return path


def nearest(vectors: Matrix, own: int, k: int, metric: str) -> set[int]:
    """The positions of the `k` nearest to one of them, itself left aside, by numpy alone."""
    wide = vectors.astype(np.float64)
    score = wide @ wide[own] if metric == "cosine" else -((wide - wide[own]) ** 2).sum(axis=1)
    score[own] = -np.inf
    return set(np.argsort(-score, kind="stable")[:k].tolist())


# What is measured


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("kind", TRAINED)
def test_the_recall_is_what_numpy_counts_through_the_catalog(
    tmp_path: Path, kind: str, metric: str
) -> None:
    vectors = clustered(3000, 24)
    if metric == "l2":
        vectors = vectors * np.linspace(1, 3, len(vectors), dtype=np.float32)[:, None]
    catalog = Catalog.open(write(tmp_path / "c.faiss", vectors, Wanted(type=kind), metric))
    choice = catalog.choice
    assert choice is not None
    assert choice.kind == kind
    asked = np.random.default_rng(5).choice(len(vectors), 300, replace=False)
    found = catalog.search(vectors[asked], 11)
    share = np.mean(
        [
            len(
                {hit.id // 2 for hit in hits if hit.id != 2 * own}
                & nearest(vectors, own, 10, metric)
            )
            for own, hits in zip(asked.tolist(), found, strict=True)
        ]
    )
    assert share / 10 == pytest.approx(choice.recall, abs=0.02)
    if kind != "tiny":
        assert choice.recall >= 0.99
    assert choice.queries_per_second is not None
    assert choice.queries_per_second > 0


@pytest.mark.parametrize("kind", TRAINED)
def test_scores_are_as_true_as_the_index_says(tmp_path: Path, kind: str) -> None:
    vectors = clustered(3000, 24)
    catalog = Catalog.open(write(tmp_path / "c.faiss", vectors, Wanted(type=kind)))
    assert catalog.choice is not None
    for own, hits in zip(range(50), catalog.search(vectors[:50], 10), strict=True):
        for hit in hits:
            exact = float(vectors[hit.id // 2].astype(np.float64) @ vectors[own])
            assert hit.score == pytest.approx(exact, abs=1.5 * catalog.choice.score_error + 1e-6)
    assert catalog.choice.score_error < (0.5 if kind == "tiny" else 0.001)


def test_copies_of_a_picture_are_as_good_as_each_other() -> None:
    vectors = np.repeat(clustered(500, 16), 4, axis=0)
    _, choice = build(vectors, Wanted(type="pq"))
    assert choice.recall >= 0.99
    assert choice.queries == 200


def test_where_nearly_all_are_alike_nothing_is_claimed() -> None:
    vectors = np.repeat(random(2, 16), [29_000, 1_000], axis=0)
    index, choice = build(vectors, Wanted())
    assert (choice.kind, choice.recall) == ("flat", 1.0)
    assert "alike" in choice.tried[0]
    assert factory_of(index) == "Flat"


def test_exact_search_leaves_out_the_vector_itself_and_keeps_ties() -> None:
    vectors = random(1500, 8)
    vectors[700:720] = vectors[3]
    truth = choosing._Truth(vectors[[3]], np.array([3]), faiss.METRIC_INNER_PRODUCT)
    for start in range(0, 1500, 333):
        truth.see(vectors[start : start + 333], start)
    kept = truth._found[0][truth._scores[0] >= truth._last()[0]]
    assert set(kept.tolist()) == set(range(700, 720))


# What is chosen


@pytest.mark.parametrize("count", [1, 2, 5, 40, 999])
@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "learned"])
def test_a_few_vectors_are_kept_flat(tmp_path: Path, count: int, kind: str) -> None:
    catalog = Catalog.open(write(tmp_path / "c.faiss", random(count, 6), Wanted(type=kind)))
    assert catalog.choice is not None
    assert catalog.choice.factory == "Flat"
    assert bool(catalog.choice.tried) == (kind not in ("auto", "flat"))
    assert len(catalog.search(random(1, 6), 10)[0]) == min(10, count)


@pytest.mark.parametrize("kind", TYPES)
def test_no_vectors_give_no_index(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DataError):
        write(tmp_path / "c.faiss", np.empty((0, 4), np.float32), Wanted(type=kind))
    assert list(tmp_path.iterdir()) == []


def test_auto_compresses_what_has_structure() -> None:
    _, choice = build(clustered(21_000, 32), Wanted())
    assert choice.kind == "pq"
    assert choice.recall >= 0.99
    assert choice.tried == ()


def test_auto_notices_that_codes_collapse_on_random_vectors() -> None:
    vectors = random(21_000, 192)
    index, choice = build(vectors, Wanted())
    assert choice.kind == "flat"
    assert choice.tried
    assert choice.tried[0].startswith("pq finds 0.")
    assert np.array_equal(index.reconstruct_n(0, 100), vectors[:100])


def test_auto_stays_flat_below_twenty_thousand() -> None:
    assert build(clustered(3000, 8), Wanted())[1].kind == "flat"


def test_beyond_what_is_scanned_auto_takes_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "_FLAT_TO", 1000)
    monkeypatch.setattr(choosing, "_PQ_TO", 2000)
    _, choice = build(clustered(5000, 16), Wanted())
    assert choice.kind == "ivf"
    assert choice.search["nprobe"] < 100


def test_more_recall_takes_more_effort() -> None:
    vectors = random(5000, 24)
    low = build(vectors, Wanted(type="pq", recall=0.7))[1]
    high = build(vectors, Wanted(type="pq", recall=0.995))[1]
    assert low.search["k_factor"] < high.search["k_factor"]
    assert 0.7 <= low.recall < high.recall


# Memory


@pytest.mark.parametrize("dim", [16, 30, 37, 128, 512])
@pytest.mark.parametrize("kind", ["flat", "sq8", *TRAINED])
def test_what_an_index_takes_is_known_before_it_is_built(kind: str, dim: int) -> None:
    vectors = random(1600, dim)
    for factory in factories(kind, len(vectors), dim):
        new = new_disk_index if kind == DISK else faiss.index_factory
        index = new(dim, factory, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
        index.add(vectors)
        length = len(faiss.serialize_index(index))
        assert length == pytest.approx(bytes_per_vector(factory, 1600, dim) * 1600, rel=0.06)
        assert factory_of(index) == factory


def test_memory_is_a_limit(tmp_path: Path) -> None:
    vectors = clustered(3000, 64)
    taken = []
    for memory in (None, 800_000, 560_000, 320_000, 200_000):
        path = write(tmp_path / "c.faiss", vectors, Wanted(memory=memory, recall=0.95))
        choice = Catalog.open(path).choice
        assert choice is not None
        taken.append((choice.kind, choice.factory))
        names = sum(len(b"a/%d.jpg" % n) + 25 for n in range(3000))
        if choice.kind != DISK:
            assert choice.bytes_per_vector * 3000 + names <= (memory or 1 << 40)
    assert taken[0] == ("flat", "Flat")
    assert taken[2] == ("pq", "PQ32x4fs,Refine(SQfp16)")
    assert taken[-1][0] == "ivf-disk"


def test_what_no_memory_is_enough_for_stays_on_the_disk(tmp_path: Path) -> None:
    path = write(tmp_path / "c.faiss", clustered(3000, 64), Wanted(memory=150_000))
    choice = Catalog.open(path).choice
    assert choice is not None
    assert (choice.kind, choice.recall >= 0.99) == ("ivf-disk", True)
    assert [one.split()[0] for one in choice.tried] == ["flat", "pq", "sq8", "tiny"]


def test_what_cannot_fit_is_refused_with_what_would(tmp_path: Path) -> None:
    vectors = clustered(3000, 64)
    with pytest.raises(UsageError) as refused:
        write(tmp_path / "c.faiss", vectors, Wanted(type="flat", memory=100_000))
    assert "100 KB" in refused.value.what
    assert "--type tiny" in (refused.value.hint or "")
    assert list(tmp_path.iterdir()) == []
    hint = (refused.value.hint or "").split("M")[0].removeprefix("--memory ")
    write(tmp_path / "c.faiss", vectors, Wanted(type="flat", memory=int(hint) * 1_000_000))


# What is asked for


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"type": "hsnw"}, "hsnw"),
        ({"recall": 0.0}, "recall"),
        ({"recall": 1.01}, "recall"),
        ({"memory": -1}, "memory"),
    ],
)
def test_what_cannot_be_wanted_is_refused(values: dict[str, object], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Wanted(**values)  # type: ignore[arg-type]


def test_what_is_not_said_stays() -> None:
    before = Wanted(type="pq", recall=0.9, memory=5)
    assert Wanted().over(before) == before
    assert Wanted(recall=0.8).over(before) == Wanted(type="pq", recall=0.8, memory=5)
    assert Wanted(memory=0).over(before).memory == 0
    assert Wanted.loads(before.dumps()) == before
    assert Wanted.loads("") == Wanted()


# The file


@pytest.mark.parametrize("kind", ["flat", *TRAINED])
def test_the_same_vectors_give_the_same_index(tmp_path: Path, kind: str) -> None:
    vectors = clustered(2500, 16)
    payloads = []
    for threads in (1, 1) if kind == "hnsw" else (1, 2):
        faiss.omp_set_num_threads(threads)
        catalog = Catalog.open(write(tmp_path / "c.faiss", vectors, Wanted(type=kind)))
        assert catalog.choice is not None
        payloads.append((catalog.manifest["index"]["payload_crc32"], catalog.choice.search))
    assert payloads[0] == payloads[1]


@pytest.mark.parametrize("kind", TRAINED)
def test_faiss_alone_searches_it_as_tuned(tmp_path: Path, kind: str) -> None:
    vectors = clustered(2500, 16)
    path = write(tmp_path / "c.faiss", vectors, Wanted(type=kind))
    bare = faiss.read_index(str(path))
    catalog = Catalog.open(path, mmap=True, verify=True)
    assert catalog.choice is not None
    assert search_parameters(bare) == catalog.choice.search
    _, positions = bare.search(vectors[:20], 11)
    ours = [[hit.id // 2 for hit in hits] for hits in catalog.search(vectors[:20], 11)]
    same = [len(set(a) & set(b)) for a, b in zip(positions.tolist(), ours, strict=True)]
    assert np.mean(same) > 10.5


def test_search_is_as_the_manifest_says(tmp_path: Path) -> None:
    vectors = random(3000, 32)
    path = write(tmp_path / "c.faiss", vectors, Wanted(type="ivf"))
    catalog = Catalog.open(path)
    assert catalog.choice is not None
    base = faiss.downcast_index(catalog._index.base_index)
    assert catalog.choice.search == {"k_factor": catalog._index.k_factor, "nprobe": base.nprobe}
    with zipfile.ZipFile(path) as archive:
        manifest = json.loads(archive.read("embedkit/manifest.json"))["index"]
    assert manifest["recall"] >= 0.99
    assert manifest["bytes_per_vector"] * 3000 == pytest.approx(manifest["payload_bytes"], rel=0.01)
    assert Wanted.loads(manifest["wanted"]) == Wanted(type="ivf")


@pytest.mark.parametrize("k", [1, 3, 10, 200, 3000, 9999])
@pytest.mark.parametrize("kind", TRAINED)
def test_any_number_of_hits_each_once_nearest_first(tmp_path: Path, kind: str, k: int) -> None:
    vectors = clustered(3000, 16)
    catalog = Catalog.open(write(tmp_path / "c.faiss", vectors, Wanted(type=kind)))
    for hits in catalog.search(vectors[:3], k):
        assert len({hit.id for hit in hits}) == len(hits) == min(k, 3000)
        assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))
        scores = [hit.score for hit in hits]
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("kind", TRAINED)
def test_without_its_tail_it_is_searched_as_tuned(tmp_path: Path, kind: str) -> None:
    vectors = clustered(2500, 16)
    path = write(tmp_path / "c.faiss", vectors, Wanted(type=kind))
    named = Catalog.open(path).search(vectors[:5], 5)
    faiss.write_index(faiss.read_index(str(path)), str(path))
    for mmap in (False, True):
        catalog = Catalog.open(path, mmap=mmap, verify=True)
        assert not catalog.has_names
        found = catalog.search(vectors[:5], 5)
        assert [[(2 * hit.id, hit.score) for hit in hits] for hits in found] == [
            [(hit.id, hit.score) for hit in hits] for hits in named
        ]


def test_parameters_that_cannot_be_are_refused() -> None:
    index, _ = build(clustered(2000, 16), Wanted(type="ivf"))
    for wrong in (
        {"k_factor": 0, "nprobe": 1},
        {"k_factor": 4, "nprobe": 10**9},
        {"k_factor": float("nan"), "nprobe": 1},
        {"k_factor": True, "nprobe": 1},
        {"k_factor": 4},
        {"efSearch": 16},
    ):
        with pytest.raises(ValueError, match="is"):
            apply_search(index, wrong)


@pytest.mark.parametrize(
    "factory",
    [
        "PQ8x4fs,RFlat",
        "PQ8x4fs,Refine(SQ4)",
        "SQ4",
        "IVF8,Flat",
        "PCA8,PQ8x4fs",
        "HNSW8,PQ4x4",
        "PQ4x4",
    ],
)
def test_a_part_that_is_not_ours_is_refused(tmp_path: Path, factory: str) -> None:
    other = faiss.index_factory(16, factory, faiss.METRIC_INNER_PRODUCT)
    other.train(random(2000, 16))
    other.add(random(2000, 16))
    path = tmp_path / "other.faiss"
    faiss.write_index(other, str(path))
    for mmap in (False, True):
        with pytest.raises(MismatchError):
            Catalog.open(path, mmap=mmap)
