"""The recipes that come with embedkit: a paper's settings, what it reported, and how to run it.

Each is a file ``models/recipes/NAME.toml`` as ``embedkit train --config`` reads it; the comment
that opens it says what it is: a title, then lines ``# Paper: ...``.
"""

from __future__ import annotations

import importlib.resources
import re
from dataclasses import dataclass
from pathlib import Path

from embedkit.errors import UnknownNameError

__all__ = ["FACTS", "RecipeFile", "find_recipe", "read_recipe", "recipe_names"]

FACTS = ("Paper", "Data", "Run", "Reported", "Source", "Differs")
"""What every recipe says of itself, in this order."""


@dataclass(frozen=True)
class RecipeFile:
    """One recipe.

    Attributes:
        name: Of the file, without its ending.
        title: Method and data.
        facts: By the words in `FACTS`.
        text: The whole file.
    """

    name: str
    title: str
    facts: dict[str, str]
    text: str


def recipe_names() -> list[str]:
    """All names, sorted."""
    return sorted(path.stem for path in _folder().glob("*.toml"))


def read_recipe(name: str) -> RecipeFile:
    """A recipe by its name.

    Raises:
        UnknownNameError: There is none; the message names the nearest.
    """
    if name not in recipe_names():
        raise UnknownNameError("recipe", name, recipe_names())
    text = (_folder() / f"{name}.toml").read_text(encoding="utf-8")
    title, facts = "", {}
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        said = line.removeprefix("#").strip()
        fact = re.match(rf"({'|'.join(FACTS)}): (.*)", said)
        if fact:
            facts[fact[1]] = fact[2]
        elif facts:
            last = next(reversed(facts))
            facts[last] += f" {said}"
        else:
            title = f"{title} {said}".strip()
    return RecipeFile(name, title.rstrip("."), facts, text)


def find_recipe(given: Path) -> Path:
    """The file that ``--config`` names: a path, or the name of a recipe that comes with embedkit.

    Raises:
        UnknownNameError: It is a plain name, and there is neither such a file nor such a recipe.
    """
    if given.exists() or given.name != str(given) or given.suffix:
        return given
    if given.name not in recipe_names():
        raise UnknownNameError("file or recipe", given.name, recipe_names())
    return _folder() / f"{given.name}.toml"


def _folder() -> Path:
    # The folder of the package, without importing it: it holds PyTorch, and a list does not.
    return Path(str(importlib.resources.files("embedkit"))) / "models" / "recipes"
