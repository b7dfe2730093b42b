"""Where each picture stands on a map: vectors become points, near ones near, by PaCMAP.

Method: Wang, Huang, Rudin, Shaposhnik, "Understanding How Dimension Reduction Tools Work", JMLR
2021, arXiv:2012.04456, by its authors' package.
"""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt

from embedkit.errors import MissingExtraError

__all__ = ["lay_out"]

Floats = npt.NDArray[np.float32]

# With fewer pictures there are no neighbourhoods to keep: the two widest directions say it all.
_FEW = 20


def lay_out(vectors: npt.ArrayLike, *, seed: int = 0) -> Floats:
    """``(N, 2)`` points in 0..1, their longer extent filling it; neighbours of N stay neighbours.

    Distances across the map mean little: groups stand apart, by how much is not to be read off.
    The same vectors and seed give the same map on the same machine and versions.

    Args:
        vectors: ``(N, D)`` finite; unit rows are compared as by their cosine.
        seed: Of what is drawn by chance.

    Raises:
        MissingExtraError: pacmap is not installed, and there are 20 pictures or more.

    Cost: O(N log N) time; half a minute for 50,000 vectors of 64 numbers on two cores. The first
    use after installation compiles, which takes up to a minute more.
    """
    rows = np.ascontiguousarray(vectors, np.float32)
    if len(rows) < _FEW or not np.ptp(rows, axis=0).any():
        return _fitted(_widest(rows))
    try:
        from pacmap import PaCMAP
    except ImportError as error:
        raise MissingExtraError("The atlas", package="pacmap", extra="atlas") from error
    # It warns of the seed that it was given.
    logger = logging.getLogger("pacmap.pacmap")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        found = PaCMAP(n_neighbors=min(10, len(rows) // 4), random_state=seed).fit_transform(rows)
    finally:
        logger.setLevel(level)
    return _fitted(np.asarray(found, np.float64))


def _widest(rows: Floats) -> npt.NDArray[np.float64]:
    """``(N, 2)``: the two principal components, zero where there are none."""
    out = np.zeros((len(rows), 2))
    if len(rows) < 2 or not rows.shape[1]:
        return out
    centred = rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64)
    left, lengths, _ = np.linalg.svd(centred, full_matrices=False)
    width = min(2, len(lengths))
    out[:, :width] = left[:, :width] * lengths[:width]
    return out


def _fitted(points: npt.NDArray[np.float64]) -> Floats:
    """The same picture, moved and scaled into 0..1, its middle in the middle."""
    if not len(points):
        return np.zeros((0, 2), np.float32)
    low, high = points.min(axis=0), points.max(axis=0)
    extent = float((high - low).max()) or 1.0
    inside = (points - (low + high) / 2) / extent + 0.5
    return np.asarray(inside.clip(0, 1), np.float32)
