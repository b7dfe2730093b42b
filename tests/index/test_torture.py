"""Kills, full disks, readers and damaged files: `benchmarks.torture` in its tiny and short form."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from embedkit.errors import EmbedKitError
from embedkit.index import sync_folder
from tests.index.fakes import FakeEmbedder, names_and_vectors, truth

ROOT = Path(__file__).parents[2]


def torture(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.torture", "--seed", "11", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing was lost or wrong" in done.stdout
    return done.stdout


@pytest.mark.parametrize("trial", ["kills", "publish", "points", "disk", "readers", "catalogs"])
def test_nothing_is_lost_or_wrong(trial: str) -> None:
    assert f"\n{trial} " in torture("--tiny", "--only", trial)


@pytest.mark.slow
def test_nothing_is_lost_or_wrong_in_the_short_form() -> None:
    said = {line.split()[0]: line.split() for line in torture("--short").splitlines()[2:-1]}
    assert int(said["kills"][1]) >= 50
    assert int(said["publish"][1]) >= 100


@pytest.mark.slow
def test_twenty_thousand_damaged_catalogs() -> None:
    assert "20,000" in torture("--only", "catalogs")


def test_what_is_wrong_is_named_and_ends_with_exit_1() -> None:
    """The torturer itself: a loader that swallows damage does not pass."""
    code = (
        "import sys, embedkit.index.catalog as catalog\n"
        "catalog.damaged = lambda path, facts: ValueError(facts)\n"
        "from benchmarks.torture import main\n"
        "sys.exit(main(['--tiny', '--seed', '1', '--only', 'catalogs']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 1, done.stderr
    assert "ValueError: its vectors do not give the checksum" in done.stdout


def test_a_disk_that_turns_out_full_at_the_close_leaves_the_old_catalog(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, index = tmp_path / "photos", tmp_path / "c.faiss"
    root.mkdir()
    (root / "a.jpg").write_bytes(b"a")
    sync_folder(root, index, FakeEmbedder())
    old = truth(root)
    (root / "b.jpg").write_bytes(b"b")
    opened = Path.open

    class Closing:
        """A file whose close fails, as on a network disk that wrote nothing until then."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Any:
            return self.file

        def __exit__(self, *_: object) -> None:
            self.file.truncate(0)
            self.file.close()
            raise OSError(errno.ENOSPC, "No space left on device")

    def failing(path: Path, mode: str = "r", *rest: Any, **named: Any) -> Any:
        file = opened(path, mode, *rest, **named)
        return Closing(file) if ".tmp." in path.name and "w" in mode else file

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(EmbedKitError, match="make room") as caught:
        sync_folder(root, index, FakeEmbedder())
    monkeypatch.undo()
    assert str(index) in str(caught.value)
    assert names_and_vectors(index) == old
    assert not list(tmp_path.glob("*.tmp.*"))
    embedder = FakeEmbedder()
    sync_folder(root, index, embedder)
    assert embedder.embedded == []
    assert names_and_vectors(index) == truth(root)
