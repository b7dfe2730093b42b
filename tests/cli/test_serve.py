"""`embedkit serve` as typed: it says where it is, answers, stops on request with 0."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from embedkit.cli import main as command_line
from tests.serve.place import made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cli-served")
    with made(folder):
        yield folder


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "embedkit.cli.main", "serve", "--port", "0", "--json"]
    return subprocess.Popen(
        [*command, "--thumbnails", str(folder / "thumbnails"), *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_it_is_stopped_and_ends_with_0(folder: Path, number: int) -> None:
    token = ["--token", "correct horse"] if number == signal.SIGTERM else []
    with start(folder, *token) as process:
        assert process.stdout is not None
        said: dict[str, Any] = json.loads(process.stdout.readline())
        assert said["schema"] == "embedkit.serve/1"
        assert (said["index"], said["count"], said["device"]) == ("catalog.faiss", 12, "cpu")
        connection = http.client.HTTPConnection(said["url"].removeprefix("http://"), timeout=30)
        connection.request("GET", "/v1/search?id=1")
        assert connection.getresponse().status == (401 if token else 200)
        connection.close()
        assert said["page"].endswith("/?token=correct%20horse" if token else "/")
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert out == ""
    assert "Traceback" not in err
    assert "stopping" in err


def test_a_second_ctrl_c_does_not_wait_for_a_client_that_stalls(folder: Path) -> None:
    with start(folder) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        said = json.loads(process.stdout.readline())
        host, port = said["url"].removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as line:
            line.sendall(
                b"POST /v1/search HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n"
            )
            while "embedkit_work_in_progress 1" not in metrics(said["url"]):
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            while not (text := process.stderr.readline()).startswith("stopping"):
                assert text
            assert "1 request" in text
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "stopped at once" in err
    assert "Traceback" not in err


def metrics(url: str) -> str:
    with urllib.request.urlopen(f"{url}/v1/metrics", timeout=30) as answer:
        text: str = answer.read().decode()
        return text


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--host", "0.0.0.0"], 2, "without a token 0.0.0.0 is not served"),
        (["--token", "short"], 2, "too short"),
        (["--token", "écoutez-moi"], 2, "a header cannot carry it"),
        (["--index", "nothing.faiss"], 2, "there is no index"),
        (["--index", "model.onnx"], 5, "model.onnx"),
        (["--host", "192.0.2.1", "--token", "correct horse"], 2, "cannot listen on 192.0.2.1"),
        (["--port", "70000"], 2, "less than or equal to 65535"),
    ],
)
def test_what_cannot_be_served_is_said_in_a_sentence(
    folder: Path,
    arguments: list[str],
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as ended:
        command_line.main(["serve", "--port", "0", *arguments])
    said = capsys.readouterr()
    assert ended.value.code == code
    assert words in said.err
    assert said.out == ""


def test_without_its_packages_it_names_the_line_that_brings_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    for name in [name for name in sys.modules if name.startswith("embedkit.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(SystemExit) as ended:
        command_line.main(["serve"])
    assert ended.value.code == 6
    assert 'pip install "embedkit[serve]"' in capsys.readouterr().err
