"""The catalog that the tests of the server share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from tests.serve.place import Place, made


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with made(tmp_path_factory.mktemp("served")) as place:
        yield place


@pytest.fixture(scope="module")
def client(place: Place) -> Iterator[TestClient]:
    with TestClient(place.app()) as client:
        yield client
