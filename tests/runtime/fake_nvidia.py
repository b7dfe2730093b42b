"""A stand-in for cuda-python and TensorRT: as strict as the documentation, with a network in numpy.

What is queued on a stream happens when the stream is waited for, and not before: code that reads
early, frees early or forgets a step gets wrong numbers or an entry in `Nvidia.broken_rules`.
Any call can be told to fail once (`Nvidia.fail`), as the documentation says that it can.
"""

from __future__ import annotations

import ctypes
import enum
import hashlib
import json
import sys
import threading
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedkit.runtime.contract import ModelContract
from tests.tiny_model import tiny_vectors

__all__ = ["Nvidia", "Status", "fake_codes", "write_engine"]

VERSION = "1.7.1.116"


class Status(enum.Enum):
    """The few of `cudaError_t` that are met here."""

    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700


class Kind(enum.Enum):
    """`cudaMemcpyKind`."""

    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class Severity(enum.IntEnum):
    """`ILogger.Severity`."""

    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


def write_engine(
    path: Path,
    contract: ModelContract,
    *,
    flavour: str = "tensorrt_rtx",
    batch: tuple[int, int, int] = (1, 8, 32),
    **changed: Any,
) -> Path:
    """A file that looks like an engine, and its sidecar; `changed` are fields of the sidecar."""
    version = [int(part) for part in VERSION.split(".")]
    magic = b"vtrt" if flavour == "tensorrt_rtx" else b"ftrt"
    plan = magic + bytes(20) + bytes(version) + b"the plan " * 40
    path.write_bytes(plan)
    side = contract.preprocess
    shapes = {
        kind: [size, side.height, side.width, 3]
        for kind, size in zip(("min", "opt", "max"), batch, strict=True)
    }
    document = {
        "schema": "embedkit.engine/1",
        "path": path.name,
        "flavour": flavour,
        "version": VERSION,
        "plan_version": VERSION,
        "compute_capability": "8.9",
        "profile": {contract.input_name: shapes},
        "onnx": "model.onnx",
        "onnx_sha256": "0" * 64,
        "engine_sha256": hashlib.sha256(plan).hexdigest(),
        "size": len(plan),
        "seconds": 0.1,
        "version_compatible": False,
        "hardware_compatible": False,
        "contract": json.loads(contract.dumps()),
        **changed,
    }
    path.with_name(f"{path.name}.json").write_text(json.dumps(document))
    return path


class Nvidia:
    """The machine: its GPUs, its memory, the two modules, and what was done with them.

    Args:
        contract: Of the one network that every engine holds, `tests.tiny_model`.
        seed: Of its weights.
        batch: Its profile.
        gpus: Compute capabilities.
    """

    def __init__(
        self,
        contract: ModelContract,
        *,
        seed: int = 0,
        batch: tuple[int, int, int] = (1, 8, 32),
        gpus: tuple[str, ...] = ("8.9",),
    ) -> None:
        self.contract, self.seed, self.batch, self.gpus = contract, seed, batch, gpus
        self.calls: list[str] = []
        self.broken_rules: list[str] = []
        self.ran: list[int] = []
        self.host_code_allowed = False
        self.memory: dict[int, tuple[Any, int, int]] = {}  # address: buffer, size, device
        self.pinned: dict[int, tuple[Any, int]] = {}
        self.streams: dict[int, list[Callable[[], None]]] = {}
        self.objects: list[weakref.ref[Any]] = []
        self._failures: dict[str, tuple[int, Status]] = {}
        self._context_made = False
        self._thread = threading.local()

    def install(self, monkeypatch: pytest.MonkeyPatch, flavour: str = "tensorrt_rtx") -> None:
        """Be the machine of this test; the other flavour is not installed."""
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", self.cuda())
        for name in ("tensorrt", "tensorrt_rtx"):
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, flavour, self.trt(flavour))

    def fail(
        self, call: str, *, at: int = 1, status: Status = Status.cudaErrorIllegalAddress
    ) -> None:
        """Let the `at`-th call of this name from now on fail, once."""
        self._failures[call] = (at, status)

    def leaks(self) -> list[str]:
        """What was taken and not given back."""
        import gc

        gc.collect()
        return [
            *(f"device memory {address}" for address in self.memory),
            *(f"pinned memory {address}" for address in self.pinned),
            *(f"stream {stream}" for stream in self.streams),
            *(f"{type(one()).__name__}" for one in self.objects if one() is not None),
        ]

    def failed(self, call: str) -> Status | None:
        self.calls.append(call)
        at, status = self._failures.get(call, (0, Status.cudaSuccess))
        if at > 1:
            self._failures[call] = (at - 1, status)
        elif at == 1:
            del self._failures[call]
            return status
        return None

    @property
    def device(self) -> int:
        return getattr(self._thread, "device", 0)

    # --- cuda-python: every function gives a tuple that begins with the status ---

    def cuda(self) -> types.ModuleType:
        module = types.ModuleType("cuda.bindings.runtime")
        module.__dict__.update(
            cudaError_t=Status,
            cudaMemcpyKind=Kind,
            cudaHostAllocDefault=0,
            cudaStreamNonBlocking=1,
            cudaGetErrorString=lambda status: (Status.cudaSuccess, f"said {status.value}".encode()),
        )
        for name in (
            *("cudaGetDeviceCount", "cudaSetDevice", "cudaGetDeviceProperties", "cudaMalloc"),
            *("cudaFree", "cudaHostAlloc", "cudaFreeHost", "cudaStreamCreateWithFlags"),
            *("cudaStreamDestroy", "cudaStreamSynchronize", "cudaMemcpyAsync"),
        ):
            setattr(module, name, self._checked(name))
        return module

    def _checked(self, name: str) -> Callable[..., tuple[Any, ...]]:
        does = getattr(self, f"_{name}")

        def function(*arguments: Any) -> tuple[Any, ...]:
            status = self.failed(name)
            if status is not None:
                return (status,) if name in _WITHOUT_VALUE else (status, None)
            given = does(*arguments)
            return (Status.cudaSuccess,) if name in _WITHOUT_VALUE else (Status.cudaSuccess, given)

        function.__name__ = name
        return function

    def _cudaGetDeviceCount(self) -> int:
        return len(self.gpus)

    def _cudaSetDevice(self, number: int) -> None:
        self._thread.device = number

    def _cudaGetDeviceProperties(self, number: int) -> Any:
        major, minor = self.gpus[number].split(".")
        return types.SimpleNamespace(name=b"NVIDIA Fake 1\0\0", major=int(major), minor=int(minor))

    def _cudaMalloc(self, size: int) -> int:
        buffer = (ctypes.c_uint8 * size)(*[0xAB] * size)  # device memory is not cleared
        address = ctypes.addressof(buffer)
        self.memory[address] = (buffer, size, self.device)
        return address

    def _cudaFree(self, address: int) -> None:
        if address == 0:
            self._context_made = True
            return
        self._rule(address in self.memory, "free of memory that is not allocated")
        self._rule(not any(self.streams.values()), "memory was freed while work was queued")
        self._here(address)
        self.memory.pop(address, None)

    def _cudaHostAlloc(self, size: int, flags: int) -> int:
        buffer = (ctypes.c_uint8 * size)(*[0xCD] * size)
        self.pinned[ctypes.addressof(buffer)] = (buffer, size)
        return ctypes.addressof(buffer)

    def _cudaFreeHost(self, address: int) -> None:
        self._rule(address in self.pinned, "free of host memory that is not pinned")
        self._rule(not any(self.streams.values()), "host memory was freed while work was queued")
        self.pinned.pop(address, None)

    def _cudaStreamCreateWithFlags(self, flags: int) -> int:
        self._rule(flags == 1, "the stream waits for the default one")
        stream = 7000 + len(self.streams)
        self.streams[stream] = []
        return stream

    def _cudaStreamDestroy(self, stream: int) -> None:
        self._rule(not self.streams[stream], "a stream was ended while work was queued")
        del self.streams[stream]

    def _cudaStreamSynchronize(self, stream: int) -> None:
        queue, self.streams[stream] = self.streams[stream], []
        for work in queue:
            work()

    def _cudaMemcpyAsync(self, to: int, source: int, size: int, kind: Kind, stream: int) -> None:
        host, device = (source, to) if kind == Kind.cudaMemcpyHostToDevice else (to, source)
        self._rule(host in self.pinned, "a copy that is not from or to pinned memory")
        self._rule(device in self.memory, "a copy to or from memory that is not the GPU's")
        self._rule(size <= self.pinned[host][1], "a copy past the end of host memory")
        self._rule(size <= self.memory[device][1], "a copy past the end of GPU memory")
        self._here(device)
        self.streams[stream].append(lambda: ctypes.memmove(to, source, size) and None)

    def _here(self, address: int) -> None:
        owner = self.memory[address][2] if address in self.memory else self.device
        self._rule(owner == self.device, f"device {self.device} was current, not {owner}")

    def _rule(self, kept: bool, rule: str) -> None:
        if not kept:
            self.broken_rules.append(rule)

    # --- TensorRT: failures are None or False, and a line in the log ---

    def trt(self, name: str) -> types.ModuleType:
        module = types.ModuleType(name)
        mode = enum.Enum("TensorIOMode", ["INPUT", "OUTPUT"])
        kind = enum.Enum("DataType", ["FLOAT", "UINT8"])
        module.__dict__.update(
            __version__=VERSION,
            ILogger=_Logger,
            TensorIOMode=mode,
            DataType=kind,
            Runtime=lambda log: self._runtime(log, mode, kind),
        )
        return module

    def _runtime(self, log: Any, mode: Any, kind: Any) -> _Runtime | None:
        self._rule(self._context_made, "Runtime before the CUDA context")
        status = self.failed("Runtime")
        if status == Status.cudaErrorInsufficientDriver:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        if status is not None:
            return None
        return self.born(_Runtime(self, log, mode, kind))

    def born(self, thing: Any) -> Any:
        self.objects.append(weakref.ref(thing))
        return thing

    def told(self, log: Any, call: str) -> bool:
        """Whether the call is to fail; then the log says so."""
        if self.failed(call):
            log.log(Severity.WARNING, "only a warning")
            log.log(Severity.ERROR, f"{call} went wrong")
            return True
        return False


_WITHOUT_VALUE = {
    *("cudaSetDevice", "cudaFree", "cudaFreeHost", "cudaStreamDestroy"),
    *("cudaStreamSynchronize", "cudaMemcpyAsync"),
}


class _Logger:
    INTERNAL_ERROR, ERROR, WARNING = Severity.INTERNAL_ERROR, Severity.ERROR, Severity.WARNING


class _Runtime:
    def __init__(self, nvidia: Nvidia, log: Any, mode: Any, kind: Any) -> None:
        self._nvidia, self._log, self._mode, self._kind = nvidia, log, mode, kind

    @property
    def engine_host_code_allowed(self) -> bool:
        return self._nvidia.host_code_allowed

    @engine_host_code_allowed.setter
    def engine_host_code_allowed(self, allowed: bool) -> None:
        self._nvidia.host_code_allowed = allowed

    def deserialize_cuda_engine(self, plan: bytes) -> _Engine | None:
        if self._nvidia.told(self._log, "deserialize_cuda_engine"):
            return None
        engine = _Engine(self._nvidia, self._log, self._mode, self._kind)
        return self._nvidia.born(engine)  # type: ignore[no-any-return]


class _Engine:
    def __init__(self, nvidia: Nvidia, log: Any, mode: Any, kind: Any) -> None:
        self._nvidia, self._log = nvidia, log
        contract, side = nvidia.contract, nvidia.contract.preprocess
        self._tensors = {
            contract.output_name: (mode.OUTPUT, kind.FLOAT, (-1, contract.embedding_dim)),
            contract.input_name: (mode.INPUT, kind.UINT8, (-1, side.height, side.width, 3)),
        }
        if contract.codebooks:
            self._tensors["codes"] = (mode.OUTPUT, kind.UINT8, (-1, contract.codebooks.parts))
        self.num_io_tensors = len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self._tensors[name][0]

    def get_tensor_dtype(self, name: str) -> Any:
        return self._tensors[name][1]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name][2]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert profile == 0
        return [(size, *self._tensors[name][2][1:]) for size in self._nvidia.batch]

    def create_execution_context(self) -> _Context | None:
        if self._nvidia.told(self._log, "create_execution_context"):
            return None
        return self._nvidia.born(_Context(self._nvidia, self._log))  # type: ignore[no-any-return]


def fake_codes(vectors: np.ndarray, contract: ModelContract) -> np.ndarray:
    """The codes of the one network: how the first numbers of a vector end."""
    books = contract.codebooks
    assert books is not None
    ends = (np.abs(vectors[:, : books.parts]) * 1000).astype(np.int64)
    codes: np.ndarray = (ends % books.words).astype(np.uint8)
    return codes


def _widths(contract: ModelContract) -> dict[str, int]:
    books = contract.codebooks
    return {
        contract.output_name: contract.embedding_dim,
        **({"codes": books.parts} if books else {}),
    }


class _Context:
    def __init__(self, nvidia: Nvidia, log: Any) -> None:
        self._nvidia, self._log = nvidia, log
        self._address: dict[str, int] = {}
        self._count: int | None = None
        self._busy_in: int | None = None

    def set_tensor_address(self, name: str, address: int) -> bool:
        if self._nvidia.told(self._log, "set_tensor_address"):
            return False
        self._address[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self._nvidia.told(self._log, "set_input_shape"):
            return False
        if self._busy_in not in (None, threading.get_ident()):
            self._nvidia.broken_rules.append("two threads in one context")
        self._busy_in = threading.get_ident()
        side = self._nvidia.contract.preprocess
        self._count = shape[0]
        fits = self._nvidia.batch[0] <= shape[0] <= self._nvidia.batch[2]
        return fits and tuple(shape[1:]) == (side.height, side.width, 3)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if self._nvidia.told(self._log, "get_tensor_shape"):
            return (-1, -1)
        return (self._count or -1, _widths(self._nvidia.contract)[name])

    def execute_async_v3(self, stream_handle: int) -> bool:
        if self._nvidia.told(self._log, "execute_async_v3"):
            self._busy_in = None
            return False
        contract, side = self._nvidia.contract, self._nvidia.contract.preprocess
        widths = _widths(contract)
        if self._count is None or set(self._address) != {contract.input_name, *widths}:
            self._nvidia.broken_rules.append("execute before shape and addresses were set")
            return False
        count = self._count
        sizes = {
            contract.input_name: count * side.height * side.width * 3,
            **{n: count * w * (1 if n == "codes" else 4) for n, w in widths.items()},
        }
        for name, size in sizes.items():
            there = self._nvidia.memory.get(self._address[name])
            if there is None or there[1] < size:
                self._nvidia.broken_rules.append(f"too little memory for {name}")
                return False
        self._nvidia.streams[stream_handle].append(lambda: self._compute(count, sizes))
        return True

    def _compute(self, count: int, sizes: dict[str, int]) -> None:
        contract, side = self._nvidia.contract, self._nvidia.contract.preprocess
        raw = ctypes.string_at(self._address[contract.input_name], sizes[contract.input_name])
        pixels = np.frombuffer(raw, np.uint8).reshape(count, side.height, side.width, 3)
        vectors = tiny_vectors(pixels, dim=contract.embedding_dim, seed=self._nvidia.seed)
        ctypes.memmove(
            self._address[contract.output_name],
            vectors.astype("<f4").tobytes(),
            sizes[contract.output_name],
        )
        if "codes" in sizes:
            codes = fake_codes(vectors, contract)
            ctypes.memmove(self._address["codes"], codes.tobytes(), sizes["codes"])
        self._nvidia.ran.append(count)
        self._busy_in = None
