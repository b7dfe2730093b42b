"""Vectors in, hits out: the catalog, its store, and the sync that keeps both true to a folder."""

from embedkit.index.catalog import Catalog, Hit, Row, write_catalog
from embedkit.index.choose import Choice, Wanted
from embedkit.index.edit import compact_index, remove_files
from embedkit.index.merge import merge_indexes
from embedkit.index.sync import SyncReport, add_files, remembered_model, sync_folder
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
    "remembered_model",
    "remove_files",
    "sync_folder",
    "verify_index",
    "write_catalog",
]
