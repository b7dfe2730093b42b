"""What this machine has for embedkit, looked at without importing what could end the process."""

from __future__ import annotations

import csv
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from embedkit.runtime.machine import (
    cpu_flags,
    cpu_limit,
    cpu_name,
    installed,
    memory_limit,
)
from embedkit.runtime.pipeline import usable_cores

__all__ = ["ABSENT", "BAD", "OK", "WARN", "Finding", "examine"]

OK, WARN, BAD, ABSENT = "ok", "warn", "bad", "absent"

_PATIENCE = 60  # seconds for a package to be imported; a cold disk takes 20
_LEAST_DISK = 2_000_000_000
_LEAST_MEMORY = 2_000_000_000
# The first patch of each Python in which tarfile holds against hostile archives (CVE-2025-4517).
_PYTHON_PATCHES = {(3, 11): 13, (3, 12): 11, (3, 13): 4}
# By the kernel's names; with one of the first, int8 is faster than fp32 on the CPU.
_INT8 = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd")

_LIGHT = ("numpy", "pillow", "faiss-cpu", "rich", "typer")
_ORT = ("onnxruntime", "onnxruntime-gpu")

# The ONNX file of one Identity: enough to see whether a session starts on the GPU.
_IDENTITY = (
    "080812003a370a100a017812017922084964656e746974791201655a0f0a0178120a0a08080112040a020801"
    "620f0a0179120a0a08080112040a02080142040a001011"
)
# Each in a process of its own: a library that does not suit the processor or the driver takes the
# process that imports it down with it.
_PROBES = {
    "onnxruntime": "import json, onnxruntime as o; "
    "print(json.dumps([o.__version__, o.get_available_providers()]))",
    "cuda": f"import onnxruntime as o; o.preload_dlls(); s = o.SessionOptions(); "
    f"s.log_severity_level = 4; print(o.InferenceSession(bytes.fromhex('{_IDENTITY}'), s, "
    "providers=['CUDAExecutionProvider']).get_providers()[0])",
    "faiss": "import json, faiss; "
    "print(json.dumps([faiss.__version__, faiss.get_compile_options().split()]))",
    "tensorrt": "import tensorrt; print(tensorrt.__version__)",
    "tensorrt_rtx": "import tensorrt_rtx; print(tensorrt_rtx.__version__)",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        group: Where it belongs: ``packages``, ``GPU``, ...
        name: What it is.
        status: ``ok``; ``warn``: works, and could be better; ``bad``: does not work; ``absent``:
            optional, and not there.
        told: What was found.
        hint: What to type or do; empty where there is nothing to do.
    """

    group: str
    name: str
    status: str
    told: str
    hint: str = ""


def examine(folder: Path) -> Iterator[Finding]:
    """Everything, in reading order; nothing is raised, and what is broken is a finding.

    Args:
        folder: Where the user works: its disk is looked at, and one empty file is written and
            removed.

    Cost: about a second; each library is imported once, in a process of its own.
    """
    floors = _floors()
    yield _python()
    yield from _packages(floors)
    yield _onnxruntime(floors)
    yield _faiss()
    yield from _training(floors)
    gpus = _gpus()
    yield gpus
    yield _cuda(gpus)
    yield from _tensorrt(floors, gpus)
    yield _bindings(floors)
    yield from _processor()
    yield from _disk(folder)


# --- packages ------------------------------------------------------------------------------------


def _python() -> Finding:
    version = platform.python_version()
    patch = _PYTHON_PATCHES.get(sys.version_info[:2])
    if patch is not None and sys.version_info.micro < patch:
        return Finding(
            "packages",
            "python",
            WARN,
            f"{version}, with known holes in tarfile (embedkit unpacks no archives)",
            f"install Python {sys.version_info.major}.{sys.version_info.minor}.{patch} or later",
        )
    return Finding("packages", "python", OK, version)


def _packages(floors: Mapping[tuple[str, str], str]) -> Iterator[Finding]:
    if not floors:
        yield Finding(
            "packages",
            "embedkit",
            WARN,
            "runs from a folder and is not installed, so no version can be compared",
            "pip install embedkit",
        )
    for name in _LIGHT:
        yield _package("packages", name, floors.get((name, ""), "0"))


def _package(group: str, name: str, floor: str, *, missing: str = "") -> Finding:
    """A package by its metadata; `missing`: what brings it, where it is optional."""
    version = installed(name)
    if version is None:
        line = missing or f'pip install "{name}>={floor}"'
        return Finding(group, name, ABSENT if missing else BAD, "not installed", line)
    if _numbers(version) < _numbers(floor):
        return Finding(
            group,
            name,
            BAD,
            f"{version} is older than {floor}, the oldest that embedkit is safe with",
            f'pip install --upgrade "{name}>={floor}"',
        )
    return Finding(group, name, OK, version)


def _onnxruntime(floors: Mapping[tuple[str, str], str]) -> Finding:
    """Which of the two wheels there is, whether it loads, and what it can run on."""
    found = {name: version for name in _ORT if (version := installed(name))}
    if len(found) == 2:
        return Finding(
            "engines",
            "onnxruntime",
            BAD,
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other",
            "pip uninstall -y onnxruntime onnxruntime-gpu && "
            'pip install "embedkit[gpu]"   (or "embedkit[cpu]")',
        )
    if not found:
        line = 'pip install "embedkit[cpu]"   (or "embedkit[gpu]")'
        return Finding(
            "engines", "onnxruntime", BAD, "not installed: no ONNX file can be run", line
        )
    ((name, version),) = found.items()
    known = _package(
        "engines", name, floors.get((name, "gpu" if name.endswith("gpu") else "cpu"), "0")
    )
    if known.status != OK:
        return Finding("engines", "onnxruntime", known.status, known.told, known.hint)
    answer, trouble = _probe("onnxruntime")
    if trouble:
        again = f"pip install --force-reinstall {name}"
        return Finding("engines", "onnxruntime", BAD, f"{version} does not load: {trouble}", again)
    providers = [one.removesuffix("ExecutionProvider") for one in json.loads(answer)[1]]
    return Finding("engines", "onnxruntime", OK, f"{version} ({name}): {', '.join(providers)}")


def _faiss() -> Finding:
    if installed("faiss-cpu") is None:
        return Finding("engines", "faiss", BAD, "not installed", "pip install embedkit")
    answer, trouble = _probe("faiss")
    if trouble:
        again = "pip install --force-reinstall faiss-cpu"
        return Finding("engines", "faiss", BAD, f"does not load: {trouble}", again)
    version, options = json.loads(answer)
    return Finding("engines", "faiss", OK, f"{version}, built with {' '.join(options)}")


def _training(floors: Mapping[tuple[str, str], str]) -> Iterator[Finding]:
    """Told by metadata alone: importing PyTorch takes seconds."""
    line = 'pip install "embedkit[train]"'
    yield _package("training", "torch", floors.get(("torch", "train"), "0"), missing=line)
    others = [name for name, extra in floors if extra == "train" and name != "torch"]
    found = [_package("training", name, floors[name, "train"], missing=line) for name in others]
    old = [one for one in found if one.status == BAD]
    absent = [one.name for one in found if one.status == ABSENT]
    yield from old
    if absent:
        yield Finding("training", "the rest", ABSENT, f"not installed: {', '.join(absent)}", line)
    elif found and not old:
        told = ", ".join(f"{one.name} {one.told}" for one in found)
        yield Finding("training", "the rest", OK, told)


# --- GPU -----------------------------------------------------------------------------------------


def _gpus() -> Finding:
    """What nvidia-smi says."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Finding("GPU", "NVIDIA driver", ABSENT, "there is no nvidia-smi: no driver, no GPU")
    fields = "name,driver_version,compute_cap,memory.total"
    answer, trouble = _run([tool, f"--query-gpu={fields}", "--format=csv,noheader"])
    rows = [[cell.strip() for cell in row] for row in csv.reader(answer.splitlines()) if row]
    if trouble or not rows or any(len(row) != 4 for row in rows):
        return Finding(
            "GPU",
            "NVIDIA driver",
            BAD,
            f"nvidia-smi does not answer: {trouble or answer.strip() or 'no GPU'}",
            "install or restart the NVIDIA driver",
        )
    told = "; ".join(f"{name}, compute {cap}, {memory}" for name, _, cap, memory in rows)
    return Finding("GPU", "NVIDIA driver", OK, f"{rows[0][1]}: {told}")


def _cuda(gpus: Finding) -> Finding:
    """Whether onnxruntime really starts on the GPU."""
    wheel = installed("onnxruntime-gpu") is not None
    if gpus.status != OK:
        said = "there is no GPU to use" if gpus.status == ABSENT else "the driver does not answer"
        return Finding("GPU", "CUDA", ABSENT, said, gpus.hint)
    if not wheel:
        line = 'pip uninstall -y onnxruntime && pip install "embedkit[gpu]"'
        return Finding(
            "GPU", "CUDA", WARN, "there is a GPU, and onnxruntime-gpu is not there", line
        )
    answer, trouble = _probe("cuda")
    last = (answer.strip().splitlines() or [""])[-1]
    if trouble or last != "CUDAExecutionProvider":
        return Finding(
            "GPU",
            "CUDA",
            BAD,
            f"onnxruntime does not start on the GPU: {trouble or last}",
            'pip install "onnxruntime-gpu[cuda,cudnn]"',
        )
    return Finding("GPU", "CUDA", OK, "onnxruntime starts on the GPU")


def _tensorrt(floors: Mapping[tuple[str, str], str], gpus: Finding) -> Iterator[Finding]:
    for name, extra in (("tensorrt", "trt"), ("tensorrt-rtx", "rtx")):
        line = f'pip install "embedkit[{extra}]"'
        known = _package("GPU", name, floors.get((name, extra), "0"), missing=line)
        if known.status != OK:
            yield known
            continue
        answer, trouble = _probe(name.replace("-", "_"))
        if trouble:
            again = f"pip install --force-reinstall {name}"
            yield Finding("GPU", name, BAD, f"{known.told} does not load: {trouble}", again)
        elif name == "tensorrt" and gpus.status != OK:
            told = f"{answer.strip()} loads; it builds and runs on a GPU, and there is none"
            yield Finding("GPU", name, WARN, told)
        else:
            builds = "" if gpus.status == OK else "; builds for a named GPU, runs nothing here"
            yield Finding("GPU", name, OK, f"{answer.strip()} loads{builds}")


def _bindings(floors: Mapping[tuple[str, str], str]) -> Finding:
    """What an engine's memory and streams are reached by."""
    line = 'pip install "embedkit[trt]"'
    return _package("GPU", "cuda-bindings", floors.get(("cuda-bindings", "trt"), "0"), missing=line)


# --- CPU and disk --------------------------------------------------------------------------------


def _processor() -> Iterator[Finding]:
    flags, cores, limit, memory = cpu_flags(), usable_cores(), cpu_limit(), memory_limit()
    yield Finding("CPU", "processor", OK, f"{cpu_name()}, {cores} cores for this process")
    if limit is not None and limit < cores:
        yield Finding(
            "CPU",
            "limit",
            WARN,
            f"the container grants the time of {limit:g} cores, and {cores} threads would share it",
            f"taskset -c 0-{max(1, round(limit)) - 1} embedkit ..., or bench --threads "
            f"{max(1, round(limit))}",
        )
    known = [name for name in (*_SETS, *_INT8) if name in flags]
    if flags and not set(_INT8) & set(flags):
        told = f"{', '.join(known) or 'none of interest'}; no integer dot products"
        yield Finding("CPU", "instructions", WARN, told, "int8 may be no faster than fp32 here")
    elif flags:
        yield Finding("CPU", "instructions", OK, ", ".join(known))
    if memory is not None:
        status = OK if memory >= _LEAST_MEMORY else WARN
        hint = "" if status == OK else "small batches: --batch 8"
        yield Finding("CPU", "memory", status, f"{memory / 1e9:,.1f} GB", hint)


def _disk(folder: Path) -> Iterator[Finding]:
    try:
        free = shutil.disk_usage(folder).free
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"embedkit")
    except OSError as error:
        told = f"{folder}: {error.strerror or error}"
        yield Finding("disk", "write here", BAD, told, "cd to a folder that you may write to")
        return
    yield Finding("disk", "write here", OK, str(folder))
    status = OK if free >= _LEAST_DISK else WARN
    hint = "" if status == OK else "a run and its export take 0.1 to 1 GB"
    yield Finding("disk", "free", status, f"{free / 1e9:,.1f} GB", hint)


# --- how it is looked at -------------------------------------------------------------------------


def _floors() -> dict[tuple[str, str], str]:
    """Package and extra (empty: none) to the oldest version, as the installed embedkit names it."""
    try:
        lines = metadata.requires("embedkit") or []
    except metadata.PackageNotFoundError:
        return {}
    floors = {}
    for line in lines:
        match = re.match(r"""([\w.-]+)>=([\d.]+)(?:\s*;\s*extra == ["'](\w+)["'])?$""", line)
        if match:
            floors[match[1], match[3] or ""] = match[2]
    return floors


def _numbers(version: str) -> tuple[int, ...]:
    """``2.15.0+cu132`` -> (2, 15, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def _probe(name: str) -> tuple[str, str]:
    """What a probe printed, and why it failed, or an empty text."""
    return _run([sys.executable, "-c", _PROBES[name]])


def _run(command: list[str]) -> tuple[str, str]:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_PATIENCE
        )
    except subprocess.TimeoutExpired:
        return "", f"no answer in {_PATIENCE} s"
    except OSError as error:
        return "", str(error)
    if done.returncode < 0:
        return "", f"the process was ended by signal {-done.returncode}"
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        return "", said[-1]
    return done.stdout, ""
