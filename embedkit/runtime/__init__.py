"""Pixels in, vectors out, by an exported model that knows itself. Torch-free."""

from embedkit.runtime.backends.base import Backend, Vectors
from embedkit.runtime.contract import CONTRACT_KEY, ModelContract, SelfTest
from embedkit.runtime.embedder import Embedder, read_contract
from embedkit.runtime.pipeline import Embedded

__all__ = [
    "CONTRACT_KEY",
    "Backend",
    "Embedded",
    "Embedder",
    "ModelContract",
    "SelfTest",
    "Vectors",
    "read_contract",
]
