"""What the server counts, for Prometheus: requests, seconds, batches, work under way."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Measured", "Metrics"]

_METHODS = ("GET", "POST", "HEAD")


class Metrics:
    """The figures of one server; two servers in a process do not share them.

    Args:
        inside: How many requests are being worked on.
        pictures: In the catalog.
    """

    def __init__(self, *, inside: Callable[[], int], pictures: int) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "embedkit_requests",
            "Requests answered.",
            ("route", "method", "status"),
            registry=self._registry,
        )
        self.seconds = Histogram(
            "embedkit_request_seconds",
            "From the first byte of a request to the last of its answer.",
            ("route",),
            registry=self._registry,
        )
        self.batches = Histogram(
            "embedkit_batch_pictures",
            "Pictures that ran through the model together.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self._registry,
        )
        under_way = Gauge(
            "embedkit_work_in_progress", "Requests being worked on.", registry=self._registry
        )
        under_way.set_function(inside)
        size = Gauge("embedkit_catalog_pictures", "In the catalog.", registry=self._registry)
        size.set(pictures)

    def text(self) -> bytes:
        """In the text format of Prometheus."""
        return generate_latest(self._registry)


class Measured:
    """Counts every request by the route that answered it; `unknown` is none of ours."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            route = scope.get("embedkit.route") or getattr(scope.get("route"), "path", "unknown")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.requests.labels(route, method, status or 500).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - started)
