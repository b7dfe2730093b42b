"""The test classes: networks are measured on them and nothing is ever chosen by them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedkit.data import PhotoLoader, PhotoSet
from embedkit.errors import DataError
from embedkit.evaluate import retrieval_metrics, split_rows
from embedkit.models import EmbeddingNet
from embedkit.train import Recipe

__all__ = ["HeldOut", "Metrics", "metric_names"]

Floats = npt.NDArray[np.float32]
Metrics = dict[str, float]

_BATCH = 64


def metric_names(ks: Sequence[int]) -> list[str]:
    """What is measured, in the order it is shown; P@1 is recall@1."""
    return ["recall@1", "r_precision", "map@r", *(f"recall@{k}" for k in ks if k > 1)]


class HeldOut:
    """Test photos, decoded once.

    Args:
        photos: Of classes that are not trained on.
        recipe: For its preprocessing.
        ks: Of recall@k.
        device: Where the networks run.
        workers: Decoding threads; None: one per core.
    """

    def __init__(
        self,
        photos: PhotoSet,
        recipe: Recipe,
        *,
        ks: Sequence[int],
        device: torch.device,
        workers: int | None,
    ) -> None:
        self._photos, self._ks, self._device = photos, tuple(ks), device
        self._loader = PhotoLoader(
            photos.files(), recipe.preprocess(), augment=None, seed=0, workers=workers
        )

    def embed(self, network: EmbeddingNet) -> Floats:
        """``(N, D)`` unit embeddings, of K vectors per photo ``(N, K, D)``; the network moves to
        the device."""
        return split_rows(self._vectors(network, network), network.vectors)

    def features(self, network: EmbeddingNet) -> Floats:
        """``(N, F)`` unit rows of the pooled features, before the head."""
        return self._vectors(network, network.features)

    def measure(self, vectors: Floats) -> Metrics:
        """Retrieval among the test photos, by cosine; lone queries are left out.

        Raises:
            DataError: No query has a match.
        """
        found = retrieval_metrics(
            vectors,
            self._photos.labels,
            ks=self._ks,
            query=_mask(self._photos.is_query),
            gallery=_mask(self._photos.is_gallery),
        ).to_json()
        if found["map@r"] is None:
            raise DataError(
                "no test photo has a match among the others",
                facts=f"{found['queries']} queries, by the data's is_query and is_gallery",
            )
        return {name: float(found[name]) for name in metric_names(self._ks)}

    def _vectors(self, network: EmbeddingNet, embed: Callable[[Tensor], Tensor]) -> Floats:
        network.to(self._device).eval()
        if self._device.type != "mps":
            network.to(memory_format=torch.channels_last)
        parts = []
        with torch.inference_mode():
            for pixels in self._loader.plain(range(len(self._photos)), _BATCH):
                batch = torch.from_numpy(pixels).to(self._device)
                parts.append(embed(batch).float().cpu().numpy())
        rows = np.concatenate(parts)
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        unit: Floats = (rows / np.maximum(lengths, 1e-30)).astype(np.float32)
        return unit


def _mask(column: tuple[bool, ...] | None) -> npt.NDArray[np.bool_] | None:
    """None where it marks nothing, because the data marks another split only."""
    return np.array(column) if column is not None and any(column) else None
