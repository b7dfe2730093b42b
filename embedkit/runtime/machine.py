"""The machine a figure comes from, in words and numbers; None where the system does not tell."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from embedkit.runtime.pipeline import usable_cores

__all__ = ["cpu_flags", "cpu_limit", "cpu_name", "describe_machine", "installed", "memory_limit"]

_CPUINFO = Path("/proc/cpuinfo")
_CGROUP = Path("/sys/fs/cgroup")


def describe_machine() -> dict[str, Any]:
    """Processor, usable cores, Python and the packages that take part in embedding."""
    packages = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "numpy", "pillow")
    found = {name: installed(name) for name in packages}
    return {
        "processor": cpu_name(),
        "cores": usable_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: known for name, known in found.items() if known},
    }


def cpu_name() -> str:
    """The processor as it calls itself; its kind (``x86_64``) where the system does not tell."""
    return _cpuinfo("model name") or platform.processor() or platform.machine() or "unknown"


def cpu_flags() -> frozenset[str]:
    """Instruction sets by the kernel's names (``avx2``); empty where the system does not tell."""
    return frozenset((_cpuinfo("flags") or _cpuinfo("Features") or "").split())


def cpu_limit(cgroup: Path = _CGROUP) -> float | None:
    """How many cores' time a container grants, as 1.5; None: no limit, or not known."""
    try:
        if (cgroup / "cpu.max").exists():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None  # no cgroup, or the word "max"


def memory_limit(cgroup: Path = _CGROUP) -> int | None:
    """How many bytes this process may use: the container's limit or the machine's memory."""
    known = []
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            known.append(int((cgroup / name).read_text()))
        except (OSError, ValueError):
            continue
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        known.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(known, default=None)


def installed(package: str) -> str | None:
    """A distribution's version by its metadata, without importing it; None: not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpuinfo(key: str) -> str | None:
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None
