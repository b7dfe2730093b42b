"""Serve a catalog: the HTTP API and the visual-search page. Torch-free; needs the extra `serve`."""

from embedkit.serve.api import MAX_K, Settings, create_app
from embedkit.serve.guard import LOOPBACK, Rules
from embedkit.serve.server import address, listen, running, serve

__all__ = [
    "LOOPBACK",
    "MAX_K",
    "Rules",
    "Settings",
    "address",
    "create_app",
    "listen",
    "running",
    "serve",
]
