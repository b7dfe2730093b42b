"""The whole network (uint8 pixels in, raw embedding out), its freezing and its weights' hash."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from embedkit.errors import UsageError
from embedkit.models.backbone import Backbone, Size, stage_of
from embedkit.models.folded import fold, unfold
from embedkit.models.pooling import AveragePooling, GemPooling, SecondOrderPooling, create_pooling
from embedkit.models.zoo import create_backbone

__all__ = ["EmbeddingNet", "create_network", "freeze_batch_norm", "freeze_stages", "weights_hash"]


class EmbeddingNet(nn.Module):
    """Normalisation, backbone, pooling and a linear head, in this order.

    Args:
        backbone: ``(B, 3, H, W)`` -> map.
        pooling: Map -> ``(B, F)``.
        dim: Width D of the embedding.
        mean: Per channel, of pixels in 0..1.
        std: Per channel, of pixels in 0..1.

    Attributes:
        embedding_dim: D.
        vectors: How many vectors of equal width the D numbers are, side by side; two pictures are
            as alike as their most alike vectors. 1 but for networks that make several.
        looks: Names of the methods that take pixels and give a row per picture: a batch that is
            divided among processes or into chunks is divided at these.
        head: Linear F -> D; starts with orthogonal weight and zero bias, so that angles between
            pooled features are kept as well as D allows.
        batch_norm_frozen: See `freeze_batch_norm`.
        frozen_stages: See `freeze_stages`.
    """

    looks: ClassVar[tuple[str, ...]] = ("forward", "features")

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        backbone: Backbone,
        pooling: AveragePooling | GemPooling | SecondOrderPooling,
        dim: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        if dim < 1:
            raise UsageError(
                f"the embedding's width must be at least 1, got {dim}", hint="--dim 128"
            )
        self.backbone = backbone
        self.pooling = pooling
        self.head = nn.Linear(pooling.num_features, dim)
        nn.init.orthogonal_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.embedding_dim = dim
        self.vectors = 1
        self.batch_norm_frozen = False
        self.frozen_stages = 0
        # Settings, not weights: they belong to the preprocessing and stay out of the state dict.
        spread = torch.tensor(std, dtype=torch.float64)
        offset = -torch.tensor(mean, dtype=torch.float64) / spread
        self.register_buffer("scale", (1 / (255 * spread)).float().view(3, 1, 1), persistent=False)
        self.register_buffer("shift", offset.float().view(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """``(B, H, W, 3)`` uint8 -> raw embedding ``(B, D)``, not normalised."""
        embedding: Tensor = self.head(self.features(pixels))
        return embedding

    def features(self, pixels: Tensor) -> Tensor:
        """``(B, H, W, 3)`` uint8 -> pooled ``(B, F)``: what the head reads."""
        pooled: Tensor = self.pooling(self.feature_map(pixels))
        return pooled

    def feature_map(self, pixels: Tensor) -> Tensor:
        """``(B, H, W, 3)`` uint8 -> the backbone's ``(B, C, h, w)``."""
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
            raise ValueError(
                "pixels must be uint8 of shape (B, H, W, 3), "
                f"got {pixels.dtype} {tuple(pixels.shape)}"
            )
        # Cast first, as TensorRT asks of a uint8 input. The permuted view of contiguous pixels is
        # already channels-last.
        images = pixels.to(self.scale.dtype).permute(0, 3, 1, 2)
        feature_map: Tensor = self.backbone(images * self.scale + self.shift)
        return feature_map

    def train(self, mode: bool = True) -> EmbeddingNet:
        """Training mode for all but what is frozen; evaluation mode for everything.

        Frozen batch normalisations are part of their convolutions while training; see `fold`.
        """
        super().train(mode)
        if mode:
            for name, module in self.backbone.body.named_modules():
                if _in_first(self.frozen_stages, stage_of(name, self.backbone.stages)):
                    module.eval()
            if self.batch_norm_frozen:
                for module in self.modules():
                    if isinstance(module, _BatchNorm):
                        module.eval()
        # Only while training: what is measured and exported is the network as it was made.
        if mode and self.batch_norm_frozen:
            fold(self.backbone.body)
        else:
            unfold(self.backbone.body)
        return self


def create_network(
    *,
    backbone: str,
    weights: str | Path,
    pooling: str,
    dim: int,
    image_size: Size,
    mean: Sequence[float],
    std: Sequence[float],
    make: Callable[..., EmbeddingNet] = EmbeddingNet,
) -> EmbeddingNet:
    """An `EmbeddingNet` from names; errors as `create_backbone` and `create_pooling` raise them.

    Args:
        make: Another class that takes the same arguments, its own ones bound by `partial`.
    """
    body = create_backbone(backbone, weights=weights, image_size=image_size)
    pool = create_pooling(pooling, body.num_features)
    return make(body, pool, dim, mean=mean, std=std)


def freeze_batch_norm(net: EmbeddingNet) -> None:
    """Keep every batch normalisation's running statistics, now and after every `net.train()`.

    Its scale and offset go on learning. Usual in metric learning: a PK batch is no fair sample.
    """
    net.batch_norm_frozen = True
    net.train(net.training)


def freeze_stages(net: EmbeddingNet, n: int) -> None:
    """Freeze exactly the first n stages: no gradient, and evaluation mode also during training.

    For mobilenet_v2 that is ``features[:n]``; for a ResNet the stem and the layers; 0 frees
    everything.

    Raises:
        UsageError: The backbone has not that many stages.
    """
    stages = net.backbone.stages
    if not 0 <= n <= len(stages):
        raise UsageError(
            f"{n} stages cannot be frozen",
            facts=f"{net.backbone.name} has {len(stages)}",
            hint=f"a number from 0 to {len(stages)}",
        )
    for name, parameter in net.backbone.body.named_parameters():
        parameter.requires_grad_(not _in_first(n, stage_of(name, stages)))
    net.frozen_stages = n
    net.train(net.training)


def weights_hash(net: nn.Module) -> str:
    """sha256 (hex) over names, types, shapes and values of the state dict.

    The same on every device and in every memory format.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _in_first(count: int, stage: int | None) -> bool:
    return stage is not None and stage < count
