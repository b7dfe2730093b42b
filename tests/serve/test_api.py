"""The API: its answers equal the model and the search by another route; its refusals are clear."""

from __future__ import annotations

import csv
import io
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from embedkit.imaging import Pixels, Preprocess, read_pixels
from embedkit.index import Catalog, Row, write_catalog
from embedkit.runtime import ModelContract
from embedkit.runtime.backends.base import Vectors
from embedkit.serve import Rules, Settings, create_app
from embedkit.serve.batching import Gate
from tests.serve.place import Place, draw
from tests.tiny_model import tiny_contract, tiny_vectors

_PREPROCESS = Preprocess(height=16, width=16, crop_ratio=1.0)


def upload(client: TestClient, data: bytes, url: str = "/v1/search", **parameters: Any) -> Any:
    return client.post(url, params=parameters, content=data, headers={"content-type": "image/png"})


def expected(place: Place, query: np.ndarray) -> list[tuple[str, float]]:
    """All pictures and their cosines, best first, written in numpy."""
    files = sorted((place.folder / "photos").rglob("*.png"))
    gallery = tiny_vectors(np.stack([read_pixels(path, _PREPROCESS) for path in files]))
    scores = gallery @ query
    names = [str(path.relative_to(place.folder / "photos")) for path in files]
    return sorted(zip(names, scores.tolist(), strict=True), key=lambda one: -one[1])


def check(hits: list[dict[str, Any]], wanted: list[tuple[str, float]]) -> None:
    assert [hit["path"] for hit in hits] == [name for name, _ in wanted]
    assert [hit["score"] for hit in hits] == pytest.approx([score for _, score in wanted], abs=1e-5)
    assert [hit["rank"] for hit in hits] == list(range(1, len(hits) + 1))


# Searching


def test_an_upload_finds_what_numpy_finds(place: Place, client: TestClient, tmp_path: Path) -> None:
    photo = draw(tmp_path / "query.png", 99)
    answer = upload(client, photo.read_bytes(), k=5).json()
    query = tiny_vectors(read_pixels(photo, _PREPROCESS)[None])[0]
    check(answer["hits"], expected(place, query)[:5])
    assert answer["query"] is None
    assert answer["verdict"] is None


def test_a_region_is_searched_as_the_cut_out_picture_would_be(
    place: Place, client: TestClient, tmp_path: Path
) -> None:
    photo = draw(tmp_path / "query.png", 98)
    cut = tmp_path / "cut.png"
    with Image.open(photo) as image:
        image.crop((12, 12, 48, 48)).save(cut)
    whole = upload(client, photo.read_bytes()).json()["hits"]
    region = upload(client, photo.read_bytes(), box="0.2,.25,0.8,1").json()["hits"]
    assert region == upload(client, cut.read_bytes()).json()["hits"]
    assert region != whole


def test_a_picture_of_the_catalog_finds_the_others_by_id_and_by_path(
    place: Place, client: TestClient
) -> None:
    hits = upload(client, (place.folder / "photos/cup/03.png").read_bytes()).json()["hits"]
    assert hits[0]["path"] == "cup/03.png"
    number = hits[0]["id"]
    by_id = client.get("/v1/search", params={"id": number, "k": 200}).json()
    by_path = client.get("/v1/search", params={"path": "cup/03.png", "k": 200}).json()
    assert by_id["hits"] == by_path["hits"]
    assert by_id["query"] == {"id": number, "path": "cup/03.png", "label": "cup"}
    query = tiny_vectors(read_pixels(place.folder / "photos/cup/03.png", _PREPROCESS)[None])[0]
    check(by_id["hits"], [one for one in expected(place, query) if one[0] != "cup/03.png"])


def test_every_picture_can_be_named_by_its_path_and_no_part_of_a_path_can(
    place: Place, client: TestClient
) -> None:
    pictures = client.get("/v1/pictures", params={"count": 200}).json()
    assert pictures["total"] == len(pictures["pictures"]) == 12
    for one in pictures["pictures"]:
        found = client.get("/v1/search", params={"path": one["path"]}).json()
        assert found["query"] == one
        assert client.get(f"/v1/pictures/{one['id']}").json() == one
    for part in ("", "cup", "cup/", "03.png", "cup/03.pn", "/cup/03.png", "../photos/cup/03.png"):
        assert client.get("/v1/search", params={"path": part}).status_code == 404


def test_a_sample_is_spread_over_the_catalog(client: TestClient) -> None:
    every = client.get("/v1/pictures", params={"count": 12}).json()["pictures"]
    four = client.get("/v1/pictures", params={"count": 4}).json()["pictures"]
    assert four == every[::3]


def test_a_region_of_a_catalogs_picture_is_read_from_its_file(
    place: Place, client: TestClient
) -> None:
    number = client.get("/v1/search", params={"path": "bag/05.png"}).json()["query"]["id"]
    box = "0,0,0.5,0.5"
    asked = client.get("/v1/search", params={"id": number, "box": box, "k": 3}).json()["hits"]
    data = (place.folder / "photos/bag/05.png").read_bytes()
    uploaded = upload(client, data, box=box, k=200).json()["hits"]
    others = [hit for hit in uploaded if hit["id"] != number][:3]
    assert [hit["id"] for hit in asked] == [hit["id"] for hit in others]


def test_a_vector_of_any_length_finds_what_its_direction_finds(
    place: Place, client: TestClient
) -> None:
    vector = np.random.default_rng(5).standard_normal(8)
    unit = vector / np.linalg.norm(vector)
    for scale in (1.0, 1e-200, 1e200):
        document = {"vector": (vector * scale).tolist()}
        answer = client.post("/v1/search/vector", json=document, params={"k": 12}).json()
        check(answer["hits"], expected(place, unit.astype(np.float32)))


def test_embed_gives_the_vector_that_is_stored(place: Place, client: TestClient) -> None:
    data = (place.folder / "photos/cup/00.png").read_bytes()
    found = upload(client, data, "/v1/embed").json()
    flat = faiss.read_index(str(place.folder / "catalog.faiss"))
    number = client.get("/v1/search", params={"path": "cup/00.png"}).json()["query"]["id"]
    at = [hit["id"] for hit in client.get("/v1/pictures?count=200").json()["pictures"]].index(
        number
    )
    np.testing.assert_allclose(found["vector"], flat.reconstruct(at), atol=1e-6)
    assert found["fingerprint"] == place.catalog.fingerprint


def test_labels_narrow_a_search_and_are_counted(client: TestClient) -> None:
    labels = client.get("/v1/labels").json()
    assert labels["labels"] == [{"label": name, "count": 4} for name in ("bag", "cup", "shoe")]
    assert client.get("/v1/labels", params={"contains": "U"}).json()["total"] == 1
    every = client.get("/v1/search?id=1&k=200").json()["hits"]
    some = client.get("/v1/search?id=1&k=200&label=cup&label=bag").json()["hits"]
    wanted = [hit["id"] for hit in every if hit["label"] in ("cup", "bag")]
    assert [hit["id"] for hit in some] == wanted
    unknown = client.get("/v1/search?id=1&label=cop")
    assert unknown.status_code == 422
    assert "no label named 'cop'" in unknown.json()["error"]["what"]


@dataclass
class Calibrated:
    """The place's model, carrying thresholds."""

    place: Place
    device = "cpu"

    @property
    def contract(self) -> ModelContract:
        thresholds = {"match": 0.9, "unsure": 0.3, "match_false": 0.01, "unsure_false": 0.1}
        return replace(self.place.embedder.contract, thresholds=thresholds)

    def embed_pixels(self, pixels: Pixels) -> Vectors:
        return self.place.embedder.embed_pixels(pixels)


def test_a_calibrated_model_says_what_each_score_is_worth(place: Place) -> None:
    model: Any = Calibrated(place)
    photo = (place.folder / "photos/cup/03.png").read_bytes()
    with TestClient(create_app(place.catalog, model, Settings(Rules(hosts=None)))) as client:
        assert client.get("/v1/info").json()["thresholds"] == {"match": 0.9, "unsure": 0.3}
        answer = upload(client, photo, k=12).json()
        assert answer["verdict"] == "match"
        for hit in answer["hits"]:
            score = hit["score"]
            assert hit["verdict"] == (
                "match" if score >= 0.9 else "unsure" if score >= 0.3 else "none"
            )
        assert {hit["verdict"] for hit in answer["hits"]} == {"match", "unsure", "none"}
        number = answer["hits"][0]["id"]
        others = client.get(f"/v1/search?id={number}").json()
        assert others["verdict"] == others["hits"][0]["verdict"] != "match"


# What is served


def test_info_health_metrics_and_the_description_tell_the_truth(
    place: Place, client: TestClient
) -> None:
    info = client.get("/v1/info").json()
    assert info["index"] == {
        "name": "catalog.faiss",
        "count": 12,
        "dim": 8,
        "metric": "cosine",
        "labels": 3,
        "changed": False,
    }
    assert info["model"]["fingerprint"] == place.embedder.contract.fingerprint
    assert client.get("/v1/health").json() == {"status": "ok"}
    before = _counted(client, "/v1/labels")
    client.get("/v1/labels")
    client.get("/v1/labels?limit=0")
    after = _counted(client, "/v1/labels")
    assert after - before == 2
    paths = client.get("/v1/openapi.json").json()["paths"]
    assert all(path.startswith("/v1/") for path in paths)
    assert {"/v1/search", "/v1/search/vector", "/v1/embed", "/v1/info", "/v1/metrics"} <= set(paths)


def _counted(client: TestClient, route: str) -> float:
    lines = client.get("/v1/metrics").text.splitlines()
    named = [line for line in lines if line.startswith("embedkit_requests_total")]
    return sum(float(line.split()[-1]) for line in named if f'route="{route}"' in line)


def test_a_thumbnail_is_an_upright_small_jpeg_without_metadata(
    place: Place, client: TestClient
) -> None:
    number = client.get("/v1/search?path=cup/00.png").json()["query"]["id"]
    for size in ("small", "large"):
        given = client.get(f"/v1/pictures/{number}/image", params={"size": size})
        assert given.headers["content-type"] == "image/jpeg"
        with Image.open(io.BytesIO(given.content)) as image:
            assert (image.size, image.format) == ((60, 48), "JPEG")
            assert not image.getexif()
    assert len(list((place.folder / "thumbnails").glob("*.jpg"))) == 2


def test_a_catalog_replaced_while_it_is_served_is_said_so(place: Place, tmp_path: Path) -> None:
    copy = tmp_path / "copy.faiss"
    copy.write_bytes((place.folder / "catalog.faiss").read_bytes())
    app = create_app(Catalog.open(copy), place.embedder, Settings(rules=Rules(hosts=None)))
    with TestClient(app) as client:
        assert not client.get("/v1/info").json()["index"]["changed"]
        copy.touch()
        time.sleep(0.01)
        copy.write_bytes(copy.read_bytes() + b" ")
        assert client.get("/v1/info").json()["index"]["changed"]


def test_names_that_are_no_utf8_and_climbing_paths_do_no_harm(place: Place, tmp_path: Path) -> None:
    secret = draw(tmp_path / "secret.png", 7)
    root = tmp_path / "root"
    root.mkdir()
    vectors = np.eye(8, dtype=np.float32)
    rows = [
        Row(1, b"caf\xe9/a.png", b"caf\xe9", vectors[0]),
        Row(2, b"../secret.png", b"", vectors[1]),
        Row(3, b"<img src=x>.png", b"<b>", vectors[2]),
    ]
    index = tmp_path / "odd.faiss"
    write_catalog(index, rows, contract=tiny_contract(), root=root)
    app = create_app(Catalog.open(index), place.embedder, Settings(rules=Rules(hosts=None)))
    with TestClient(app) as client:
        hits = client.get("/v1/search?id=3").json()["hits"]
        assert {hit["label"] for hit in hits} == {"caf\\udce9", ""}
        assert client.get("/v1/search?id=1&label=caf\\udce9").json()["hits"] == []
        assert secret.exists()
        for number in (1, 2, 3):
            assert client.get(f"/v1/pictures/{number}/image").status_code == 404
            assert client.get(f"/v1/search?id={number}&box=0,0,1,.5").status_code == 404


# What is refused


@pytest.mark.parametrize(
    ("method", "url", "status"),
    [
        ("GET", "/v1/search", 422),
        ("GET", "/v1/search?id=1&path=cup/00.png", 422),
        ("GET", "/v1/search?id=999", 404),
        ("GET", "/v1/search?id=-1", 422),
        ("GET", "/v1/search?id=99999999999999999999999", 422),
        ("GET", "/v1/search?id=1&k=0", 422),
        ("GET", "/v1/search?id=1&k=201", 422),
        ("GET", "/v1/search?id=1&box=0.5,0,0.5,1", 422),
        ("GET", "/v1/search?id=1&box=nan,0,1,1", 422),
        ("GET", "/v1/search?path=../../etc/passwd", 404),
        ("GET", "/v1/search?path=%00%ff", 404),
        ("GET", "/v1/pictures/999/image", 404),
        ("GET", "/v1/pictures/..%2f..%2fetc%2fpasswd/image", 404),
        ("GET", "/v1/pictures/1/image?size=huge", 422),
        ("GET", "/static/../api.py", 404),
        ("GET", "/static/..%2fapi.py", 404),
        ("GET", "/static/index.html", 404),
        ("GET", "/nothing", 404),
        ("DELETE", "/v1/search", 405),
    ],
)
def test_what_cannot_be_answered_says_why(
    client: TestClient, method: str, url: str, status: int
) -> None:
    answer = client.request(method, url)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["what"]
    assert "Traceback" not in answer.text


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data; boundary=x", "", "image"])
def test_what_a_foreign_web_page_can_send_is_refused(client: TestClient, kind: str) -> None:
    answer = client.post("/v1/search", content=b"x", headers={"content-type": kind})
    assert answer.status_code == 415


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"vector": "x"}',
        b'{"vector": []}',
        b'{"vector": [1, 2]}',
        b'{"vector": [0, 0, 0, 0, 0, 0, 0, 0]}',
        b'{"vector": [NaN, 0, 0, 0, 0, 0, 0, 0]}',
        b'{"vector": [1e999, 0, 0, 0, 0, 0, 0, 0]}',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_a_vector_that_is_none_is_refused(client: TestClient, body: bytes) -> None:
    answer = client.post(
        "/v1/search/vector", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code in (400, 422)
    assert json.loads(answer.text)["error"]["what"]


def test_every_odd_file_gets_a_picture_or_a_sentence(client: TestClient, shared_data: Path) -> None:
    rows = csv.DictReader((shared_data / "odd/index.csv").read_text().splitlines())
    counts = {200: 0, 422: 0}
    for row in rows:
        file = shared_data / "odd" / row["file"]
        if not file.is_file():
            continue
        answer = upload(client, file.read_bytes(), k=1)
        counts[answer.status_code] += 1
        if answer.status_code == 422:
            assert answer.json()["error"]["code"] in (
                *("unreadable", "not-an-image", "truncated", "too-large", "too-many-scans"),
                *("empty", "unsupported"),
            )
    assert counts[200] > 20
    assert counts[422] > 10


def test_limits_hold_for_bytes_and_for_pixels(place: Place, tmp_path: Path) -> None:
    photo = draw(tmp_path / "query.png", 1)
    rules = Rules(max_bytes=5_000)
    with TestClient(place.app(rules, max_pixels=2_000)) as client:
        large = upload(client, b"x" * 5_001)
        assert (large.status_code, large.json()["error"]["code"]) == (413, "too-large")
        streamed = client.post(
            "/v1/search",
            content=iter([b"x" * 4_000, b"x" * 4_000]),
            headers={"content-type": "image/png"},
        )
        assert streamed.status_code == 413
        wide = upload(client, photo.read_bytes())
        assert (wide.status_code, wide.json()["error"]["code"]) == (422, "too-large")
        assert client.get("/v1/search?id=1").status_code == 200


# Who may ask


def test_without_the_token_nothing_but_health_is_told(place: Place) -> None:
    with TestClient(place.app(Rules(token="correct horse"))) as client:
        assert client.get("/v1/health").status_code == 200
        for url in ("/v1/info", "/v1/search?id=1", "/v1/pictures/1/image", "/v1/openapi.json"):
            assert client.get(url).status_code == 401
            wrong = client.get(url, headers={"authorization": "Bearer correct house"})
            assert wrong.status_code == 401
            right = client.get(url, headers={"authorization": "Bearer correct horse"})
            assert right.status_code == 200
        door = client.get("/?token=wrong")
        assert door.status_code == 401
        assert "asks for a token" in door.text


def test_a_browser_gives_the_token_once_and_it_leaves_the_address(place: Place) -> None:
    with TestClient(place.app(Rules(token="correct horse"))) as client:
        entered = client.get("/?token=correct+horse", follow_redirects=False)
        assert (entered.status_code, entered.headers["location"]) == (303, "/")
        cookie = entered.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Lax" in cookie
        assert "horse" not in cookie
        assert client.get("/").status_code == 200
        assert client.get("/v1/info").status_code == 200


def test_a_page_that_calls_itself_by_another_name_is_refused(place: Place) -> None:
    app = create_app(place.catalog, place.embedder)
    with TestClient(app, base_url="http://evil.example") as client:
        answer = client.get("/v1/info")
        assert (answer.status_code, answer.json()["error"]["code"]) == (421, "wrong-host")
    for host in ("http://localhost:8000", "http://127.0.0.1:1", "http://[::1]:8000"):
        assert TestClient(app, base_url=host).get("/v1/health").status_code == 200


def test_every_answer_keeps_the_browser_in_check(client: TestClient) -> None:
    for url in ("/", "/static/app.js", "/v1/info", "/v1/nothing", "/v1/pictures/1/image"):
        headers = client.get(url).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "access-control-allow-origin" not in headers


def test_the_page_names_nothing_outside_the_server(client: TestClient) -> None:
    page = client.get("/").text
    parts = [line.split('"')[1] for line in page.split("<") if "/static/" in line for line in
             [line[line.index("/static/") - 1 :]]]  # fmt: skip
    assert {"/static/style.css", "/static/app.js", "/static/icon.svg"} <= set(parts)
    for url in ("/", *parts, *(f"/static/{name}.js" for name in ("api", "region", "compare"))):
        answer = client.get(url)
        assert answer.status_code == 200
        text = answer.text.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text
        assert "https://" not in text
        assert " style=" not in text


def test_a_full_server_says_when_to_come_back(place: Place) -> None:
    work = Gate(0)
    with TestClient(place.app(Rules(work=work))) as client:
        answer = client.get("/v1/search?id=1")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert client.get("/v1/info").status_code == 200
    assert work.inside == 0
