"""The small JSON files a comparison is kept in: each appears whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from embedkit.atomic import published
from embedkit.errors import MismatchError

__all__ = ["read_json", "write_json"]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Publish a document; the same content gives the same bytes."""
    with published(path) as temporary:
        text = json.dumps(content, indent=1, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any] | None:
    """A document of `write_json`, or None where there is none.

    Raises:
        MismatchError: It cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise MismatchError(
            f"{path} is damaged", facts=str(error), hint="delete it: it will be made again"
        ) from error
    if not isinstance(content, dict):
        raise MismatchError(f"{path} is damaged", hint="delete it: it will be made again")
    return content
