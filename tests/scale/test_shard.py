"""Shards: every name in exactly one, the same everywhere and for ever, and about equally many."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from embedkit.errors import UsageError
from embedkit.imaging import Shard

NAMES = [f"class{n % 7}/photo {n}.jpg" for n in range(2000)]


@pytest.mark.parametrize("count", [1, 2, 3, 8, 100])
def test_every_name_is_in_exactly_one_shard(count: int) -> None:
    owners = Counter(i for name in NAMES for i in range(count) if Shard(i, count).has(name))
    assert sum(owners.values()) == len(NAMES)


def test_shards_are_about_equally_large() -> None:
    sizes = [sum(Shard(i, 4).has(name) for name in NAMES) for i in range(4)]
    assert max(sizes) - min(sizes) < 5 * (len(NAMES) / 4) ** 0.5


def test_the_shard_of_a_name_is_written_down_here_and_never_changes() -> None:
    # b2sum -l 64 of the bytes, modulo 8, by another program.
    assert [n for n in range(8) if Shard(n, 8).has("a/1.jpg")] == [0x00B28D7E6A132EB3 % 8]
    assert [n for n in range(8) if Shard(n, 8).has("caf\udce9.jpg")] == [0x1A465498A08B9047 % 8]


def test_another_process_with_another_hash_seed_agrees() -> None:
    code = "from embedkit.imaging import Shard; print([Shard(3, 5).has(str(n)) for n in range(50)])"
    answers = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert answers == {f"{[Shard(3, 5).has(str(n)) for n in range(50)]}\n"}


def test_it_is_written_as_two_numbers_and_named_in_the_file() -> None:
    shard = Shard.parse(" 2/8")
    assert (shard.index, shard.count, str(shard)) == (2, 8, "2/8")
    assert shard.named(Path("a/vectors.npy")) == Path("a/vectors.2-of-8.npy")
    assert Shard().named(Path("vectors.npy")) == Path("vectors.npy")


@pytest.mark.parametrize("text", ["8/8", "1/0", "0/0", "-1/8", "1", "a/b", "1/8/2", "", "1.5/2"])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Shard.parse(text)
