"""Thumbnails: made once, made again when the picture changes, never more than agreed."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from PIL import Image

from embedkit.errors import ImageError
from embedkit.imaging import Limits
from embedkit.serve import thumbnails as room
from embedkit.serve.thumbnails import Thumbnails
from tests.serve.place import draw


def size(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data)) as image:
        return image.size


def test_a_picture_is_decoded_once_and_again_when_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Path] = []

    def decode(source: Path, **limits: object) -> Image.Image:
        decoded.append(source)
        return Image.open(source).convert("RGB")

    monkeypatch.setattr(room, "decode", decode)
    photo = draw(tmp_path / "photo.png", 1)
    thumbnails = Thumbnails(tmp_path / "kept")
    first = thumbnails.jpeg(photo, 30)
    assert size(first) == (30, 24)
    assert thumbnails.jpeg(photo, 30) == first
    assert Thumbnails(tmp_path / "kept").jpeg(photo, 30) == first
    assert len(decoded) == 1
    draw(photo, 2)
    os.utime(photo, (1, 1))
    assert thumbnails.jpeg(photo, 30) != first
    assert len(decoded) == 2


def test_a_small_picture_is_not_blown_up(tmp_path: Path) -> None:
    photo = draw(tmp_path / "photo.png", 1)
    assert size(Thumbnails(tmp_path / "kept").jpeg(photo, 500)) == (60, 48)


def test_a_half_written_thumbnail_is_made_again(tmp_path: Path) -> None:
    photo = draw(tmp_path / "photo.png", 1)
    thumbnails = Thumbnails(tmp_path / "kept")
    whole = thumbnails.jpeg(photo, 30)
    (file,) = (tmp_path / "kept").iterdir()
    file.write_bytes(whole[:-40])
    assert thumbnails.jpeg(photo, 30) == whole
    assert file.read_bytes() == whole


def test_the_folder_stays_small_and_keeps_what_is_looked_at(tmp_path: Path) -> None:
    photos = [draw(tmp_path / f"{n}.png", n) for n in range(30)]
    one = len(Thumbnails(tmp_path / "size").jpeg(photos[0], 30))
    thumbnails = Thumbnails(tmp_path / "kept", max_bytes=10 * one)
    for n, photo in enumerate(photos):
        thumbnails.jpeg(photo, 30)
        thumbnails.jpeg(photos[0], 30)
        for kept in (tmp_path / "kept").iterdir():  # a clock that is finer than the disk's
            if kept.stat().st_mtime > 1e6:
                os.utime(kept, (n, n + (kept.stat().st_size > 0)))
        assert sum(kept.stat().st_size for kept in (tmp_path / "kept").iterdir()) <= 11 * one
    assert not list((tmp_path / "kept").glob("*.tmp"))


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    photo = draw(tmp_path / "photo.png", 1)
    thumbnails = Thumbnails(tmp_path / "kept")
    (tmp_path / "kept").rmdir()
    assert size(thumbnails.jpeg(photo, 30)) == (30, 24)


def test_without_a_cache_folder_a_temporary_one_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    thumbnails = Thumbnails()
    thumbnails.jpeg(draw(tmp_path / "photo.png", 1), 30)
    assert thumbnails.folder.is_dir()
    thumbnails.close()
    assert not thumbnails.folder.exists()


def test_what_cannot_be_shown_says_why(tmp_path: Path) -> None:
    thumbnails = Thumbnails(tmp_path / "kept", limits=Limits(max_pixels=100))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ImageError, match="no picture of a known format"):
        thumbnails.jpeg(tmp_path / "text.png", 30)
    with pytest.raises(ImageError, match="more than the limit"):
        thumbnails.jpeg(draw(tmp_path / "photo.png", 1), 30)
    with pytest.raises(ImageError, match="gone"):
        thumbnails.jpeg(tmp_path / "nothing.png", 30)
