"""Catalogs of several vectors per picture: the score is the greatest cosine, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pytest

from embedkit.errors import MismatchError, UsageError
from embedkit.index import Catalog, Row, sync_folder, write_catalog
from embedkit.index.choose import Wanted
from embedkit.index.cluster import cluster_by_density, cluster_by_links, cluster_by_means
from embedkit.index.fuse import Fusion
from embedkit.index.rerank import Expansion, Reciprocal
from embedkit.runtime import ModelContract
from tests.index.fakes import FakeEmbedder, contract

Floats = npt.NDArray[np.float32]

_SEVERAL, _DIM = 3, 12


def several(**changes: Any) -> ModelContract:
    return dataclasses.replace(contract(dim=_DIM), vectors=_SEVERAL, **changes)


def pictures(count: int, seed: int = 0) -> Floats:
    """Rows of unit length, of vectors of one length: what a model gives."""
    vectors = np.random.default_rng(seed).standard_normal((count, _SEVERAL, _DIM // _SEVERAL))
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True) * _SEVERAL**0.5
    return vectors.reshape(count, _DIM).astype(np.float32)


def by_loops(query: Floats, rows: Floats) -> npt.NDArray[np.float64]:
    each = [row.reshape(_SEVERAL, -1).astype(float) for row in rows]
    asking = query.reshape(_SEVERAL, -1).astype(float)
    return np.array(
        [
            max(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a in asking for b in one)
            for one in each
        ]
    )


def write(path: Path, rows: Floats, **changes: Any) -> Catalog:
    path.parent.mkdir(exist_ok=True)
    named = (Row(3 * at, b"%d.jpg" % at, b"ab"[at % 2 : at % 2 + 1], row) for at, row in
             enumerate(rows))  # fmt: skip
    write_catalog(path, named, contract=several(**changes), root=path.parent)
    return Catalog.open(path)


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return write(tmp_path / "c.faiss", pictures(50))


@pytest.mark.parametrize("k", [1, 5, 50, 80])
def test_search_finds_each_picture_once_by_its_best_pair(catalog: Catalog, k: int) -> None:
    rows, queries = pictures(50), pictures(4, seed=1)
    assert (catalog.parts, catalog.dim, len(catalog)) == (_SEVERAL, _DIM, 50)
    for query, hits in zip(queries, catalog.search(queries, k), strict=True):
        scores = by_loops(query, rows)
        order = np.argsort(-scores, kind="stable")[:k]
        assert [hit.id for hit in hits] == [3 * at for at in order]
        assert np.allclose([hit.score for hit in hits], scores[order], atol=1e-6)
        assert np.allclose(catalog.scores(query, [7, 2]), scores[[7, 2]], atol=1e-6)


def test_it_searches_among_chosen_pictures_the_same_way(catalog: Catalog) -> None:
    (query,) = pictures(1, seed=2)
    among = np.array([40, 3, 17, 9])
    scores = by_loops(query, pictures(50)[among])
    (hits,) = catalog.search(query[None], 3, among=among)
    assert [hit.id // 3 for hit in hits] == among[np.argsort(-scores)][:3].tolist()


def test_lengths_do_not_matter_and_equal_pictures_stand_by_id(tmp_path: Path) -> None:
    rows = pictures(20)
    rows[11] = rows[4]
    turned = rows[4].reshape(_SEVERAL, -1)[::-1].reshape(-1)  # the same vectors, another order
    query = turned * np.repeat([5, 1, 0.1], _DIM // _SEVERAL).astype(np.float32)
    (hits,) = write(tmp_path / "c.faiss", rows).search(query[None], 2)
    assert [(hit.id // 3, round(hit.score, 6)) for hit in hits] == [(4, 1.0), (11, 1.0)]


def test_a_large_one_is_kept_flat_and_mapped_ones_answer_the_same(tmp_path: Path) -> None:
    rows = pictures(5000)
    catalog = write(tmp_path / "c.faiss", rows)
    assert catalog.choice is not None
    assert catalog.choice.kind == "flat"
    assert faiss.read_index(str(catalog.path)).ntotal == 5000
    mapped = Catalog.open(catalog.path, mmap=True)
    asked = pictures(2, seed=3)
    assert mapped.search(asked, 4) == catalog.search(asked, 4)
    best = by_loops(asked[0], rows).argmax()
    assert catalog.search(asked[:1], 1)[0][0].id == 3 * best


@pytest.mark.parametrize("kind", ["pq", "ivf", "hnsw", "tiny", "learned"])
def test_other_types_are_refused_before_anything_is_embedded(tmp_path: Path, kind: str) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"a")
    embedder = FakeEmbedder(dim=_DIM)
    embedder.contract = several()
    index, wanted = tmp_path / "c.faiss", Wanted(type=kind)
    with pytest.raises(UsageError, match=f"type {kind} cannot hold several vectors per picture"):
        sync_folder(photos, index, embedder, wanted=wanted, rebuild=True)
    rows = [Row(1, b"a", b"", pictures(1)[0])]
    with pytest.raises(UsageError, match="cannot hold several"):
        write_catalog(index, rows, contract=several(), root=tmp_path, wanted=wanted)
    assert not embedder.embedded
    assert sync_folder(photos, index, embedder, wanted=Wanted(type="flat")).embedded == 1
    assert Catalog.open(index).parts == _SEVERAL
    # What was wanted before, for another model, counts as well.
    embedder.contract = dataclasses.replace(contract(dim=_DIM), weights_hash="other")
    if kind != "learned":
        sync_folder(photos, index, embedder, wanted=wanted, rebuild=True)
        embedder.contract = several()
        with pytest.raises((UsageError, MismatchError)):
            sync_folder(photos, index, embedder)


@pytest.mark.parametrize(
    "use",
    [
        lambda one: Expansion().search(one, pictures(1), 3),
        lambda one: Reciprocal().search(one, pictures(1), 3),
        lambda one: cluster_by_links(one, 0.5),
        lambda one: cluster_by_means(one, 2),
        lambda one: cluster_by_density(one),
    ],
)
def test_what_needs_one_vector_says_so(catalog: Catalog, use: Callable[[Catalog], Any]) -> None:
    with pytest.raises(UsageError, match="needs one vector per picture") as caught:
        use(catalog)
    assert caught.value.facts == "c.faiss has 3 of each"


def test_it_is_fused_with_another_by_the_mean_of_scores(tmp_path: Path) -> None:
    rows, asked = [pictures(20, seed=5), pictures(20, seed=6)], pictures(2, seed=7)
    files = (tmp_path / "one.faiss", tmp_path / "two.faiss")
    catalogs = [
        write(file, some, weights_hash=file.stem) for file, some in zip(files, rows, strict=True)
    ]
    (hits,) = Fusion(catalogs).search([asked[:1], asked[1:]], 4)
    mean = (by_loops(asked[0], rows[0]) + by_loops(asked[1], rows[1])) / 2
    assert [hit.id // 3 for hit in hits] == np.argsort(-mean)[:4].tolist()


def test_a_model_that_gives_another_number_is_another_model(catalog: Catalog) -> None:
    catalog.check_model(several())
    with pytest.raises(MismatchError, match="made by another model"):
        catalog.check_model(contract(dim=_DIM))


def test_a_file_that_lost_its_names_does_not_pretend_to_know(catalog: Catalog) -> None:
    bare = catalog.path.with_name("bare.faiss")
    faiss.write_index(faiss.read_index(str(catalog.path)), str(bare))
    with pytest.raises(MismatchError, match="no longer says how many vectors a picture has"):
        Catalog.open(bare).check_model(several())


@pytest.mark.parametrize("said", [0, -1, 5, "2", 1.5, None])
def test_a_number_that_cannot_be_is_damage(catalog: Catalog, said: Any) -> None:
    catalog.manifest["model"]["contract"]["vectors"] = said
    with pytest.raises(MismatchError, match="is damaged"):
        Catalog(catalog.path, catalog._index, catalog._tail)
