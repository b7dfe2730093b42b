"""A file is a name; a plug-in is a name; a wrong name is answered with the nearest right one."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from embedkit import registry
from embedkit.errors import EmbedKitError, UnknownNameError
from embedkit.registry import Registry


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    package = tmp_path / "shelf_for_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "_shared.py").write_text("raise RuntimeError('never imported')")
    (package / "plain.py").write_text("__all__ = ['Plain', 'other']\nclass Plain: ...\nother = 1\n")
    (package / "two_words.py").write_text("__all__ = ['TwoWords']\nclass TwoWords: ...\n")
    (package / "broken.py").write_text("raise RuntimeError('imported without need')")
    monkeypatch.syspath_prepend(tmp_path)
    yield Registry("book", "shelf_for_test")
    for name in [name for name in sys.modules if name.startswith("shelf_for_test")]:
        del sys.modules[name]


def test_names_are_the_files_with_dashes_and_none_is_imported(shelf: Registry) -> None:
    assert shelf.names() == ["broken", "plain", "two-words"]


def test_the_object_is_the_first_public_name_of_the_file(shelf: Registry) -> None:
    assert shelf.get("plain").__name__ == "Plain"
    assert shelf.get("two-words").__name__ == "TwoWords"


@pytest.mark.parametrize("name", ["plane", "two_words", "_shared", "", "plain.py", "../plain"])
def test_anything_else_is_refused(shelf: Registry, name: str) -> None:
    with pytest.raises(UnknownNameError, match="there is no book named"):
        shelf.get(name)


def test_a_plug_in_adds_a_name_and_a_broken_one_is_named(
    shelf: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [
        EntryPoint("ordered", "collections:OrderedDict", "shelf_for_test"),
        EntryPoint("gone", "no_such_module_at_all:Thing", "shelf_for_test"),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    assert {"ordered", "gone", "plain"} <= set(shelf.names())
    assert shelf.get("ordered").__name__ == "OrderedDict"
    with pytest.raises(EmbedKitError, match="no_such_module_at_all") as caught:
        shelf.get("gone")
    assert caught.value.exit_code == 1
