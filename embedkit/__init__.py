"""Train an image embedding on your photos, export it proven equal, search without PyTorch.

The public names below are resolved on first use, so that ``import embedkit`` costs neither torch
nor onnxruntime nor faiss.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedkit.errors import EmbedKitError
    from embedkit.imaging import Preprocess
    from embedkit.index import Catalog
    from embedkit.runtime import Embedder, ModelContract

__version__ = "0.1.0"

__all__ = ["Catalog", "EmbedKitError", "Embedder", "ModelContract", "Preprocess", "__version__"]

_HOMES = {
    "Catalog": "embedkit.index",
    "EmbedKitError": "embedkit.errors",
    "Embedder": "embedkit.runtime",
    "ModelContract": "embedkit.runtime",
    "Preprocess": "embedkit.imaging",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'embedkit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
