"""A TensorRT engine from the ONNX file, with a note beside it that says what it was built for.

One road for three builders: TensorRT 10 and 11 (package ``tensorrt``), which build for the GPU of
this machine, and TensorRT for RTX (package ``tensorrt-rtx``), which can build for another GPU and
needs none itself. Precision is what the typed graph says. Tested with TensorRT for RTX 1.7 without
a GPU; the plain builder is written after its documentation and is untested.

An engine is a cache of the ONNX file, never the only copy.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from embedkit.atomic import published
from embedkit.errors import EmbedKitError, MissingError, MissingExtraError, UsageError
from embedkit.runtime import read_contract

__all__ = ["ENGINE_SCHEMA", "EngineInfo", "build_engine"]

ENGINE_SCHEMA = "embedkit.engine/1"

_PLAIN, _RTX = "tensorrt", "tensorrt_rtx"
_SHOWN = 5


@dataclass(frozen=True)
class EngineInfo:
    """What an engine is and was built for.

    Attributes:
        path: The engine; ``<path>.json`` beside it is its sidecar.
        flavour: ``tensorrt`` or ``tensorrt_rtx``: which runtime reads it.
        version: Of that package.
        compute_capability: Of the GPU it was built for, as NVIDIA writes it: ``8.9``.
        profile: By input: its least, usual and largest shape.
        onnx_sha256: Of the file it was built from.
        engine_sha256: Of the engine.
        size: Bytes.
        seconds: What the build took.
    """

    path: Path
    flavour: str
    version: str
    compute_capability: str
    profile: dict[str, dict[str, list[int]]]
    onnx_sha256: str
    engine_sha256: str
    size: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "path": str(self.path)}


def build_engine(
    onnx_path: Path,
    engine_path: Path,
    *,
    gpu: str | None = None,
    batch: tuple[int, int, int] = (1, 8, 32),
    workspace: int = 1 << 30,
) -> EngineInfo:
    """Build an engine and write it with its sidecar ``<engine>.json``.

    Args:
        onnx_path: A file written by `export_onnx`.
        engine_path: Replaced at once, or not at all; usually ``model.engine``.
        gpu: For which GPU, as ``sm89``; None is the GPU of this machine. Naming one asks for
            TensorRT for RTX, where that is installed.
        batch: Least, usual and largest number of pictures at once.
        workspace: Most bytes of GPU memory a layer may use for scratch.

    Raises:
        MissingExtraError: Neither package is installed.
        MissingError: A package cannot be loaded, or there is no GPU for plain TensorRT.
        UsageError: No such GPU target, or an impossible batch.
        MismatchError: The ONNX file is not ours, or damaged.
        EmbedKitError: The graph was refused (says at which node), or the build failed.
    """
    if not 1 <= batch[0] <= batch[1] <= batch[2]:
        raise UsageError(
            "the batch sizes of an engine must grow: least, usual, largest",
            facts=f"got {':'.join(map(str, batch))}",
            hint="--batch 1:8:32",
        )
    contract = read_contract(onnx_path)
    trt = _load(gpu)
    flavour = trt.__name__
    capability = _rtx_target(trt, gpu) if flavour == _RTX else _plain_target(gpu)
    source = onnx_path.read_bytes()

    start = time.perf_counter()
    log = _keep_log(trt)
    plan, profile = _build(trt, log, source, capability, batch, workspace)
    seconds = time.perf_counter() - start

    info = EngineInfo(
        path=engine_path,
        flavour=flavour,
        version=trt.__version__,
        compute_capability=f"{capability[:-1]}.{capability[-1]}",
        profile=profile,
        onnx_sha256=hashlib.sha256(source).hexdigest(),
        engine_sha256=hashlib.sha256(plan).hexdigest(),
        size=len(plan),
        seconds=round(seconds, 2),
    )
    document = {
        "schema": ENGINE_SCHEMA,
        **info.to_json(),
        "path": engine_path.name,
        "contract": json.loads(contract.dumps()),
    }
    _write(engine_path, plan, json.dumps(document, indent=1, sort_keys=True, allow_nan=False))
    return info


def _load(gpu: str | None) -> Any:
    """The builder's module: for a named GPU the one that can, else plain TensorRT first."""
    order = (_RTX, _PLAIN) if gpu else (_PLAIN, _RTX)
    for name in order:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise _broken(name, error) from error
        except (ImportError, OSError) as error:
            raise _broken(name, error) from error
    raise MissingExtraError(
        "building an engine", package="tensorrt or tensorrt-rtx", extra="rtx" if gpu else "trt"
    )


def _broken(name: str, error: Exception) -> MissingError:
    package = name.replace("_", "-")
    return MissingError(
        f"the package {package} is installed and cannot be loaded",
        facts=str(error),
        hint=f"pip install --force-reinstall {package}",
    )


def _rtx_target(trt: Any, gpu: str | None) -> str:
    """The digits of the compute capability to build for."""
    known = sorted((n for n in dir(trt.ComputeCapability) if n.startswith("SM")), key=_digits)
    listed = f"targets: {' '.join(name.lower() for name in known)}"
    name = (gpu or _this_gpu() or "").upper()
    if not name:
        raise UsageError(
            "there is no GPU here, so the one to build for must be named",
            facts=listed,
            hint="--gpu sm89   (RTX 40 series; 30 series is sm86, 50 series sm120)",
        )
    if name not in known:
        raise UsageError(
            f"TensorRT for RTX cannot build for {name.lower()}",
            facts=listed,
            hint=None if gpu else 'pip install "embedkit[trt]"   (plain TensorRT)',
        )
    return name.removeprefix("SM")


def _plain_target(gpu: str | None) -> str:
    here = _this_gpu()
    if here is None:
        raise MissingError(
            "TensorRT builds for the GPU of the machine it runs on, and there is none here",
            facts="TensorRT for RTX builds for GeForce and RTX GPUs without one",
            hint='pip install "embedkit[rtx]", then: embedkit export --trt --gpu sm89',
        )
    if gpu not in (None, here):
        raise UsageError(
            f"TensorRT builds for the GPU of the machine it runs on, {here}, not for {gpu}",
            hint="leave --gpu out, or run this on a machine with that GPU",
        )
    return here.removeprefix("sm")


def _this_gpu() -> str | None:
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"


def _digits(name: str) -> int:
    return int(name.removeprefix("SM"))


def _keep_log(trt: Any) -> Any:
    """A logger that keeps warnings and errors: the only place where a failed build says why."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return Log()


def _build(
    trt: Any,
    log: Any,
    source: bytes,
    capability: str,
    batch: tuple[int, int, int],
    workspace: int,
) -> tuple[bytes, dict[str, dict[str, list[int]]]]:
    builder = trt.Builder(log)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(source):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        raise EmbedKitError(
            "TensorRT cannot take this graph",
            facts="\n".join(
                f"node {error.node_name() or '?'} ({error.node_operator() or '?'}): {error.desc()}"
                for error in errors[:_SHOWN]
            ),
            hint="the ONNX file itself is fine and can be used",
        )
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    if trt.__name__ == _RTX:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), 0)
    shapes = _profile(network, batch)
    profile = builder.create_optimization_profile()
    for name, sizes in shapes.items():
        profile.set_shape(name, sizes["min"], sizes["opt"], sizes["max"])
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EmbedKitError(
            "TensorRT could not build the engine",
            facts="\n".join(log.errors[-_SHOWN:]) or "it gave no reason",
            hint="the ONNX file itself is fine and can be used",
        )
    return bytes(plan), shapes


def _profile(network: Any, batch: tuple[int, int, int]) -> dict[str, dict[str, list[int]]]:
    """Shapes of every input with a free first size."""
    shapes = {}
    for index in range(network.num_inputs):
        given = network.get_input(index)
        rest = list(given.shape)[1:]
        shapes[given.name] = {
            kind: [size, *rest] for kind, size in zip(("min", "opt", "max"), batch, strict=True)
        }
    return shapes


def _write(engine: Path, plan: bytes, sidecar_text: str) -> None:
    """Engine first, sidecar last: an engine whose sidecar is missing is refused, so is no lie."""
    sidecar = engine.with_name(f"{engine.name}.json")
    sidecar.unlink(missing_ok=True)
    with published(engine) as temporary:
        temporary.write_bytes(plan)
    with published(sidecar) as temporary:
        temporary.write_text(sidecar_text + "\n", encoding="utf-8")
