"""Backbones, pooling and the network around them. One family of backbones per file."""

from __future__ import annotations

from embedkit.models.backbone import Backbone, BackboneEntry
from embedkit.models.network import (
    EmbeddingNet,
    create_network,
    freeze_batch_norm,
    freeze_stages,
    weights_hash,
)
from embedkit.models.pooling import create_pooling, pooling_names
from embedkit.models.zoo import backbone_entry, backbone_names, create_backbone

__all__ = [
    "Backbone",
    "BackboneEntry",
    "EmbeddingNet",
    "backbone_entry",
    "backbone_names",
    "create_backbone",
    "create_network",
    "create_pooling",
    "freeze_batch_norm",
    "freeze_stages",
    "pooling_names",
    "weights_hash",
]
