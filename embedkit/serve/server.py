"""Listen, answer, and stop politely: what has begun is finished first."""

from __future__ import annotations

import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from embedkit.errors import EmbedKitError, Interrupted, UsageError

__all__ = ["address", "listen", "running", "serve"]

_GRACE = 30  # seconds that requests have to finish
_BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """A socket that waits for connections; port 0 takes a free one.

    Raises:
        UsageError: There is no such address on this machine, or the port is taken.
    """
    try:
        family, kind, proto, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        raise UsageError(
            f"the server cannot listen on {host} port {port}",
            facts=getattr(error, "strerror", None) or str(error),
            hint="--port 0 takes a free one",
        ) from error
    return listener


def address(listener: socket.socket) -> str:
    """Where a browser finds it: ``http://127.0.0.1:8000``."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    app: ASGIApp,
    listener: socket.socket,
    *,
    on_ready: Callable[[], None],
    on_stopping: Callable[[], None],
) -> None:
    """Answer until SIGINT or SIGTERM comes, then finish what has begun; the main thread only.

    Raises:
        Interrupted: A second signal came while requests were being finished.
        EmbedKitError: The server ended by itself.
    """
    stopping = forced = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping, forced
        forced = stopping
        stopping = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with _thread(app, listener) as (server, thread):
            on_ready()
            while thread.is_alive() and not stopping:
                thread.join(0.1)
            if not stopping:
                raise EmbedKitError("the server ended by itself")
            on_stopping()
            server.should_exit = True
            while thread.is_alive():
                if forced and not server.force_exit:
                    # What is cut off now would only complain.
                    logging.getLogger("uvicorn.error").disabled = True
                    server.force_exit = True
                thread.join(0.1)
            if forced:
                raise Interrupted("stopped at once; requests were left unfinished")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def running(app: ASGIApp, listener: socket.socket | None = None) -> Iterator[str]:
    """A server in the background for the length of the block; gives its address.

    Args:
        app: See `create_app`.
        listener: See `listen`; None: a free port of the loopback.
    """
    listener = listener or listen("127.0.0.1", 0)
    where = address(listener)
    with _thread(app, listener):
        yield where


@contextmanager
def _thread(
    app: ASGIApp, listener: socket.socket
) -> Iterator[tuple[uvicorn.Server, threading.Thread]]:
    config = uvicorn.Config(
        app,
        lifespan="on",
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=_GRACE,
    )
    server = uvicorn.Server(config)
    # In a thread uvicorn leaves the signals alone, and they are ours to read.
    thread = threading.Thread(target=server.run, args=([listener],), name="embedkit-http")
    thread.start()
    try:
        while thread.is_alive() and not server.started:
            time.sleep(0.01)
        if not server.started:
            raise EmbedKitError("the server did not start")
        yield server, thread
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
