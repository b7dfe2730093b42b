"""The TensorRT backend: right numbers by right steps, and no byte of a wrong engine gets far.

Running is tested against `fake_nvidia`; refusals also on engines that TensorRT for RTX built.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from embedkit.errors import (
    EmbedKitError,
    MismatchError,
    MissingError,
    MissingExtraError,
    UnknownNameError,
    UsageError,
)
from embedkit.export import build_engine
from embedkit.runtime import Embedder, read_contract
from embedkit.runtime.backends.cuda import this_gpu
from embedkit.runtime.backends.onnxruntime import OnnxRuntimeBackend
from embedkit.runtime.backends.tensorrt import TensorRTBackend
from embedkit.runtime.codebooks import Codebooks
from embedkit.runtime.engine_file import check_fits, open_engine, read_engine
from tests.runtime.fake_nvidia import Nvidia, Status, fake_codes, write_engine
from tests.tiny_model import tiny_contract, tiny_vectors, write_tiny_model

LOADING = [
    *("cudaGetDeviceCount", "cudaSetDevice", "cudaFree", "cudaGetDeviceProperties", "Runtime"),
    *("deserialize_cuda_engine", "create_execution_context", "cudaStreamCreateWithFlags"),
    *("cudaMalloc", "cudaHostAlloc", "set_tensor_address"),
]
RUNNING = [
    *("cudaSetDevice", "set_input_shape", "get_tensor_shape", "cudaMemcpyAsync"),
    *("execute_async_v3", "cudaStreamSynchronize"),
]
CLOSING = ["cudaStreamSynchronize", "cudaFree", "cudaFreeHost", "cudaStreamDestroy"]


def pictures(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


@pytest.fixture
def nvidia(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nvidia]:
    """A machine with one GPU of capability 8.9; what is done there must keep its rules."""
    machine = Nvidia(tiny_contract())
    machine.install(monkeypatch)
    yield machine
    assert machine.broken_rules == []


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return write_engine(tmp_path / "model.engine", tiny_contract())


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real engine for capability 8.9 and the ONNX file it was built from."""
    pytest.importorskip("tensorrt_rtx")
    folder = tmp_path_factory.mktemp("built")
    write_tiny_model(folder / "model.onnx")
    build_engine(folder / "model.onnx", folder / "model.engine", gpu="sm89", batch=(1, 4, 9))
    return folder / "model.engine"


# --- running ---


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt_rtx"])
@pytest.mark.parametrize("count", [1, 2, 7, 32, 33, 71])
def test_vectors_equal_those_of_numpy_at_any_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flavour: str, count: int
) -> None:
    nvidia = Nvidia(tiny_contract())
    nvidia.install(monkeypatch, flavour)
    backend = TensorRTBackend(write_engine(tmp_path / "m.engine", tiny_contract(), flavour=flavour))
    vectors = backend.run(pictures(count))
    again = backend.run(pictures(3, seed=1))
    assert (vectors.shape, vectors.dtype) == ((count, 8), np.float32)
    np.testing.assert_allclose(vectors, tiny_vectors(pictures(count)), atol=1e-6)
    np.testing.assert_allclose(again, tiny_vectors(pictures(3, seed=1)), atol=1e-6)
    backend.close()
    assert nvidia.broken_rules == []
    assert nvidia.leaks() == []


@pytest.mark.parametrize("count", [1, 7, 33])
def test_codes_come_with_their_vectors_at_any_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    words = np.random.default_rng(0).standard_normal((4, 5, 2), dtype=np.float32)
    contract = dataclasses.replace(tiny_contract(), metric="l2", codebooks=Codebooks.of(words))
    nvidia = Nvidia(contract, batch=(2, 8, 16))
    nvidia.install(monkeypatch)
    path = write_engine(tmp_path / "m.engine", contract, batch=(2, 8, 16))
    with Embedder(TensorRTBackend(path)) as embedder:
        vectors, codes = embedder.embed_coded(pictures(count))
        assert np.array_equal(embedder.embed_pixels(pictures(count)), vectors)
    wanted = tiny_vectors(pictures(count))
    np.testing.assert_allclose(vectors, wanted, atol=1e-6)
    assert (codes.dtype, codes.shape) == (np.uint8, (count, 4))
    np.testing.assert_array_equal(codes, fake_codes(wanted, contract))
    assert nvidia.broken_rules == []
    assert nvidia.leaks() == []


@pytest.mark.parametrize(
    ("count", "ran"), [(1, [4]), (4, [4]), (5, [5]), (9, [9]), (10, [9, 4]), (20, [9, 9, 4])]
)
def test_small_batches_are_filled_up_and_large_ones_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, ran: list[int]
) -> None:
    nvidia = Nvidia(tiny_contract(), batch=(4, 8, 9))
    nvidia.install(monkeypatch)
    path = write_engine(tmp_path / "m.engine", tiny_contract(), batch=(4, 8, 9))
    with Embedder(TensorRTBackend(path)) as embedder:
        vectors = embedder.embed_pixels(pictures(count))
    np.testing.assert_allclose(vectors, tiny_vectors(pictures(count)), atol=1e-6)
    assert nvidia.ran == ran
    assert nvidia.broken_rules == []


def test_the_context_of_cuda_comes_before_anything_of_tensorrt(
    nvidia: Nvidia, engine: Path
) -> None:
    TensorRTBackend(engine).close()
    assert nvidia.calls.index("cudaFree") < nvidia.calls.index("Runtime")


def test_several_threads_get_their_own_vectors(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia = Nvidia(tiny_contract(), gpus=("7.5", "8.9"))
    nvidia.install(monkeypatch)
    backend = TensorRTBackend(engine, device="cuda:1")
    assert backend.device == "cuda:1"
    barrier = threading.Barrier(6)

    def work(seed: int) -> np.ndarray:
        barrier.wait()
        return backend.run(pictures(40, seed))

    with ThreadPoolExecutor(6) as pool:
        for seed, vectors in enumerate(pool.map(work, range(6))):
            np.testing.assert_allclose(vectors, tiny_vectors(pictures(40, seed)), atol=1e-6)
    backend.close()
    assert nvidia.broken_rules == []  # each thread made cuda:1 its device
    assert nvidia.leaks() == []


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((1, 16, 15, 3), np.uint8), np.zeros((1, 16, 16, 3), np.float32), pictures(1)[0]],
)
def test_other_pixels_are_refused_before_they_are_copied(
    nvidia: Nvidia, engine: Path, pixels: np.ndarray
) -> None:
    backend = TensorRTBackend(engine)
    with pytest.raises(UsageError, match=r"uint8 \(N, 16, 16, 3\)"):
        backend.run(pixels)
    assert "cudaMemcpyAsync" not in nvidia.calls


@pytest.mark.parametrize(
    ("call", "at"),
    [*((call, 1) for call in LOADING), *((call, 2) for call in LOADING[-3:])],
)
def test_a_call_that_fails_while_loading_is_told_and_leaves_nothing(
    nvidia: Nvidia, engine: Path, call: str, at: int
) -> None:
    nvidia.fail(call, at=at)
    with pytest.raises(EmbedKitError) as caught:
        TensorRTBackend(engine)
    assert caught.value.facts
    del caught
    assert nvidia.leaks() == []


@pytest.mark.parametrize("call", RUNNING)
@pytest.mark.parametrize("at", [1, 2])
def test_a_call_that_fails_while_running_is_told_and_the_next_batch_is_right(
    nvidia: Nvidia, engine: Path, call: str, at: int
) -> None:
    backend = TensorRTBackend(engine)
    nvidia.fail(call, at=at)
    if at == 1 or call != "cudaSetDevice":
        with pytest.raises(EmbedKitError, match=call):
            backend.run(pictures(40))
    np.testing.assert_allclose(backend.run(pictures(5)), tiny_vectors(pictures(5)), atol=1e-6)
    backend.close()
    assert nvidia.leaks() == []


def test_what_tensorrt_logged_is_the_reason_and_warnings_are_not(
    nvidia: Nvidia, engine: Path
) -> None:
    nvidia.fail("deserialize_cuda_engine")
    with pytest.raises(MismatchError) as caught:
        TensorRTBackend(engine)
    assert caught.value.facts == "deserialize_cuda_engine went wrong"
    assert caught.value.hint == f"embedkit export {engine.parent / 'model.onnx'} --trt"


def test_a_runtime_that_does_not_start_is_told_however_it_says_so(
    nvidia: Nvidia, engine: Path
) -> None:
    for status in (Status.cudaErrorInsufficientDriver, Status.cudaErrorIllegalAddress):
        nvidia.fail("Runtime", status=status)
        with pytest.raises(EmbedKitError, match="could not be started"):
            TensorRTBackend(engine)
    assert "deserialize_cuda_engine" not in nvidia.calls


def test_too_little_memory_says_what_helps(nvidia: Nvidia, engine: Path) -> None:
    nvidia.fail("cudaMalloc", status=Status.cudaErrorMemoryAllocation)
    with pytest.raises(EmbedKitError, match="not enough free memory") as caught:
        TensorRTBackend(engine)
    assert "--batch" in (caught.value.hint or "")


@pytest.mark.parametrize("call", CLOSING)
def test_closing_goes_on_after_a_failure_and_names_it(
    nvidia: Nvidia, engine: Path, call: str, caplog: pytest.LogCaptureFixture
) -> None:
    backend = TensorRTBackend(engine)
    nvidia.fail(call)
    before = len(nvidia.leaks())
    with caplog.at_level(logging.WARNING, "embedkit"):
        backend.close()
    left = nvidia.leaks()
    assert len(left) <= 1 < before  # only what refused to go
    assert call in caplog.text


def test_closing_twice_is_harmless_and_a_closed_one_does_not_run(
    nvidia: Nvidia, engine: Path
) -> None:
    backend = TensorRTBackend(engine)
    backend.close()
    done = len(nvidia.calls)
    backend.close()
    with pytest.raises(EmbedKitError, match="closed"):
        backend.run(pictures(1))
    assert len(nvidia.calls) == done


# --- refusing ---


def refused(path: Path, match: str, **options: Any) -> MismatchError:
    with pytest.raises(MismatchError, match=match) as caught:
        TensorRTBackend(path, **options)
    assert caught.value.exit_code == 5
    assert "embedkit export" in (caught.value.hint or "")
    assert "--trt" in (caught.value.hint or "")
    return caught.value


def rewrite(path: Path, **changed: Any) -> None:
    sidecar = path.with_name(f"{path.name}.json")
    document = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps({**document, **changed}))


def copied(built: Path, folder: Path) -> Path:
    for name in ("model.onnx", "model.engine", "model.engine.json"):
        shutil.copy(built.with_name(name), folder / name)
    return folder / "model.engine"


def test_a_real_engine_without_a_gpu_is_told_in_a_sentence(built: Path) -> None:
    if this_gpu() is not None:
        pytest.skip("there is a GPU here")
    with pytest.raises(MissingError, match="NVIDIA GPU") as caught:
        TensorRTBackend(built)
    assert caught.value.exit_code == 6
    assert not isinstance(caught.value, MissingExtraError)


def test_a_real_engine_is_what_its_description_says(built: Path) -> None:
    file = open_engine(built)
    assert file.contract == read_contract(built) == read_contract(built.with_name("model.onnx"))
    assert file.info == read_engine(built)[0]
    assert file.info.plan_version == file.info.version  # by its own bytes, and by the package
    assert file.info.rebuild() == f"embedkit export {built.parent}/model.onnx --trt --batch 1:4:9"


def test_any_changed_byte_of_a_real_engine_is_found(
    built: Path, tmp_path: Path, nvidia: Nvidia
) -> None:
    path = copied(built, tmp_path)
    plan = path.read_bytes()
    rng = np.random.default_rng(0)
    places = {0, 3, 4, 23, 24, 27, 28, len(plan) - 1, *rng.integers(0, len(plan), 40).tolist()}
    for place in places:
        changed = bytearray(plan)
        changed[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        refused(path, "no TensorRT engine|does not fit")
    for size in (0, 3, 4, 24, 64, len(plan) // 2, len(plan) - 1):
        path.write_bytes(plan[:size])
        refused(path, "no TensorRT engine|does not fit")
    path.write_bytes(plan + b"\0")
    refused(path, "damaged, cut short")
    assert nvidia.calls == []  # not one byte reached NVIDIA's code


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"text"', "[" * 5000, "{}", "\udcff"])
def test_a_description_that_is_none_is_refused(engine: Path, nvidia: Nvidia, text: str) -> None:
    sidecar = engine.with_name("model.engine.json")
    sidecar.write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(engine, "damaged|cannot be read")
    sidecar.unlink()
    refused(engine, "no description beside it")
    assert nvidia.calls == []


@pytest.mark.parametrize(
    "field",
    [
        *("schema", "flavour", "version", "plan_version", "compute_capability", "profile", "onnx"),
        *("onnx_sha256", "engine_sha256", "size", "version_compatible", "contract"),
    ],
)
@pytest.mark.parametrize(
    "value",
    [
        None,
        -1,
        1.5,
        "",
        "x",
        "1..2",
        [],
        {},
        {"pixels": {}},
        {"pixels": {"min": [1]}},
        [[[]]],
        True,
    ],
)
def test_nonsense_in_a_description_is_refused_and_never_crashes(
    engine: Path, nvidia: Nvidia, field: str, value: Any
) -> None:
    """Where the value happens to be fine, the engine runs."""
    rewrite(engine, **{field: value})
    try:
        TensorRTBackend(engine).close()
    except MismatchError:
        assert "deserialize_cuda_engine" not in nvidia.calls
    else:
        assert (field, value) in [("onnx", "x"), ("onnx", "1..2"), ("onnx", ""), *FINE]


FINE = [
    ("version_compatible", True),
    *(("onnx_sha256", value) for value in ("", "x", "1..2")),
    *(("size", value) for value in (-1,)),
]


def test_fields_that_are_missing_or_unknown_are_refused(engine: Path) -> None:
    rewrite(engine, surprise=1)
    refused(engine, "damaged")
    sidecar = engine.with_name("model.engine.json")
    document = json.loads(sidecar.read_text())
    del document["surprise"], document["plan_version"]
    sidecar.write_text(json.dumps(document))
    refused(engine, "damaged")


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"flavour": "tensorrt"}, "is a TensorRT for RTX engine, its description is of one for"),
        ({"plan_version": "1.7.1.117"}, "written by version 1.7.1.116"),
        ({"version": "1.6.0.3"}, "1.6.0.3 built it, 1.7.1.116 is installed"),
        ({"version": "1.7.1.115", "plan_version": "1.7.1.116"}, "1.7.1.115 built it"),
        ({"compute_capability": "8.6"}, "compute capability 8.6, the GPU here has 8.9"),
        ({"compute_capability": "12.0"}, "compute capability 12.0, the GPU here has 8.9"),
        ({"engine_sha256": "0" * 64}, "damaged, cut short"),
    ],
)
def test_an_engine_for_something_else_is_refused_with_the_line_that_rebuilds_it(
    engine: Path, nvidia: Nvidia, changed: dict[str, Any], match: str
) -> None:
    rewrite(engine, **changed)
    error = refused(engine, match)
    assert error.hint == f"embedkit export {engine.parent / 'model.onnx'} --trt"
    assert "deserialize_cuda_engine" not in nvidia.calls


def test_a_contract_that_was_altered_is_refused(engine: Path, nvidia: Nvidia) -> None:
    document = json.loads(engine.with_name("model.engine.json").read_text())
    document["contract"]["embedding_dim"] = 9
    rewrite(engine, contract=document["contract"])
    with pytest.raises(MismatchError, match="altered"):
        TensorRTBackend(engine)
    assert nvidia.calls == []


@pytest.mark.parametrize("dim", [7, 9])
def test_an_engine_that_gives_something_else_than_described_is_refused(
    tmp_path: Path, nvidia: Nvidia, dim: int
) -> None:
    path = write_engine(tmp_path / "model.engine", tiny_contract(dim=dim))
    refused(path, "is not what its description says")
    path = write_engine(tmp_path / "model.engine", tiny_contract(), batch=(1, 8, 64))
    refused(path, "is not what its description says")  # else pixels past the profile's end
    assert nvidia.leaks() == []


def test_an_engine_of_a_model_that_changed_since_is_refused(
    built: Path, tmp_path: Path, nvidia: Nvidia
) -> None:
    path = copied(built, tmp_path)
    nvidia.batch = (1, 4, 9)
    TensorRTBackend(path).close()
    write_tiny_model(tmp_path / "model.onnx", seed=1)
    refused(path, "was not built from .*model.onnx as that is now")
    (tmp_path / "model.onnx").unlink()
    TensorRTBackend(path).close()  # copied without it: nothing to compare with


def test_names_in_a_rebuild_line_cannot_run_anything(engine: Path, nvidia: Nvidia) -> None:
    rewrite(engine, onnx="../../$(reboot); x.onnx", compute_capability="8.0")
    hint = refused(engine, "does not fit").hint or ""
    assert f"export '{engine.parent}/$(reboot); x.onnx' --trt" in hint


@pytest.mark.parametrize(
    ("built_by", "here", "fits"),
    [
        ("10.8.0.43", "10.8.0.43", True),
        ("10.8.0.43", "10.8.0.43.post1", True),
        ("10.8.0.43", "10.13.3.9", True),
        ("10.8.0.43", "10.7.0.23", False),
        ("10.8.0.43", "11.4.0.1", False),
        ("9.3.0.1", "10.8.0.43", False),
    ],
)
def test_version_compatible_engines_run_on_newer_versions_of_their_major(
    engine: Path, built_by: str, here: str, fits: bool
) -> None:
    rewrite(engine, version=built_by, version_compatible=True)
    info = read_engine(engine)[0]
    assert "--version-compatible" in info.rebuild()
    if fits:
        check_fits(info, version=here, capability="8.9")
    else:
        with pytest.raises(MismatchError, match="is installed here"):
            check_fits(info, version=here, capability="8.9")


@pytest.mark.parametrize(
    ("built_for", "here", "fits"),
    [("8.0", "9.0", True), ("9.0", "8.6", True), ("8.9", "12.0", True), ("8.0", "7.5", False)],
)
def test_hardware_compatible_engines_run_on_every_gpu_since_ampere(
    engine: Path, built_for: str, here: str, fits: bool
) -> None:
    rewrite(engine, compute_capability=built_for, hardware_compatible=True)
    info = read_engine(engine)[0]
    assert "--hardware-compatible" in info.rebuild()
    if fits:
        check_fits(info, version=info.version, capability=here)
    else:
        with pytest.raises(MismatchError, match="compute capability"):
            check_fits(info, version=info.version, capability=here)


@pytest.mark.parametrize("compatible", [False, True])
def test_code_inside_an_engine_is_allowed_only_where_it_was_asked_for(
    engine: Path, nvidia: Nvidia, compatible: bool
) -> None:
    rewrite(engine, version_compatible=compatible)
    TensorRTBackend(engine).close()
    assert nvidia.host_code_allowed is compatible


# --- what is missing ---


@pytest.mark.parametrize(
    ("flavour", "package", "extra"),
    [("tensorrt", "tensorrt", "trt"), ("tensorrt_rtx", "tensorrt-rtx", "rtx")],
)
def test_a_missing_package_is_named_with_its_pip_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flavour: str, package: str, extra: str
) -> None:
    path = write_engine(tmp_path / "m.engine", tiny_contract(), flavour=flavour)
    Nvidia(tiny_contract()).install(monkeypatch, flavour)
    for missing, name in ((flavour, package), ("cuda.bindings.runtime", "cuda-bindings")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, missing, None)
            with pytest.raises(MissingExtraError, match=name) as caught:
                TensorRTBackend(path)
        assert caught.value.hint == f'pip install "embedkit[{extra}]"'


def test_a_gpu_that_is_not_there_is_exit_6(nvidia: Nvidia, engine: Path) -> None:
    with pytest.raises(MissingError, match="no CUDA device 3"):
        TensorRTBackend(engine, device="cuda:3")
    nvidia.gpus = ()
    with pytest.raises(MissingError, match="there is none"):
        TensorRTBackend(engine)
    assert "Runtime" not in nvidia.calls


@pytest.mark.parametrize("device", ["cpu", "gpu", "cuda:", "cuda:x", "cuda:-1"])
def test_a_device_that_is_no_gpu_is_wrong_usage(engine: Path, device: str) -> None:
    with pytest.raises(UsageError, match="TensorRT runs on a GPU"):
        TensorRTBackend(engine, device=device)


# --- through the Embedder ---


def test_the_embedder_runs_an_engine_by_its_ending(engine: Path, nvidia: Nvidia) -> None:
    with Embedder.load(engine) as embedder:
        assert embedder.device == "cuda:0"
        assert embedder.self_test() > 0.9999
        vectors = embedder.embed(list(pictures(3)))
    assert vectors.shape == (3, 8)
    assert nvidia.leaks() == []


def test_an_engine_with_other_vectors_is_refused_and_freed(engine: Path, nvidia: Nvidia) -> None:
    nvidia.seed = 3
    with pytest.raises(MismatchError, match="does not give the vectors it was exported with"):
        Embedder.load(engine)
    assert nvidia.memory == nvidia.pinned == nvidia.streams == {}


def test_an_engine_that_fails_its_first_run_is_freed(engine: Path, nvidia: Nvidia) -> None:
    nvidia.fail("execute_async_v3")
    with pytest.raises(EmbedKitError, match="failed on a batch of 1"):
        Embedder.load(engine)
    assert nvidia.memory == nvidia.pinned == nvidia.streams == {}


def test_an_onnx_file_stands_for_the_engine_beside_it(
    built: Path, tmp_path: Path, nvidia: Nvidia
) -> None:
    path = copied(built, tmp_path)
    nvidia.batch = (1, 4, 9)
    onnx = path.with_name("model.onnx")
    with Embedder.load(onnx, backend="tensorrt") as embedder:
        assert embedder.device == "cuda:0"
    write_tiny_model(onnx, seed=1)
    with pytest.raises(MismatchError, match="was not built from"):
        Embedder.load(onnx, backend="tensorrt")
    path.unlink()
    with pytest.raises(UsageError, match="no TensorRT engine") as caught:
        Embedder.load(onnx, backend="tensorrt")
    assert caught.value.hint == f"embedkit export {onnx} --trt"


@pytest.mark.parametrize("backend", ["onnxruntime", "onnxruntime-tensorrt"])
def test_an_engine_is_not_for_onnxruntime(engine: Path, backend: str) -> None:
    with pytest.raises(UsageError, match="is a TensorRT engine"):
        Embedder.load(engine, backend=backend)


def test_a_backend_that_does_not_exist_is_answered_with_those_that_do(engine: Path) -> None:
    with pytest.raises(UnknownNameError, match="onnxruntime-tensorrt, tensorrt"):
        Embedder.load(engine, backend="tensort")


# --- TensorRT through ONNX Runtime ---


class _Session:
    """The CPU's session under the name of a GPU build, which notes what it was asked for."""

    asked: Any = None
    strict: Any = None
    used = "TensorrtExecutionProvider"
    fails = False
    batches: tuple[int, ...] = ()

    def __init__(self, data: bytes, options: Any, providers: list[Any], **rest: Any) -> None:
        self._mine = providers != ["CPUExecutionProvider"]
        if self._mine:
            type(self).asked = providers
            key = "session.disable_cpu_ep_fallback"
            type(self).strict = options.get_session_config_entry(key)
            if type(self).fails:
                raise RuntimeError("nodes were assigned to the default CPU EP")
            options = ort.SessionOptions()
        self._session = _REAL_SESSION(data, options, ["CPUExecutionProvider"])

    def get_providers(self) -> list[str]:
        return [type(self).used] if self._mine else ["CPUExecutionProvider"]

    def run(self, names: Any, given: dict[str, np.ndarray]) -> Any:
        type(self).batches += tuple(len(value) for value in given.values())
        return self._session.run(names, given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


_REAL_SESSION = ort.InferenceSession


@pytest.fixture
def gpu_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[_Session]:
    names = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: names)
    monkeypatch.setattr(ort, "InferenceSession", type("_Fresh", (_Session,), {}))
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return ort.InferenceSession  # type: ignore[no-any-return]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    write_tiny_model(tmp_path / "tiny.onnx")
    return tmp_path / "tiny.onnx"


def test_onnxruntime_runs_all_of_a_model_on_tensorrt(
    tiny: Path, tmp_path: Path, gpu_build: type[_Session]
) -> None:
    with Embedder.load(tiny, backend="onnxruntime-tensorrt", device="cuda:1") as embedder:
        assert embedder.device == "cuda:1"
        vectors = embedder.embed_pixels(pictures(70))
    np.testing.assert_allclose(vectors, tiny_vectors(pictures(70)), atol=2e-6)
    assert gpu_build.batches[-3:] == (32, 32, 6)  # never beyond the shapes it was built for
    assert gpu_build.strict == "1"
    ((name, options),) = gpu_build.asked
    assert name == "TensorrtExecutionProvider"
    assert options["device_id"] == "1"
    assert options["trt_fp16_enable"] == options["trt_int8_enable"] == "False"
    assert options["trt_profile_max_shapes"] == "pixels:32x16x16x3"
    cache = Path(options["trt_engine_cache_path"])
    assert cache.is_relative_to(tmp_path / "cache")
    assert cache.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"used": "CPUExecutionProvider"}, "would have run on: CPU"),
        ({"fails": True}, "default CPU"),
    ],
)
def test_onnxruntime_never_leaves_tensorrt_without_a_word(
    tiny: Path, gpu_build: type[_Session], changed: dict[str, Any], match: str
) -> None:
    for name, value in changed.items():
        setattr(gpu_build, name, value)
    with pytest.raises(MissingError, match=match) as caught:
        OnnxRuntimeBackend(tiny, tensorrt=True)
    assert caught.value.exit_code == 6


def test_a_cache_of_engines_that_others_can_write_is_not_used(
    tiny: Path, tmp_path: Path, gpu_build: type[_Session]
) -> None:
    OnnxRuntimeBackend(tiny, tensorrt=True)
    ((_, options),) = gpu_build.asked
    Path(options["trt_engine_cache_path"]).chmod(0o777)
    with pytest.raises(MissingError, match="not yours alone"):
        OnnxRuntimeBackend(tiny, tensorrt=True)


def test_onnxruntime_without_tensorrt_names_the_pip_line(tiny: Path) -> None:
    if "TensorrtExecutionProvider" in ort.get_available_providers():
        pytest.skip("this machine's onnxruntime has TensorRT")
    with pytest.raises(MissingError, match="this onnxruntime cannot use it") as caught:
        Embedder.load(tiny, backend="onnxruntime-tensorrt")
    assert 'pip install "embedkit[gpu,trt]"' in (caught.value.hint or "")


# --- on a real GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [(1, 4, 9), (4, 8, 9)])
def test_on_a_gpu_an_engine_gives_the_vectors_of_its_onnx_file(
    tmp_path: Path, batch: tuple[int, int, int]
) -> None:
    if this_gpu() is None:
        pytest.skip("no GPU here")
    write_tiny_model(tmp_path / "model.onnx")
    build_engine(tmp_path / "model.onnx", tmp_path / "model.engine", batch=batch)
    with (
        Embedder.load(tmp_path / "model.engine") as embedder,
        Embedder.load(tmp_path / "model.onnx", device="cpu") as reference,
    ):
        for count in (1, 2, 7, 9, 25):
            pixels = pictures(count, seed=count)
            given, wanted = embedder.embed_pixels(pixels), reference.embed_pixels(pixels)
            assert (given * wanted).sum(axis=1).min() > 0.9999
