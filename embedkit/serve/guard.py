"""What every request passes first: who asks, for how much, and is there room.

It takes no part in what is asked. A refused request is read to its end (within the limits) before
it is answered: a connection closed on unread bytes would take the answer with it.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import http.cookies
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qs

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedkit.serve.batching import Gate

__all__ = ["LOOPBACK", "Guard", "Rules", "problem"]

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
_OPEN = frozenset({"/v1/health", "/static/style.css"})
_DROP_SECONDS = 5.0
_OTHER_BYTES = 2_000_000


@dataclass(frozen=True)
class Rules:
    """Who may ask, and for how much.

    Attributes:
        token: What a request must carry; None: nobody needs one.
        hosts: The names the server may be called by, without port; None: any. Where no token is
            asked for, this keeps out a page that gives its name this machine's address (DNS
            rebinding).
        max_bytes: Of an uploaded picture; any other body is held to 2 MB.
        body_seconds: In which the body must have come.
        work: Room for requests that search or embed.
        pictures: Room for requests for a picture.
    """

    token: str | None = None
    hosts: frozenset[str] | None = LOOPBACK
    max_bytes: int = 20_000_000
    body_seconds: float = 30.0
    work: Gate = field(default_factory=lambda: Gate(64))
    pictures: Gate = field(default_factory=lambda: Gate(256))

    def most(self, path: str) -> int:
        """Bytes that a request for this path may bring."""
        uploads = path in ("/v1/search", "/v1/embed")
        return self.max_bytes if uploads else min(self.max_bytes, _OTHER_BYTES)

    def gate(self, path: str) -> Gate | None:
        """Where a request for this path must find room; None: nowhere, it costs nothing."""
        if path.startswith(("/v1/search", "/v1/embed")):
            return self.work
        return self.pictures if path.startswith("/v1/pictures/") else None


class Guard:
    """The outermost part of the application."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self._app, self._rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        rules, body = self._rules, _Body(receive)
        answer = _Answer(scope, body, _safely(send), rules.most(scope["path"]))
        if rules.hosts is not None and _host(scope) not in rules.hosts:
            await answer.refuse(
                421,
                "wrong-host",
                "this server does not go by that name",
                hint="http://localhost; by other names it serves when started with --token",
            )
            return
        if rules.token is not None and scope["path"] not in _OPEN and not self._knows(scope):
            await self._ask_who(scope, answer)
            return
        gate = rules.gate(scope["path"])
        if gate is not None and not gate.enter():
            await answer.refuse(
                503,
                "busy",
                "the server has as much work as it can take",
                hint="ask again in a second",
                headers={"retry-after": "1"},
            )
            return
        try:
            await self._pass(scope, receive, body, answer)
        finally:
            if gate is not None:
                gate.leave()

    async def _pass(self, scope: Scope, receive: Receive, body: _Body, answer: _Answer) -> None:
        """Read the body, all of it, and hand it on."""
        most = self._rules.most(scope["path"])
        try:
            async with asyncio.timeout(self._rules.body_seconds):
                data = await body.read(scope, most)
        except TimeoutError:
            await answer.refuse(408, "too-slow", "the request did not come in time", drop=False)
            return
        except _GoneError:
            return
        if data is None:
            await answer.refuse(
                413,
                "too-large",
                "the upload is too large",
                facts=f"{most:,} bytes are allowed",
                hint="send a smaller picture, or start the server with --max-upload",
            )
            return
        await self._app(scope, _replay(data, receive), answer.send)

    def _knows(self, scope: Scope) -> bool:
        """By the header of a program, or by the cookie of a browser."""
        kind, _, given = _header(scope, b"authorization").partition(" ")
        if kind.lower() == "bearer" and _same(given.strip(), self._rules.token or ""):
            return True
        try:
            cookies = http.cookies.SimpleCookie(_header(scope, b"cookie"))
        except http.cookies.CookieError:
            return False
        found = cookies.get(_cookie_name(scope))
        return found is not None and _same(found.value, _cookie_value(self._rules.token or ""))

    async def _ask_who(self, scope: Scope, answer: _Answer) -> None:
        token = self._rules.token or ""
        if scope["path"] != "/":
            await answer.refuse(
                401,
                "no-token",
                "this server asks for a token",
                hint="Authorization: Bearer TOKEN",
                headers={"www-authenticate": "Bearer"},
            )
            return
        query = parse_qs(scope["query_string"].decode("latin-1"), errors="replace")
        if scope["method"] == "GET" and _same(query.get("token", [""])[0], token):
            cookie = f"{_cookie_name(scope)}={_cookie_value(token)}; Path=/; HttpOnly; SameSite=Lax"
            # Sent on to the bare address, so that the token stands in no history.
            await answer.finish(303, b"", "text/plain", {"location": "/", "set-cookie": cookie})
            return
        await answer.finish(401, _DOOR, "text/html; charset=utf-8", {"www-authenticate": "Bearer"})


class _GoneError(Exception):
    """The client has left."""


class _Body:
    """What a client sends, piece by piece."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self._ended = receive, False

    async def read(self, scope: Scope, most: int) -> bytes | None:
        """All of it; None: it is too large."""
        announced = _header(scope, b"content-length")
        if announced.isdecimal() and int(announced) > most:
            return None
        body = bytearray()
        while not self._ended:
            body += await self._next()
            if len(body) > most:
                return None
        return bytes(body)

    async def drop(self, most: int) -> None:
        """Take in what still comes, but no more than an upload may have, and not for long."""
        try:
            async with asyncio.timeout(_DROP_SECONDS):
                while not self._ended and most > 0:
                    most -= len(await self._next())
        except (TimeoutError, _GoneError):
            return

    async def _next(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise _GoneError
        self._ended = not message.get("more_body", False)
        piece: bytes = message.get("body", b"")
        return piece


class _Answer:
    """An answer given here, without asking the application."""

    def __init__(self, scope: Scope, body: _Body, send: Send, most: int) -> None:
        self._scope, self._body, self.send, self._most = scope, body, send, most

    async def refuse(
        self,
        status: int,
        code: str,
        what: str,
        *,
        facts: str | None = None,
        hint: str | None = None,
        headers: Mapping[str, str] | None = None,
        drop: bool = True,
    ) -> None:
        self._scope["embedkit.route"] = "refused"
        if drop:
            await self._body.drop(self._most)
        body = json.dumps(problem(code, what, facts=facts, hint=hint)).encode()
        await self.finish(status, body, "application/json", headers or {})

    async def finish(self, status: int, body: bytes, kind: str, headers: Mapping[str, str]) -> None:
        lines = {
            "content-type": kind,
            "content-length": str(len(body)),
            "cache-control": "no-store",
            **headers,
        }
        encoded = [(name.encode(), value.encode("latin-1")) for name, value in lines.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": encoded})
        body = b"" if self._scope["method"] == "HEAD" else body
        await self.send({"type": "http.response.body", "body": body})


def problem(
    code: str, what: str, *, facts: str | None = None, hint: str | None = None
) -> dict[str, dict[str, str | None]]:
    """The document of every answer that is no success."""
    return {"error": {"code": code, "what": what, "facts": facts, "hint": hint}}


def _safely(send: Send) -> Send:
    """Every answer with the headers that keep a browser from doing more with it than shown."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            more = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
            message = {**message, "headers": [*message.get("headers", []), *more]}
        await send(message)

    return sending


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once, then what else comes: that the client has left."""
    given = False

    async def receiving() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receiving


def _header(scope: Scope, name: bytes) -> str:
    for key, value in scope["headers"]:
        if key == name:
            text: str = value.decode("latin-1")
            return text
    return ""


def _host(scope: Scope) -> str:
    """The name the client used, without port and brackets."""
    host = _header(scope, b"host").lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _same(given: str, wanted: str) -> bool:
    """Compared in a time that does not tell how much of it was right."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), wanted.encode())


def _cookie_name(scope: Scope) -> str:
    """Browsers share cookies between the ports of a machine; two servers must not."""
    server = scope.get("server") or ("", 0)
    return f"embedkit-{server[1] or 0}"


def _cookie_value(token: str) -> str:
    return hashlib.sha256(b"embedkit cookie\0" + token.encode()).hexdigest()


_DOOR = b"""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>embedkit: token</title>
<link rel="stylesheet" href="/static/style.css">
<main class="door">
<h1>This catalog asks for a token</h1>
<form>
<label for="token">Token, as the server was started with</label>
<input id="token" name="token" type="password" required autofocus autocomplete="current-password">
<button>Open</button>
</form>
</main>
</html>
"""
