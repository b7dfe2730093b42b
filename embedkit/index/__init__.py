"""Vectors in, hits out: the catalog, its store, and the sync that keeps both true to a folder."""

from embedkit.index.catalog import Catalog, Hit, Row, write_catalog
from embedkit.index.sync import SyncReport, remembered_model, sync_folder

__all__ = [
    "Catalog",
    "Hit",
    "Row",
    "SyncReport",
    "remembered_model",
    "sync_folder",
    "write_catalog",
]
