"""Which of the files are this machine's, when several share the work and never talk."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from embedkit.errors import UsageError

__all__ = ["Shard"]


@dataclass(frozen=True)
class Shard:
    """One of `count` shares of the files; every name belongs to exactly one of them.

    A name's share depends on the name alone: on no other file, machine, day or Python.

    Attributes:
        index: Which one, from 0 to `count` - 1.
        count: How many there are; with 1, everything is in it.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise UsageError(
                f"there is no shard {self.index}/{self.count}",
                facts="shards are numbered from 0 to the count less one",
                hint=f"--shard 0/{max(self.count, 1)}",
            )

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Of ``2/8``: the third of eight.

        Raises:
            UsageError: It is no such pair, or there is no such shard.
        """
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text.strip())
        if match is None:
            raise UsageError(f"--shard takes two numbers, got {text!r}", hint="--shard 0/8")
        return cls(int(match[1]), int(match[2]))

    def has(self, name: str | bytes) -> bool:
        """Whether the file of this name is in it."""
        return self.count == 1 or self.owner(name, self.count) == self.index

    @staticmethod
    def owner(name: str | bytes, count: int) -> int:
        """Which of `count` shares a name is in: BLAKE2b-64 of its bytes, modulo `count`."""
        digest = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
        return int.from_bytes(digest, "big") % count

    def named(self, file: Path) -> Path:
        """The name of this share's own file: ``vectors.npy`` -> ``vectors.2-of-8.npy``.

        So that every machine can be given the same command line but for its number.
        """
        if self.count == 1:
            return file
        return file.with_name(f"{file.stem}.{self.index}-of-{self.count}{file.suffix}")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"
