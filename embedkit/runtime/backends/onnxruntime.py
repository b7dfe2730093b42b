"""Run a model's ONNX file with ONNX Runtime; the only file that imports it for running.

A model file is input from outside: it is opened from its bytes with an empty folder as the only
place where external data may lie, as plain ONNX, without compiled blobs or operators of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from embedkit.errors import (
    EmbedKitError,
    MismatchError,
    MissingError,
    MissingExtraError,
    UsageError,
)
from embedkit.floors import require
from embedkit.imaging.preprocess import Pixels
from embedkit.runtime.backends.base import Vectors
from embedkit.runtime.backends.cuda import gpu_number
from embedkit.runtime.backends.tensorrt import import_tensorrt
from embedkit.runtime.codebooks import Codes
from embedkit.runtime.contract import CODES_NAME, CONTRACT_KEY, ModelContract
from embedkit.runtime.engine_file import PLAIN
from embedkit.runtime.private_folder import private_folder
from embedkit.runtime.seal import check_seal

try:
    import onnxruntime as ort
except ImportError as error:
    raise MissingExtraError(
        "the onnxruntime backend", package="onnxruntime", extra="cpu"
    ) from error

__all__ = ["OnnxRuntimeBackend", "read_onnx_contract"]

require("onnxruntime", ort.__version__)

_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_TENSORRT = "TensorrtExecutionProvider"
_TENSORRT_BATCH = (1, 8, 32)  # least, usual, largest
_EXPORT_AGAIN = "export the model again with: embedkit export"

_log = logging.getLogger("embedkit")


class OnnxRuntimeBackend:
    """One model, loaded and checked; see `embedkit.runtime.backends.base.Backend`.

    Args:
        path: The ``.onnx`` file, all in one.
        device: ``cpu``, ``cuda``, ``cuda:N``, or ``auto``: CUDA where it is there and works.
        threads: Of the CPU; 0 leaves the choice to ONNX Runtime (one per core).
        tensorrt: Run all of it through ONNX Runtime's TensorRT provider, which builds an engine on
            first use and keeps it in the user's cache folder. Batches above 32 are split. Run on
            hardware: untested.

    Raises:
        UsageError: There is no such file, or no such device name.
        MismatchError: The file is damaged, no ONNX, not self-contained, carries no contract, or
            does not do what its contract says.
        MissingError: CUDA or TensorRT was asked for and cannot be used, or two onnxruntime packages
            overwrite each other.
    """

    def __init__(
        self, path: Path, *, device: str = "auto", threads: int = 0, tensorrt: bool = False
    ) -> None:
        _refuse_two_packages()
        if threads < 0:
            raise UsageError(f"threads must not be negative, got {threads}")
        self.name = "onnxruntime-tensorrt" if tensorrt else "onnxruntime"
        self._largest: int | None = None
        number = gpu_number(device) if tensorrt else _cuda_number(device)
        data = _read_model(path)
        session: Any = None
        if tensorrt:
            session = _tensorrt_session(path, data, number or 0, threads)
            self.device = f"cuda:{number}"
            self._largest = _TENSORRT_BATCH[-1]
        elif number is not None:
            try:
                session = _cuda_session(path, data, number, threads)
                self.device = f"cuda:{number}"
            except MissingError as error:
                if device != "auto":
                    raise
                if _CUDA in ort.get_available_providers():
                    _log.warning("the GPU cannot be used, going on with the CPU: %s", error)
        if session is None:
            session = _session(path, data, [_CPU], threads)
            self.device = "cpu"
        self.contract = _contract(path, session)
        _check_graph(path, session, self.contract)
        self._session = session

    def run(self, pixels: Pixels) -> Vectors:
        """``(N, height, width, 3)`` uint8, N >= 1 -> ``(N, embedding_dim)`` float32.

        Raises:
            EmbedKitError: The engine failed (out of memory, a lost device), or was closed.
        """
        (vectors,) = self._run(pixels, [self.contract.output_name])
        return np.asarray(vectors, dtype=np.float32)

    def run_coded(self, pixels: Pixels) -> tuple[Vectors, Codes]:
        """As `run`, and the codes ``(N, parts)`` of a model whose contract has codebooks."""
        vectors, codes = self._run(pixels, [self.contract.output_name, CODES_NAME])
        return np.asarray(vectors, dtype=np.float32), np.asarray(codes, dtype=np.uint8)

    def close(self) -> None:
        """Give back the session's memory; calling it twice is harmless."""
        self._session = None

    def _run(self, pixels: Pixels, outputs: list[str]) -> list[Any]:
        """These outputs for any number of pictures."""
        if self._session is None:
            raise EmbedKitError("this model was closed and cannot run any more")
        step = self._largest or len(pixels)
        parts = [
            self._run_once(pixels[at : at + step], outputs) for at in range(0, len(pixels), step)
        ]
        return (
            parts[0]
            if len(parts) == 1
            else [np.concatenate(one) for one in zip(*parts, strict=True)]
        )

    def _run_once(self, pixels: Pixels, outputs: list[str]) -> list[Any]:
        try:
            given: list[Any] = self._session.run(outputs, {self.contract.input_name: pixels})
        except Exception as error:
            raise EmbedKitError(
                f"the model failed on a batch of {len(pixels)}",
                facts=_first_line(error),
                hint="try a smaller batch" if len(pixels) > 1 else None,
            ) from error
        return given


def read_onnx_contract(path: Path) -> ModelContract:
    """What an ONNX file says about itself, without preparing it to run.

    Raises:
        UsageError: There is no such file.
        MismatchError: See `OnnxRuntimeBackend`.
    """
    session = _session(path, _read_model(path), [_CPU], threads=1, optimize=False)
    return _contract(path, session)


def _refuse_two_packages() -> None:
    """Both wheels write the same folder: what is installed last is what runs, or neither does."""
    there = []
    for package in ("onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            there.append(f"{package} {importlib.metadata.version(package)}")
    if len(there) == 2:
        raise MissingError(
            "two packages that overwrite each other are installed",
            facts=" and ".join(there),
            hint="pip uninstall -y onnxruntime onnxruntime-gpu && "
            'pip install "embedkit[gpu]"   (or "embedkit[cpu]")',
        )


def _cuda_number(device: str) -> int | None:
    """Which CUDA device to try; None for none."""
    kind, _, number = device.partition(":")
    if device == "cpu":
        return None
    if device in ("auto", "cuda"):
        return 0
    if kind == "cuda" and number.isdecimal():
        return int(number)
    raise UsageError(
        f"there is no device named {device!r}", facts="known: auto, cpu, cuda, cuda:0, cuda:1, ..."
    )


def _read_model(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"the model {str(path)!r} cannot be read", facts=error.strerror) from error
    # The word and not its place in the file, because one number can be coded in several ways.
    if b"EPContext" in data:
        raise MismatchError(
            f"the model {str(path)!r} was refused",
            facts="it holds a compiled blob (EPContext), which would run unchecked",
            hint=_EXPORT_AGAIN,
        )
    check_seal(str(path), data)
    return data


def _cuda_session(path: Path, data: bytes, number: int, threads: int) -> Any:
    """A session that really runs on the GPU and gave one result there."""
    if _CUDA not in ort.get_available_providers():
        raise MissingError(
            "CUDA was asked for, and this onnxruntime cannot use it",
            facts=f"onnxruntime {ort.__version__} offers: "
            f"{', '.join(ort.get_available_providers())}",
            hint='pip uninstall -y onnxruntime && pip install "embedkit[gpu]"',
        )
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # it prints, and stdout is for answers
        ort.preload_dlls()
    session: Any = None
    try:
        provider = (_CUDA, {"device_id": str(number)})
        session = _session(path, data, [provider, _CPU], threads)
        trouble = "CUDA could not be started" if session.get_providers()[0] != _CUDA else None
    except MismatchError as error:
        # The CPU tells whether it is the file (then this raises) or the GPU.
        _session(path, data, [_CPU], threads, optimize=False)
        trouble = error.facts
    if trouble is not None:
        raise MissingError(
            f"CUDA device {number} cannot be used",
            facts="\n".join(filter(None, [trouble, said.getvalue().strip()])),
            hint="see that nvidia-smi shows the device; the CUDA and cuDNN libraries come with: "
            'pip install "onnxruntime-gpu[cuda,cudnn]"',
        )
    _try_once(session, number)
    return session


def _tensorrt_session(path: Path, data: bytes, number: int, threads: int) -> Any:
    """A session that runs all of the model on TensorRT and gave one result there."""
    if _TENSORRT not in ort.get_available_providers():
        raise MissingError(
            "TensorRT was asked for, and this onnxruntime cannot use it",
            facts=f"onnxruntime {ort.__version__} offers: "
            f"{', '.join(ort.get_available_providers())}",
            hint='pip uninstall -y onnxruntime && pip install "embedkit[gpu,trt]"',
        )
    session = _session(path, data, [_CPU], threads, optimize=False)
    contract = _contract(path, session)
    _check_graph(path, session, contract)
    import_tensorrt(PLAIN)  # brings NVIDIA's libraries into the process, where pip installed them
    folder = str(private_folder(f"onnxruntime-tensorrt/{hashlib.sha256(data).hexdigest()[:16]}"))
    options = {
        "device_id": str(number),
        # Precision is what the graph says: nothing is reduced behind the user's back.
        "trt_fp16_enable": "False",
        "trt_int8_enable": str(contract.precision == "int8"),
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": folder,
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": folder,
    }
    side = contract.preprocess
    for kind, size in zip(("min", "opt", "max"), _TENSORRT_BATCH, strict=True):
        shape = f"{contract.input_name}:{size}x{side.height}x{side.width}x3"
        options[f"trt_profile_{kind}_shapes"] = shape
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # it prints, and stdout is for answers
        ort.preload_dlls()
    try:
        session = _session(path, data, [(_TENSORRT, options)], threads, only_these=True)
        used = session.get_providers()
        trouble = None if used[0] == _TENSORRT else f"it would have run on: {', '.join(used)}"
    except MismatchError as error:
        trouble = error.facts
    if trouble is not None:
        raise MissingError(
            f"ONNX Runtime cannot run this model on TensorRT on CUDA device {number}",
            facts="\n".join(filter(None, [trouble, said.getvalue().strip()])),
            hint="see that nvidia-smi shows the device, or run it with --backend onnxruntime",
        )
    _try_once(session, number)
    return session


def _try_once(session: Any, number: int) -> None:
    """Run one black picture: a GPU that is too old or full fails here and not later."""
    (pixels,) = session.get_inputs()[:1]
    shape = [size if isinstance(size, int) else 1 for size in pixels.shape]
    if pixels.type != "tensor(uint8)":
        return  # not a model of this kind; `_check_graph` says so
    try:
        session.run(None, {pixels.name: np.zeros(shape, np.uint8)})
    except Exception as error:
        raise MissingError(
            f"CUDA device {number} cannot run this model",
            facts=_first_line(error),
            hint="run it with --device cpu",
        ) from error


def _session(
    path: Path,
    data: bytes,
    providers: list[Any],
    threads: int,
    *,
    optimize: bool = True,
    only_these: bool = False,
) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what fails is raised; nothing is written to stderr
    options.intra_op_num_threads = threads
    # Threads that spin while they wait take the cores from those that decode: measured 8 to 15 %
    # more CPU time per image and not one image more a second (benchmarks/pipeline.py, 2 cores).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Only ONNX is taken: the ORT format may name compiled kernels.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if only_these:  # else what a provider cannot run goes to the CPU without a word
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    with tempfile.TemporaryDirectory(prefix="embedkit-") as empty:
        # Tensors kept outside the file could be any file of this machine.
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", empty
        )
        try:
            return ort.InferenceSession(data, options, providers=providers, enable_fallback=0)
        except Exception as error:
            raise MismatchError(
                f"the model {str(path)!r} cannot be loaded: it is damaged, or no ONNX file that "
                "stands alone",
                facts=_first_line(error),
                hint=_EXPORT_AGAIN,
            ) from error


def _contract(path: Path, session: Any) -> ModelContract:
    try:
        text = session.get_modelmeta().custom_metadata_map.get(CONTRACT_KEY)
    except UnicodeDecodeError as error:
        raise MismatchError(
            f"the model {str(path)!r} is damaged",
            facts="what it says about itself is no text",
            hint=_EXPORT_AGAIN,
        ) from error
    if text is None:
        raise MismatchError(
            f"the model {str(path)!r} carries no contract",
            facts="an ONNX file from elsewhere does not say how its pixels are made",
            hint=_EXPORT_AGAIN,
        )
    return ModelContract.loads(text)


def _check_graph(path: Path, session: Any, contract: ModelContract) -> None:
    """The graph takes and gives what the contract says, and any number at once."""
    side, books = contract.preprocess, contract.codebooks
    wanted = (
        [(contract.input_name, "tensor(uint8)", ["N", side.height, side.width, 3])],
        [
            (contract.output_name, "tensor(float)", ["N", contract.embedding_dim]),
            *([(CODES_NAME, "tensor(uint8)", ["N", books.parts])] if books else ()),
        ],
    )
    found = tuple(
        [(node.name, node.type, _any_first(node.shape)) for node in nodes]
        for nodes in (session.get_inputs(), session.get_outputs())
    )
    if found != wanted:
        raise MismatchError(
            f"the model {str(path)!r} is not what its contract says",
            facts=f"the contract says {wanted[0]} -> {wanted[1]}\n"
            f"the graph has {found[0]} -> {found[1]}",
            hint=_EXPORT_AGAIN,
        )


def _any_first(shape: list[int | str | None]) -> list[int | str | None]:
    """A shape whose free first size is called N, whatever the file calls it."""
    return ["N", *shape[1:]] if shape and not isinstance(shape[0], int) else shape


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
