"""The few CUDA calls an engine needs, without torch: a device, its memory, copies and a stream.

Each call's status is checked and becomes an error that says what the driver said. Written after the
documentation of cuda-python 12 and 13; tested against a stand-in and, without a driver, for real.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import EmbedKitError, MissingError, MissingExtraError, UsageError

__all__ = ["Cuda", "Gpu", "PinnedMemory", "gpu_number", "this_gpu"]


@dataclass(frozen=True)
class Gpu:
    """One device of this machine: its number, its product name, its capability as ``8.9``."""

    number: int
    name: str
    capability: str

    @property
    def target(self) -> str:
        """As builders call it: ``sm89``."""
        return f"sm{self.capability.replace('.', '')}"


@dataclass(frozen=True)
class PinnedMemory:
    """Memory of the host that the GPU copies from and to at once."""

    address: int
    bytes: npt.NDArray[np.uint8]


class Cuda:
    """One device, its context made; every call is on it. Not for two threads at once.

    Args:
        number: Of the device.
        extra: The extra that brings cuda-python, for the pip line.

    Raises:
        MissingExtraError: cuda-python is not installed.
        MissingError: No driver, no GPU, or none of that number.
    """

    def __init__(self, number: int = 0, *, extra: str = "trt") -> None:
        self._api = _bindings(extra)
        count = self._devices()
        if number >= count:
            raise MissingError(
                f"there is no CUDA device {number}",
                facts=f"{count} here: {', '.join(f'cuda:{one}' for one in range(count))}",
                hint="--device cuda:0",
            )
        self._number = number
        self.use()
        self._call(self._api.cudaFree, 0)  # the way to make the context now, in every version
        properties = self._call(self._api.cudaGetDeviceProperties, number)
        name = bytes(properties.name).split(b"\0")[0].decode("utf-8", "replace")
        self.gpu = Gpu(number, name, f"{properties.major}.{properties.minor}")

    def use(self) -> None:
        """Make this the device of the calling thread; each thread has its own."""
        self._call(self._api.cudaSetDevice, self._number)

    def stream(self) -> Any:
        """A stream that does not wait for the default one; end it with `end_stream`."""
        return self._call(self._api.cudaStreamCreateWithFlags, self._api.cudaStreamNonBlocking)

    def memory(self, size: int) -> int:
        """The address of `size` bytes on the GPU; give them back with `free`."""
        return int(self._call(self._api.cudaMalloc, size))

    def pinned(self, size: int) -> PinnedMemory:
        """`size` bytes of the host; give them back with `free_pinned` and do not touch them then.

        Filled with zeros: the memory is new, and what is never written must not depend on chance.
        """
        address = int(self._call(self._api.cudaHostAlloc, size, self._api.cudaHostAllocDefault))
        view = np.frombuffer(memoryview((ctypes.c_uint8 * size).from_address(address)), np.uint8)
        view[:] = 0
        return PinnedMemory(address, view)

    def upload(self, to: int, source: PinnedMemory, size: int, stream: Any) -> None:
        """Queue a copy to the GPU."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self._api.cudaMemcpyAsync, to, source.address, size, kind, stream)

    def download(self, to: PinnedMemory, source: int, size: int, stream: Any) -> None:
        """Queue a copy from the GPU."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(self._api.cudaMemcpyAsync, to.address, source, size, kind, stream)

    def wait(self, stream: Any) -> None:
        """Until all that was queued is done."""
        self._call(self._api.cudaStreamSynchronize, stream)

    def free(self, address: int) -> None:
        """Give memory of the GPU back."""
        self._call(self._api.cudaFree, address)

    def free_pinned(self, memory: PinnedMemory) -> None:
        """Give memory of the host back."""
        self._call(self._api.cudaFreeHost, memory.address)

    def end_stream(self, stream: Any) -> None:
        """Give a stream back."""
        self._call(self._api.cudaStreamDestroy, stream)

    def _devices(self) -> int:
        status, count = self._api.cudaGetDeviceCount()
        good = status == self._api.cudaError_t.cudaSuccess
        if good and count:
            return int(count)
        raise MissingError(
            "an engine runs on an NVIDIA GPU, and none can be used here",
            facts="there is none" if good else self._said(status),
            hint="see that nvidia-smi shows the GPU; the ONNX file runs without one",
        )

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a CUDA function gives besides its status."""
        status, *values = function(*arguments)
        if status != self._api.cudaError_t.cudaSuccess:
            full = status == self._api.cudaError_t.cudaErrorMemoryAllocation
            raise EmbedKitError(
                "the GPU has not enough free memory" if full else "the GPU failed",
                facts=f"{function.__name__}: {self._said(status)}",
                hint="end what else uses the GPU (nvidia-smi shows it), or build the engine for "
                "smaller batches: --batch 1:4:8"
                if full
                else None,
            )
        return values[0] if values else None

    def _said(self, status: Any) -> str:
        text = self._api.cudaGetErrorString(status)[1]
        return f"{text.decode() if isinstance(text, bytes) else text} ({status.name})"


def this_gpu() -> Gpu | None:
    """The first GPU of this machine; None where none can be used.

    Raises:
        MissingExtraError: cuda-python is not installed.
    """
    try:
        return Cuda().gpu
    except MissingExtraError:
        raise
    except MissingError:
        return None


def gpu_number(device: str) -> int:
    """``auto``, ``cuda``, ``cuda:N`` -> the number of the device.

    Raises:
        UsageError: Another word; ``cpu`` too.
    """
    kind, _, number = device.partition(":")
    if device in ("auto", "cuda"):
        return 0
    if kind == "cuda" and number.isdecimal():
        return int(number)
    raise UsageError(
        f"TensorRT runs on a GPU, not on {device!r}",
        facts="known: auto, cuda, cuda:0, cuda:1, ...",
        hint="--backend onnxruntime and the .onnx file run on the CPU" if device == "cpu" else None,
    )


def _bindings(extra: str) -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "running on the GPU without PyTorch", package="cuda-bindings", extra=extra
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingError(
            "the package cuda-bindings is installed and cannot be loaded",
            facts=str(error),
            hint="pip install --force-reinstall cuda-bindings",
        ) from error
