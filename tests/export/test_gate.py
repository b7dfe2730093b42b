"""The gate finds what was planted, whatever it is, and lets nothing else be called finished."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from embedkit.errors import DataError, GateError
from embedkit.evaluate import Difference, Interval
from embedkit.export import (
    BatchParity,
    GateReport,
    Thresholds,
    check_export,
    export_checked,
    gate,
    sample,
)
from embedkit.export.precision import with_contract
from embedkit.imaging import read_pixels
from embedkit.models import weights_hash
from embedkit.runtime import ModelContract
from tests.export.small import Exported, Photos


class Fake:
    """Runs the network itself, then spoils the vectors."""

    name = "fake"
    device = "cpu"

    def __init__(self, exported: Exported, spoil: Callable[[np.ndarray], np.ndarray]) -> None:
        self.contract: ModelContract = exported.contract
        self._network = copy.deepcopy(exported.network).eval()
        self._spoil = spoil
        self.batches: list[int] = []

    def run(self, pixels: np.ndarray) -> np.ndarray:
        self.batches.append(len(pixels))
        with torch.no_grad():
            raw = self._network(torch.from_numpy(np.ascontiguousarray(pixels))).numpy()
        return self._spoil(raw / np.linalg.norm(raw, axis=1, keepdims=True))

    def close(self) -> None:
        return


def edited(exported: Exported, folder: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load(exported.path)
    change(model)
    path = folder / "edited.onnx"
    path.write_bytes(with_contract(model, exported.contract))
    return path


def set_tensor(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], None]) -> None:
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    values = numpy_helper.to_array(tensor).copy()
    change(values)
    tensor.CopyFrom(numpy_helper.from_array(values, name))


def test_an_honest_export_passes_with_the_numbers_a_loop_finds(
    exported: Exported, photos: Photos
) -> None:
    report = check_export(exported.path, exported.network, photos.paths, photos.labels)
    assert report.passed
    assert report.images == 24
    assert not report.skipped
    assert [row.batch for row in report.batches] == [1, 2, 7]
    assert report.neighbour_overlap == 1

    pixels = [read_pixels(path, exported.contract.preprocess) for path in photos.paths]
    with torch.no_grad():
        raw = [exported.network(torch.from_numpy(p[None].copy()))[0].numpy() for p in pixels]
    unit = [row / np.linalg.norm(row) for row in raw]
    hits = 0
    for i, row in enumerate(unit):
        scores = {j: float(row @ other) for j, other in enumerate(unit) if j != i}
        hits += photos.labels[max(scores, key=lambda j: scores[j])] == photos.labels[i]
    assert report.recall_at_1 is not None
    assert report.recall_at_1.before == pytest.approx(hits / 24)
    assert report.recall_at_1.after == pytest.approx(hits / 24)
    assert report.recall_at_1.interval == Interval(0, 0)
    assert report.index_overlap == 1
    for row in report.batches:
        assert row.images == 24
        assert row.min_cosine > 0.999999
        assert row.length_error < 1e-5


def test_a_wrong_mean_in_the_graph_is_caught(
    exported: Exported, photos: Photos, tmp_path: Path
) -> None:
    def shift(values: np.ndarray) -> None:
        values += 0.3

    path = edited(exported, tmp_path, lambda m: set_tensor(m, "network.shift", shift))
    report = check_export(path, exported.network, photos.paths, photos.labels)
    assert not report.passed
    assert "cosine" in report.reasons[0]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_no_number_is_caught(
    exported: Exported, photos: Photos, value: float, tmp_path: Path
) -> None:
    def poison(values: np.ndarray) -> None:
        values.ravel()[5] = value

    path = edited(exported, tmp_path, lambda m: set_tensor(m, "network.head.weight", poison))
    report = check_export(path, exported.network, photos.paths, photos.labels)
    assert report.reasons == ("the file gives vectors that are not finite, 24 of 24",)
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["passed"] is False


def test_a_network_that_gives_no_numbers_is_told_apart_from_a_file_that_does(
    exported: Exported, photos: Photos
) -> None:
    broken = copy.deepcopy(exported.network)
    with torch.no_grad():
        broken.head.bias[0] = float("nan")
    report = check_export(exported.path, broken, photos.paths, photos.labels)
    assert report.reasons == ("the network gives vectors that are not finite, 24 of 24",)


def test_a_batch_norm_that_the_file_lost_is_caught(exported: Exported, photos: Photos) -> None:
    network = copy.deepcopy(exported.network)
    layer = network.backbone.body.get_submodule("layer3.0")
    norm = torch.nn.BatchNorm2d(256).eval()
    norm.running_mean, norm.running_var = torch.full((256,), 0.1), torch.full((256,), 1.5)
    layer.bn2 = torch.nn.Sequential(layer.get_submodule("bn2"), norm)
    report = check_export(exported.path, network, photos.paths, photos.labels)
    assert not report.passed
    assert "cosine" in report.reasons[0]


def test_a_model_that_is_wrong_at_one_batch_size_only_is_caught(
    exported: Exported, photos: Photos
) -> None:
    def spoil(vectors: np.ndarray) -> np.ndarray:
        return np.asarray(vectors[:, ::-1]) if len(vectors) == 1 else vectors

    backend = Fake(exported, spoil)
    report = check_export(backend, exported.network, photos.paths, photos.labels)
    assert set(backend.batches) == {1, 2, 7}
    assert [reason.split(":")[0] for reason in report.reasons] == ["batch 1"]


def test_a_wrong_length_is_caught_though_every_cosine_is_one(
    exported: Exported, photos: Photos
) -> None:
    backend = Fake(exported, lambda vectors: vectors * np.float32(1.05))
    report = check_export(backend, exported.network, photos.paths, photos.labels)
    assert len(report.reasons) == 3
    assert all("off by 5.00%" in reason for reason in report.reasons)


def test_lost_neighbours_and_lost_recall_are_caught_whatever_the_cosines(
    exported: Exported, photos: Photos
) -> None:
    rng = np.random.default_rng(0)

    def spoil(vectors: np.ndarray) -> np.ndarray:
        noisy = vectors + rng.normal(0, 1, vectors.shape)
        return np.asarray(noisy / np.linalg.norm(noisy, axis=1, keepdims=True), np.float32)

    report = check_export(
        Fake(exported, spoil),
        exported.network,
        photos.paths,
        photos.labels,
        thresholds=Thresholds(min_cosine=-1),
    )
    words = " | ".join(report.reasons)
    assert "nearest neighbours stay" in words
    assert "searches an fp32 index" in words
    assert report.recall_at_1 is not None
    change = report.recall_at_1
    assert change.interval.low <= change.after - change.before <= change.interval.high < 0
    assert "recall@1 falls" in words
    assert "MAP@R falls" in words


def test_a_drop_within_the_limit_passes(exported: Exported, photos: Photos) -> None:
    rng = np.random.default_rng(0)

    def spoil(vectors: np.ndarray) -> np.ndarray:
        return vectors + rng.normal(0, 1e-5, vectors.shape).astype(np.float32)

    report = check_export(Fake(exported, spoil), exported.network, photos.paths, photos.labels)
    assert report.passed


def test_a_file_that_fails_is_not_published_and_the_old_one_stands(
    exported: Exported, photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_again(network: object, contract: ModelContract, path: Path) -> ModelContract:
        path.write_bytes(exported.path.read_bytes())
        return contract

    monkeypatch.setattr(gate, "export_onnx", write_again)  # tracing it once more takes seconds
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the old one")
    everything = exported.network, exported.contract, path, photos.paths, photos.labels
    with pytest.raises(GateError, match="not published") as caught:
        export_checked(*everything, thresholds=Thresholds(min_cosine=1.1))
    assert caught.value.exit_code == 4
    assert "below 1.1" in str(caught.value)
    assert path.read_bytes() == b"the old one"
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]

    with pytest.raises(DataError):
        export_checked(exported.network, exported.contract, path, [], [])
    assert path.read_bytes() == b"the old one"

    contract, report = export_checked(*everything)
    assert report.passed
    assert contract == exported.contract
    assert path.read_bytes() == exported.path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        ("network.shift", "differ, in order: pixels 0."),
        ("network.backbone.body.layer2.0.conv2.weight", "differ, in order: layer2 "),
        ("network.head.weight", "all stages but the last agree"),
    ],
)
def test_the_part_that_hurts_is_named(
    exported: Exported,
    photos: Photos,
    tensor: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def spoil(values: np.ndarray) -> None:
        values[:] = values[::-1].copy() + 0.5

    def write(network: object, contract: ModelContract, path: Path) -> ModelContract:
        path.write_bytes(spoilt.read_bytes())
        return contract

    spoilt = edited(exported, tmp_path, lambda model: set_tensor(model, tensor, spoil))
    monkeypatch.setattr(gate, "export_onnx", write)
    everything = exported.network, exported.contract, tmp_path / "model.onnx"
    with pytest.raises(GateError, match=said):
        export_checked(*everything, photos.paths, photos.labels)
    assert not (tmp_path / "model.onnx").exists()


def test_an_index_that_no_longer_fits_is_noticed_though_the_file_agrees_with_itself(
    exported: Exported, photos: Photos
) -> None:
    """A rotation keeps all neighbours among its own vectors and none in another index."""
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 12)))[0].astype(np.float32)
    report = check_export(
        Fake(exported, lambda vectors: vectors @ turn),
        exported.network,
        photos.paths,
        photos.labels,
        thresholds=Thresholds(min_cosine=-1),
    )
    assert report.neighbour_overlap is not None
    assert report.neighbour_overlap > 0.99
    assert len(report.reasons) == 1
    assert "searches an fp32 index" in report.reasons[0]


def test_unreadable_photos_are_skipped_and_named(
    exported: Exported, photos: Photos, tmp_path: Path
) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    paths = [tmp_path / "text.jpg", *photos.paths[:8], tmp_path / "gone.jpg"]
    calls: list[tuple[int, int]] = []
    report = check_export(
        exported.path,
        exported.network,
        paths,
        ["x", *photos.labels[:8], "x"],
        progress=lambda done, failed: calls.append((done, failed)),
    )
    assert report.passed
    assert report.images == 8
    assert [path.name for path, _ in report.skipped] == ["text.jpg", "gone.jpg"]
    assert sum(done for done, _ in calls) == 10
    assert sum(failed for _, failed in calls) == 2


@pytest.mark.parametrize("paths", [[], [Path("nowhere/a.jpg"), Path("nowhere/b.jpg")]])
def test_without_one_readable_photo_nothing_is_promised(
    exported: Exported, paths: list[Path]
) -> None:
    with pytest.raises(DataError, match="no held-out photo"):
        check_export(exported.path, exported.network, paths, ["a"] * len(paths))


def test_one_photo_has_a_cosine_and_no_neighbours(exported: Exported, photos: Photos) -> None:
    report = check_export(exported.path, exported.network, photos.paths[:1], ["a"])
    assert report.passed
    assert report.neighbour_overlap is None
    assert report.recall_at_1 is None
    assert [row.images for row in report.batches] == [1, 1, 1]


def test_photos_without_a_second_of_their_class_have_no_recall(
    exported: Exported, photos: Photos
) -> None:
    report = check_export(exported.path, exported.network, photos.paths[:3], ["a", "b", "c"])
    assert report.passed
    assert report.recall_at_1 is None
    assert report.map_at_r is None
    assert report.neighbour_overlap == 1


def test_more_photos_than_are_held_at_once_are_all_compared(
    exported: Exported, photos: Photos, tmp_path: Path
) -> None:
    paths, labels = photos.paths * 2, photos.labels * 2
    (tmp_path / "last.png").write_bytes(b"")
    paths, labels = [*paths, tmp_path / "last.png"], [*labels, "a"]
    report = check_export(exported.path, exported.network, paths, labels)
    assert [row.images for row in report.batches] == [28, 28, 48]
    assert len(report.skipped) == 1


def test_the_network_is_compared_as_it_evaluates_and_left_in_its_mode(
    exported: Exported, photos: Photos
) -> None:
    network = copy.deepcopy(exported.network).train()
    before = weights_hash(network)
    assert check_export(exported.path, network, photos.paths, photos.labels).passed
    assert network.training
    assert weights_hash(network) == before


def test_on_real_photos_an_honest_export_passes(exported: Exported, shared_data: Path) -> None:
    paths = sorted((shared_data / "tiny").rglob("*.jpg"))[:40]
    report = check_export(exported.path, exported.network, paths, [p.parent.name for p in paths])
    assert report.passed
    assert report.recall_at_1 is not None


def test_a_report_is_complete_json(exported: Exported) -> None:
    row = BatchParity(1, 3, float("nan"), 1.0, float("inf"), 0.0)
    report = GateReport(
        images=3,
        skipped=((Path("a.jpg"), "truncated"),),
        thresholds=Thresholds(),
        batches=(row,),
        neighbour_overlap=0.9,
        index_overlap=0.8,
        recall_at_1=Difference(0.5, 0.25, Interval(-0.5, 0.125)),
        map_at_r=None,
        reasons=("why",),
    )
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert document["passed"] is False
    assert document["batches"][0]["min_cosine"] is None
    assert document["recall@1"] == {
        "torch": 0.5,
        "file": 0.25,
        "change": -0.25,
        "low": -0.5,
        "high": 0.125,
    }
    assert document["map@r"] is None
    assert document["skipped"] == [{"path": "a.jpg", "reason": "truncated"}]
    assert document["thresholds"]["max_drop"] == 0.5


@pytest.mark.parametrize(("classes", "each"), [(3, 2000), (40, 59), (5000, 5), (600, 1), (1, 9000)])
def test_a_sample_keeps_the_neighbours_of_its_photos(classes: int, each: int) -> None:
    labels = [f"c{i % classes}" for i in range(classes * each)]
    rows = sample(labels, 512)
    assert rows == sorted(set(rows))
    assert 300 <= len(rows) <= 520
    counts = dict.fromkeys(labels, 0)
    for row in rows:
        counts[labels[row]] += 1
    assert min(count for count in counts.values() if count) >= min(each, 4)
    assert sample(labels, 512) == rows


@pytest.mark.parametrize("count", [0, 1, 512])
def test_a_small_set_is_its_own_sample(count: int) -> None:
    assert sample(["a"] * count, 512) == list(range(count))
