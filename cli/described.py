"""What the docstring of a loss or method says, in parts: the docstring is the one source."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

__all__ = ["Described", "describe"]


@dataclass(frozen=True)
class Described:
    """A loss or method in words.

    Attributes:
        about: The sentence that opens its file, without the full stop.
        paper: Where it is from, in full, and what is not from there.
        short: The same in a few words: ``Wang et al., CVPR 2019``; empty where no paper is named.
        text: The class's docstring before and after its options.
        options: What each option means, by name.
    """

    about: str
    paper: str
    short: str
    text: str
    options: dict[str, str]


def describe(kind: type) -> Described:
    """The parts of the docstrings of a class and of the file it stands in."""
    module = inspect.getmodule(kind)
    opening = _paragraphs(inspect.getdoc(module) or "")
    about, paper = opening[:1], opening[1:]
    before, options, after = _parted(inspect.getdoc(kind) or "")
    return Described(
        about="".join(about).rstrip("."),
        paper="\n\n".join(paper),
        short=_short(" ".join(paper)),
        text="\n\n".join(part for part in (before, after) if part),
        options=options,
    )


def _paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def _parted(text: str) -> tuple[str, dict[str, str], str]:
    """What stands before ``Args:``, its entries, and what stands after."""
    before, _, rest = text.partition("Args:\n")
    lines = rest.splitlines()
    end = next((n for n, line in enumerate(lines) if line and line[0] != " "), len(lines))
    options: dict[str, str] = {}
    name = ""
    for line in lines[:end]:
        entry = re.match(r" {4}(\w+): (.*)", line)
        if entry:
            name = entry[1]
            options[name] = entry[2]
        elif name and line.strip():
            options[name] += f" {line.strip()}"
    return before.strip(), options, "\n".join(lines[end:]).strip()


def _short(paper: str) -> str:
    """First author, venue and year, from ``Paper: A, B, "Title", CVPR 2019, arXiv:...``."""
    quoted = re.search(r'(.*?)"[^"]+",?\s*(.*)', paper)
    if quoted is None:
        return ""
    authors = re.sub(r"^.*?(?:Papers?: | of )", "", quoted[1]).strip(" ,")
    first, *others = [part.strip() for part in re.split(r",| and ", authors) if part.strip()]
    who = f"{first} et al." if others else first
    venue = re.search(r"[A-Z][A-Za-z]+(?: [A-Z]{2,})? \d{4}|arXiv:\d{4}\.\d+", quoted[2])
    return f"{who}, {venue[0]}" if venue else who
