"""The published file: what it answers, that damage is met, and that it is never half."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt
import pytest

from embedkit.errors import DataError, EmbedKitError, MismatchError, UsageError
from embedkit.index import Catalog, Row, write_catalog
from embedkit.index.catalog import portable_path, resolve_path
from tests.index.fakes import contract

Matrix = npt.NDArray[np.float32]


def unit(count: int, dim: int, seed: int = 0) -> Matrix:
    rows = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    out: Matrix = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return out


def rows_of(vectors: Matrix, *, step: int = 1, first: int = 1) -> list[Row]:
    return [
        Row(first + step * n, b"class%d/%d.jpg" % (n % 3, n), b"class%d" % (n % 3), vector)
        for n, vector in enumerate(vectors)
    ]


def write(path: Path, vectors: Matrix, *, metric: str = "cosine", step: int = 1) -> Path:
    about = contract(dim=vectors.shape[1], metric=metric)
    write_catalog(path, rows_of(vectors, step=step), contract=about, root=path.parent / "photos")
    return path


def brute_force(
    vectors: Matrix, queries: Matrix, k: int, metric: str = "cosine"
) -> list[list[tuple[int, float]]]:
    """Positions and scores by float64 loops over all pairs, ties by position."""
    out = []
    for query in queries.astype(np.float64):
        scores = []
        for row in vectors.astype(np.float64):
            score = (
                float(row @ query)
                if metric == "cosine"
                else -float(np.sqrt(((row - query) ** 2).sum()))
            )
            scores.append(float(np.float32(score)))
        order = sorted(range(len(scores)), key=lambda n: (-scores[n], n))[:k]
        out.append([(n, scores[n]) for n in order])
    return out


@pytest.fixture
def index(tmp_path: Path) -> Path:
    return write(tmp_path / "catalog.faiss", unit(12, 5))


# Searching


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize(
    ("count", "dim", "queries", "k"), [(1, 1, 1, 3), (40, 7, 1, 5), (300, 16, 33, 10)]
)
def test_search_equals_loops_over_all_pairs(
    tmp_path: Path, metric: str, count: int, dim: int, queries: int, k: int
) -> None:
    vectors, asked = unit(count, dim, 1), unit(queries, dim, 2)
    if metric == "l2":
        vectors, asked = vectors * 3, asked * 2
    catalog = Catalog.open(write(tmp_path / "c.faiss", vectors, metric=metric, step=7))
    found = catalog.search(asked, k)
    for hits, expected in zip(found, brute_force(vectors, asked, k, metric), strict=True):
        assert [hit.rank for hit in hits] == list(range(1, len(expected) + 1))
        assert [hit.id for hit in hits] == [1 + 7 * n for n, _ in expected]
        assert [hit.score for hit in hits] == pytest.approx([s for _, s in expected], abs=1e-6)


@pytest.mark.parametrize("queries", [1, 64])
def test_equal_pictures_stand_by_id_also_across_the_cut(tmp_path: Path, queries: int) -> None:
    base = unit(6, 8, 3)
    # 50 copies of each of six pictures, mixed; any cut falls between copies.
    vectors = base[np.random.default_rng(0).integers(0, 6, 300)]
    catalog = Catalog.open(write(tmp_path / "c.faiss", vectors))
    asked = np.repeat(base[:1], queries, axis=0)
    expected = [1 + n for n, _ in brute_force(vectors, base[:1], 60)[0]]
    for hits in catalog.search(asked, 60):
        assert [hit.id for hit in hits] == expected
        assert len({hit.score for hit in hits}) == 2


def test_a_score_does_not_depend_on_the_other_queries(tmp_path: Path) -> None:
    catalog = Catalog.open(write(tmp_path / "c.faiss", unit(200, 64)))
    asked = unit(40, 64, 5)
    together = catalog.search(asked, 200)
    alone = [catalog.search(asked[n : n + 1], 200)[0] for n in range(40)]
    assert together == alone


def test_more_hits_than_pictures_gives_all_of_them(index: Path) -> None:
    (hits,) = Catalog.open(index).search(unit(1, 5, 9), 99)
    assert len(hits) == 12
    assert {hit.id for hit in hits} == set(range(1, 13))


def test_no_query_gives_no_answer(index: Path) -> None:
    assert Catalog.open(index).search(np.zeros((0, 5), np.float32)) == []


def test_a_hit_says_who_it_is(index: Path) -> None:
    (hit,), *_ = Catalog.open(index).search(unit(12, 5)[4:5], 1)
    assert (hit.rank, hit.id, hit.label) == (1, 5, "class1")
    assert hit.path == index.parent / "photos/class1/4.jpg"
    assert hit.score == pytest.approx(1)


@pytest.mark.parametrize(
    ("vectors", "k", "error", "text"),
    [
        (np.zeros((1, 4)), 1, MismatchError, "4 wide"),
        (np.zeros(5), 1, UsageError, "shape"),
        (np.full((2, 5), np.nan), 1, UsageError, "query 0"),
        (np.array([[0, 0, 0, 0, 1], [0, 0, np.inf, 0, 0]]), 1, UsageError, "query 1"),
        (np.zeros((1, 5)), 0, UsageError, "at least 1"),
        ([["a"]], 1, UsageError, "numbers"),
    ],
)
def test_vectors_that_cannot_be_searched_with_are_refused_in_a_sentence(
    index: Path, vectors: npt.ArrayLike, k: int, error: type[EmbedKitError], text: str
) -> None:
    with pytest.raises(error, match=text):
        Catalog.open(index).search(vectors, k)


# The file


def test_it_is_a_genuine_faiss_file_and_a_genuine_zip(index: Path) -> None:
    flat = faiss.read_index(str(index))
    assert type(flat) is faiss.IndexFlatIP
    assert np.array_equal(flat.reconstruct_n(0, 12), unit(12, 5))
    with zipfile.ZipFile(index) as archive:
        assert archive.testzip() is None
        manifest = json.loads(archive.read("embedkit/manifest.json"))
    alone = index.with_name("alone.faiss")
    faiss.write_index(flat, str(alone))
    payload = alone.read_bytes()
    assert index.read_bytes().startswith(payload)
    assert manifest["index"]["payload_bytes"] == len(payload)
    assert manifest["index"]["payload_crc32"] == zlib.crc32(payload)
    assert manifest["model"]["fingerprint"] == contract(dim=5).fingerprint


def test_an_l2_model_gives_an_l2_index(tmp_path: Path) -> None:
    path = write(tmp_path / "c.faiss", unit(3, 4), metric="l2")
    assert type(faiss.read_index(str(path))) is faiss.IndexFlatL2
    catalog = Catalog.open(path, verify=True)
    assert catalog.metric == "l2"
    (hits,) = catalog.search(unit(3, 4)[:1] + np.float32([[3, 0, 0, 0]]), 1)
    assert hits[0].score < 0


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    one = write(tmp_path / "one.faiss", unit(9, 4)).read_bytes()
    assert write(tmp_path / "two.faiss", unit(9, 4)).read_bytes() == one


def test_mapped_and_read_answer_the_same(index: Path) -> None:
    asked = unit(4, 5, 8)
    mapped = Catalog.open(index, mmap=True, verify=True)
    read = Catalog.open(index)
    assert mapped.search(asked, 5) == read.search(asked, 5)
    assert mapped.labels() == read.labels()
    for position in range(len(read)):
        name = os.fsencode(str(read.hit(position).name))
        assert mapped.hit(position) == read.hit(position)
        assert mapped.position_of(name) == read.position_of(name) == position
    assert mapped.position_of(b"no such name") is None


def test_a_mapped_catalog_outlives_its_replacement(index: Path) -> None:
    asked = unit(2, 5, 8)
    mapped = Catalog.open(index, mmap=True)
    before = mapped.search(asked, 3)
    write(index, unit(3, 5, 77))
    assert mapped.search(asked, 3) == before
    assert len(Catalog.open(index)) == 3


def test_any_bytes_will_do_as_a_name(tmp_path: Path) -> None:
    names = [
        b"a\xff\xfe.jpg",
        b"new\nline/x.jpg",
        "\u5199\u771f/\u0438\u043c\u044f.jpg".encode(),
        b"a" * 250 + b".jpg",
    ]
    rows = [
        Row(n, name, name.split(b"/")[0], vector)
        for n, (name, vector) in enumerate(zip(names, unit(4, 3), strict=True))
    ]
    folder = tmp_path / os.fsdecode(b"odd \xe9\n folder")
    folder.mkdir()
    path = folder / os.fsdecode(b"\xff.faiss")
    write_catalog(path, rows, contract=contract(dim=3), root=folder / "p")
    for mmap in (False, True):
        hits = Catalog.open(path, mmap=mmap, verify=True).search(unit(4, 3), 1)
        assert [os.fsencode(hit.path or "") for (hit,) in hits] == [
            os.fsencode(folder) + b"/p/" + name for name in names
        ]


def test_no_rows_write_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no usable picture"):
        write_catalog(tmp_path / "c.faiss", [], contract=contract(), root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_rows_that_cannot_be_right_are_refused(tmp_path: Path) -> None:
    first, second, *_ = rows_of(unit(2, 8))
    for rows in ([second, first], [first, first], [first._replace(vector=unit(1, 7)[0])]):
        with pytest.raises(MismatchError):
            write_catalog(tmp_path / "c.faiss", rows, contract=contract(), root=tmp_path)


def test_folder_and_index_move_together(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "photos/class0").mkdir(parents=True)
    (home / "photos/class0/0.jpg").touch()
    (home / "model.onnx").touch()
    path = home / "c.faiss"
    write_catalog(
        path,
        rows_of(unit(1, 8)),
        contract=contract(),
        root=home / "photos",
        model=home / "model.onnx",
    )
    home.rename(tmp_path / "elsewhere")
    catalog = Catalog.open(tmp_path / "elsewhere/c.faiss")
    (hits,) = catalog.search(unit(1, 8), 1)
    assert hits[0].path is not None
    assert hits[0].path.is_file()
    assert catalog.find_model() == tmp_path / "elsewhere/model.onnx"


def test_what_shares_no_folder_is_remembered_in_full(tmp_path: Path) -> None:
    assert portable_path(Path("/dev/null"), tmp_path) == b"/dev/null"
    assert portable_path(tmp_path / "a", tmp_path / "b") == b"../a"
    assert resolve_path(b"../a", tmp_path / "b") == tmp_path / "a"
    assert resolve_path(b"/dev/null", tmp_path) == Path("/dev/null")


# Damage


def test_without_its_tail_it_still_answers_by_position(index: Path) -> None:
    asked = unit(3, 5, 4)
    named = Catalog.open(index).search(asked, 4)
    faiss.write_index(faiss.read_index(str(index)), str(index))
    catalog = Catalog.open(index, verify=True)
    assert not catalog.has_names
    assert catalog.root is None
    assert catalog.find_model() is None
    for hits, before in zip(catalog.search(asked, 4), named, strict=True):
        assert [(hit.id + 1, hit.score) for hit in hits] == [(hit.id, hit.score) for hit in before]
        assert all(hit.path is None and hit.label == "" for hit in hits)
    with pytest.raises(UsageError, match="not to be found"):
        catalog.embedder()


def test_a_file_cut_short_anywhere_is_refused_or_answers_by_position(index: Path) -> None:
    whole = index.read_bytes()
    payload = 45 + 4 * 12 * 5
    cut = index.with_name("cut.faiss")
    near = [edge + n for edge in (45, payload, len(whole) - 22, len(whole)) for n in range(-3, 3)]
    for length in sorted({*range(0, len(whole), 9), *near} - {*range(len(whole), len(whole) + 3)}):
        cut.write_bytes(whole[:length])
        if length == payload:
            assert not Catalog.open(cut).has_names
            continue
        with pytest.raises(MismatchError):
            Catalog.open(cut, mmap=bool(length % 2))


@pytest.mark.parametrize("mmap", [False, True])
def test_a_flipped_bit_in_the_tail_never_changes_an_answer(index: Path, mmap: bool) -> None:
    asked = unit(3, 5, 4)
    expected = Catalog.open(index).search(asked, 12)
    whole = bytearray(index.read_bytes())
    refused = []
    for place in range(45 + 4 * 12 * 5, len(whole), 4):
        bit = 1 << (place // 4 % 8)
        whole[place] ^= bit
        index.write_bytes(whole)
        whole[place] ^= bit
        try:
            catalog = Catalog.open(index, mmap=mmap)
        except MismatchError:
            refused.append(True)
        else:
            # Only what means nothing can differ: dates and attributes in the ZIP's own lists.
            refused.append(False)
            assert catalog.has_names
            assert catalog.search(asked, 12) == expected
    assert sum(refused) > 0.7 * len(refused)


def test_a_flipped_bit_in_the_vectors_is_met_by_verify(index: Path) -> None:
    whole = bytearray(index.read_bytes())
    for place in [*range(45), *range(45, 45 + 4 * 12 * 5, 4)]:
        mmap = bool(place % 3)
        whole[place] ^= 1 << (place % 8)
        index.write_bytes(whole)
        whole[place] ^= 1 << (place % 8)
        with pytest.raises(MismatchError):
            Catalog.open(index, verify=True, mmap=mmap)
        with contextlib.suppress(MismatchError):  # without verify: any outcome but a crash
            Catalog.open(index, mmap=mmap).search(unit(2, 5), 12)


@pytest.mark.parametrize("bits", [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001])
@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_stored_numbers_that_are_not_finite_are_one_error(
    tmp_path: Path, metric: str, bits: int
) -> None:
    index = write(tmp_path / "c.faiss", unit(12, 5), metric=metric)
    whole = bytearray(index.read_bytes())
    for at in range(12):  # wherever FAISS ranks it, each row is looked at
        whole[45 + 20 * at : 49 + 20 * at] = bits.to_bytes(4, "little")
    index.write_bytes(whole)
    catalog = Catalog.open(index)
    # No warning of NumPy's beside it: a warning fails the tests.
    for query in ([0, 1, 0, 0, 0], [1, 0, 0, 0, 0]):
        for ask in (
            lambda query: catalog.search([query], 3),
            lambda query: catalog.search([query], 3, among=[2, 5, 7]),
            lambda query: catalog.scores(query, [2, 5]),
        ):
            with pytest.raises(MismatchError, match=r"finite|fewer vectors"):
                ask(query)


def test_a_tail_of_other_vectors_is_refused(index: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.faiss", unit(11, 5))
    index.write_bytes(index.read_bytes()[: 45 + 240] + other.read_bytes()[45 + 220 :])
    with pytest.raises(MismatchError, match="damaged"):
        Catalog.open(index)


def test_a_tail_of_another_version_says_so(index: Path) -> None:
    whole = index.read_bytes()
    flat = whole[: 45 + 240]
    with zipfile.ZipFile(index) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = "embedkit/manifest.json"
    members[name] = members[name].replace(b"embedkit.catalog/1", b"embedkit.catalog/9")
    with index.open("wb") as file:
        file.write(flat)
        with zipfile.ZipFile(file, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
    with pytest.raises(MismatchError, match="another embedkit"):
        Catalog.open(index)


@pytest.mark.parametrize("factory", ["HNSW8,Flat", "SQ4", "IVF2,Flat", "PCA4,Flat", "IDMap2,Flat"])
def test_a_faiss_file_of_another_kind_is_refused(tmp_path: Path, factory: str) -> None:
    other = faiss.index_factory(8, factory)
    other.train(unit(100, 8))
    if factory != "IDMap2,Flat":
        other.add(unit(100, 8))
    path = tmp_path / "other.faiss"
    faiss.write_index(other, str(path))
    with pytest.raises(MismatchError, match=r"no embedkit index|damaged"):
        Catalog.open(path)


@pytest.mark.parametrize(
    "content", [b"", b"IxFI", b"PK\x03\x04" + b"0" * 99, b"IxFI" + b"\xff" * 200]
)
def test_what_is_no_index_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.faiss"
    path.write_bytes(content)
    with pytest.raises(MismatchError):
        Catalog.open(path)


def test_a_missing_index_is_a_usage_error(tmp_path: Path) -> None:
    for path in (tmp_path / "no.faiss", tmp_path, tmp_path / "no/no.faiss"):
        with pytest.raises(UsageError, match="there is no index"):
            Catalog.open(path)


def test_reading_limits_are_put_back(index: Path) -> None:
    before = faiss.get_deserialization_vector_byte_limit()
    Catalog.open(index)
    assert faiss.get_deserialization_vector_byte_limit() == before


# Whose vectors


@pytest.mark.parametrize(("dim", "weights"), [(5, "other"), (7, "w"), (7, "other")])
def test_another_model_of_whatever_width_is_refused_by_name(
    index: Path, dim: int, weights: str
) -> None:
    catalog = Catalog.open(index)
    other = contract(dim=dim, weights=weights)
    with pytest.raises(MismatchError) as caught:
        catalog.check_model(other)
    assert catalog.fingerprint in str(caught.value)
    assert other.fingerprint in str(caught.value)
    assert "--rebuild" in str(caught.value)
    catalog.check_model(contract(dim=5))


# Publishing


def test_the_order_is_file_to_disk_then_rename_then_folder_to_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(handle: int) -> None:
        name = Path(f"/proc/self/fd/{handle}").readlink().name
        events.append(f"fsync {name.split('.tmp')[0] if '.tmp' in name else 'folder'}")
        fsync(handle)

    def record_replace(path: Path, target: Path) -> Path:
        assert path.parent == target.parent
        Catalog.open(path, verify=True)  # whole before it gets its name
        events.append(f"rename {target.name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    write(tmp_path / "c.faiss", unit(2, 3))
    assert events == ["fsync c.faiss", "rename c.faiss", "fsync folder"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    "point",
    [
        "embedkit.index.file.write_payload",
        "embedkit.index.catalog.write_tail",
        "zipfile.ZipFile.writestr",
        "os.fsync",
        "embedkit.index.file._check_written",
        "pathlib.Path.replace",
    ],
)
def test_failing_at_any_point_leaves_the_old_file_and_nothing_else(
    index: Path, monkeypatch: pytest.MonkeyPatch, point: str, error: BaseException
) -> None:
    before = index.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise error

    if point == "embedkit.index.file.write_payload":
        point = "embedkit.index.catalog.write_payload"
    monkeypatch.setattr(point, fail)
    expected = EmbedKitError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        write(index, unit(30, 5, 1))
    if isinstance(error, OSError):
        assert "still stands" in str(caught.value)
        assert "room" in str(caught.value)
    monkeypatch.undo()
    assert index.read_bytes() == before
    assert list(index.parent.iterdir()) == [index]


def test_a_write_that_reports_success_and_is_short_is_not_published(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = index.read_bytes()
    fsync = os.fsync

    def lose_the_end(handle: int) -> None:
        os.ftruncate(handle, 100)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", lose_the_end)
    with pytest.raises(EmbedKitError, match="cannot be written"):
        write(index, unit(30, 5, 1))
    assert index.read_bytes() == before


_FULL = """
import resource, sys
from pathlib import Path
from embedkit.errors import EmbedKitError
from tests.index.test_catalog import unit, write
index = Path(sys.argv[1])
before = index.read_bytes()
failed = 0
for limit in range(0, 30_000, 1_500):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write(index, unit(500, 10, 1))
    except EmbedKitError as error:
        failed += 1
        assert str(index) in str(error) and "room" in str(error), error
        assert index.read_bytes() == before
    else:
        assert limit > 20_000
    assert list(index.parent.iterdir()) == [index]
print(failed)
"""


def test_a_full_disk_leaves_the_old_file_whatever_the_room(index: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FULL, str(index)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 14


def test_the_target_of_a_link_is_replaced_not_the_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    write(tmp_path / "real/c.faiss", unit(2, 3))
    link = tmp_path / "link.faiss"
    link.symlink_to("real/c.faiss")
    write(link, unit(4, 3))
    assert link.is_symlink()
    assert len(Catalog.open(tmp_path / "real/c.faiss")) == 4


def test_a_copy_answers_as_the_first(index: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    copy = Path(shutil.copy(index, tmp_path / "there/other-name.faiss"))
    asked = unit(1, 5, 3)
    one, two = Catalog.open(index).search(asked, 5)[0], Catalog.open(copy).search(asked, 5)[0]
    assert [hit.id for hit in one] == [hit.id for hit in two]
