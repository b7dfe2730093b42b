"""What a person types becomes pictures: files, folders, tars, lists, object stores."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import fsspec
import pytest

from embedkit.errors import DataError, ImageError, MissingError, UsageError
from embedkit.imaging import Limits, Preprocess, Shard, find_images
from embedkit.scale import Source, count_files, find_sources
from embedkit.scale.remote import remote_sources
from tests.scale.places import jpeg, picture, tar_of

SIZE = Preprocess(height=8, width=8)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for n in range(12):
        picture(tmp_path / f"photos/c{n % 3}/{n}.jpg", n)
    (tmp_path / "photos/notes.txt").write_text("no picture")
    return tmp_path


@pytest.fixture
def store() -> Iterator[fsspec.AbstractFileSystem]:
    """An object store in memory: nine photos in two folders, and a tar of three."""
    files = fsspec.filesystem("memory")
    for n in range(9):
        files.pipe(f"/bucket/photos/c{n % 2}/{n}.jpg", jpeg(n))
    files.pipe("/bucket/photos/list.txt", b"no picture")
    files.pipe("/bucket/tars/a.tar", tar_of({f"x/{n}.jpg": jpeg(n) for n in range(3)}))
    yield files
    files.rm("/bucket", recursive=True)


def found(*arguments: str, **choices: object) -> list[Source]:
    return [source.held() for source in find_sources(arguments, **choices)]  # type: ignore[arg-type]


def paths(sources: list[Source]) -> list[str]:
    return [source.path for source in sources]


def test_folders_files_and_tars_come_in_the_order_they_are_named(photos: Path) -> None:
    (photos / "t.tar").write_bytes(tar_of({"k/1.jpg": jpeg(1)}))
    sources = found("photos/c1/4.jpg", "photos", "t.tar")
    walked = [str(path) for path in find_images(Path("photos"))]
    assert paths(sources) == ["photos/c1/4.jpg", *walked, "t.tar/k/1.jpg"]
    assert [source.label for source in sources][:2] == ["c1", "c0"]
    assert all(source.pixels(SIZE).shape == (8, 8, 3) for source in sources)
    assert count_files(["photos", "photos/c1/4.jpg"]) == 13
    assert count_files(["photos", "t.tar"]) is None


def test_the_stamp_changes_with_the_file(photos: Path) -> None:
    (before,) = found("photos/c1/4.jpg")
    os.utime("photos/c1/4.jpg", (1, 1))
    (after,) = found("photos/c1/4.jpg")
    assert before.stamp != after.stamp


def test_shards_part_the_pictures_wherever_the_folder_stands(photos: Path) -> None:
    names = [
        [path.removeprefix("photos/") for path in paths(found("photos", shard=Shard(i, 3)))]
        for i in range(3)
    ]
    assert sorted(chain(*names)) == sorted(f"c{n % 3}/{n}.jpg" for n in range(12))
    elsewhere = paths(found(str(photos / "photos"), shard=Shard(1, 3)))
    assert elsewhere == [str(photos / "photos" / name) for name in names[1]]
    assert [count_files(["photos"], Shard(i, 3)) for i in range(3)] == list(map(len, names))


def test_a_tar_is_in_one_shard_whole(photos: Path) -> None:
    for n in range(6):
        (photos / f"{n}.tar").write_bytes(tar_of({f"{k}.jpg": jpeg(k) for k in range(2)}))
    tars = [f"{n}.tar" for n in range(6)]
    parts = [paths(found(*tars, shard=Shard(i, 2))) for i in range(2)]
    assert sorted(chain(*parts)) == [f"{n}.tar/{k}.jpg" for n in range(6) for k in range(2)]
    assert not {p.split("/")[0] for p in parts[0]} & {p.split("/")[0] for p in parts[1]}


def test_in_a_list_what_is_not_there_is_a_failure_and_typed_it_is_an_error(photos: Path) -> None:
    lines = ["photos/c1/4.jpg", "no.jpg", "no.tar", "file:///etc/x.jpg", "http://x/y.jpg"]
    lines += ["memory://nowhere/x", "photos/c1"]
    sources = found("-", listed=lines)
    codes = []
    for source in sources:
        try:
            source.pixels(SIZE)
            codes.append("ok")
        except ImageError as error:
            codes.append(error.code)
    unusable = ["unreadable", "unreadable", "unsupported", "unsupported", "unreadable"]
    assert codes == ["ok", *unusable, *["ok"] * 4]
    for line in lines[1:5]:
        with pytest.raises(UsageError):
            find_sources([line])
    with pytest.raises(DataError):
        found("memory://nowhere/x")


def test_an_object_store_is_walked_like_a_folder(store: fsspec.AbstractFileSystem) -> None:
    sources = found("memory://bucket/photos")
    order = [f"c{k}/{n}.jpg" for k in range(2) for n in range(9) if n % 2 == k]
    assert paths(sources) == [f"memory:///bucket/photos/{name}" for name in order]
    assert [source.label for source in sources] == [name[:2] for name in order]
    assert (sources[3].pixels(SIZE) == Source("", "", "", jpeg(6)).pixels(SIZE)).all()
    parts = [paths(found("memory://bucket/photos", shard=Shard(i, 2))) for i in range(2)]
    assert sorted(chain(*parts)) == sorted(paths(sources))


@pytest.mark.parametrize(
    ("address", "count"),
    [
        ("memory://bucket/tars/a.tar", 3),
        ("memory://bucket/photos/c1/1.jpg", 1),
        ("memory://bucket/*/c0/*.jpg", 5),
        ("memory://bucket/tars/*.tar", 3),
        ("memory://bucket", 9),
    ],
)
def test_a_file_a_tar_a_pattern_and_a_whole_bucket(
    store: fsspec.AbstractFileSystem, address: str, count: int
) -> None:
    sources = found(address)
    assert len(sources) == count
    assert all(source.pixels(SIZE).any() for source in sources)


def test_an_object_that_changed_has_another_stamp(store: fsspec.AbstractFileSystem) -> None:
    before = found("memory://bucket/photos/c0")[0].stamp
    store.pipe("/bucket/photos/c0/0.jpg", jpeg(99) + b"x")
    assert found("memory://bucket/photos/c0")[0].stamp != before


def test_a_long_object_is_not_fetched_and_a_lost_one_is_named(
    store: fsspec.AbstractFileSystem,
) -> None:
    limits = Limits(max_bytes=10)
    for source in remote_sources("memory://bucket/photos", Shard(), limits=limits):
        with pytest.raises(ImageError, match="more than 10 bytes"):
            source.pixels(SIZE)
    (lost,) = found("memory://bucket/photos/c0/404.jpg")
    with pytest.raises(ImageError, match="FileNotFoundError"):
        lost.pixels(SIZE)


@pytest.mark.parametrize(
    "address",
    ["file:///etc/a.jpg", "ssh://h/a.jpg", "simplecache::s3://b/a.jpg", "memory://a::file://b.jpg"],
)
def test_kinds_of_addresses_that_reach_this_machine_are_refused(address: str) -> None:
    with pytest.raises(UsageError, match="not taken"):
        find_sources([address], web=True)


def test_the_web_is_taken_only_when_asked_for() -> None:
    with pytest.raises(UsageError, match="--web"):
        find_sources(["https://example.org/a.jpg"])


def test_a_missing_driver_is_named_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    from embedkit.scale import remote

    def absent(_: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", absent)
    with pytest.raises(MissingError, match="pip install s3fs"):
        remote.check_address("s3://bucket/a.jpg", web=False)
