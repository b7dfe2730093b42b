"""Sort a catalog into clusters without labels: by links, by k-means, or by density.

k-means is FAISS's own. Density is HDBSCAN (Campello, Moulavi, Sander, 2013) from scikit-learn,
which a light installation does not have.
"""

from __future__ import annotations

from collections.abc import Callable

import faiss
import numpy as np
import numpy.typing as npt

from embedkit.errors import MissingExtraError, UsageError
from embedkit.index.catalog import Catalog, Indices
from embedkit.index.duplicates import Progress, linked_groups
from embedkit.index.several import needs_one_vector

__all__ = ["ALONE", "cluster_by_density", "cluster_by_links", "cluster_by_means"]

ALONE = -1
"""The cluster of what belongs to none."""

_BLOCK = 8192
_ROUNDS = 25


def cluster_by_links(
    catalog: Catalog, least: float, *, progress: Progress | None = None
) -> Indices:
    """``(N,)``: pictures that hang together over pairs that score at least `least`.

    Clusters are numbered from 0, the largest first; who is linked to none is `ALONE`. One chance
    pair joins two clusters, so that `least` must be strict.

    Cost and errors: see `duplicates.linked_groups`.
    """
    needs_one_vector("clustering", catalog)
    roots = linked_groups(
        catalog.vectors, len(catalog), least, metric=catalog.metric, progress=progress
    )
    sizes = np.bincount(roots, minlength=len(roots))
    return _numbered(np.where(sizes[roots] > 1, roots, ALONE))


def cluster_by_means(catalog: Catalog, clusters: int, *, seed: int = 0) -> Indices:
    """``(N,)``: k-means, on the sphere where the metric is cosine; the largest cluster is 0.

    Args:
        catalog: At least `clusters` pictures.
        clusters: How many; some may stay empty, and are then not numbered.
        seed: Of the first centres, so that the same catalog gives the same clusters.

    Raises:
        UsageError: `clusters` is below 1 or above N.

    Cost: 25 rounds of O(min(N, 256 C) C D); memory 256 C vectors and the centres.
    """
    if not 1 <= clusters <= len(catalog):
        raise UsageError(
            f"k-means into {clusters:,} clusters is not possible",
            facts=f"{catalog.path.name} holds {len(catalog):,} pictures",
        )
    needs_one_vector("clustering", catalog)
    rng = np.random.default_rng(seed)
    most = min(len(catalog), 256 * clusters)
    sample = np.sort(rng.choice(len(catalog), most, replace=False))
    means = faiss.Kmeans(
        catalog.dim,
        clusters,
        niter=_ROUNDS,
        seed=seed,
        spherical=catalog.metric == "cosine",
        min_points_per_centroid=1,
    )
    means.train(catalog.vectors(sample))
    nearest = _by_blocks(
        catalog, lambda vectors: np.asarray(means.index.search(vectors, 1)[1])[:, 0]
    )
    return _numbered(nearest)


def cluster_by_density(catalog: Catalog, least_size: int = 5) -> Indices:
    """``(N,)``: HDBSCAN on the vectors; what lies in no dense place is `ALONE`.

    Args:
        catalog: Unit rows are compared by their distance, which orders as the cosine does.
        least_size: Pictures of the smallest cluster, at least 2.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        UsageError: `least_size` is below 2.

    Cost: O(N^2 D) time; memory all vectors in float64. Hours from 100,000 pictures up.
    """
    if least_size < 2:
        raise UsageError(f"the smallest cluster must have at least 2 pictures, got {least_size}")
    needs_one_vector("clustering", catalog)
    try:
        from sklearn.cluster import HDBSCAN
    except ImportError as error:
        raise MissingExtraError("HDBSCAN", package="scikit-learn", extra="train") from error
    if len(catalog) < least_size:
        return np.full(len(catalog), ALONE)
    vectors = catalog.vectors(np.arange(len(catalog)))
    found = HDBSCAN(min_cluster_size=least_size, copy=True).fit_predict(vectors)
    return _numbered(np.asarray(found, np.int64))


def _by_blocks(catalog: Catalog, nearest: Callable[[npt.NDArray[np.float32]], Indices]) -> Indices:
    found = np.empty(len(catalog), np.int64)
    for start in range(0, len(catalog), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(catalog)))
        found[rows] = nearest(catalog.vectors(rows))
    return found


def _numbered(groups: Indices) -> Indices:
    """The same clusters as 0, 1, ... by size, equal ones by their first picture; ALONE stays."""
    out = np.full(len(groups), ALONE)
    inside = np.flatnonzero(groups != ALONE)
    if not len(inside):
        return out
    _, first, codes, sizes = np.unique(
        groups[inside], return_index=True, return_inverse=True, return_counts=True
    )
    place = np.empty(len(first), np.int64)
    place[np.lexsort((first, -sizes))] = np.arange(len(first))
    out[inside] = place[codes]
    return out
