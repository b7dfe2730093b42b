"""The exported file gives the network's vectors, says what it is, and holds nothing else."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from embedkit.errors import EmbedKitError, GateError, MismatchError
from embedkit.export import export_onnx
from embedkit.models import backbone_names, freeze_batch_norm, weights_hash
from embedkit.runtime import Embedder, read_contract
from tests.export.small import Exported, MakeNetwork


def some_pixels(count: int, size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *size, 3), dtype=np.uint8)


def run_file(path: Path, pixels: np.ndarray) -> np.ndarray:
    """By onnxruntime itself, not through embedkit."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (vectors,) = session.run(["embedding"], {"pixels": pixels})
    return np.asarray(vectors)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.asarray((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))


@pytest.mark.parametrize("count", [1, 2, 7, 32])
def test_it_gives_unit_vectors_of_the_network_at_any_batch(exported: Exported, count: int) -> None:
    pixels = some_pixels(count, (32, 48))
    with torch.no_grad():
        raw = exported.network(torch.from_numpy(pixels)).numpy()
    vectors = run_file(exported.path, pixels)
    assert vectors == pytest.approx(raw / np.linalg.norm(raw, axis=1, keepdims=True), abs=1e-5)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)


def test_the_file_carries_its_contract_and_passes_its_own_test(exported: Exported) -> None:
    assert read_contract(exported.path) == exported.contract
    assert exported.contract.versions["opset"] == "20"
    with Embedder.load(exported.path, device="cpu") as embedder:
        assert embedder.self_test() > 0.99999


def test_the_self_test_vector_is_torchs(exported: Exported) -> None:
    test = exported.contract.self_test
    assert test is not None
    with torch.no_grad():
        raw = exported.network(torch.from_numpy(test.pixels(exported.contract.preprocess)))[0]
    assert np.array(test.vector) == pytest.approx((raw / raw.norm()).numpy(), abs=1e-6)


def test_it_is_one_plain_file_that_tells_nothing_about_the_machine(exported: Exported) -> None:
    assert [path.name for path in exported.path.parent.iterdir()] == ["model.onnx"]
    content = exported.path.read_bytes()
    assert b"site-packages" not in content
    assert str(Path(__file__).parents[2]).encode() not in content
    model = onnx.load(exported.path)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    assert not any(node.domain for node in model.graph.node)
    assert not any(t.data_location for t in model.graph.initializer)
    assert [entry.key for entry in model.metadata_props] == ["embedkit.contract", "embedkit.seal"]


def test_pixels_enter_as_bytes_and_are_cast_first(exported: Exported) -> None:
    graph = onnx.load(exported.path).graph
    (given,) = graph.input
    assert given.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    dims = given.type.tensor_type.shape.dim
    assert dims[0].dim_param
    assert [d.dim_value for d in dims[1:]] == [32, 48, 3]
    assert graph.node[0].op_type == "Cast"


def test_the_same_network_gives_the_same_bytes_from_any_mode_and_is_left_alone(
    exported: Exported, tmp_path: Path
) -> None:
    network = copy.deepcopy(exported.network).to(memory_format=torch.channels_last)
    freeze_batch_norm(network)
    network.train()
    export_onnx(network, exported.contract, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == exported.path.read_bytes()
    assert network.training
    assert weights_hash(network) == weights_hash(exported.network)
    assert all(p.requires_grad for p in network.parameters())


def test_raw_vectors_stay_raw_where_the_loss_is_not_on_the_sphere_and_nothing_is_printed(
    make_network: MakeNetwork, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    network, contract = make_network(pooling="second-order", normalizes=False)
    with torch.no_grad():
        network.head.weight.mul_(7)
    contract = dataclasses.replace(contract, weights_hash=weights_hash(network))
    export_onnx(network, contract, tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")

    pixels = some_pixels(3, (32, 48))
    with torch.no_grad():
        raw = network(torch.from_numpy(pixels)).numpy()
    assert run_file(tmp_path / "model.onnx", pixels) == pytest.approx(raw, abs=1e-4)
    assert not np.allclose(np.linalg.norm(raw, axis=1), 1, atol=0.1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights_hash": "0" * 64}, "weights are others"),
        ({"embedding_dim": 13}, "the contract says 13"),
        ({"mean": (0.5, 0.5, 0.5)}, "another mean"),
        ({"std": (0.2, 0.2, 0.2)}, "another mean"),
    ],
    ids=["weights", "width", "mean", "std"],
)
def test_a_contract_of_another_network_is_refused(
    exported: Exported, change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    contract = exported.contract
    if "mean" in change or "std" in change:
        change = {"preprocess": dataclasses.replace(contract.preprocess, **change)}
    contract = dataclasses.replace(contract, **change)
    with pytest.raises(MismatchError, match=said):
        export_onnx(exported.network, contract, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_network_with_a_nan_is_refused_and_nothing_is_written(
    make_network: MakeNetwork, tmp_path: Path
) -> None:
    network, contract = make_network()
    with torch.no_grad():
        network.head.weight[3, 3] = float("nan")
    contract = dataclasses.replace(contract, weights_hash=weights_hash(network))
    with pytest.raises(GateError, match="not finite"):
        export_onnx(network, contract, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_what_stood_there_stands_when_the_exporter_fails(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("long story\nthe operator is unknown")

    monkeypatch.setattr("torch.onnx.export", fail)
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the old one")
    with pytest.raises(EmbedKitError, match="the operator is unknown"):
        export_onnx(exported.network, exported.contract, path)
    assert path.read_bytes() == b"the old one"
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_a_place_that_cannot_be_written_is_named(exported: Exported, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EmbedKitError, match="could not be written"):
        export_onnx(exported.network, exported.contract, tmp_path / "file" / "model.onnx")


def check_backbone(
    name: str, pooling: str, size: tuple[int, int], make_network: MakeNetwork, folder: Path
) -> Path:
    """At both ends of an engine's usual profile, at the traced size, and at an odd one."""
    network, contract = make_network(name, pooling=pooling, size=size)
    path = folder / f"{name}.onnx"
    export_onnx(network, contract, path)
    pixels = some_pixels(32, size)
    with torch.no_grad():
        raw = network(torch.from_numpy(pixels)).numpy()
    for count in (1, 2, 7, 32):
        assert cosines(run_file(path, pixels[:count]), raw[:count]).min() > 0.99999
    return path


@pytest.mark.parametrize(
    ("name", "pooling", "size"),
    [("mobilenet_v3_small", "avg", (64, 64)), ("vit_b_16", "second-order", (48, 64))],
)
def test_other_families_and_poolings_come_through_the_exporter_too(
    name: str, pooling: str, size: tuple[int, int], make_network: MakeNetwork, tmp_path: Path
) -> None:
    check_backbone(name, pooling, size, make_network, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["avg", "gem", "second-order"])
@pytest.mark.parametrize("name", backbone_names())
def test_every_backbone_becomes_an_equal_file_and_an_engine(
    name: str, pooling: str, make_network: MakeNetwork, tmp_path: Path
) -> None:
    from embedkit.export import build_engine

    size = (64, 64) if pooling == "avg" else (48, 64)
    path = check_backbone(name, pooling, size, make_network, tmp_path)
    info = build_engine(path, tmp_path / "model.engine", gpu="sm89")
    assert info.size > 1000
