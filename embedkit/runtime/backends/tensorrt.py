"""Run a TensorRT engine without torch: numpy in, numpy out, through pinned memory and one stream.

For engines of the packages ``tensorrt`` (10 and 11) and ``tensorrt-rtx``. Written after the
documentation of TensorRT and cuda-python and tested against a stand-in for both; run on hardware:
untested. `embedkit.runtime.Embedder.load` compares the model's self-test before it is used.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from embedkit.errors import (
    EmbedKitError,
    MismatchError,
    MissingError,
    MissingExtraError,
    UsageError,
)
from embedkit.imaging.preprocess import Pixels
from embedkit.runtime.backends.base import Vectors
from embedkit.runtime.backends.cuda import Cuda, gpu_number
from embedkit.runtime.codebooks import Codes
from embedkit.runtime.contract import CODES_NAME, ModelContract
from embedkit.runtime.engine_file import PLAIN, EngineFile, check_fits, open_engine

__all__ = ["TensorRTBackend", "extra_of", "import_tensorrt", "message_log"]

_SHOWN = 5

_log = logging.getLogger("embedkit")


class TensorRTBackend:
    """One engine, loaded and checked; see `embedkit.runtime.backends.base.Backend`.

    Safe to call from several threads: one lock lets one batch run at a time, since an execution
    context and its buffers serve one at a time. Batches larger than the engine's largest are split,
    smaller ones than its least are filled up with black pictures, whose vectors are dropped.

    Memory: the largest batch's pixels and vectors, once on the GPU and once pinned on the host.

    Args:
        path: The ``.engine``, its sidecar beside it.
        device: ``auto`` or ``cuda``: the first GPU; ``cuda:N``.
        onnx: The model it must have been built from; None takes the one beside it, where there is
            one.

    Raises:
        UsageError: There is no such file, or the device is no GPU.
        MismatchError: The engine is foreign, damaged, stale, or for another TensorRT or GPU; the
            hint is the line that builds it again.
        MissingError: There is no GPU or no driver, or a package is missing.
        EmbedKitError: The GPU failed, for example for want of memory.
    """

    name = "tensorrt"

    def __init__(self, path: Path, *, device: str = "auto", onnx: Path | None = None) -> None:
        number = gpu_number(device)
        file = open_engine(path, onnx=onnx)
        extra = extra_of(file.info.flavour)
        trt = import_tensorrt(file.info.flavour)
        if trt is None:
            raise MissingExtraError(
                "running this engine", package=file.info.flavour.replace("_", "-"), extra=extra
            )
        self.contract: ModelContract = file.contract
        self._info = file.info
        self._lock = threading.Lock()
        # The CUDA context comes before anything of TensorRT: without a driver, 11.4 hands out a
        # null runtime, and to deserialise with that ends the process.
        self._cuda = Cuda(number, extra=extra)
        self.device = f"cuda:{number}"
        check_fits(file.info, version=trt.__version__, capability=self._cuda.gpu.capability)
        with ExitStack() as undo:
            self._load(trt, file, undo)
            self._undo = undo.pop_all()
        self._open = True

    def run(self, pixels: Pixels) -> Vectors:
        """``(N, height, width, 3)`` uint8, N >= 1 -> ``(N, embedding_dim)`` float32.

        Raises:
            UsageError: Pixels of another shape or type than the contract's.
            EmbedKitError: The GPU failed, or this was closed.
        """
        vectors: Vectors = self._run_all(pixels)[0]
        return vectors

    def run_coded(self, pixels: Pixels) -> tuple[Vectors, Codes]:
        """As `run`, and the codes ``(N, parts)`` of a model whose contract has codebooks."""
        vectors, codes = self._run_all(pixels)
        return vectors, codes

    def _run_all(self, pixels: Pixels) -> list[Any]:
        """Every output for any number of pictures."""
        if pixels.dtype != np.uint8 or pixels.shape[1:] != self._shape:
            raise UsageError(
                f"this engine takes uint8 (N, {', '.join(map(str, self._shape))})",
                facts=f"got {pixels.dtype} {pixels.shape}",
            )
        given = [np.empty((len(pixels), one.width), one.dtype) for one in self._outputs]
        with self._lock:
            if not self._open:
                raise EmbedKitError("this model was closed and cannot run any more")
            self._cuda.use()
            for start in range(0, len(pixels), self._largest):
                part = slice(start, start + self._largest)
                for rows, some in zip(given, self._run(pixels[part]), strict=True):
                    rows[part] = some
        return given

    def close(self) -> None:
        """Give back what the engine holds; calling it twice is harmless."""
        with self._lock:
            if self._open:
                self._open = False
                _try(self._cuda.use)
                self._undo.close()

    def _load(self, trt: Any, file: EngineFile, undo: ExitStack) -> None:
        """Everything that has to be given back goes onto `undo` as soon as it is there."""
        cuda, contract = self._cuda, self.contract
        log = message_log(trt)
        try:
            runtime = trt.Runtime(log)
        except (TypeError, RuntimeError) as error:  # how pybind11 tells of a null
            raise EmbedKitError("TensorRT could not be started", facts=str(error)) from error
        if runtime is None:
            raise EmbedKitError("TensorRT could not be started", facts=log.told())
        # An engine for several versions carries a runtime of its own, which is code to be run; its
        # bytes are those that were built here, as far as the sidecar can tell.
        if file.info.version_compatible:
            runtime.engine_host_code_allowed = True
        engine = runtime.deserialize_cuda_engine(file.plan)
        if engine is None:
            raise MismatchError(
                f"TensorRT does not take the engine {str(file.info.path)!r}",
                facts=log.told(),
                hint=file.info.rebuild(),
            )
        self._least, self._largest = _check_engine(trt, engine, file)
        self._shape = (contract.preprocess.height, contract.preprocess.width, 3)
        context = engine.create_execution_context()
        if context is None:
            raise EmbedKitError(
                "TensorRT could not make the engine ready",
                facts=log.told(),
                hint="the GPU may be short of memory: nvidia-smi shows what uses it",
            )
        self._kept: list[Any] = [log, runtime, engine, context]
        self._context: Any = context
        undo.callback(self._forget)
        self._stream = _made(undo, cuda.stream(), cuda.end_stream)
        self._outputs = _outputs(contract)
        rows = int(np.prod(self._shape)), *(one.bytes for one in self._outputs)
        sizes = [self._largest * row for row in rows]
        self._given, *self._results = (_made(undo, cuda.memory(size), cuda.free) for size in sizes)
        self._host_in, *self._hosts_out = (
            _made(undo, cuda.pinned(size), cuda.free_pinned) for size in sizes
        )
        undo.callback(self._forget)  # once more, to come before the memory it knows of
        undo.callback(_try, cuda.wait, self._stream)  # nothing is freed while it is being copied
        for name, address in (
            (contract.input_name, self._given),
            *zip((one.name for one in self._outputs), self._results, strict=True),
        ):
            if not context.set_tensor_address(name, address):
                raise EmbedKitError(f"TensorRT took no memory for {name!r}", facts=log.told())

    def _run(self, pixels: Pixels) -> list[Any]:
        """Outputs of at most the largest batch; they are views that the next run overwrites."""
        cuda, context, contract = self._cuda, self._context, self.contract
        count = max(len(pixels), self._least)
        given = self._host_in.bytes[: count * pixels[0].size]
        rows = given.reshape(count, *self._shape)
        rows[: len(pixels)] = pixels
        rows[len(pixels) :] = 0
        if not context.set_input_shape(contract.input_name, rows.shape):
            raise self._failed("set_input_shape", count)
        for one in self._outputs:
            if tuple(context.get_tensor_shape(one.name)) != (count, one.width):
                raise self._failed("get_tensor_shape", count)
        try:
            cuda.upload(self._given, self._host_in, given.size, self._stream)
            if not context.execute_async_v3(int(self._stream)):
                raise self._failed("execute_async_v3", count)
            for one, host, result in zip(
                self._outputs, self._hosts_out, self._results, strict=True
            ):
                cuda.download(host, result, count * one.bytes, self._stream)
        finally:
            # Also after a failure: the buffers are written again by the next batch.
            cuda.wait(self._stream)
        return [
            host.bytes[: count * one.bytes].view(one.dtype).reshape(count, one.width)[: len(pixels)]
            for one, host in zip(self._outputs, self._hosts_out, strict=True)
        ]

    def _failed(self, call: str, count: int) -> EmbedKitError:
        return EmbedKitError(
            f"the engine failed on a batch of {count}",
            facts=f"{call}: {self._kept[0].told()}",
            hint="run it again; if it fails again, build the engine anew: " + self._info.rebuild(),
        )

    def _forget(self) -> None:
        """Let TensorRT's objects go, the last first: each needs those before it."""
        self._context = None
        while self._kept:
            self._kept.pop()


def import_tensorrt(*names: str) -> Any:
    """The first of these packages that is installed; None where none is.

    Raises:
        MissingError: It is installed and cannot be loaded.
    """
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise _broken(name, error) from error
        except (ImportError, OSError) as error:
            raise _broken(name, error) from error
    return None


def extra_of(flavour: str) -> str:
    """The extra of embedkit that brings this package."""
    return "trt" if flavour == PLAIN else "rtx"


def message_log(trt: Any) -> Any:
    """A logger that keeps errors: the only place where TensorRT says why something failed.

    Its `told` gives the last ones as text and forgets them.
    """

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self._errors.append(message)

        def told(self) -> str:
            last, self._errors = self._errors[-_SHOWN:], []
            return "\n".join(last) or "it gave no reason"

    return Log()


class _Output(NamedTuple):
    """What an engine gives of a picture: so many numbers of a type."""

    name: str
    width: int
    dtype: np.dtype[Any]

    @property
    def bytes(self) -> int:
        return self.width * self.dtype.itemsize


def _outputs(contract: ModelContract) -> list[_Output]:
    vectors = _Output(contract.output_name, contract.embedding_dim, np.dtype(np.float32))
    books = contract.codebooks
    return [vectors, *([_Output(CODES_NAME, books.parts, np.dtype(np.uint8))] if books else ())]


def _check_engine(trt: Any, engine: Any, file: EngineFile) -> tuple[int, int]:
    """The least and the largest batch, once the engine takes and gives what its sidecar says."""
    contract, side = file.contract, file.contract.preprocess
    found = sorted(
        (name, engine.get_tensor_mode(name), engine.get_tensor_dtype(name), shape)
        for name, shape in (
            (name, tuple(engine.get_tensor_shape(name)))
            for name in map(engine.get_tensor_name, range(engine.num_io_tensors))
        )
    )
    wanted = sorted(
        (
            (
                contract.input_name,
                trt.TensorIOMode.INPUT,
                trt.DataType.UINT8,
                (-1, side.height, side.width, 3),
            ),
            *(
                (
                    one.name,
                    trt.TensorIOMode.OUTPUT,
                    trt.DataType.FLOAT if one.dtype == np.float32 else trt.DataType.UINT8,
                    (-1, one.width),
                )
                for one in _outputs(contract)
            ),
        )
    )
    shapes = file.info.profile.get(contract.input_name)
    profile = (
        [list(shape) for shape in engine.get_tensor_profile_shape(contract.input_name, 0)]
        if found == wanted and shapes is not None
        else None
    )
    if shapes is None or profile != [shapes["min"], shapes["opt"], shapes["max"]]:
        raise MismatchError(
            f"the engine {str(file.info.path)!r} is not what its description says",
            facts=f"described: {wanted}, {shapes}\nfound: {found}, {profile}",
            hint=file.info.rebuild(),
        )
    return int(shapes["min"][0]), int(shapes["max"][0])


def _made(undo: ExitStack, thing: Any, give_back: Callable[[Any], None]) -> Any:
    undo.callback(_try, give_back, thing)
    return thing


def _try(function: Callable[..., None], *arguments: Any) -> None:
    """What is given back at the end must not keep the rest from being given back."""
    try:
        function(*arguments)
    except EmbedKitError as error:
        _log.warning("while an engine was closed: %s", error)


def _broken(name: str, error: Exception) -> MissingError:
    package = name.replace("_", "-")
    return MissingError(
        f"the package {package} is installed and cannot be loaded",
        facts=str(error),
        hint=f"pip install --force-reinstall {package}",
    )
