"""The ONNX Runtime backend: it runs what its contract says, and opens no door to a hostile file."""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from embedkit.errors import (
    EmbedKitError,
    MismatchError,
    MissingError,
    MissingExtraError,
    UsageError,
)
from embedkit.runtime import CONTRACT_KEY, read_contract
from embedkit.runtime.backends import onnxruntime as backend_module
from embedkit.runtime.backends.onnxruntime import OnnxRuntimeBackend
from tests.tiny_model import tiny_contract, tiny_graph, tiny_vectors, write_tiny_model


def _pixels(count: int, size: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def _written(path: Path, model: onnx.ModelProto, contract: str | None = "") -> Path:
    if contract is not None:
        text = contract or tiny_contract().dumps()
        model.metadata_props.add(key=CONTRACT_KEY, value=text)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.onnx"
    write_tiny_model(path)
    return path


@pytest.mark.parametrize("count", [1, 2, 7, 33])
@pytest.mark.parametrize("threads", [0, 1, 2])
def test_vectors_equal_those_of_numpy_at_any_batch(tiny: Path, count: int, threads: int) -> None:
    backend = OnnxRuntimeBackend(tiny, device="cpu", threads=threads)
    vectors = backend.run(_pixels(count))
    assert (vectors.shape, vectors.dtype) == ((count, 8), np.float32)
    np.testing.assert_allclose(vectors, tiny_vectors(_pixels(count)), atol=2e-6)


@pytest.mark.parametrize(("dim", "size", "seed"), [(1, 4, 0), (3, 32, 5), (64, 8, 1)])
def test_another_width_and_size_work_the_same(
    tmp_path: Path, dim: int, size: int, seed: int
) -> None:
    contract = write_tiny_model(tmp_path / "m.onnx", dim=dim, size=size, seed=seed)
    backend = OnnxRuntimeBackend(tmp_path / "m.onnx")
    assert backend.contract == contract == read_contract(tmp_path / "m.onnx")
    wanted = tiny_vectors(_pixels(3, size), dim=dim, seed=seed)
    np.testing.assert_allclose(backend.run(_pixels(3, size)), wanted, atol=2e-6)


def test_a_closed_backend_says_so_and_closes_again(tiny: Path) -> None:
    backend = OnnxRuntimeBackend(tiny)
    backend.close()
    backend.close()
    with pytest.raises(EmbedKitError, match="closed"):
        backend.run(_pixels(1))


def test_a_run_that_fails_is_told_in_a_sentence(tiny: Path) -> None:
    with pytest.raises(EmbedKitError, match="failed on a batch of 2") as caught:
        OnnxRuntimeBackend(tiny).run(_pixels(2, size=20))
    assert caught.value.hint == "try a smaller batch"


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_a_file_cut_short_is_refused(tiny: Path, share: float) -> None:
    data = tiny.read_bytes()
    tiny.write_bytes(data[: int(len(data) * share)])
    for load in (OnnxRuntimeBackend, read_contract):
        with pytest.raises(MismatchError):
            load(tiny)


@pytest.mark.parametrize("data", [b"hello", b"\x89PNG\r\n\x1a\n" + bytes(50), bytes(1000)])
def test_a_file_that_is_no_onnx_is_refused_without_noise(
    tmp_path: Path, data: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(MismatchError, match="damaged, or no ONNX file") as caught:
        OnnxRuntimeBackend(tmp_path / "m.onnx")
    assert caught.value.hint is not None
    assert capfd.readouterr() == ("", "")


def test_a_missing_file_and_a_folder_are_wrong_usage(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.onnx", tmp_path):
        with pytest.raises(UsageError, match="cannot be read"):
            OnnxRuntimeBackend(path)
        with pytest.raises(UsageError, match="cannot be read"):
            read_contract(path)


def test_an_onnx_without_a_contract_is_refused(tmp_path: Path) -> None:
    path = _written(tmp_path / "m.onnx", tiny_graph(), contract=None)
    for load in (OnnxRuntimeBackend, read_contract):
        with pytest.raises(MismatchError, match="carries no contract"):
            load(path)


def test_an_onnx_with_a_damaged_contract_is_refused(tmp_path: Path) -> None:
    path = _written(tmp_path / "m.onnx", tiny_graph(), contract="{not json")
    with pytest.raises(MismatchError, match="no contract that can be read"):
        OnnxRuntimeBackend(path)


def _renamed_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].name = model.graph.node[0].input[0] = "images"


def _renamed_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = model.graph.node[-1].output[0] = "vector"


def _float_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT


def _fixed_batch(model: onnx.ModelProto) -> None:
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 4


def _second_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("raw", TensorProto.FLOAT, ["N", 8]))


def _half_output(model: onnx.ModelProto) -> None:
    model.graph.node[-1].output[0] = "full"
    model.graph.node.append(
        helper.make_node("Cast", ["full"], ["embedding"], to=TensorProto.FLOAT16)
    )
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16


@pytest.mark.parametrize(
    "change",
    [_renamed_input, _renamed_output, _float_input, _fixed_batch, _second_output, _half_output],
)
def test_a_graph_that_is_not_what_the_contract_says_is_refused(tmp_path: Path, change: Any) -> None:
    model = tiny_graph()
    change(model)
    with pytest.raises(MismatchError, match="not what its contract says") as caught:
        OnnxRuntimeBackend(_written(tmp_path / "m.onnx", model))
    assert caught.value.facts is not None
    assert "the graph has" in caught.value.facts


@pytest.mark.parametrize(("dim", "size"), [(9, 16), (8, 20)])
def test_a_contract_of_another_width_or_size_is_refused(
    tmp_path: Path, dim: int, size: int
) -> None:
    text = tiny_contract(dim=dim, size=size).dumps()
    with pytest.raises(MismatchError, match="not what its contract says"):
        OnnxRuntimeBackend(_written(tmp_path / "m.onnx", tiny_graph(), text))


# --- doors --------------------------------------------------------------------------------------


def _with_external_bias(location: str) -> onnx.ModelProto:
    """The tiny graph with its bias in another file, as the ONNX format allows."""
    model = tiny_graph()
    (bias,) = [one for one in model.graph.initializer if one.name == "bias"]
    size = len(numpy_helper.to_array(bias).tobytes())
    bias.ClearField("raw_data")
    bias.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(size))):
        bias.external_data.add(key=key, value=value)
    return model


@pytest.mark.parametrize(
    "place", ["beside", "in the working folder", "above", "absolute", "link", "hard link"]
)
def test_a_model_cannot_read_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    folder, here, secret = tmp_path / "models", tmp_path / "here", tmp_path / "secret"
    folder.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    secret.write_bytes(np.ones(8, np.float32).tobytes())
    location = "data"
    if place == "beside":
        (folder / "data").write_bytes(secret.read_bytes())
    elif place == "in the working folder":
        (here / "data").write_bytes(secret.read_bytes())
    elif place == "above":
        location = "../secret"
    elif place == "absolute":
        location = str(secret)
    elif place == "link":
        (folder / "data").symlink_to(secret)
        (here / "data").symlink_to(secret)
    else:
        (folder / "data").hardlink_to(secret)
        (here / "data").hardlink_to(secret)
    path = _written(folder / "m.onnx", _with_external_bias(location))
    for load in (OnnxRuntimeBackend, read_contract):
        with pytest.raises(MismatchError, match="stands alone"):
            load(path)


def _with_operator(domain: str, name: str) -> onnx.ModelProto:
    model = tiny_graph()
    model.graph.node[-1].output[0] = "unit"
    model.graph.node.append(helper.make_node(name, ["unit"], ["embedding"], domain=domain))
    model.opset_import.append(helper.make_opsetid(domain, 1))
    return model


def test_operators_of_a_strange_domain_are_refused(tmp_path: Path) -> None:
    path = _written(tmp_path / "m.onnx", _with_operator("evil.example", "Run"))
    with pytest.raises(MismatchError, match="cannot be loaded"):
        OnnxRuntimeBackend(path)


def test_a_compiled_blob_is_refused_before_the_engine_sees_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _written(tmp_path / "m.onnx", _with_operator("com.microsoft", "EPContext"))

    def session(*args: object, **options: object) -> None:
        raise AssertionError("the engine saw it")

    monkeypatch.setattr(ort, "InferenceSession", session)
    with pytest.raises(MismatchError, match="was refused"):
        OnnxRuntimeBackend(path)


def test_nothing_is_left_in_the_folder_of_temporary_files(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    OnnxRuntimeBackend(tiny)
    assert list((tmp_path / "tmp").iterdir()) == []


# --- devices and packages -----------------------------------------------------------------------


def test_the_cpu_is_what_auto_takes_where_there_is_no_gpu(tiny: Path) -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this machine's onnxruntime has CUDA")
    assert OnnxRuntimeBackend(tiny).device == "cpu"
    assert OnnxRuntimeBackend(tiny, device="cpu").device == "cpu"
    for device in ("cuda", "cuda:1"):
        with pytest.raises(MissingError, match="CUDA was asked for") as caught:
            OnnxRuntimeBackend(tiny, device=device)
        assert caught.value.exit_code == 6
        assert "embedkit[gpu]" in str(caught.value)


@pytest.mark.parametrize("device", ["gpu", "", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "auto:0"])
def test_a_device_nobody_knows_is_wrong_usage(tiny: Path, device: str) -> None:
    with pytest.raises(UsageError, match="no device named"):
        OnnxRuntimeBackend(tiny, device=device)


def test_negative_threads_are_wrong_usage(tiny: Path) -> None:
    with pytest.raises(UsageError, match="threads"):
        OnnxRuntimeBackend(tiny, threads=-1)


class _Session:
    """A stand-in for a GPU build: asked for CUDA, it answers as told."""

    answer = "works"
    asked: list[Any] = []  # noqa: RUF012, one list for all on purpose
    real = ort.InferenceSession

    def __init__(self, data: bytes, options: Any, *, providers: list[Any], **flags: int) -> None:
        self.cuda = isinstance(providers[0], tuple)
        self.asked.append(providers[0])
        if self.cuda and self.answer == "raises":
            raise RuntimeError("CUDA driver version is insufficient")
        self.session = self.real(data, options, providers=["CPUExecutionProvider"], **flags)

    def get_providers(self) -> list[str]:
        on_gpu = self.cuda and self.answer != "falls back"
        return ["CUDAExecutionProvider"] if on_gpu else ["CPUExecutionProvider"]

    def run(self, *args: Any) -> Any:
        if self.cuda and self.answer == "cannot run":
            raise RuntimeError("no kernel image is available")
        return self.session.run(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)


@pytest.fixture
def gpu_build(monkeypatch: pytest.MonkeyPatch) -> type[_Session]:
    monkeypatch.setattr(
        ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(ort, "InferenceSession", _Session)
    monkeypatch.setattr(ort, "preload_dlls", lambda: print("Failed to load libcudnn"))
    monkeypatch.setattr(_Session, "asked", [])
    monkeypatch.setattr(_Session, "answer", "works")
    return _Session


@pytest.mark.parametrize(("device", "number"), [("auto", 0), ("cuda", 0), ("cuda:3", 3)])
def test_a_gpu_that_works_is_taken_and_named(
    tiny: Path, gpu_build: type[_Session], device: str, number: int
) -> None:
    backend = OnnxRuntimeBackend(tiny, device=device)
    assert backend.device == f"cuda:{number}"
    assert gpu_build.asked == [("CUDAExecutionProvider", {"device_id": str(number)})]


@pytest.mark.parametrize("answer", ["raises", "falls back", "cannot run"])
def test_a_gpu_that_does_not_work_is_an_error_when_asked_for_and_a_note_otherwise(
    tiny: Path,
    gpu_build: type[_Session],
    answer: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu_build, "answer", answer)
    with pytest.raises(MissingError, match="CUDA device 0 cannot"):
        OnnxRuntimeBackend(tiny, device="cuda")
    assert caplog.text == ""
    backend = OnnxRuntimeBackend(tiny, device="auto")
    assert backend.device == "cpu"
    assert "going on with the CPU" in caplog.text
    assert capsys.readouterr().out == ""  # what onnxruntime prints is no answer of ours
    np.testing.assert_allclose(backend.run(_pixels(2)), tiny_vectors(_pixels(2)), atol=2e-6)


@pytest.mark.parametrize("device", ["auto", "cuda", "cpu"])
def test_a_damaged_file_is_not_blamed_on_the_gpu(
    tmp_path: Path, gpu_build: type[_Session], device: str
) -> None:
    (tmp_path / "m.onnx").write_bytes(b"hello")
    with pytest.raises(MismatchError, match="damaged"):
        OnnxRuntimeBackend(tmp_path / "m.onnx", device=device)


def test_two_packages_that_overwrite_each_other_are_named_with_the_line_to_type(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata,
        "version",
        lambda name: "1.31.0" if name.startswith("onnxruntime") else real(name),
    )
    with pytest.raises(MissingError, match="overwrite each other") as caught:
        OnnxRuntimeBackend(tiny)
    assert caught.value.facts == "onnxruntime 1.31.0 and onnxruntime-gpu 1.31.0"
    assert caught.value.hint is not None
    assert caught.value.hint.startswith(
        "pip uninstall -y onnxruntime onnxruntime-gpu && pip install"
    )


def test_without_onnxruntime_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, backend_module.__name__)
    with pytest.raises(MissingExtraError, match="onnxruntime") as caught:
        importlib.import_module(backend_module.__name__)
    assert caught.value.hint == 'pip install "embedkit[cpu]"'
    assert caught.value.exit_code == 6


def test_the_tiny_model_is_a_valid_onnx_file(tiny: Path) -> None:
    onnx.checker.check_model(onnx.load(io.BytesIO(tiny.read_bytes())), full_check=True)
