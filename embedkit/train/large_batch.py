"""Batches larger than memory, exactly: the network sees a part at a time, the loss sees all.

Gao, Zhang, Han, Callan, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
RepL4NLP 2021, arXiv:2101.06983 (gradient caching). A part's embeddings are computed without keeping
what its gradient needs; once the loss has its gradient to all embeddings, each part is computed
again, with the same random numbers, and its gradient goes on through the network. So the gradient
is that of the whole batch, for one more forward pass, and what is kept of an image until then is
its pixels and its embedding.

That holds where an image's embedding depends on that image alone. BatchNorm must be frozen; dropout
draws other numbers than for the whole batch, in the same way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from embedkit.errors import UsageError
from embedkit.methods import Batch
from embedkit.models import EmbeddingNet
from embedkit.train.distributed import World

__all__ = ["check_divisible", "divided", "in_chunks"]

Embed = Callable[[Tensor], Tensor]


def divided(
    network: EmbeddingNet, batch: Batch, *, chunk: int | None, world: World
) -> EmbeddingNet:
    """The network as a step sees it: itself, or one that takes the batch apart.

    Args:
        batch: Of the step; in several processes its `pixels` are this one's part of it.
        chunk: Images at a time; None: all of them.
        world: Whose processes share the batch.
    """
    if chunk is None and world.alone:
        return network

    def route(embed: Embed, pixels: Tensor) -> Tensor:
        own = embed if chunk is None else partial(in_chunks, embed, size=chunk)
        if world.alone:
            return own(pixels)
        if pixels is not batch.pixels:
            raise UsageError(
                "this method cannot be trained in several processes",
                facts="it takes its batches apart by itself",
            )
        return world.compute(own, pixels, len(batch.rows))

    # The same parts and parameters, of the same class: only its calls on pixels go another way.
    rerouted = copy.copy(network)
    for look in network.looks:
        setattr(rerouted, look, partial(route, getattr(network, look)))
    return rerouted


def check_divisible(network: EmbeddingNet, *, chunk: int | None, world: World) -> None:
    """Refuse a network whose images see each other in training, when batches are divided.

    Args:
        network: With everything frozen that is to be.

    Raises:
        UsageError: It has BatchNorm that learns its statistics.
    """
    network.train()
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    if (chunk is None and world.alone) or not any(norm.training for norm in norms):
        return
    raise UsageError(
        f"{'--chunk' if world.alone else 'training in several processes'} needs frozen BatchNorm",
        facts="its statistics would be those of a part of the batch, not of the batch",
        hint="--freeze-batch-norm, or a backbone without it: convnext_tiny, vit_b_16",
    )


def in_chunks(embed: Embed, pixels: Tensor, size: int) -> Tensor:
    """``embed(pixels)``, `size` images at a time in both directions.

    Args:
        embed: ``(B, H, W, 3)`` -> ``(B, D)``, row by row.
        pixels: B may be 0, and need not be a multiple of `size`.
    """
    if len(pixels) <= size:
        return embed(pixels)
    return torch.cat([_recomputed(embed, piece) for piece in torch.split(pixels, size)])


def _recomputed(embed: Embed, pixels: Tensor) -> Tensor:
    result: Tensor = checkpoint(embed, pixels, use_reentrant=False)
    return result
