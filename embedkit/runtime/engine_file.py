"""What an engine's file and its sidecar say, checked before any byte of it reaches NVIDIA's code.

A TensorRT engine is executable code: to load a foreign one is to run it, and no check of its bytes
makes that safe. So an engine is a cache of the ONNX file it was built from, made on the machine (or
for the GPU) that runs it. The checks here find the wrong, the stale and the damaged one, and name
the line that builds it again; they do not stop somebody who can write both files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedkit.errors import MismatchError, UsageError
from embedkit.runtime.contract import ModelContract

__all__ = [
    "ENGINE_SCHEMA",
    "FLAVOURS",
    "PLAIN",
    "RTX",
    "EngineFile",
    "EngineInfo",
    "check_fits",
    "open_engine",
    "plan_version",
    "read_engine",
    "sidecar_of",
]

ENGINE_SCHEMA = "embedkit.engine/1"

PLAIN, RTX = "tensorrt", "tensorrt_rtx"
FLAVOURS = {PLAIN: "TensorRT", RTX: "TensorRT for RTX"}

# How the plan of each begins; its version follows at byte 24 (seen on TensorRT for RTX 1.7).
_MAGIC = {b"ftrt": PLAIN, b"vtrt": RTX}
_VERSION_AT = slice(24, 28)
_USUAL_BATCH = (1, 8, 32)


@dataclass(frozen=True)
class EngineInfo:
    """What an engine is and was built for.

    Attributes:
        path: The engine; ``<path>.json`` beside it is its sidecar.
        flavour: ``tensorrt`` or ``tensorrt_rtx``: which package reads it.
        version: Of that package, of the one that built it.
        plan_version: The version that the engine's own bytes name.
        compute_capability: Of the GPU it was built for, as NVIDIA writes it: ``8.9``.
        profile: By input: its least, usual and largest shape.
        onnx: Name of the file it was built from.
        onnx_sha256: Of that file.
        engine_sha256: Of the engine.
        size: Bytes.
        seconds: What the build took.
        version_compatible: Whether newer versions of the same TensorRT major may run it.
        hardware_compatible: Whether every GPU since Ampere (8.0) may run it.
    """

    path: Path
    flavour: str
    version: str
    plan_version: str
    compute_capability: str
    profile: dict[str, dict[str, list[int]]]
    onnx: str
    onnx_sha256: str
    engine_sha256: str
    size: int
    seconds: float
    version_compatible: bool = False
    hardware_compatible: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "path": str(self.path)}

    def rebuild(self) -> str:
        """The line that builds this engine again, on the machine that is to run it."""
        onnx = self.path.parent / Path(self.onnx).name
        words = ["embedkit", "export", shlex.quote(str(onnx)), "--trt"]
        (shapes,) = self.profile.values()
        sizes = tuple(shapes[kind][0] for kind in ("min", "opt", "max"))
        if sizes != _USUAL_BATCH:
            words += ["--batch", ":".join(map(str, sizes))]
        if self.version_compatible:
            words.append("--version-compatible")
        if self.hardware_compatible:
            words.append("--hardware-compatible")
        if self.path.name != onnx.with_suffix(".engine").name:
            words.append(f"  (then name it {self.path.name})")
        return " ".join(words)


@dataclass(frozen=True)
class EngineFile:
    """An engine that is whole and is what its sidecar says.

    Attributes:
        info: What it was built for.
        contract: Of the model in it.
        plan: Its bytes.
    """

    info: EngineInfo
    contract: ModelContract
    plan: bytes


def open_engine(path: Path, *, onnx: Path | None = None) -> EngineFile:
    """Read an engine and its sidecar, and see that they belong together.

    Args:
        path: The engine.
        onnx: The model it must have been built from; None takes the file of that name beside it,
            where there is one.

    Raises:
        UsageError: There is no such file.
        MismatchError: No engine, no sidecar, damaged, altered, or built from another ONNX file.
    """
    try:
        plan = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"the engine {str(path)!r} cannot be read", facts=error.strerror
        ) from error
    flavour = _MAGIC.get(plan[:4])
    if flavour is None:
        raise MismatchError(
            f"{str(path)!r} is no TensorRT engine",
            facts=f"it begins with {plan[:4]!r}, an engine with b'ftrt' or b'vtrt'",
            hint=_any_rebuild(path),
        )
    info, contract = read_engine(path)
    if info.flavour != flavour:
        raise _refused(
            info,
            f"the file is a {FLAVOURS[flavour]} engine, its description is of one for "
            f"{FLAVOURS[info.flavour]}",
        )
    if plan_version(plan) != info.plan_version:
        raise _refused(
            info,
            f"the file was written by version {plan_version(plan)}, its description says "
            f"{info.plan_version}",
        )
    if hashlib.sha256(plan).hexdigest() != info.engine_sha256:
        raise _refused(
            info,
            f"its bytes are not those that were built: damaged, cut short ({len(plan):,} of "
            f"{info.size:,} bytes) or altered",
        )
    source = onnx if onnx is not None else path.parent / Path(info.onnx).name
    if (onnx is not None or source.is_file()) and _file_hash(source) != info.onnx_sha256:
        raise _refused(info, f"it was not built from {source} as that is now")
    return EngineFile(info, contract, plan)


def check_fits(info: EngineInfo, *, version: str, capability: str) -> None:
    """See that this TensorRT and this GPU may run the engine.

    Args:
        info: Of the engine.
        version: Of the installed package.
        capability: Compute capability of the GPU here, as ``8.9``.

    Raises:
        MismatchError: They may not.
    """
    built, here = _numbers(info.version), _numbers(version)
    newer = info.version_compatible and built[0] == here[0] and here >= built
    if built != here and not newer:
        raise _refused(
            info,
            f"{FLAVOURS[info.flavour]} {info.version} built it, {version} is installed here",
        )
    newer = info.hardware_compatible and min(
        _numbers(info.compute_capability), _numbers(capability)
    ) >= (8,)
    if info.compute_capability != capability and not newer:
        raise _refused(
            info,
            f"it was built for compute capability {info.compute_capability}, the GPU here has "
            f"{capability}",
        )


def read_engine(path: Path) -> tuple[EngineInfo, ModelContract]:
    """What the sidecar of an engine says, without reading the engine: look, do not run.

    Raises:
        UsageError: There is no such engine.
        MismatchError: There is no sidecar, or it is damaged.
    """
    if not path.is_file():
        raise UsageError(f"there is no engine {str(path)!r}")
    sidecar = sidecar_of(path)
    try:
        text = sidecar.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise MismatchError(
            f"the engine {str(path)!r} has no description beside it",
            facts=f"{sidecar.name} says what an engine was built for; without it none is loaded",
            hint=_any_rebuild(path),
        ) from error
    except (OSError, ValueError) as error:
        raise MismatchError(
            f"the engine's description {str(sidecar)!r} cannot be read",
            facts=str(error),
            hint=_any_rebuild(path),
        ) from error
    try:
        document = json.loads(text)
        if document.pop("schema") != ENGINE_SCHEMA:
            raise ValueError(f"it is not {ENGINE_SCHEMA}")
        contract = json.dumps(document.pop("contract"))
        info = EngineInfo(**{**document, "path": path})
        _check_types(info)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MismatchError(
            f"the engine's description {str(sidecar)!r} is damaged",
            facts=f"{type(error).__name__}: {error}",
            hint=_any_rebuild(path),
        ) from error
    return info, ModelContract.loads(contract)


def sidecar_of(engine: Path) -> Path:
    """``model.engine`` -> ``model.engine.json``."""
    return engine.with_name(f"{engine.name}.json")


def plan_version(plan: bytes) -> str:
    """The version an engine's own bytes name: ``1.7.1.116``."""
    return ".".join(map(str, plan[_VERSION_AT]))


def _check_types(info: EngineInfo) -> None:
    """What came from JSON is what the class says, as far as it is used.

    Raises:
        ValueError: It is not.
    """
    texts = (
        *(info.version, info.plan_version, info.compute_capability),
        *(info.onnx, info.onnx_sha256, info.engine_sha256),
    )
    if not all(isinstance(text, str) for text in texts) or info.flavour not in FLAVOURS:
        raise ValueError("a text is missing or unknown")
    for version in (info.version, info.compute_capability):
        _numbers(version)
    flags = (info.version_compatible, info.hardware_compatible)
    if not all(isinstance(flag, bool) for flag in flags) or type(info.size) is not int:
        raise ValueError("a flag or a size is of another type")
    if len(info.profile) != 1:
        raise ValueError("its profile is not of one input")
    (shapes,) = info.profile.values()
    least, usual, largest = (shapes[kind] for kind in ("min", "opt", "max"))
    if not (
        all(len(shape) == 4 and all(type(n) is int for n in shape) for shape in shapes.values())
        and len(shapes) == 3
        and least[1:] == usual[1:] == largest[1:]
        and 1 <= least[0] <= usual[0] <= largest[0]
    ):
        raise ValueError(f"its profile makes no sense: {shapes}")


def _numbers(version: str) -> tuple[int, ...]:
    """The first four numbers of a version: ``10.13.3.9.post1`` -> (10, 13, 3, 9)."""
    return tuple(int(part) for part in version.split(".")[:4])


def _refused(info: EngineInfo, why: str) -> MismatchError:
    return MismatchError(
        f"the engine {str(info.path)!r} does not fit", facts=why, hint=info.rebuild()
    )


def _any_rebuild(path: Path) -> str:
    """The line for an engine whose own description cannot be trusted."""
    return f"embedkit export {shlex.quote(str(path.with_suffix('.onnx')))} --trt"


def _file_hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"the model {str(path)!r} cannot be read", facts=error.strerror) from error
