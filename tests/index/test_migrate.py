"""Going on to another model: the bridge recovers what is known, and nothing is lost on the way."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from embedkit.errors import MismatchError, UsageError
from embedkit.index import Catalog, sync_folder
from embedkit.index.migrate import Bridge, bridge_path, fit_bridge, migrate
from embedkit.index.store import Store, store_path
from embedkit.runtime import Embedder
from tests.index.test_rerank import unit
from tests.tiny_model import write_tiny_model


def rotation(rows: int, columns: int) -> Any:
    """``(rows, columns)`` with orthonormal rows."""
    square = np.random.default_rng(5).standard_normal((columns, columns))
    return np.linalg.qr(square)[0][:rows]


@pytest.mark.parametrize(("new", "old"), [(8, 8), (6, 10), (5, 5)])
def test_a_rotation_between_two_models_is_recovered_exactly(new: int, old: int) -> None:
    vectors = unit(400, new)
    turn = rotation(new, old)
    labels = [f"c{n % 20}" for n in range(400)]
    bridge = fit_bridge((vectors @ turn).astype(np.float32), vectors, labels, ("a", "b"))
    assert bridge.kind == "orthogonal"
    np.testing.assert_allclose(bridge.matrix, turn, atol=1e-5)
    assert bridge.losses.overlap > 0.999
    assert bridge.losses.before == bridge.losses.bridge == bridge.losses.after
    assert bridge.losses.queries == 60


def test_a_skewed_map_is_found_by_ridge_and_the_loss_is_that_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    new = unit(300, 6)
    old = (new @ (rng.standard_normal((6, 6)) * [3, 3, 1, 1, 0.2, 0.2])).astype(np.float32)
    old /= np.linalg.norm(old, axis=1, keepdims=True)
    labels = [f"c{n % 7}" for n in range(299)] + [""]
    bridge = fit_bridge(old, new, labels, ("a", "b"))
    assert bridge.kind == "ridge"
    rows = np.random.default_rng(0).permutation(300)[255:].tolist()
    overlap, recall, asked = 0.0, 0, 0
    for row in rows:
        ask = new[row].astype(np.float64) @ bridge.matrix
        others = [n for n in range(300) if n != row]
        over = sorted(others, key=lambda n: -float(ask @ old[n]))[:10]
        true = sorted(others, key=lambda n: -float(old[row] @ old[n]))[:10]
        overlap += len(set(over) & set(true)) / 10
        if labels[row]:
            asked += 1
            recall += labels[over[0]] == labels[row]
    assert bridge.losses.overlap == pytest.approx(overlap / len(rows), abs=0.005)
    assert bridge.losses.bridge == pytest.approx(recall / asked, abs=0.03)


def test_a_bridge_is_kept_and_a_damaged_one_met(tmp_path: Path) -> None:
    bridge = fit_bridge(unit(120, 4), unit(120, 4), [""] * 120, ("a", "b"))
    bridge.save(tmp_path / "b.npz")
    again = Bridge.load(tmp_path / "b.npz")
    assert (again.old, again.new, again.kind) == ("a", "b", bridge.kind)
    assert np.array_equal(again.matrix, bridge.matrix)
    assert again.losses.overlap == bridge.losses.overlap
    assert np.isnan(again.losses.before)
    content = (tmp_path / "b.npz").read_bytes()
    for damaged in (b"", content[:100], b"PK" + bytes(50)):
        (tmp_path / "b.npz").write_bytes(damaged)
        with pytest.raises(MismatchError, match="no bridge"):
            Bridge.load(tmp_path / "b.npz")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """150 pictures indexed by one model, and another model of another width."""
    for n in range(150):
        rng = np.random.default_rng(n)
        small = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        file = tmp_path / f"photos/class{n % 10}/{n}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small).resize((24, 20)).save(file)
    write_tiny_model(tmp_path / "old.onnx", dim=24)
    write_tiny_model(tmp_path / "new.onnx", dim=20, seed=3, name="new")
    with Embedder.load(tmp_path / "old.onnx") as old:
        sync_folder(tmp_path / "photos", tmp_path / "c.faiss", old, model=tmp_path / "old.onnx")
    return tmp_path


def names(place: Path) -> set[str]:
    return {path.name for path in place.iterdir()}


def test_after_it_the_index_is_the_new_models_and_nothing_is_left(place: Path) -> None:
    before = names(place)
    told: list[Bridge | None] = []
    with Embedder.load(place / "new.onnx") as new:
        report = migrate(place / "c.faiss", new, model=place / "new.onnx", fitted=told.append)
        direct = place / "direct.faiss"
        sync_folder(place / "photos", direct, new, model=place / "new.onnx")
        fingerprint = new.contract.fingerprint
    catalog = Catalog.open(place / "c.faiss", verify=True)
    assert catalog.fingerprint == fingerprint
    everything = np.arange(150)
    assert np.array_equal(catalog.vectors(everything), Catalog.open(direct).vectors(everything))
    assert (report.found, report.embedded, report.count) == (150, 150, 150)
    assert len(told) == 1
    assert told[0] is not None
    assert names(place) == before | {"direct.faiss", "direct.faiss.store"}
    # The store belongs to it: a sync has nothing to do.
    with Embedder.load(place / "new.onnx") as new:
        again = sync_folder(place / "photos", place / "c.faiss", new, model=place / "new.onnx")
        assert (again.unchanged, again.published) == (150, False)
        with pytest.raises(UsageError, match="of this model already"):
            migrate(place / "c.faiss", new, model=place / "new.onnx")


def test_while_it_goes_on_both_models_search_the_old_catalog(place: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, failed: int, total: int) -> None:
        raise Stop

    with Embedder.load(place / "new.onnx") as new, pytest.raises(Stop):
        migrate(place / "c.faiss", new, model=place / "new.onnx", progress=stop)
    catalog = Catalog.open(place / "c.faiss")
    picture = place / "photos/class3/13.png"
    bridge = Bridge.load(bridge_path(place / "c.faiss"))
    with catalog.embedder(place / "new.onnx") as over, Embedder.load(place / "new.onnx") as new:
        vector = over.embed([picture])
        wanted = new.embed([picture])[0].astype(np.float64) @ bridge.matrix
        np.testing.assert_allclose(vector[0], wanted / np.linalg.norm(wanted), atol=1e-6)
        assert len(catalog.search(vector, 5)[0]) == 5
        assert over.contract.thresholds == {}
    with catalog.embedder() as own:
        assert catalog.search(own.embed([picture]), 1)[0][0].path == picture.resolve()
    write_tiny_model(place / "third.onnx", dim=20, seed=9)
    with pytest.raises(MismatchError, match="another model"):
        catalog.embedder(place / "third.onnx")
    # The same call goes on, and does not embed again what it has.
    with Embedder.load(place / "new.onnx") as new:
        report = migrate(place / "c.faiss", new, model=place / "new.onnx")
    assert report.count == 150
    assert report.unchanged + report.embedded == 150


def test_killed_between_the_two_renames_the_same_call_finishes(place: Path) -> None:
    shutil.copy(place / "c.faiss", place / "kept.faiss")
    with Embedder.load(place / "new.onnx") as new:
        migrate(place / "c.faiss", new, model=place / "new.onnx")
        # The store has taken its place, the catalog has not.
        (place / "c.faiss").rename(place / "c.faiss.next")
        (place / "kept.faiss").rename(place / "c.faiss")
        with Catalog.open(place / "c.faiss").embedder() as own:
            assert own.contract.name == "tiny"
        report = migrate(place / "c.faiss", new, model=place / "new.onnx")
        assert (report.unchanged, report.embedded) == (150, 0)
        assert Catalog.open(place / "c.faiss").fingerprint == new.contract.fingerprint
    assert not (place / "c.faiss.next").exists()


def test_what_was_said_by_hand_goes_along(place: Path) -> None:
    with Store(store_path(place / "c.faiss")) as store:
        store.choose(kept_out=[b"class0/0.png"])
        store.give_labels({b"class1/1.png": b"odd"})
    with Embedder.load(place / "new.onnx") as new:
        report = migrate(place / "c.faiss", new, model=place / "new.onnx")
    catalog = Catalog.open(place / "c.faiss")
    assert (report.count, len(catalog)) == (149, 149)
    assert catalog.positions_labelled(["odd"]).size == 1


def test_few_pictures_and_lost_ones(place: Path) -> None:
    for n in range(60):
        (place / f"photos/class{n % 10}/{n}.png").unlink()
    told: list[Bridge | None] = []
    with Embedder.load(place / "new.onnx") as new:
        report = migrate(place / "c.faiss", new, model=place / "new.onnx", fitted=told.append)
        assert told == [None]
        assert report.count == 90
        shutil.move(place / "photos", place / "elsewhere")
        with Embedder.load(place / "old.onnx") as old, pytest.raises(UsageError, match="not there"):
            migrate(place / "c.faiss", old, model=place / "old.onnx")
