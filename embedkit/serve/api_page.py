"""The API as a page to read: written from its own OpenAPI description, with a command for each."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from typing import Any

__all__ = ["api_page"]

_Json = Mapping[str, Any]
_METHODS = ("get", "post")
_TITLES = {"search": "Search", "catalog": "The catalog", "server": "The server"}


def api_page(description: _Json, url: str) -> str:
    """HTML that loads nothing but the server's own style.

    Args:
        description: The OpenAPI document.
        url: Where the server is, for the commands: ``http://127.0.0.1:8000``.
    """
    info, schemas = description["info"], description["components"]["schemas"]
    calls = list(_calls(description))
    sections = "".join(
        f"<h2>{title}</h2>"
        + "".join(_call(*call, schemas, url) for call in calls if tag in call[2]["tags"])
        for tag, title in _TITLES.items()
    )
    documents = "".join(
        _document(name, schema) for name, schema in schemas.items() if "properties" in schema
    )
    return _PAGE.format(
        title=escape(info["title"]),
        summary=escape(info["summary"]),
        description=_words(info["description"]),
        version=escape(info["version"]),
        sections=sections,
        documents=documents,
    )


def _calls(description: _Json) -> Iterator[tuple[str, str, _Json]]:
    for path, methods in description["paths"].items():
        for method in _METHODS:
            if method in methods:
                yield method.upper(), path, methods[method]


def _call(method: str, path: str, call: _Json, schemas: _Json, url: str) -> str:
    given = [(one["name"], *_asked(one)) for one in call.get("parameters", [])]
    return (
        f'<section class="call" id="{call["operationId"]}">'
        f"<h3><code>{method} {escape(path)}</code> {escape(call['summary'])}</h3>"
        f"<p>{_words(call.get('description', ''))}</p>"
        f"{_table('Parameters', given)}"
        f"{_body(call.get('requestBody'))}"
        f'<pre tabindex="0"><code>{escape(_command(method, path, call, url))}</code></pre>'
        f"{_table('Answers', _answers(call, schemas))}</section>"
    )


def _answers(call: _Json, schemas: _Json) -> Iterator[tuple[str, str, str]]:
    for status, answer in sorted(call["responses"].items()):
        kinds = answer.get("content", {})
        what = ", ".join(_kind(one.get("schema", {})) or kind for kind, one in kinds.items())
        said = "" if status == "200" else answer["description"]
        if status == "200" and what in schemas:
            said = schemas[what].get("description", "")
        yield status, what, said


def _body(body: _Json | None) -> str:
    if body is None:
        return ""
    kinds = [
        _kind(one["schema"]) if "json" in kind else kind for kind, one in body["content"].items()
    ]
    said = body.get("description") or "JSON"
    return f"<p>Body: {_words(said)} <code>{escape(', '.join(kinds))}</code></p>"


def _command(method: str, path: str, call: _Json, url: str) -> str:
    """A line for a shell that works as it is, beside a ``photo.jpg``."""
    address = url + path.replace("{id}", "1")
    known = {one["name"] for one in call.get("parameters", []) if one["in"] == "query"}
    asked = "&".join(f"{name}={value}" for name, value in _EXAMPLES if name in known)
    words = ["curl", f"{address}?{asked}" if asked and method == "GET" else address]
    content = call.get("requestBody", {}).get("content", {})
    if "application/json" in content:
        words += ["--json", '{"vector": [0.1, 0.2, ...]}']
    elif content:
        words += ["-H", "content-type: image/jpeg", "--data-binary", "@photo.jpg"]
    if "image/jpeg" in call["responses"]["200"].get("content", {}):
        words += ["-o", "small.jpg"]
    return shlex.join(words)


_EXAMPLES = (("id", 1), ("k", 5), ("size", "small"), ("contains", "a"), ("count", 12))


def _document(name: str, schema: _Json) -> str:
    rows = [
        (field, _kind(facts), facts.get("description", ""))
        for field, facts in schema["properties"].items()
    ]
    said = _words(schema.get("description", ""))
    return (
        f'<section class="call" id="{name}"><h3>{name}</h3><p>{said}</p>'
        f"{_table('Fields', rows)}</section>"
    )


def _kind(schema: _Json) -> str:
    """What may stand there, in few words: ``whole number, 1 to 200``; empty: anything."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(map(_kind, schema["anyOf"]))
    kind = str(schema.get("type", ""))
    if kind == "array":
        return f"list of {_kind(schema['items'])}"
    least, most = schema.get("minimum"), schema.get("maximum")
    limits = f", {least} to {most}" if least is not None and most and most < 10**9 else ""
    return {"integer": "whole number", "string": "text"}.get(kind, kind) + limits


def _asked(parameter: _Json) -> tuple[str, str]:
    """What a parameter takes and what it is without, and what it means."""
    schema = parameter["schema"]
    kind = _kind(schema).removesuffix(" or null")
    default = schema.get("default")
    if parameter["required"]:
        kind += ", required"
    elif default not in (None, ""):
        kind += f"; {default} if not given"
    return kind, schema.get("description", "")


def _table(caption: str, rows: Iterable[tuple[str, str, str]]) -> str:
    """Names, each with a kind and a sentence; nothing where there are no rows."""
    lines = [
        f'<tr><th scope="row"><code>{escape(name)}</code></th>'
        f"<td><em>{escape(kind)}</em> {_words(said)}</td></tr>"
        for name, kind, said in rows
    ]
    if not lines:
        return ""
    return f'<table><caption class="unseen">{caption}</caption>{"".join(lines)}</table>'


def _words(text: str) -> str:
    """Text with what stands between backticks as code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if at % 2 else part for at, part in enumerate(parts))


_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>API · {title}</title>
<link rel="icon" href="/static/icon.svg" type="image/svg+xml">
<link rel="stylesheet" href="/static/style.css">
</head>
<body>
<header><h1><a href="/">{title}</a></h1><p class="soft">API v1 · {version}</p></header>
<main class="text">
<p>{summary} {description}</p>
<p>For programs: <a href="/v1/openapi.json">the OpenAPI description</a>.</p>
{sections}
<h2>Documents</h2>
{documents}
</main>
</body>
</html>
"""
