"""`embedkit serve` for a long time: does its memory grow, does it keep what it should let go?

    python -m benchmarks.serve_soak --index catalog.faiss --photos FOLDER [--seconds 300]

Clients do all at once what many people do in a day: uploads whole and cut to a region, searches on
from a hit, thumbnails, what is no picture, half an upload and then gone, a new connection each
time. Every few seconds the server's memory, open files and threads are read from the outside. The
first fifth of the time is for warming up; what comes after it must be flat.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import os
import random
import socket
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.figures import machine, save
from benchmarks.serve import serving
from embedkit.imaging import find_images
from embedkit.index import Catalog

__all__ = ["watch"]

_WARM = 0.2  # share of the time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--clients", type=int, default=4)
    asked = parser.parse_args()
    photos = [path.read_bytes() for path in itertools.islice(find_images(asked.photos), 200)]
    catalog = Catalog.open(asked.index)
    ids = [catalog.hit(at).id for at in range(len(catalog))]
    answers: Counter[str] = Counter()
    with serving(asked.index) as (host, process), ThreadPoolExecutor(asked.clients) as pool:
        end = time.monotonic() + asked.seconds
        clients = [
            pool.submit(_client, seed, host, photos, ids, end, answers)
            for seed in range(asked.clients)
        ]
        samples = list(watch(process, asked.seconds))
        for client in clients:
            client.result()
    warm = samples[int(_WARM * len(samples)) :]
    third = max(len(warm) // 3, 1)
    first, last = warm[:third], warm[-third:]
    figures = {
        "machine": machine(),
        "index": len(ids),
        "seconds": asked.seconds,
        "clients": asked.clients,
        "requests": sum(answers.values()),
        "answers": dict(sorted(answers.items())),
        "memory_mb": {
            "after warming up": round(statistics.median(one[0] for one in first), 1),
            "at the end": round(statistics.median(one[0] for one in last), 1),
            "most": round(max(one[0] for one in samples), 1),
        },
        "open_files": {
            "after warming up": statistics.median(one[1] for one in first),
            "at the end": statistics.median(one[1] for one in last),
            "most": max(one[1] for one in samples),
        },
        "threads": {
            "after warming up": max(one[2] for one in first),
            "at the end": max(one[2] for one in last),
        },
    }
    for name, value in figures.items():
        print(f"{name:<11} {value}")
    save("serve-soak", figures)


def watch(process: int, seconds: float, *, every: float = 1.0) -> Iterator[tuple[float, int, int]]:
    """Memory in MB, open files and threads of a process, again and again (Linux)."""
    page, folder = os.sysconf("SC_PAGE_SIZE"), Path(f"/proc/{process}")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        resident = int((folder / "statm").read_text().split()[1]) * page / 1e6
        files = sum(1 for _ in (folder / "fd").iterdir())
        threads = sum(1 for _ in (folder / "task").iterdir())
        yield resident, files, threads
        time.sleep(every)


def _client(
    seed: int, host: str, photos: list[bytes], ids: list[int], end: float, answers: Counter[str]
) -> None:
    """One person after the other, until the time is up; the same ones for the same seed."""
    chance = random.Random(seed)
    while time.monotonic() < end:
        photo, number = chance.choice(photos), chance.choice(ids)
        left, top = chance.uniform(0, 0.5), chance.uniform(0, 0.5)
        box = f"{left:.3f},{top:.3f},{left + 0.4:.3f},{top + 0.4:.3f}"
        asks = [
            ("upload", "POST", "/v1/search?k=20", photo),
            ("region", "POST", f"/v1/search?k=20&box={box}", photo),
            ("search on", "GET", f"/v1/search?id={number}&k=20", None),
            ("thumbnail", "GET", f"/v1/pictures/{number}/image", None),
            ("page", "GET", "/", None),
            ("figures", "GET", "/v1/metrics", None),
            ("no picture", "POST", "/v1/search", photo[: len(photo) // 7]),
        ]
        connection = http.client.HTTPConnection(host, timeout=60)
        try:
            for name, method, path, body in chance.choices(asks, k=5):
                headers = {"content-type": "application/octet-stream"} if body else {}
                connection.request(method, path, body, headers)
                answer = connection.getresponse()
                answer.read()
                answers[f"{name} {answer.status}"] += 1
        finally:
            connection.close()
        _leave_midway(host, photo)
        answers["left midway"] += 1


def _leave_midway(host: str, photo: bytes) -> None:
    """Begin an upload and close the line."""
    name, _, port = host.partition(":")
    with socket.create_connection((name, int(port)), timeout=60) as line:
        head = f"POST /v1/search HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(photo)}\r\n"
        line.sendall(head.encode() + b"content-type: image/jpeg\r\n\r\n" + photo[:1000])


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
