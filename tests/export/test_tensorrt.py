"""Engines are built by TensorRT for RTX, without a GPU, and say what they are."""

from __future__ import annotations

import enum
import hashlib
import json
import logging
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from embedkit.errors import (
    EmbedKitError,
    GateError,
    MismatchError,
    MissingError,
    MissingExtraError,
    UsageError,
)
from embedkit.export import build_engine, try_engine
from embedkit.export import tensorrt as builder
from embedkit.runtime import read_contract
from embedkit.runtime.backends.cuda import Gpu, this_gpu
from embedkit.runtime.contract import CONTRACT_KEY
from embedkit.runtime.engine_file import open_engine
from tests.export.small import Exported
from tests.runtime.fake_nvidia import Nvidia
from tests.tiny_model import tiny_contract, tiny_graph, write_tiny_model

rtx = pytest.importorskip("tensorrt_rtx")

H200 = Gpu(0, "NVIDIA H200", "9.0")


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers on a machine with a GPU."""
    monkeypatch.setattr(builder, "_this_gpu", lambda: None)


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """An ONNX file that needs no torch, alone in a folder."""
    (tmp_path / "tiny").mkdir()
    write_tiny_model(tmp_path / "tiny" / "model.onnx")
    return tmp_path / "tiny" / "model.onnx"


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
    assert sidecar["onnx"] == exported.path.name
    assert open_engine(engine, onnx=exported.path).info == info
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
    PlainTensorRT().install(monkeypatch)
    with pytest.raises(MissingError, match="there is none here") as caught:
        build_engine(exported.path, tmp_path / "model.engine")
    assert caught.value.exit_code == 6
    named = build_engine(exported.path, tmp_path / "model.engine", gpu="sm89")
    assert named.flavour == "tensorrt_rtx"  # only that one can build for a GPU that is not here


def test_plain_tensorrt_does_not_build_for_another_gpu(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    PlainTensorRT().install(monkeypatch)
    without(monkeypatch, "tensorrt_rtx")
    monkeypatch.setattr(builder, "_this_gpu", lambda: H200)
    with pytest.raises(UsageError, match="sm90, not for sm89"):
        build_engine(exported.path, tmp_path / "model.engine", gpu="sm89")


def test_a_gpu_that_rtx_does_not_know_is_sent_to_plain_tensorrt(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "tensorrt")
    monkeypatch.setattr(builder, "_this_gpu", lambda: H200)
    with pytest.raises(UsageError, match="cannot build for sm90") as caught:
        build_engine(exported.path, tmp_path / "model.engine")
    assert "embedkit[trt]" in str(caught.value)


def test_the_gpu_of_this_machine_is_taken_when_none_is_named(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "tensorrt")
    monkeypatch.setattr(builder, "_this_gpu", lambda: Gpu(0, "NVIDIA A10", "8.6"))
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


@pytest.mark.parametrize("option", ["version_compatible", "hardware_compatible"])
def test_what_only_plain_tensorrt_can_is_refused_for_rtx(
    tiny: Path, option: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"has no --{option.replace('_', '-')}"):
        build_engine(tiny, tmp_path / "model.engine", gpu="sm89", **{option: True})


def test_a_workspace_of_nothing_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="workspace"):
        build_engine(tiny, tmp_path / "model.engine", gpu="sm89", workspace=0)


def test_an_engine_is_built_where_neither_torch_nor_onnx_is_installed(tiny: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['onnx'] = None\n"
        "from pathlib import Path\n"
        "from embedkit.export import build_engine\n"
        f"build_engine(Path({str(tiny)!r}), Path({str(tiny.with_suffix('.engine'))!r}), gpu='sm89')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert open_engine(tiny.with_suffix(".engine")).info.compute_capability == "8.9"


def quantised_for_the_cpu(path: Path) -> Path:
    """The tiny model with uint8 activations before its matrix."""
    model = tiny_graph()
    gemm = next(node for node in model.graph.node if node.op_type == "Gemm")
    place = list(model.graph.node).index(gemm)
    gemm.input[0] = "rounded"
    pair = [
        helper.make_node("QuantizeLinear", ["features", "step", "zero"], ["whole"], name="the_q"),
        helper.make_node("DequantizeLinear", ["whole", "step", "zero"], ["rounded"]),
    ]
    for node in reversed(pair):
        model.graph.node.insert(place, node)
    model.graph.initializer.append(helper.make_tensor("step", TensorProto.FLOAT, [], [0.02]))
    model.graph.initializer.append(helper.make_tensor("zero", TensorProto.UINT8, [], [128]))
    model.metadata_props.add(key=CONTRACT_KEY, value=tiny_contract().dumps())
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


def test_a_graph_quantised_for_the_cpu_is_refused_by_its_nodes(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = quantised_for_the_cpu(tiny)
    with pytest.raises(MismatchError, match=r"the_q \(QuantizeLinear\): is uint8") as caught:
        build_engine(path, path.with_suffix(".engine"), gpu="sm89")
    assert caught.value.exit_code == 5
    assert not path.with_suffix(".engine").exists()
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "embedkit.export.qdq_lint", raising=False)
    with pytest.raises(MissingExtraError, match="onnx") as missing:
        build_engine(path, path.with_suffix(".engine"), gpu="sm89")
    assert missing.value.hint == 'pip install "embedkit[rtx]"'


# --- trying an engine on the machine that built it ---


def test_an_engine_is_tried_where_its_gpu_is_here(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = build_engine(tiny, tiny.with_suffix(".engine"), gpu="sm89")
    assert try_engine(info) is None  # no GPU at all
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cuda.bindings.runtime", None)
        patch.setattr(builder, "_this_gpu", this_gpu)
        assert try_engine(info) is None  # nothing to run it with
    monkeypatch.setattr(builder, "_this_gpu", lambda: H200)
    assert try_engine(info) is None  # another one

    monkeypatch.setattr(builder, "_this_gpu", lambda: Gpu(0, "NVIDIA L4", "8.9"))
    Nvidia(tiny_contract()).install(monkeypatch)
    assert try_engine(info) == pytest.approx(1, abs=1e-6)
    Nvidia(tiny_contract(), seed=4).install(monkeypatch)
    with pytest.raises(GateError, match="it was removed") as caught:
        try_engine(info)
    assert caught.value.exit_code == 4
    assert [path.name for path in tiny.parent.iterdir()] == ["model.onnx"]


# --- plain TensorRT, against a stand-in ---


class PlainTensorRT:
    """As far as a build needs it, `tensorrt` 10 and 11 after their documentation.

    Args:
        version: Of the package.
        typed: Whether networks must be asked to be strongly typed (10), or always are.
        takes: Timing caches it accepts besides an empty one.
    """

    def __init__(
        self, version: str = "11.4.0.2", *, typed: bool = True, takes: tuple[bytes, ...] = ()
    ) -> None:
        self.version, self.takes = version, takes
        self.flags = enum.Enum("NetworkDefinitionCreationFlag", ["STRONGLY_TYPED"] if typed else [])
        self.asked: dict[str, Any] = {"flags": []}
        self.fails = False

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = types.ModuleType("tensorrt")
        module.__dict__.update(
            __version__=self.version,
            ILogger=type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 0}),
            Builder=lambda log: self,
            OnnxParser=lambda network, log: self,
            MemoryPoolType=enum.Enum("MemoryPoolType", ["WORKSPACE"]),
            BuilderFlag=enum.Enum("BuilderFlag", ["VERSION_COMPATIBLE"]),
            HardwareCompatibilityLevel=enum.Enum("Level", ["NONE", "AMPERE_PLUS"]),
            NetworkDefinitionCreationFlag=enum.IntEnum(
                "Flag", {member.name: 1 for member in self.flags}
            ),
        )
        monkeypatch.setitem(sys.modules, "tensorrt", module)

    # The builder, the network, the parser and the config in one: each name has one meaning.
    def create_network(self, flags: int) -> Any:
        self.asked["network"] = flags
        return types.SimpleNamespace(
            num_inputs=1,
            get_input=lambda index: types.SimpleNamespace(name="pixels", shape=(-1, 16, 16, 3)),
        )

    def parse(self, source: bytes) -> bool:
        return bool(source)

    def create_builder_config(self) -> Any:
        return self

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self.asked[pool.name] = size

    def set_flag(self, flag: Any) -> None:
        self.asked["flags"].append(flag.name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("num_compute_capabilities",):
            raise AttributeError("only TensorRT for RTX has it")
        object.__setattr__(self, name, value)

    def create_timing_cache(self, content: bytes) -> Any:
        self.asked.setdefault("caches", []).append(content)
        return None if content == b"not even a cache" else content

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        if cache == b"" or cache in self.takes:
            self.timing = cache
            return True
        return False

    def get_timing_cache(self) -> Any:
        return types.SimpleNamespace(serialize=lambda: memoryview(self.timing + b"measured;"))

    def create_optimization_profile(self) -> Any:
        return types.SimpleNamespace(
            set_shape=lambda *shapes: self.asked.update(profile=shapes),
        )

    def add_optimization_profile(self, profile: Any) -> int:
        return 0

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        numbers = [int(part) for part in self.version.split(".")]
        return None if self.fails else memoryview(b"ftrt" + bytes(20) + bytes(numbers) + b"plan")


@pytest.fixture
def timing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with an H200; where its timings are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(builder, "_this_gpu", lambda: H200)
    return tmp_path / "cache" / "embedkit" / "timing"


@pytest.mark.parametrize("typed", [True, False])
def test_plain_tensorrt_is_told_all_that_was_asked(
    tiny: Path, timing: Path, monkeypatch: pytest.MonkeyPatch, typed: bool
) -> None:
    plain = PlainTensorRT(typed=typed)
    plain.install(monkeypatch)
    info = build_engine(
        tiny,
        tiny.with_suffix(".engine"),
        gpu=None,
        batch=(2, 4, 6),
        workspace=1 << 31,
        version_compatible=True,
        hardware_compatible=True,
    )
    assert plain.asked["network"] == (2 if typed else 0)
    assert plain.asked["WORKSPACE"] == 2147483648
    assert plain.asked["flags"] == ["VERSION_COMPATIBLE"]
    assert plain.hardware_compatibility_level.name == "AMPERE_PLUS"  # type: ignore[attr-defined]
    assert plain.asked["profile"] == ("pixels", *([size, 16, 16, 3] for size in (2, 4, 6)))
    assert (info.flavour, info.version, info.compute_capability) == ("tensorrt", "11.4.0.2", "9.0")
    assert open_engine(info.path).info == info
    assert info.rebuild() == (
        f"embedkit export {tiny} --trt --batch 2:4:6 --version-compatible --hardware-compatible"
    )


def test_timings_are_kept_for_the_same_version_and_gpu_only(
    tiny: Path, timing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked_of(version: str) -> list[bytes]:
        plain = PlainTensorRT(version, takes=(b"measured;",))
        plain.install(monkeypatch)
        build_engine(tiny, tiny.with_suffix(".engine"))
        caches: list[bytes] = plain.asked["caches"]
        return caches

    assert asked_of("11.4.0.2") == [b""]
    (file,) = timing.iterdir()
    assert file.name == "tensorrt-11.4.0.2-sm90-NVIDIA-H200.cache"
    assert timing.stat().st_mode & 0o077 == 0
    assert asked_of("11.4.0.2") == [b"measured;"]
    assert file.read_bytes() == b"measured;measured;"
    assert asked_of("10.13.3.9") == [b""]
    monkeypatch.setattr(builder, "_this_gpu", lambda: Gpu(0, "NVIDIA H100", "9.0"))
    assert asked_of("11.4.0.2") == [b""]
    assert len(list(timing.iterdir())) == 3


@pytest.mark.parametrize("content", [b"of another machine", b"not even a cache"])
def test_timings_that_do_not_fit_are_said_and_replaced(
    tiny: Path,
    timing: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    content: bytes,
) -> None:
    plain = PlainTensorRT()
    plain.install(monkeypatch)
    timing.mkdir(parents=True, mode=0o700)
    file = timing / "tensorrt-11.4.0.2-sm90-NVIDIA-H200.cache"
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING, "embedkit"):
        build_engine(tiny, tiny.with_suffix(".engine"))
    assert plain.asked["caches"] == [content, b""]
    assert file.read_bytes() == b"measured;"
    assert "not for this machine" in caplog.text


def test_an_engine_is_built_where_timings_cannot_be_kept(
    tiny: Path, timing: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    PlainTensorRT().install(monkeypatch)
    timing.parent.mkdir(parents=True)
    timing.write_text("a file where the folder would be")
    with caplog.at_level(logging.WARNING, "embedkit"):
        info = build_engine(tiny, tiny.with_suffix(".engine"))
    assert info.path.is_file()
    assert "timings are not kept" in caplog.text
    timing.unlink()
    timing.mkdir()
    timing.chmod(0o777)
    with caplog.at_level(logging.WARNING, "embedkit"):
        build_engine(tiny, tiny.with_suffix(".engine"))
    assert "not yours alone" in caplog.text
    assert not list(timing.iterdir())


def test_a_failed_build_keeps_no_timings_and_no_engine(
    tiny: Path, timing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = PlainTensorRT()
    plain.fails = True
    plain.install(monkeypatch)
    with pytest.raises(EmbedKitError, match="could not build the engine"):
        build_engine(tiny, tiny.with_suffix(".engine"))
    assert not list(timing.iterdir())
    assert not tiny.with_suffix(".engine").exists()
