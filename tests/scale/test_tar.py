"""Tar files as a source: what is in them, in order; nothing on the disk; damage is named."""

from __future__ import annotations

import io
import tarfile
import tracemalloc
from dataclasses import replace

import pytest

from embedkit.errors import ImageError
from embedkit.imaging import Limits
from embedkit.scale import Source
from embedkit.scale.tar import is_tar, tar_sources
from tests.scale.places import jpeg, tar_of

PHOTOS = {f"cats/{n}.jpg": jpeg(n) for n in range(5)}


def read(data: bytes, limits: Limits | None = None) -> list[Source]:
    name = "t.tgz" if data.startswith(b"\x1f\x8b") else "t.tar"
    sources = tar_sources(io.BytesIO(data), name, limits=limits)
    return [replace(source.held(), path=source.path.replace(name, "t.tar")) for source in sources]


def failures(sources: list[Source]) -> list[tuple[str, str]]:
    return [(s.path, s.content.code) for s in sources if isinstance(s.content, ImageError)]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_every_picture_comes_out_in_order_with_its_bytes(mode: str) -> None:
    sources = read(tar_of({"readme.txt": b"hello", **PHOTOS}, mode=mode))
    assert [source.path for source in sources] == [f"t.tar/{name}" for name in PHOTOS]
    assert [source.content for source in sources] == list(PHOTOS.values())
    assert {source.label for source in sources} == {"cats"}
    assert len({source.stamp for source in sources if source.stamp}) >= 1


def test_a_webdataset_sample_has_the_label_that_stands_before_it() -> None:
    photo = jpeg(0)
    members = {"s/01.cls": b"17\n", "s/01.jpg": photo, "s/02.jpg": photo, "s/02.cls": b"3"}
    assert [source.label for source in read(tar_of(members))] == ["17", "s"]


def test_a_picture_that_was_passed_over_costs_nothing_and_harms_no_other() -> None:
    stream = tar_sources(io.BytesIO(tar_of(PHOTOS)), "t.tar")
    kept = [source.held() for n, source in enumerate(stream) if n % 2]
    assert [source.content for source in kept] == [PHOTOS["cats/1.jpg"], PHOTOS["cats/3.jpg"]]


def test_links_devices_and_paths_that_climb_have_no_effect() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo("x.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        member = tarfile.TarInfo("../../up.jpg")
        member.size = len(PHOTOS["cats/0.jpg"])
        archive.addfile(member, io.BytesIO(PHOTOS["cats/0.jpg"]))
    (source,) = read(file.getvalue())
    assert source.path == "t.tar/../../up.jpg"
    assert source.content == PHOTOS["cats/0.jpg"]


def test_wherever_a_tar_is_cut_what_was_whole_counts_and_the_rest_is_named() -> None:
    whole = tar_of(PHOTOS)
    ends = [0]
    for data in PHOTOS.values():
        ends.append(ends[-1] + 512 + -(-len(data) // 512) * 512)
    for length in range(0, ends[-1], 700):
        sources = read(whole[:length])
        good = [source.content for source in sources if isinstance(source.content, bytes)]
        least = sum(end <= length for end in ends[1:])
        assert good[:least] == list(PHOTOS.values())[:least]
        assert len(good) <= least + 1  # the padding of the last may be what is missing
        assert failures(sources)[-1] == ("t.tar", "truncated")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_damaged_byte_never_ends_a_tar_in_silence(mode: str) -> None:
    whole = tar_of(PHOTOS, mode=mode)
    for at in range(3, len(whole) - 600, 331):
        broken = bytearray(whole)
        broken[at] ^= 0xFF
        sources = read(bytes(broken))
        named = [source for source in sources if isinstance(source.content, bytes)]
        assert len(named) == len(PHOTOS) or failures(sources)


@pytest.mark.parametrize("data", [b"", b"not a tar" * 100, jpeg(0), b"\x1f\x8b" + b"x" * 99])
def test_what_is_no_tar_is_one_failure(data: bytes) -> None:
    assert failures(read(data)) == [("t.tar", "truncated")]


@pytest.mark.parametrize("mode", ["w:bz2", "w:xz"])
def test_other_compressions_are_not_opened(mode: str) -> None:
    assert failures(read(tar_of(PHOTOS, mode=mode))) == [("t.tar", "truncated")]


def test_an_empty_tar_holds_nothing() -> None:
    assert read(tar_of({})) == []


def test_a_long_member_is_refused_unread_and_the_next_one_is_fine() -> None:
    big = b"\xff\xd8" + bytes(100_000)
    sources = read(tar_of({"a.jpg": big, "b.jpg": jpeg(1)}), Limits(max_bytes=5000))
    assert failures(sources) == [("t.tar/a.jpg", "too-large")]
    assert sources[1].content == jpeg(1)


def test_a_header_cannot_ask_for_memory() -> None:
    bomb = tarfile.TarInfo("x")
    bomb.type, bomb.size = tarfile.XHDTYPE, 1 << 40
    tracemalloc.start()
    sources = read(bomb.tobuf() + bytes(1 << 16))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert failures(sources) == [("t.tar", "truncated")]
    assert peak < 10_000_000


def test_names_say_what_is_a_tar() -> None:
    assert is_tar("a/B.TAR")
    assert is_tar("s3://x/y.tar.gz")
    assert not is_tar("tar.jpg")
