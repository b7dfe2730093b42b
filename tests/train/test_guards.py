"""A training's memory is kept from step to step, and given back at its end."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_SCRIPT = """
import resource, torch
from embedkit.train.guards import kept_memory

def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(16 << 20)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() >> 20

faults(1)
print(faults(5), resident())
with kept_memory():
    faults(5)
    print(faults(5), resident())
print(resident(), faults(1))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back")
def test_pages_are_cleared_once_and_given_back_at_the_end() -> None:
    # A process of its own: the test's may have more memory at hand than it needs.
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True
    )
    faults, resident, faults_inside, resident_inside, resident_after, faults_after = map(
        int, done.stdout.split()
    )
    # The first few blocks may each find the one before cut into by something small.
    assert faults_inside < faults / 10
    assert resident_inside > resident + 50
    assert resident_after < resident + 20
    # One block of the five.
    assert faults_after > faults / 10
