"""Requests per second and p95 of `embedkit serve`, against the bare model and search, in one run.

    python -m benchmarks.serve --index catalog.faiss --photos FOLDER [--clients 8]

The same photos go, for the same time, (a) through `Embedder.embed` and `Catalog.search` one at a
time in this process, and (b) as uploads of several clients through the server, which runs in a
process of its own. Then four times as many clients as the server has room for ask at once, and ask
again at once when they are told to come back: every request must be answered, 200 or 503, and the
answers are counted. `benchmarks.serve_soak` watches its memory for longer.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

from benchmarks.figures import machine, save
from embedkit.imaging import find_images
from embedkit.index import Catalog

__all__ = ["rate", "serving"]

_K = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--room", type=int, default=16)
    asked = parser.parse_args()
    files = list(find_images(asked.photos))[:200]
    photos = [path.read_bytes() for path in files]
    catalog = Catalog.open(asked.index)
    found: dict[str, list[Figures]] = {}
    with (
        catalog.embedder(device="cpu") as embedder,
        serving(asked.index, "--queue", str(asked.room)) as (host, process),
    ):

        def clients(count: int) -> list[Callable[[int], int]]:
            return [_client(host, photos) for _ in range(count)]

        def bare(turn: int) -> int:
            catalog.search(embedder.embed([files[turn % len(files)]]), _K)
            return 200

        counts = {"one client": 1, "served": asked.clients, "overload": 4 * asked.room}
        # In turns, so that a busy machine is as hard on one as on the other.
        for _ in range(asked.rounds):
            one = rate([bare], asked.seconds, time.process_time)
            found.setdefault("bare", []).append(one)
            for name, count in counts.items():
                one = rate(clients(count), asked.seconds, lambda: _used(process))
                found.setdefault(name, []).append(one)
    figures: dict[str, object] = {
        "machine": machine(),
        "index": len(catalog),
        "clients": asked.clients,
        "room": asked.room,
        "rounds": asked.rounds,
    }
    middle = {
        name: sorted(some, key=lambda one: one["per_second"])[len(some) // 2]
        for name, some in found.items()
    }
    for name, one in middle.items():
        print(f"{name:<11} {one}")
    ratios = {
        "served / bare, answers a second": middle["served"]["per_second"]
        / middle["bare"]["per_second"],
        "served / bare, processor time": middle["served"]["cpu_ms"] / middle["bare"]["cpu_ms"],
    }
    for name, value in ratios.items():
        print(f"{name}: {value:.2f}")
    lost = sum(one["lost"] for some in found.values() for one in some)
    print(f"lost in all rounds: {lost}")
    figures |= {**middle, **{name: round(value, 3) for name, value in ratios.items()}, "lost": lost}
    save("serve", figures)


@contextmanager
def serving(index: Path, *options: str) -> Iterator[tuple[str, int]]:
    """`embedkit serve` in a process of its own: its host and port, and the process's number."""
    command = [sys.executable, "-m", "embedkit.cli.main", "serve", "--json", "-q", "--port", "0"]
    command += ["--index", str(index), "--device", "cpu", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield json.loads(server.stdout.readline())["url"].removeprefix("http://"), server.pid
        finally:
            server.send_signal(signal.SIGINT)


class Figures(TypedDict):
    """What one kind of asking reached."""

    per_second: float
    p50_ms: float
    p95_ms: float
    cpu_ms: float
    answers: dict[str, int]
    lost: int


def rate(asks: list[Callable[[int], int]], seconds: float, used: Callable[[], float]) -> Figures:
    """How many answers a second each asking in its own thread for so long, and how long they took.

    Args:
        asks: Each takes its turn's number and gives the answer's status.
        seconds: How long.
        used: Seconds of processor time so far, of whoever does the work.

    Returns:
        Answers of status 200 per second, the milliseconds of half and of 95 % of them, processor
        time for each, and the number of answers of every status; `lost` counts requests without.
    """
    for one in asks[:2]:
        one(0)  # warm
    took: list[float] = []
    statuses: Counter[str] = Counter()
    began, before = time.monotonic(), used()

    def work(number: int) -> None:
        turn = number
        while time.monotonic() - began < seconds:
            start = time.monotonic()
            try:
                status = asks[number](turn)
            except OSError:
                statuses["lost"] += 1
                continue
            statuses[str(status)] += 1
            if status == 200:
                took.append(time.monotonic() - start)
            turn += 1

    with ThreadPoolExecutor(len(asks)) as pool:
        list(pool.map(work, range(len(asks))))
    whole = time.monotonic() - began
    cuts = statistics.quantiles(took, n=20)
    return {
        "per_second": round(len(took) / whole, 2),
        "p50_ms": round(1000 * statistics.median(took), 1),
        "p95_ms": round(1000 * cuts[-1], 1),
        "cpu_ms": round(1000 * (used() - before) / len(took), 2),
        "answers": dict(sorted(statuses.items())),
        "lost": statuses["lost"],
    }


def _used(process: int) -> float:
    """Processor seconds of another process (Linux)."""
    text = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(text[11]) + int(text[12])) / os.sysconf("SC_CLK_TCK")


def _client(host: str, photos: list[bytes]) -> Callable[[int], int]:
    """One that keeps its connection, as browsers and programs do."""
    connection = http.client.HTTPConnection(host, timeout=60)

    def ask(turn: int) -> int:
        body = photos[turn % len(photos)]
        headers = {"content-type": "application/octet-stream"}
        connection.request("POST", f"/v1/search?k={_K}", body, headers)
        answer = connection.getresponse()
        answer.read()
        return answer.status

    return ask


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
