"""Pictures in the terminal, where it can show them: `embedkit search ./query.jpg --preview`."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Any

from embedkit.cli.display import Display
from embedkit.errors import MissingExtraError

if TYPE_CHECKING:
    from embedkit.report import SheetRow

__all__ = ["Viewer"]

_WIDEST = 100  # columns


class Viewer:
    """Shows rows of pictures: in full where the terminal knows kitty's or the sixel protocol, else
    as coloured blocks.

    Finding out what a terminal can takes a question to it; nobody pays for that who did not ask for
    pictures.
    """

    def __init__(self, display: Display, image: Any) -> None:
        self._display, self._image = display, image

    @classmethod
    def find(cls, display: Display) -> Viewer | None:
        """None where there is no terminal to show pictures, which is said; not under ``--json``.

        Raises:
            MissingExtraError: textual-image is not installed.
        """
        if display.as_json:
            return None
        if not (display.shows_colour and sys.stdin.isatty()):
            display.warn("--preview needs a terminal that shows colours: no pictures")
            return None
        # It says in the log, with a traceback, that a terminal did not tell how large a letter is.
        logging.getLogger("textual_image").setLevel(logging.ERROR)
        try:
            from textual_image.renderable import Image
        except ImportError as error:
            raise MissingExtraError(
                "search --preview", package="textual-image", extra="preview"
            ) from error
        if not os.get_terminal_size(sys.stdout.fileno()).columns:
            display.warn("--preview needs a terminal that tells its size: no pictures")
            return None
        return cls(display, Image)

    def show(self, row: SheetRow) -> None:
        """The query and its hits, nearest first, five in a line."""
        from embedkit.report import contact_strip

        width = min(self._display.columns, _WIDEST)
        self._display.answer(self._image(contact_strip(row), width=width, height="auto"))
