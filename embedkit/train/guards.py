"""What a training runs under: the same numbers again, and a way to be stopped in good order."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import platform
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch

__all__ = ["kept_memory", "reproducible", "seed_of", "stop_requests"]

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MAPPINGS_MAX = -1, -4
_NEVER, _USUAL_MAPPINGS = -1, 65536
_USUAL_TRIM = 64 << 20


def seed_of(*parts: object) -> int:
    """A seed that is a function of `parts` alone, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1


@contextlib.contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """The same numbers again on the CPU, the fastest kernels on CUDA; all as before afterwards."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # A property that this module has at run time only.
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    benchmark = torch.backends.cudnn.benchmark
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if device.type == "cpu":
            torch.use_deterministic_algorithms(True)
            # It would write every result twice, for programs that read what they have not written.
            memory.fill_uninitialized_memory = False
        else:
            torch.backends.cudnn.benchmark = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            memory.fill_uninitialized_memory = filled
            torch.backends.cudnn.benchmark = benchmark


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """What a training step frees stays with the process for the next step, until this ends.

    glibc gives every large block back to the system, which hands it out again page by page and
    cleared: a third of a step on the CPU. With another C library nothing is changed. The setting
    holds for the whole process.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    library = ctypes.CDLL(None)
    library.mallopt(_MAPPINGS_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        library.mallopt(_MAPPINGS_MAX, _USUAL_MAPPINGS)
        # The limit that it would have come to by itself; a fixed one, once one was set.
        library.mallopt(_TRIM_THRESHOLD, _USUAL_TRIM)
        library.malloc_trim(0)


@contextlib.contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; a second one acts as it did before."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(number, before[number])

    before = {
        int(number): signal.getsignal(number) or signal.SIG_DFL
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
