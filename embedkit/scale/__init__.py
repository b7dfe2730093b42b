"""Many pictures, many machines: sources of every kind in, files of vectors out. Torch-free."""

from embedkit.scale.embed import EmbedReport, Engine, embed_sources, format_of, local_engine
from embedkit.scale.find import count_files, find_sources
from embedkit.scale.source import Source
from embedkit.scale.write import FORMATS

__all__ = [
    "FORMATS",
    "EmbedReport",
    "Engine",
    "Source",
    "count_files",
    "embed_sources",
    "find_sources",
    "format_of",
    "local_engine",
]
