"""The running server: overload, slow and huge clients, stopping; over real sockets."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from embedkit.errors import UsageError
from embedkit.imaging import Pixels
from embedkit.runtime.backends.base import Vectors
from embedkit.serve import Rules, Settings, address, create_app, listen, running
from embedkit.serve.batching import Gate
from tests.serve.place import Place


@dataclass
class Slow:
    """The place's model, taking its time."""

    place: Place
    seconds: float

    @property
    def contract(self) -> Any:
        return self.place.embedder.contract

    device = "cpu"

    def embed_pixels(self, pixels: Pixels) -> Vectors:
        time.sleep(self.seconds)
        return self.place.embedder.embed_pixels(pixels)


def slow_app(place: Place, seconds: float, rules: Rules) -> Any:
    settings = Settings(rules=rules, max_batch=4, thumbnails=place.folder / "thumbnails")
    return create_app(place.catalog, Slow(place, seconds), settings)  # type: ignore[arg-type]


def ask(url: str, body: bytes, *, kind: str = "image/png") -> tuple[int, dict[str, Any], str]:
    host = url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=30)
    try:
        connection.request("POST", "/v1/search?k=1", body, {"content-type": kind})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read()), answer.headers.get("retry-after", "")
    finally:
        connection.close()


def test_at_four_times_the_load_every_request_is_answered_and_none_wrongly(place: Place) -> None:
    files = sorted((place.folder / "photos").rglob("*.png"))
    # So large that an answer sent too early, on unread bytes, would be lost with the connection.
    photos = [file.read_bytes() + bytes(600_000) for file in files]
    rules = Rules(work=Gate(8))
    with running(slow_app(place, 0.02, rules)) as url, ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda n: (n, ask(url, photos[n % 12])), range(160)))
        counts = Counter(status for _, (status, _, _) in answers)
        assert set(counts) == {200, 503}
        assert counts[200] + counts[503] == 160
        assert counts[200] >= 8
        for n, (status, document, retry) in answers:
            if status == 200:
                assert document["hits"][0]["path"].endswith(files[n % 12].name)
            else:
                assert document["error"]["code"] == "busy"
                assert retry == "1"
        assert ask(url, photos[0])[0] == 200  # and afterwards there is room again
    assert rules.work.inside == 0


def test_stopping_finishes_what_has_begun(place: Place) -> None:
    photo = (place.folder / "photos/cup/00.png").read_bytes()
    answers: list[int] = []
    rules = Rules(work=Gate(64))
    with running(slow_app(place, 0.4, rules)) as url:
        asking = [
            threading.Thread(target=lambda: answers.append(ask(url, photo)[0])) for _ in range(6)
        ]
        for one in asking:
            one.start()
        end = time.monotonic() + 30
        while rules.work.inside < 6 and time.monotonic() < end:
            time.sleep(0.01)
    for one in asking:
        one.join(30)
    assert answers == [200] * 6
    with pytest.raises(OSError, match="refused"):
        ask(url, photo)


def test_a_slow_body_is_given_up_and_a_huge_one_is_refused(place: Place) -> None:
    rules = Rules(max_bytes=100_000, body_seconds=0.3, work=Gate(1))
    with running(slow_app(place, 0.0, rules)) as url:
        host, port = url.removeprefix("http://").split(":")
        for announced, sent, status in ((1000, 10, 408), (150_000, 150_000, 413)):
            with socket.create_connection((host, int(port)), timeout=10) as line:
                head = (
                    "POST /v1/search HTTP/1.1\r\nhost: localhost\r\ncontent-type: image/png\r\n"
                    f"content-length: {announced}\r\n\r\n"
                )
                line.sendall(head.encode() + bytes(sent))
                assert line.recv(100).split()[1] == str(status).encode()
        photo = (place.folder / "photos/cup/00.png").read_bytes()
        assert ask(url, photo)[0] == 200


def test_a_client_that_leaves_takes_no_room_with_it(place: Place) -> None:
    rules = Rules(work=Gate(1))
    photo = (place.folder / "photos/cup/00.png").read_bytes()
    with running(slow_app(place, 0.0, rules)) as url:
        host, port = url.removeprefix("http://").split(":")
        for _ in range(5):
            with socket.create_connection((host, int(port)), timeout=10) as line:
                line.sendall(
                    b"POST /v1/search HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n"
                )
        end = time.monotonic() + 30
        while (status := ask(url, photo)[0]) == 503 and time.monotonic() < end:
            time.sleep(0.01)
        assert status == 200
    assert rules.work.inside == 0


def test_pictures_that_come_together_run_together(place: Place) -> None:
    photo = (place.folder / "photos/cup/00.png").read_bytes()
    app = slow_app(place, 0.05, Rules())
    with running(app) as url, ThreadPoolExecutor(12) as pool:
        assert list(pool.map(lambda _: ask(url, photo)[0], range(12))) == [200] * 12
        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        connection.request("GET", "/v1/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(lines["embedkit_batch_pictures_sum"]) == 12
    assert float(lines["embedkit_batch_pictures_count"]) < 12


def test_an_address_that_cannot_be_had_is_one_sentence() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert address(taken) == f"http://127.0.0.1:{port}"
        with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1 port {port}"):
            listen("127.0.0.1", port)
    with pytest.raises(UsageError, match="cannot listen on"):
        listen("no such host.invalid", 0)
