"""Vectors in, hits out: the catalog, its store, and the sync that keeps both true to a folder.

The names below are resolved on first use: a search needs no store and no sync.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedkit.index.catalog import Catalog, Hit, Row, write_catalog
    from embedkit.index.choose import Choice, Wanted
    from embedkit.index.edit import compact_index, remove_files
    from embedkit.index.merge import merge_indexes
    from embedkit.index.sync import (
        SyncReport,
        add_files,
        remembered_dim,
        remembered_model,
        sync_folder,
    )
    from embedkit.index.verify import verify_index

__all__ = [
    "Catalog",
    "Choice",
    "Hit",
    "Row",
    "SyncReport",
    "Wanted",
    "add_files",
    "compact_index",
    "merge_indexes",
    "remembered_dim",
    "remembered_model",
    "remove_files",
    "sync_folder",
    "verify_index",
    "write_catalog",
]

_HOMES = {
    "Catalog": "catalog",
    "Choice": "choose",
    "Hit": "catalog",
    "Row": "catalog",
    "SyncReport": "sync",
    "Wanted": "choose",
    "add_files": "sync",
    "compact_index": "edit",
    "merge_indexes": "merge",
    "remembered_dim": "sync",
    "remembered_model": "sync",
    "remove_files": "edit",
    "sync_folder": "sync",
    "verify_index": "verify",
    "write_catalog": "catalog",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'embedkit.index' has no attribute {name!r}")
    return getattr(importlib.import_module(f"embedkit.index.{_HOMES[name]}"), name)
