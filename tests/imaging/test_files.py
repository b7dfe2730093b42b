"""The walk over a folder finds each picture once, in order, and enters no loop."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from embedkit.errors import DataError
from embedkit.imaging import IMAGE_SUFFIXES, find_images, hash_file


def _touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def _found(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in find_images(root)]


def test_pictures_are_found_at_any_depth_in_order_of_their_names(tmp_path: Path) -> None:
    names = ["b/2.jpg", "b/1.PNG", "a.jpeg", "b.webp", "b/c/d/e/x.TIFF", "a/z.gif"]
    _touch(*(tmp_path / name for name in names))
    _touch(
        tmp_path / "notes.txt", tmp_path / "a" / "jpg", tmp_path / ".jpg", tmp_path / "x.jpg.part"
    )
    assert _found(tmp_path) == sorted(names, key=lambda name: Path(name).parts)


def test_an_empty_folder_gives_nothing(tmp_path: Path) -> None:
    assert _found(tmp_path) == []


def test_names_are_told_by_their_last_ending_in_any_case() -> None:
    assert {".jpg", ".png", ".heic"} <= IMAGE_SUFFIXES
    assert all(suffix == suffix.lower() and suffix[0] == "." for suffix in IMAGE_SUFFIXES)


def test_a_folder_named_like_a_picture_is_walked_into(tmp_path: Path) -> None:
    _touch(tmp_path / "folder.jpg" / "in.jpg")
    assert _found(tmp_path) == ["folder.jpg/in.jpg"]


def test_links_to_files_and_to_nothing_count_and_links_to_folders_are_not_followed(
    tmp_path: Path,
) -> None:
    root = tmp_path / "root"
    _touch(root / "real.jpg", tmp_path / "elsewhere" / "far.jpg")
    (root / "link.jpg").symlink_to(root / "real.jpg")
    (root / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (root / "itself.jpg").symlink_to(root / "itself.jpg")
    (root / "loop").symlink_to(root)
    (root / "folder.png").symlink_to(tmp_path / "elsewhere")
    assert _found(root) == ["dangling.jpg", "itself.jpg", "link.jpg", "real.jpg"]


def test_a_linked_root_is_walked(tmp_path: Path) -> None:
    _touch(tmp_path / "real" / "a.jpg")
    (tmp_path / "root").symlink_to(tmp_path / "real")
    assert _found(tmp_path / "root") == ["a.jpg"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_named_like_a_picture_is_passed_over(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "pipe.jpg")
    assert _found(tmp_path) == []


def test_a_name_that_is_no_utf8_is_found_and_can_be_opened(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    try:
        Path(os.fsdecode(raw)).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (path,) = find_images(tmp_path)
    assert os.fsencode(path) == raw
    assert path.read_bytes() == b"x"


def test_a_deep_tree_does_not_exhaust_the_stack(tmp_path: Path) -> None:
    folder = tmp_path
    for _ in range(300):
        folder = folder / "d"
        folder.mkdir()
    _touch(folder / "deep.jpg")
    assert len(_found(tmp_path)) == 1


def test_a_root_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    _touch(tmp_path / "file.jpg")
    with pytest.raises(DataError, match="it is a file"):
        list(find_images(tmp_path / "file.jpg"))
    with pytest.raises(DataError, match="there is no folder"):
        list(find_images(tmp_path / "absent"))


def test_a_folder_that_cannot_be_read_is_an_error_and_not_an_absence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _touch(tmp_path / "a.jpg", tmp_path / "closed" / "b.jpg", tmp_path / "gone" / "c.jpg")
    scandir = os.scandir

    def refusing(folder: Path) -> object:
        if Path(folder).name == "closed":
            raise PermissionError(13, "Permission denied")
        if Path(folder).name == "gone":
            raise FileNotFoundError(2, "No such file or directory")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    walk = find_images(tmp_path)
    assert next(walk).name == "a.jpg"
    with pytest.raises(DataError, match=r"closed.*cannot be read"):
        next(walk)
    (tmp_path / "closed" / "b.jpg").unlink()
    (tmp_path / "closed").rmdir()
    assert _found(tmp_path) == ["a.jpg"]  # a folder deleted during the walk holds nothing


def test_the_hash_is_blake2b_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    for data in (b"", b"abc", bytes(range(256)) * 5000):
        path.write_bytes(data)
        assert hash_file(path) == hashlib.blake2b(data, digest_size=16).hexdigest()
    with pytest.raises(FileNotFoundError):
        hash_file(tmp_path / "absent")
