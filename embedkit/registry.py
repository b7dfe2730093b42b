"""Names to objects: a file in a folder is a name to type, and so is a plug-in's entry point.

``Registry("loss", "embedkit.losses")`` offers ``multi-similarity`` because there is a file
``multi_similarity.py``; the object is the first name in that file's ``__all__``. Files that begin
with an underscore are not entries. A distribution adds names of its own with an entry point in the
group ``embedkit.losses``: nothing in embedkit has to change for it.
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from embedkit.errors import EmbedKitError, UnknownNameError

__all__ = ["Registry"]


class Registry:
    """The entries of one kind.

    Args:
        kind: The noun for messages: ``"loss"``.
        package: The package whose files are the entries, and the entry-point group of the plug-ins.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package

    def names(self) -> list[str]:
        """All names, sorted; imports none of them."""
        return sorted({*self._files(), *self._plugins()})

    def get(self, name: str) -> Any:
        """The object behind ``name``.

        Raises:
            UnknownNameError: There is none; the message names the nearest.
            EmbedKitError: A plug-in is there and cannot be imported.
        """
        files = self._files()
        if name in files:
            module = importlib.import_module(f"{self.package}.{files[name]}")
            return getattr(module, module.__all__[0])
        plugins = self._plugins()
        if name not in plugins:
            raise UnknownNameError(self.kind, name, [*files, *plugins])
        try:
            return plugins[name].load()
        except Exception as error:
            raise EmbedKitError(
                f"the plug-in {self.kind} {name!r} cannot be loaded",
                facts=f"{plugins[name].value}: {error}",
            ) from error

    def _files(self) -> dict[str, str]:
        package = importlib.import_module(self.package)
        found = (module.name for module in pkgutil.iter_modules(package.__path__))
        return {name.replace("_", "-"): name for name in found if not name.startswith("_")}

    def _plugins(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.package)}
