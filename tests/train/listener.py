"""A reporter for tests: it remembers what it was told, and can strike at a line or a step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

__all__ = ["Listener"]


class Listener:
    """A reporter that remembers, and does something at a line or a step."""

    def __init__(
        self,
        *,
        at_step: dict[int, Callable[[], None]] | None = None,
        at_note: dict[str, Callable[[], None]] | None = None,
    ) -> None:
        self.notes: list[tuple[str, str]] = []
        self.warnings: list[str] = []
        self.steps = 0
        self._at_step, self._at_note = at_step or {}, at_note or {}

    def note(self, label: str, text: str) -> None:
        self.notes.append((label, text))
        if label in self._at_note:
            self._at_note.pop(label)()

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def alarms(self) -> list[str]:
        """Warnings of a collapse; the others are of the photos."""
        return [text for text in self.warnings if "collapsed" in text]

    @contextlib.contextmanager
    def progress(self, what: str, total: int | None) -> Iterator[Callable[[int, int], None]]:
        training = what.startswith("epoch")

        def advance(done: int, failed: int) -> None:
            if training and done:
                self.steps += 1
                if self.steps in self._at_step:
                    self._at_step.pop(self.steps)()

        yield advance
