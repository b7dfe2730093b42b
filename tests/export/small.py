"""What the fixtures of the export tests hand out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from embedkit.models import EmbeddingNet
from embedkit.runtime import ModelContract

__all__ = ["Exported", "MakeNetwork", "Photos"]

MakeNetwork = Callable[..., tuple[EmbeddingNet, ModelContract]]


@dataclass(frozen=True)
class Photos:
    """Paths and labels, one label per path."""

    paths: list[Path]
    labels: list[str]


@dataclass(frozen=True)
class Exported:
    """A file, the network it came from, and what it says about itself."""

    path: Path
    network: EmbeddingNet
    contract: ModelContract
