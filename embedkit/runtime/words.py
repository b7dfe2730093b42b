"""What a model's contract says, in sentences for people: for `embedkit info` and the model card."""

from __future__ import annotations

from typing import Any

from embedkit.imaging.preprocess import Preprocess
from embedkit.runtime.contract import ModelContract

__all__ = ["METRICS", "megabytes", "network_in_words", "preprocess_in_words", "scores_in_words"]
__all__ += ["trained_on"]

METRICS = {"recall@1": "recall@1", "map@r": "MAP@R", "r_precision": "R-precision", "mrr": "MRR"}
"""Retrieval metrics worth a line, by the names they have in JSON."""


_GREATEST = "the greatest of their cosines"


def network_in_words(contract: ModelContract) -> str:
    """``resnet10, gem pooling, 64 numbers of unit length, compared by cosine``.

    Of several vectors: ``2 vectors of 32 numbers, compared by the greatest of their cosines``.
    """
    parts = [contract.backbone, f"{contract.pooling} pooling" if contract.pooling else ""]
    length = " of unit length" if contract.normalizes else ""
    compared = "cosine" if contract.metric == "cosine" else "Euclidean distance"
    narrower = " or ".join(f"{prefix.dim}" for prefix in contract.prefixes)
    first = f" (or the first {narrower})" if narrower else ""
    numbers = f"{contract.embedding_dim} numbers{length}{first}"
    if contract.vectors > 1:
        each = contract.embedding_dim // contract.vectors
        numbers, compared = f"{contract.vectors} vectors of {each} numbers", _GREATEST
    parts += [numbers, f"compared by {compared}"]
    return ", ".join(filter(None, parts))


def preprocess_in_words(preprocess: Preprocess) -> list[str]:
    """From a file to the network's input, a step per sentence."""
    share = "" if preprocess.crop_ratio == 1 else f", shrunk to {preprocess.crop_ratio:.4g} of it"
    steps = [
        "Turned upright by its EXIF orientation; transparent parts over white; RGB.",
        f"Cut: the largest centred box of the shape {preprocess.width} x {preprocess.height}"
        f" (width x height){share}.",
        f"Resampled to {preprocess.width} x {preprocess.height} pixels in one step, "
        f"{preprocess.filter} with antialiasing, uint8.",
        "Inside the model: divided by 255, minus the mean "
        f"{_numbers(preprocess.mean)}, divided by {_numbers(preprocess.std)}.",
    ]
    smallest = preprocess.decode_size()
    if smallest is not None:
        steps.insert(
            0,
            "A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size while both sides keep "
            f"{smallest} pixels.",
        )
    return steps


def trained_on(data: dict[str, Any]) -> list[str]:
    """Photos and classes of each split that has any; nothing where that is not known."""
    lines = []
    splits = data.get("splits")
    for name, counts in splits.items() if isinstance(splits, dict) else ():
        if isinstance(counts, dict) and counts.get("images"):
            lines.append(f"{name}: {counts['images']:,} photos of {counts['classes']:,} classes")
    return lines


def scores_in_words(thresholds: dict[str, float]) -> str:
    """From which score on a hit is called a match; empty where the model was not calibrated."""
    names = ("match", "match_false", "unsure", "unsure_false")
    if any(not isinstance(thresholds.get(name), int | float) for name in names):
        return ""
    match, match_false, unsure, unsure_false = (thresholds[name] for name in names)
    queries = thresholds.get("queries")
    of = f", measured on {queries:,.0f} held-out photos" if queries else ""
    return (
        f"match from {match:.4g} ({100 * match_false:.3g} % of strangers reach it), unsure from "
        f"{unsure:.4g} ({100 * unsure_false:.3g} %){of}"
    )


def megabytes(size: int) -> str:
    """A file's size: ``9.5 MB``, or ``86.0 kB`` below a tenth of that."""
    return f"{size / 1e6:,.1f} MB" if size >= 100_000 else f"{size / 1e3:,.1f} kB"


def _numbers(values: tuple[float, float, float]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"
