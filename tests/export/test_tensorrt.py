"""Engines are built by TensorRT for RTX, without a GPU, and say what they are."""

from __future__ import annotations

import hashlib
import json
import sys
import types
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from embedkit.errors import EmbedKitError, MissingError, MissingExtraError, UsageError
from embedkit.export import build_engine
from embedkit.export import tensorrt as builder
from embedkit.runtime import read_contract
from embedkit.runtime.contract import CONTRACT_KEY
from tests.export.small import Exported

rtx = pytest.importorskip("tensorrt_rtx")


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers on a machine with a GPU."""
    monkeypatch.setattr(builder, "_this_gpu", lambda: None)


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def pretend_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The builder that is here under the name of the one that is not."""
    plain = types.ModuleType("tensorrt")
    plain.__dict__.update({k: v for k, v in vars(rtx).items() if k != "__name__"})
    monkeypatch.setitem(sys.modules, "tensorrt", plain)


def test_an_engine_and_its_sidecar_say_the_same(exported: Exported, tmp_path: Path) -> None:
    engine = tmp_path / "model.engine"
    info = build_engine(exported.path, engine, gpu="sm89", batch=(1, 4, 9))
    sidecar = json.loads((tmp_path / "model.engine.json").read_text())

    assert engine.read_bytes()[:4] == b"vtrt"
    assert info.size == engine.stat().st_size
    assert sidecar["schema"] == "embedkit.engine/1"
    assert sidecar["flavour"] == info.flavour == "tensorrt_rtx"
    assert sidecar["version"] == info.version == rtx.__version__
    assert sidecar["compute_capability"] == info.compute_capability == "8.9"
    assert sidecar["path"] == "model.engine"
    assert sidecar["profile"] == {
        "pixels": {"min": [1, 32, 48, 3], "opt": [4, 32, 48, 3], "max": [9, 32, 48, 3]}
    }
    for key, path in (("onnx_sha256", exported.path), ("engine_sha256", engine)):
        assert sidecar[key] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_contract(engine) == exported.contract
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.engine", "model.engine.json"]


@pytest.mark.parametrize(
    ("gpu", "capability"), [("SM80", "8.0"), ("sm120", "12.0"), ("sm121", "12.1")]
)
def test_other_gpus_can_be_built_for(
    exported: Exported, gpu: str, capability: str, tmp_path: Path
) -> None:
    info = build_engine(exported.path, tmp_path / "model.engine", gpu=gpu)
    assert info.compute_capability == capability


def test_without_a_gpu_the_target_must_be_named(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="sm75 sm80 sm86 sm89 sm120 sm121") as caught:
        build_engine(exported.path, tmp_path / "model.engine")
    assert "--gpu sm89" in str(caught.value)


@pytest.mark.parametrize("gpu", ["sm90", "current", "none", "8.9", "sm"])
def test_a_target_that_does_not_exist_is_answered_with_those_that_do(
    exported: Exported, gpu: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="sm75 sm80"):
        build_engine(exported.path, tmp_path / "model.engine", gpu=gpu)


@pytest.mark.parametrize("batch", [(0, 1, 2), (1, 9, 8), (5, 4, 8), (-1, -1, -1)])
def test_batch_sizes_that_do_not_grow_are_refused(
    exported: Exported, batch: tuple[int, int, int], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="must grow"):
        build_engine(exported.path, tmp_path / "model.engine", gpu="sm89", batch=batch)


@pytest.mark.parametrize(("gpu", "extra"), [("sm89", "rtx"), (None, "trt")])
def test_without_both_packages_the_pip_line_is_named(
    exported: Exported,
    gpu: str | None,
    extra: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without(monkeypatch, "tensorrt", "tensorrt_rtx")
    with pytest.raises(MissingExtraError) as caught:
        build_engine(exported.path, tmp_path / "model.engine", gpu=gpu)
    assert caught.value.hint == f'pip install "embedkit[{extra}]"'
    assert caught.value.exit_code == 6


def test_plain_tensorrt_comes_first_and_needs_a_gpu(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_plain(monkeypatch)
    with pytest.raises(MissingError, match="there is none here") as caught:
        build_engine(exported.path, tmp_path / "model.engine")
    assert caught.value.exit_code == 6
    named = build_engine(exported.path, tmp_path / "model.engine", gpu="sm89")
    assert named.flavour == "tensorrt_rtx"  # only that one can build for a GPU that is not here


def test_plain_tensorrt_does_not_build_for_another_gpu(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_plain(monkeypatch)
    without(monkeypatch, "tensorrt_rtx")
    monkeypatch.setattr(builder, "_this_gpu", lambda: "sm90")
    with pytest.raises(UsageError, match="sm90, not for sm89"):
        build_engine(exported.path, tmp_path / "model.engine", gpu="sm89")


def test_a_gpu_that_rtx_does_not_know_is_sent_to_plain_tensorrt(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "tensorrt")
    monkeypatch.setattr(builder, "_this_gpu", lambda: "sm90")
    with pytest.raises(UsageError, match="cannot build for sm90") as caught:
        build_engine(exported.path, tmp_path / "model.engine")
    assert "embedkit[trt]" in str(caught.value)


def test_the_gpu_of_this_machine_is_taken_when_none_is_named(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "tensorrt")
    monkeypatch.setattr(builder, "_this_gpu", lambda: "sm86")
    assert build_engine(exported.path, tmp_path / "model.engine").compute_capability == "8.6"


def test_a_package_that_cannot_be_loaded_is_not_called_missing(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.11 is not here')")
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(MissingError, match=r"libnvinfer\.so\.11"):
        build_engine(exported.path, tmp_path / "model.engine")


def refused_graph(contract: str) -> bytes:
    """Valid ONNX that TensorRT for RTX does not take: a resize with antialiasing."""
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", 32, 48, 3])
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", 16, 24, 3])
    scales = helper.make_tensor("scales", TensorProto.FLOAT, [4], [1, 0.5, 0.5, 1])
    nodes = [
        helper.make_node("Cast", ["pixels"], ["float"], to=TensorProto.FLOAT),
        helper.make_node(
            "Resize",
            ["float", "", "scales"],
            ["embedding"],
            name="the_shrinking",
            mode="linear",
            antialias=1,
        ),
    ]
    graph = helper.make_graph(nodes, "refused", [pixels], [embedding], [scales])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model.metadata_props.add(key=CONTRACT_KEY, value=contract)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def test_a_refused_graph_names_the_node_and_leaves_what_stood_there(
    exported: Exported, tmp_path: Path
) -> None:
    path, engine = tmp_path / "model.onnx", tmp_path / "model.engine"
    path.write_bytes(refused_graph(exported.contract.dumps()))
    engine.write_bytes(b"old engine")
    (tmp_path / "model.engine.json").write_text("old sidecar")
    with pytest.raises(EmbedKitError, match=r"the_shrinking \(Resize\): .*[Aa]ntialias"):
        build_engine(path, engine, gpu="sm89")
    assert engine.read_bytes() == b"old engine"
    assert (tmp_path / "model.engine.json").read_text() == "old sidecar"


def test_a_build_that_fails_tells_what_the_log_said(exported: Exported, tmp_path: Path) -> None:
    """Seen with TensorRT for RTX 1.7: for Turing it has no matrix product in fp32."""
    with pytest.raises(EmbedKitError, match="could not build the engine") as caught:
        build_engine(exported.path, tmp_path / "model.engine", gpu="sm75")
    assert caught.value.facts is not None
    assert "SM75" in caught.value.facts
    assert not list(tmp_path.iterdir())
