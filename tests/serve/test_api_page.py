"""The API's own page: complete, true to the server it stands on, and safe."""

from __future__ import annotations

import html
import re
import shlex

from starlette.testclient import TestClient

from embedkit.serve import Rules
from tests.serve.place import Place


def commands(page: str) -> list[list[str]]:
    """Every command of the page, as a shell would read it."""
    return [shlex.split(html.unescape(one)) for one in re.findall(r"<pre[^>]*><code>(.*?)</", page)]


def test_every_call_is_there_with_a_command_for_it(client: TestClient) -> None:
    page = client.get("/api").text
    described = client.get("/v1/openapi.json").json()
    for path, methods in described["paths"].items():
        for method, call in methods.items():
            assert f"<code>{method.upper()} {path}</code> {call['summary']}" in page
            assert f'id="{call["operationId"]}"' in page
    calls = sum(len(methods) for methods in described["paths"].values())
    assert len(commands(page)) == calls
    for name in described["components"]["schemas"]:
        assert name in page


def test_the_commands_do_what_they_say(client: TestClient, place: Place) -> None:
    photo = (place.folder / "photos/cup/00.png").read_bytes()
    for program, url, *options in commands(client.get("/api").text):
        assert program == "curl"
        assert url.startswith("http://testserver/v1/")
        if "--json" in options:
            numbers = {"vector": [0.1, 0.2] * (place.catalog.dim // 2)}
            answer = client.post(url, json=numbers)
        elif "--data-binary" in options:
            name, _, kind = options[options.index("-H") + 1].partition(": ")
            answer = client.post(url, content=photo, headers={name: kind})
        else:
            answer = client.get(url)
        assert answer.status_code == 200, url


def test_the_page_loads_nothing_from_elsewhere_and_no_name_breaks_it(client: TestClient) -> None:
    page = client.get("/api", headers={"host": "localhost"}).text
    assert set(re.findall(r'(?:src|href)="([^"]+)"', page)) == {
        *("/", "/static/icon.svg", "/static/style.css", "/v1/openapi.json")
    }
    assert "<script" not in page
    assert "style=" not in page
    odd = client.get("/api", headers={"host": 'x"><script>alert(1)</script>'}).text
    assert "<script" not in odd


def test_with_a_token_nobody_else_reads_it(place: Place) -> None:
    with TestClient(place.app(Rules(token="a long token"))) as client:
        assert client.get("/api").status_code == 401
        assert client.get("/api", headers={"authorization": "Bearer a long token"}).is_success
