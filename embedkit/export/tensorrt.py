"""A TensorRT engine from the ONNX file, with a note beside it that says what it was built for.

One road for three builders: TensorRT 10 and 11 (package ``tensorrt``), which build for the GPU of
this machine, and TensorRT for RTX (package ``tensorrt-rtx``), which can build for another GPU and
needs none itself. Precision is what the typed graph says. Tested with TensorRT for RTX 1.7 without
a GPU; the plain builder is written after its documentation and tested against a stand-in; run on
hardware: untested.

An engine is a cache of the ONNX file, never the only copy. This file imports neither torch nor,
for a graph without quantisation, onnx: a machine that only deploys can build its own engine.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedkit.atomic import published
from embedkit.errors import (
    EmbedKitError,
    GateError,
    MismatchError,
    MissingError,
    MissingExtraError,
    UsageError,
)
from embedkit.runtime import Embedder, read_contract
from embedkit.runtime.backends.cuda import Gpu, this_gpu
from embedkit.runtime.backends.tensorrt import extra_of, import_tensorrt, message_log
from embedkit.runtime.engine_file import (
    ENGINE_SCHEMA,
    PLAIN,
    RTX,
    EngineInfo,
    plan_version,
    sidecar_of,
)
from embedkit.runtime.private_folder import private_folder

__all__ = ["EngineInfo", "build_engine", "try_engine"]

_SHOWN = 5
# Words of the operators that `qdq_lint` looks at, in a file that is not parsed for them yet.
_QUANTIZED = (b"uantizeLinear", b"QLinear", b"Integer")

_log = logging.getLogger("embedkit")


def build_engine(
    onnx_path: Path,
    engine_path: Path,
    *,
    gpu: str | None = None,
    batch: tuple[int, int, int] = (1, 8, 32),
    workspace: int = 1 << 30,
    version_compatible: bool = False,
    hardware_compatible: bool = False,
) -> EngineInfo:
    """Build an engine and write it with its sidecar ``<engine>.json``.

    Plain TensorRT remembers what it measured in the user's cache folder (``timing``), one file per
    version and GPU: the second build of a similar network takes a fraction of the time.

    Args:
        onnx_path: A file written by `export_onnx`.
        engine_path: Replaced at once, or not at all; usually ``model.engine``.
        gpu: For which GPU, as ``sm89``; None is the GPU of this machine. Naming one asks for
            TensorRT for RTX, where that is installed.
        batch: Least, usual and largest number of pictures at once.
        workspace: Most bytes of GPU memory a layer may use for scratch.
        version_compatible: Let newer versions of the same TensorRT major run it, somewhat slower.
        hardware_compatible: Let every GPU since Ampere run it, somewhat slower.

    Raises:
        MissingExtraError: Neither package is installed.
        MissingError: A package cannot be loaded, or there is no GPU for plain TensorRT.
        UsageError: No such GPU target, or an option that this TensorRT does not have.
        MismatchError: The ONNX file is not ours, damaged, or quantised in a way TensorRT does not
            take (says at which nodes).
        EmbedKitError: The graph was refused (says at which node), or the build failed.
    """
    options = _Options(gpu, batch, workspace, version_compatible, hardware_compatible)
    contract = read_contract(onnx_path)
    trt = _load(gpu)
    here = None
    if trt.__name__ == RTX:
        _refuse_plain_options(options)
        capability = _rtx_target(trt, gpu)
    else:
        here = _plain_target(gpu)
        capability = here.target.removeprefix("sm")
    source = onnx_path.read_bytes()
    if any(word in source for word in _QUANTIZED):
        _lint(source, trt.__name__)

    start = time.perf_counter()
    plan, profile = _build(trt, source, capability, here, options)
    seconds = time.perf_counter() - start

    info = EngineInfo(
        path=engine_path,
        flavour=trt.__name__,
        version=trt.__version__,
        plan_version=plan_version(plan),
        compute_capability=f"{capability[:-1]}.{capability[-1]}",
        profile=profile,
        onnx=onnx_path.name,
        onnx_sha256=hashlib.sha256(source).hexdigest(),
        engine_sha256=hashlib.sha256(plan).hexdigest(),
        size=len(plan),
        seconds=round(seconds, 2),
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
    )
    document = {
        "schema": ENGINE_SCHEMA,
        **info.to_json(),
        "path": engine_path.name,
        "contract": json.loads(contract.dumps()),
    }
    _write(engine_path, plan, json.dumps(document, indent=1, sort_keys=True, allow_nan=False))
    return info


@dataclass(frozen=True)
class _Options:
    """As `build_engine` was asked."""

    gpu: str | None
    batch: tuple[int, int, int]
    workspace: int
    version_compatible: bool
    hardware_compatible: bool

    def __post_init__(self) -> None:
        if not 1 <= self.batch[0] <= self.batch[1] <= self.batch[2]:
            raise UsageError(
                "the batch sizes of an engine must grow: least, usual, largest",
                facts=f"got {':'.join(map(str, self.batch))}",
                hint="--batch 1:8:32",
            )
        if self.workspace < 1:
            raise UsageError(
                f"the workspace must be at least a byte, got {self.workspace}",
                hint="--workspace 1G",
            )


def try_engine(info: EngineInfo) -> float | None:
    """Run an engine's self-test, where the GPU it was built for is here; run on hardware: untested.

    Returns:
        The cosine between its vector and the exported network's; None where it cannot be run here.

    Raises:
        GateError: It gives other vectors; the engine and its sidecar were removed.
        EmbedKitError: It failed.
    """
    try:
        gpu = _this_gpu()
    except MissingExtraError:  # it was built for another machine, and nothing here can run it
        return None
    if gpu is None or gpu.capability != info.compute_capability:
        return None
    try:
        with Embedder.load(info.path) as embedder:
            return embedder.self_test() if embedder.contract.self_test is not None else None
    except MismatchError as error:
        sidecar_of(info.path).unlink(missing_ok=True)
        info.path.unlink(missing_ok=True)
        raise GateError(
            "the engine was built and does not give the ONNX file's vectors; it was removed",
            facts=error.facts,
            hint="the ONNX file itself is fine and can be used",
        ) from error


def _load(gpu: str | None) -> Any:
    """The builder's module: for a named GPU the one that can, else plain TensorRT first."""
    trt = import_tensorrt(*((RTX, PLAIN) if gpu else (PLAIN, RTX)))
    if trt is None:
        raise MissingExtraError(
            "building an engine", package="tensorrt or tensorrt-rtx", extra="rtx" if gpu else "trt"
        )
    return trt


def _refuse_plain_options(options: _Options) -> None:
    for given, name in (
        (options.version_compatible, "--version-compatible"),
        (options.hardware_compatible, "--hardware-compatible"),
    ):
        if given:
            raise UsageError(
                f"TensorRT for RTX has no {name}",
                facts="its engines are for one version and one compute capability",
                hint=f"leave {name} out; with a GPU here, plain TensorRT has it: "
                'pip install "embedkit[trt]"',
            )


def _rtx_target(trt: Any, gpu: str | None) -> str:
    """The digits of the compute capability to build for."""
    known = sorted((n for n in dir(trt.ComputeCapability) if n.startswith("SM")), key=_digits)
    listed = f"targets: {' '.join(name.lower() for name in known)}"
    here = None if gpu else _this_gpu()
    name = (gpu or (here.target if here else "")).upper()
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


def _plain_target(gpu: str | None) -> Gpu:
    here = _this_gpu()
    if here is None:
        raise MissingError(
            "TensorRT builds for the GPU of the machine it runs on, and there is none here",
            facts="TensorRT for RTX builds for GeForce and RTX GPUs without one",
            hint='pip install "embedkit[rtx]", then: embedkit export --trt --gpu sm89',
        )
    if gpu is not None and gpu.lower() != here.target:
        raise UsageError(
            f"TensorRT builds for the GPU of the machine it runs on, {here.target}, not for {gpu}",
            hint="leave --gpu out, or run this on a machine with that GPU",
        )
    return here


def _this_gpu() -> Gpu | None:
    return this_gpu()


def _lint(source: bytes, flavour: str) -> None:
    try:
        import onnx

        from embedkit.export.qdq_lint import check_qdq
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "checking this graph's quantisation",
            package=str(error.name),
            extra=extra_of(flavour),
        ) from error
    check_qdq(onnx.load_model_from_string(source))


def _digits(name: str) -> int:
    return int(name.removeprefix("SM"))


def _build(
    trt: Any, source: bytes, capability: str, gpu: Gpu | None, options: _Options
) -> tuple[bytes, dict[str, dict[str, list[int]]]]:
    """The engine's bytes and the shapes it takes; `gpu` where plain TensorRT measures on one."""
    log = message_log(trt)
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
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    remember = _configure_plain(trt, config, gpu, options) if gpu is not None else _nothing
    if gpu is None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), 0)
    shapes = _profile(network, options.batch)
    profile = builder.create_optimization_profile()
    for name, sizes in shapes.items():
        profile.set_shape(name, sizes["min"], sizes["opt"], sizes["max"])
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EmbedKitError(
            "TensorRT could not build the engine",
            facts=log.told(),
            hint="the ONNX file itself is fine and can be used",
        )
    remember()
    return bytes(plan), shapes


def _configure_plain(trt: Any, config: Any, gpu: Gpu, options: _Options) -> Callable[[], None]:
    """Compatibility and timing cache; what it returns keeps the cache after the build."""
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    try:
        folder = private_folder("timing")
    except MissingError as error:
        _log.warning("engine timings are not kept: %s", error)
        return _nothing
    product = re.sub(r"[^A-Za-z0-9]+", "-", gpu.name).strip("-")
    file = folder / f"tensorrt-{trt.__version__}-{gpu.target}-{product}.cache"
    kept = file.read_bytes() if file.is_file() else b""
    cache = config.create_timing_cache(kept)
    # Its own header is checked too: False means that a mismatch is not ignored.
    if cache is None or not config.set_timing_cache(cache, False):
        _log.warning("the engine timings in %s are not for this machine: starting anew", file)
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)

    def remember() -> None:
        try:
            with published(file) as temporary:
                temporary.write_bytes(bytes(config.get_timing_cache().serialize()))
        except EmbedKitError as error:  # the engine is built all the same
            _log.warning("engine timings are not kept: %s", error)

    return remember


def _nothing() -> None:
    """Where nothing was measured, nothing is kept."""


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
    sidecar = sidecar_of(engine)
    sidecar.unlink(missing_ok=True)
    with published(engine) as temporary:
        temporary.write_bytes(plan)
    with published(sidecar) as temporary:
        temporary.write_text(sidecar_text + "\n", encoding="utf-8")
