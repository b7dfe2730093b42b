"""How long until `embedkit --help` answers, against the least any Typer program can take.

    python -m benchmarks.startup [--repeats 15]

The two are run in turn in one go; the figure is user plus system CPU time of the whole process, and
the claim is the ratio. Target: at most 3.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

from benchmarks.figures import machine, save

__all__ = ["measure"]

CASES = {
    "import typer": [sys.executable, "-c", "import typer"],
    "embedkit --help": [sys.executable, "-m", "embedkit.cli.main", "--help"],
    "embedkit search --help": [sys.executable, "-m", "embedkit.cli.main", "search", "--help"],
}


def measure(repeats: int) -> dict[str, float]:
    """Median CPU seconds of each case, taken in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for round_ in range(repeats + 1):
        for name, command in CASES.items():
            before = os.times()
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
            after = os.times()
            used = after.children_user - before.children_user
            used += after.children_system - before.children_system
            if round_:  # the first fills the caches
                seconds[name].append(used)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    found = measure(parser.parse_args().repeats)
    least = found["import typer"]
    for name, value in found.items():
        print(f"{name:<24} {value * 1000:6.0f} ms CPU   {value / least:4.2f} x import typer")
    ratios = {name: round(value / least, 3) for name, value in found.items()}
    save("startup", {"machine": machine(), "cpu_seconds": found, "ratio_to_import_typer": ratios})


if __name__ == "__main__":
    main()
