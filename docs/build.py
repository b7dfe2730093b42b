"""The Python API reference, from the docstrings, as HTML that opens offline.

    python docs/build.py FOLDER

pdoc writes a page for every room and every loss and method. A warning is an error: a name in
`__all__` that is not there, an annotation that means nothing. So is what pdoc does not look at: a
public name without a docstring, or an ``Args:`` that the signature does not have.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import get_type_hints

from pdoc import render
from pdoc.doc import Class, Doc, Function, Module

import embedkit

__all__ = ["faults", "main", "public_modules"]

# Not rooms, and named in every script that uses embedkit; and the rooms whose files are entries.
_SINGLE = ("embedkit.errors", "embedkit.registry")
_BY_FILE = ("embedkit.losses", "embedkit.methods")


def main() -> None:
    """Write the pages, or say what is wrong with the docstrings and leave with 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the pages go")
    folder: Path = parser.parse_args().folder
    pages = {name: Module(module) for name, module in public_modules().items()}
    for page in pages.values():
        page.submodules = [
            other for name, other in pages.items() if name.rpartition(".")[0] == page.fullname
        ]
    if found := [fault for page in pages.values() for fault in faults(page)]:
        sys.exit("\n".join(found))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(pages, folder)
    print(f"{len(pages)} pages: {folder / 'index.html'}")


def public_modules() -> dict[str, ModuleType]:
    """The modules a user imports from: embedkit, its rooms, each loss and each method."""
    rooms = [
        room.name
        for room in pkgutil.iter_modules(embedkit.__path__, "embedkit.")
        if room.ispkg and hasattr(importlib.import_module(room.name), "__all__")
    ]
    files = [
        file.name
        for room in _BY_FILE
        for file in pkgutil.iter_modules(importlib.import_module(room).__path__, f"{room}.")
        if not file.name.rpartition(".")[2].startswith("_")
    ]
    modules = {
        name: importlib.import_module(name) for name in ["embedkit", *_SINGLE, *rooms, *files]
    }
    for module in modules.values():
        _settle(module)
    return modules


def _settle(module: ModuleType) -> None:
    """What is resolved on first use is put where pdoc looks for it."""
    for name in module.__all__:
        value = getattr(module, name)
        setattr(module, name, value)
        if inspect.isclass(value) and issubclass(value, tuple):
            # A named tuple's constructor has forgotten the module its annotations mean.
            value.__new__.__annotations__ = get_type_hints(value)


def write(pages: dict[str, Module], folder: Path) -> None:
    """All pages, the page to begin with, and the search."""
    render.configure(
        docformat="google",
        include_undocumented=False,
        footer_text=f"embedkit {embedkit.__version__}",
    )
    for name, page in pages.items():
        file = folder / f"{name.replace('.', '/')}.html"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(render.html_module(page, pages), encoding="utf-8")
    (folder / "index.html").write_text(render.html_index(pages), encoding="utf-8")
    (folder / "search.js").write_text(render.search_index(pages), encoding="utf-8")


def faults(page: Module) -> Iterator[str]:
    """What a reader of the page would miss or be misled by, a line each."""
    if not page.docstring:
        yield f"{page.fullname}: no docstring"
    for name in page.obj.__all__:
        member = page.members[name]
        if not isinstance(member, Class | Function):
            continue
        if not member.docstring:
            yield f"{page.fullname}.{name}: no docstring"
        yield from _unknown_arguments(member)
        if isinstance(member, Class):
            for method in member.own_members:
                if isinstance(method, Function):
                    yield from _unknown_arguments(method)


def _unknown_arguments(member: Doc) -> Iterator[str]:
    described = set(_described(member.docstring))
    if not described:
        return
    real = set(inspect.signature(member.obj).parameters)
    for name in sorted(described - real):
        yield f"{member.fullname}: the docstring describes {name!r}, which is no argument of it"


def _described(docstring: str) -> list[str]:
    """The names under ``Args:``."""
    lines = iter(docstring.splitlines())
    names: list[str] = []
    for line in lines:
        if line.strip() == "Args:":
            break
    for line in lines:
        if line and not line.startswith(" "):
            break
        if found := re.match(r" {4}(\w+):", line):
            names.append(found[1])
    return names


if __name__ == "__main__":
    main()
