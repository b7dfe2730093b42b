"""Ask a running `embedkit serve` over HTTP, with Python's standard library alone.

    python examples/05_server_client.py catalog.faiss PHOTO [--model MODEL.onnx]

Starts a server on a free port of this machine, searches by an uploaded photo, then by the picture
that was found, and stops it. A busy server answers 503 and says when to come back: `ask` does.
The whole API is described at /v1/openapi.json.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

ATTEMPTS = 5


def main() -> None:
    """Print what is served, and the hits of two searches."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("index", type=Path)
    parser.add_argument("photo", type=Path)
    parser.add_argument("--model", type=Path)
    options = parser.parse_args()
    with server(options.index, options.model) as url:
        info = ask(f"{url}/v1/info")
        print(f"{url} serves {info['index']['count']} pictures by {info['model']['name']}")
        answer = ask(f"{url}/v1/search?k=3", options.photo.read_bytes())
        show(f"like {options.photo}", answer)
        first = answer["hits"][0]
        show(f"like {first['path']}", ask(f"{url}/v1/search?k=3&id={first['id']}"))


@contextmanager
def server(index: Path, model: Path | None) -> Iterator[str]:
    """The address of a server that runs for the length of the block."""
    arguments = ["serve", "--index", str(index), "--port", "0", "--json", "--quiet"]
    arguments += ["--model", str(model)] if model else []
    with subprocess.Popen(
        [sys.executable, "-m", "embedkit.cli.main", *arguments], stdout=subprocess.PIPE, text=True
    ) as process:
        # The line comes when the server is ready; an empty one means that it has ended, and why
        # stands on stderr.
        line = process.stdout.readline() if process.stdout else ""
        if not line:
            sys.exit(process.wait())
        try:
            yield json.loads(line)["url"]
        finally:
            process.send_signal(signal.SIGINT)  # what has begun is finished first
    if process.returncode:
        sys.exit(process.returncode)


def ask(url: str, photo: bytes | None = None) -> dict[str, Any]:
    """The JSON answer; a photo makes it an upload."""
    for _ in range(ATTEMPTS):
        try:
            request = Request(url, photo, {"content-type": "application/octet-stream"})
            with urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except HTTPError as error:
            if error.code != 503:
                sys.exit(f"{url}: {json.load(error)['error']['what']}")
            time.sleep(float(error.headers["retry-after"]))
    sys.exit(f"{url}: the server stays busy")


def show(what: str, answer: dict[str, Any]) -> None:
    """One line a hit."""
    print(what)
    for hit in answer["hits"]:
        print(f"  {hit['rank']}  {hit['score']:.4f}  {hit['label']}  {hit['path']}")


if __name__ == "__main__":
    main()
