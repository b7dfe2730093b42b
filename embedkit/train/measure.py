"""What is measured of embeddings, by what the data knows of its photos, and how it is told."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.evaluate import continuous_metrics, retrieval_metrics, triplet_metrics
from embedkit.train.plan import Plan

__all__ = ["brief", "measure", "quality", "quality_name"]

# The one number a checkpoint is chosen by, for each kind of metrics, and how people write it.
_QUALITY = {"map@r": "MAP@R", "ndcg@10": "nDCG@10", "triplet_accuracy": "triplet accuracy"}
_KS = (1, 10)


def measure(
    plan: Plan, rows: npt.NDArray[np.int64], embeddings: npt.NDArray[np.float32], *, metric: str
) -> dict[str, Any]:
    """Flat metrics of the photos in these rows of the plan.

    Args:
        embeddings: ``(len(rows), D)``, or ``(len(rows), K, D)`` for K vectors per photo.
        metric: ``cosine`` or ``l2``; retrieval of classes is by cosine always.
    """
    photos = plan.photos.subset(rows)
    query, gallery = _flags(photos.is_query), _flags(photos.is_gallery)
    if photos.triplets is not None:
        places = [(one.a, one.b, one.odd) for one in photos.triplets]
        return triplet_metrics(embeddings, places, metric=metric).to_json()
    if plan.measured_by() == "numbers":
        assert photos.targets is not None
        return continuous_metrics(
            embeddings, photos.targets, ks=_KS, query=query, gallery=gallery, metric=metric
        ).to_json()
    return retrieval_metrics(embeddings, photos.labels, query=query, gallery=gallery).to_json()


def quality(metrics: dict[str, Any]) -> float:
    """The number a checkpoint is chosen by, the greater the better; 0 where there was nothing."""
    return float(metrics[_key(metrics)] or 0)


def quality_name(metrics: dict[str, Any]) -> str:
    """What `quality` is, in words."""
    return _QUALITY[_key(metrics)]


def brief(metrics: dict[str, Any], digits: int = 4) -> str:
    """Two numbers for a line."""

    def show(name: str) -> str:
        return "-" if metrics[name] is None else f"{metrics[name]:.{digits}f}"

    if "triplet_accuracy" in metrics:
        return f"triplet accuracy {show('triplet_accuracy')}"
    if "ndcg@10" in metrics:
        near = metrics["target_distance@1"]
        distance = "-" if near is None else f"{near:.{digits}g}"
        return f"nDCG@10 {show('ndcg@10')}  target distance {distance}"
    return f"recall@1 {show('recall@1')}  MAP@R {show('map@r')}"


def _key(metrics: dict[str, Any]) -> str:
    return next(name for name in _QUALITY if name in metrics)


def _flags(column: tuple[bool, ...] | None) -> npt.NDArray[np.bool_] | None:
    """None where they mark nothing, because the data marks another split only."""
    return None if column is None or not any(column) else np.array(column)
