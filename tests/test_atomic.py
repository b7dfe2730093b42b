"""A file is there whole, or what was there before is."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from embedkit import atomic
from embedkit.atomic import published
from embedkit.errors import EmbedKitError


def test_the_file_and_its_folders_appear_with_the_users_mode(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    plain = tmp_path / "plain"
    plain.touch()
    with published(path) as temporary:
        temporary.unlink()
        temporary.write_bytes(b"new")
        temporary.chmod(0o600)
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode == plain.stat().st_mode
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("failure", [ValueError("broken"), KeyboardInterrupt()])
def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, failure: BaseException
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write() -> None:
        with published(path) as temporary:
            temporary.write_bytes(b"half")
            raise failure

    with pytest.raises(type(failure)):
        write()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with (
            pytest.raises(EmbedKitError, match="file could not be written") as caught,
            published(path) as temporary,
        ):
            temporary.write_bytes(bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "still stands" in str(caught.value)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / ".file.tmp").write_bytes(b"left behind, and longer than the new one")
    with published(tmp_path / "file") as temporary:
        temporary.write_bytes(b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"new"


def test_the_content_is_on_the_disk_before_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    order: list[str] = []
    sync, replace = os.fsync, Path.replace

    def note_sync(handle: int) -> None:
        order.append("folder" if path.exists() else "content")
        sync(handle)

    def note_replace(self: Path, target: Path) -> Path:
        order.append("rename")
        return replace(self, target)

    monkeypatch.setattr(atomic.os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_replace)
    with published(path) as temporary:
        temporary.write_bytes(b"new")
    assert order == ["content", "rename", "folder"]
