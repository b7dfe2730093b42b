"""Every error a user can act on, each with the exit code of the command that meets it.

    EmbedKitError                     1  it failed
    |- UsageError                     2  wrong usage
    |  `- UnknownNameError            2  no such loss, backbone, ... (names the nearest real one)
    |- DataError                      2  unusable data
    |  `- ImageError                  2  one file that is no usable picture (`code` says why)
    |- NotFiniteError                 1  the numbers of a training ran away
    |- GateError                      4  a quality gate failed
    |- MismatchError                  5  artefacts do not belong together, or a file is damaged
    |- MissingError                   6  an asked-for device, provider or package is not there
    |  `- MissingExtraError           6  a package of an extra (names the pip line)
    `- Interrupted                  130  stopped by the user; what is saved and how to go on

Exit code 3 is no error: the work was finished, and some inputs were skipped and named.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

__all__ = [
    "DataError",
    "EmbedKitError",
    "GateError",
    "ImageError",
    "Interrupted",
    "MismatchError",
    "MissingError",
    "MissingExtraError",
    "NotFiniteError",
    "UnknownNameError",
    "UsageError",
]


class EmbedKitError(Exception):
    """What happened, the facts, and what to type: three short texts, in this order.

    Args:
        what: One line without a full stop.
        facts: What was found and what was expected; may have several lines.
        hint: The command or change that helps.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, facts: str | None = None, hint: str | None = None) -> None:
        super().__init__("\n".join(part for part in (what, facts, hint) if part))
        self.what = what
        self.facts = facts
        self.hint = hint


class UsageError(EmbedKitError):
    """The command or call was wrong."""

    exit_code = 2


class UnknownNameError(UsageError):
    """No such name; the message carries the nearest real one and the whole list.

    Args:
        kind: What was looked up, as a noun: ``"loss"``.
        name: What was given.
        known: All real names.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=1)
        super().__init__(
            f"there is no {kind} named {name!r}",
            facts=f"known: {', '.join(names)}",
            hint=f"did you mean {near[0]!r}?" if near else None,
        )


class DataError(EmbedKitError):
    """The data cannot be used as it is."""

    exit_code = 2


class ImageError(DataError):
    """One file that is no usable picture.

    Args:
        code: A stable short word for lists and JSON: ``unreadable``, ``not-an-image``,
            ``truncated``, ``too-large``, ``too-many-scans``, ``empty``, ``not-a-file``,
            ``unsupported``.
        reason: One line for people, without the file's name.
    """

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        return type(self), (self.code, self.reason)


class NotFiniteError(EmbedKitError):
    """The numbers of a training ran away, as they do at a learning rate that is too high."""


class GateError(EmbedKitError):
    """An artefact was made and is not as good as promised; it was not published."""

    exit_code = 4


class MismatchError(EmbedKitError):
    """Two artefacts do not belong together, or one is damaged or foreign."""

    exit_code = 5


class MissingError(EmbedKitError):
    """An asked-for device, provider or package is missing."""

    exit_code = 6


class MissingExtraError(MissingError):
    """A package of one of embedkit's extras is not installed.

    Args:
        what: Who needs it: ``"The onnxruntime backend"``.
        package: The missing package.
        extra: The extra that brings it.
    """

    def __init__(self, what: str, *, package: str, extra: str) -> None:
        super().__init__(
            f"{what} needs the package {package}, which is not installed",
            hint=f'pip install "embedkit[{extra}]"',
        )


class Interrupted(EmbedKitError):
    """Stopped by the user after saving."""

    exit_code = 130
