"""Reads a page back, for tests: tags that close, ids, pictures, text; nothing from outside."""

from __future__ import annotations

import re
from html.parser import HTMLParser

__all__ = ["ReadPage"]

_VOID = {"meta", "img", "wbr", "br"}
_SELF_CLOSED = {"line", "path", "circle", "rect"}


class ReadPage(HTMLParser):
    """Fails where tags do not close, an id is given twice, or something is loaded."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.labelled_by: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.classes: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == []
        assert len(self.ids) == len(set(self.ids))
        assert set(self.labelled_by) <= set(self.ids)
        assert not {"script", "link", "iframe", "object"} & set(self.tags)
        assert not re.search(r"url\(|@import|https?://", source)
        assert all((image["src"] or "").startswith("data:image/jpeg;") for image in self.images)
        assert all(image["alt"] for image in self.images)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in _SELF_CLOSED
        self._note(tag, attrs)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def _note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        if "id" in given:
            self.ids.append(given["id"] or "")
        self.labelled_by += (given.get("aria-labelledby") or "").split()
        self.classes += (given.get("class") or "").split()
        if tag == "img":
            self.images.append(given)
