"""How tangled classes are in an embedding, and which ones: the cumulative spectral gradient.

Paper: Branchaud-Charron, Achkar, Jodoin, "Spectral Metric for Dataset Complexity Assessment", CVPR
2019, arXiv:1905.07299. Ours: unit rows, neighbours by cosine with the row itself taken out by its
index, an own random generator, draws with replacement from classes of at most M photos, the volumes
in logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.evaluate import nearest

__all__ = ["Complexity", "Confusion", "complexity", "spectral_gradient"]

Floats = npt.NDArray[np.float64]

_DRAWS = 10
# Student's t, 97.5 % with _DRAWS - 1 = 9 degrees of freedom.
_T = 2.262157
_LEAST_VOLUME = 1e-4
_MOST_CLASSES = 1000
_SHOWN = 20


@dataclass(frozen=True)
class Confusion:
    """Two classes that share neighbours.

    Attributes:
        a: Name of a class.
        b: Name of the other.
        similarity: 1 - Bray-Curtis of their neighbour distributions, 0 apart to 1 the same.
        a_in_b: Share of the neighbours of `a` that are of `b`, 0 to 1.
        b_in_a: The other way.
    """

    a: str
    b: str
    similarity: float
    a_in_b: float
    b_in_a: float


@dataclass(frozen=True)
class Complexity:
    """CSG of a labelled embedding: relative, for the same model, samples and neighbours only.

    Attributes:
        csg: Mean over the draws; 0 is separable, higher is harder.
        low: Of the 95 % interval of that mean.
        high: The same.
        draws: How often samples were drawn.
        classes: How many took part in a draw.
        samples: Most of one class in a draw.
        neighbours: Of each sample.
        own: Mean share of neighbours that are of the sample's own class, 0 to 1.
        confusions: The most similar pairs of classes, worst first; those that share nothing are
            left out.
    """

    csg: float
    low: float
    high: float
    draws: int
    classes: int
    samples: int
    neighbours: int
    own: float
    confusions: tuple[Confusion, ...]

    def to_json(self) -> dict[str, Any]:
        """The attributes; confusions as a list of objects."""
        return {**vars(self), "confusions": [vars(pair) for pair in self.confusions]}


def complexity(
    embeddings: npt.ArrayLike,
    labels: Sequence[str],
    *,
    neighbours: int = 3,
    samples: int = 100,
    seed: int = 0,
) -> Complexity:
    """The CSG over ten draws of samples, with its interval, and the most confusable classes.

    Args:
        embeddings: ``(N, D)``, scaled to unit rows here; no row all zero.
        labels: ``(N,)`` names; classes of one photo are left out.
        neighbours: k of the paper, at least 1.
        samples: M of the paper, of each class in each draw; as many as it has where it has fewer.
        seed: Of the draws.

    Raises:
        ValueError: Sizes do not fit, or fewer than two classes have two rows.

    Of more than 1,000 classes, 1,000 are drawn by the seed, and the others are as if not there.
    Cost: `nearest` of all rows; for each draw O(K^3), 2 s at 1,000 classes.
    """
    rows = np.asarray(embeddings, np.float32)
    if len(rows) != len(labels):
        raise ValueError(f"{len(rows)} embeddings and {len(labels)} labels")
    if neighbours < 1 or samples < 1:
        raise ValueError("neighbours and samples must be at least 1")
    names, codes, sizes = np.unique(np.array(labels), return_inverse=True, return_counts=True)
    usable = np.flatnonzero(sizes >= 2)
    if len(usable) < 2:
        raise ValueError("fewer than two classes have two rows")
    generator = np.random.default_rng(seed)
    if len(usable) > _MOST_CLASSES:
        usable = np.sort(generator.choice(usable, _MOST_CLASSES, replace=False))
    inside = np.isin(codes, usable)
    rows, names = rows[inside], names[usable]
    codes = np.searchsorted(usable, codes[inside])
    rows = rows / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    k = min(neighbours, len(rows) - 1)
    near = nearest(rows, k)
    weight = _density(rows, near)
    members = [np.flatnonzero(codes == code) for code in range(len(names))]
    total = np.zeros((len(names), len(names)))
    values = []
    for _ in range(_DRAWS):
        shares = np.zeros((len(names), len(names)))
        for code, own in enumerate(members):
            # With replacement where a class has no more than M photos: else all draws were one.
            count = min(len(own), samples)
            own = generator.choice(own, count, replace=len(own) <= samples)
            # Only ratios within a row count, so the largest weight of a class may be 1.
            scaled = np.exp(weight[own] - weight[own].max())
            np.add.at(shares[code], codes[near[own]], scaled[:, None])
        shares /= shares.sum(axis=1, keepdims=True)
        total += shares
        values.append(spectral_gradient(shares))
    mean = float(np.mean(values))
    half = _T * float(np.std(values, ddof=1)) / math.sqrt(_DRAWS)
    average = total / _DRAWS
    return Complexity(
        csg=mean,
        low=max(mean - half, 0.0),
        high=mean + half,
        draws=_DRAWS,
        classes=len(names),
        samples=samples,
        neighbours=k,
        own=float(np.diagonal(average).mean()),
        confusions=_confusions(average, names.tolist()),
    )


def spectral_gradient(shares: npt.ArrayLike) -> float:
    """CSG of a ``(K, K)`` matrix S whose row i says where the neighbours of class i lie.

    W_ij = 1 - BrayCurtis(S_i, S_j), L = D - W, eigenvalues l_0 <= ... <= l_{K-1}, gradient_i =
    (l_{i+1} - l_i) / (K - i), and the sum of the running maximum of that. 0 for one class.
    """
    w = _similarity(np.asarray(shares, np.float64))
    np.fill_diagonal(w, 0)
    values = np.linalg.eigvalsh(np.diag(w.sum(axis=1)) - w)
    count = len(w)
    gradient = np.diff(values) / (count - np.arange(count - 1))
    # Eigenvalues that are equal come out in rounding's order; CSG of separable classes is 0.
    return float(np.maximum.accumulate(gradient.clip(min=0)).sum())


def _similarity(shares: Floats) -> Floats:
    """``(K, K)`` 1 - Bray-Curtis of the rows; two rows of nothing share nothing."""
    w = np.zeros((len(shares), len(shares)))
    for place, row in enumerate(shares):
        apart = np.abs(shares - row).sum(axis=1)
        both = (shares + row).sum(axis=1)
        w[place] = np.where(both > 0, 1 - apart / np.where(both > 0, both, 1), 0)
    return w


def _density(rows: Floats, near: npt.NDArray[np.int64]) -> Floats:
    """``(N,)`` logarithm of 1 / V, V the box that holds the neighbours, floored as in the paper."""
    density = np.empty(len(rows))
    for start in range(0, len(rows), 1024):
        part = slice(start, start + 1024)
        box = 2 * np.abs(rows[near[part]] - rows[part, None]).max(axis=1)
        with np.errstate(divide="ignore"):  # a flat box has no volume: the floor counts
            volume = np.log(box).sum(axis=1)
        density[part] = -np.maximum(volume, np.log(_LEAST_VOLUME))
    return density


def _confusions(shares: Floats, names: list[str]) -> tuple[Confusion, ...]:
    w = np.triu(_similarity(shares), 1)
    order = np.argsort(-w, axis=None, kind="stable")[:_SHOWN]
    pairs = [divmod(int(place), len(names)) for place in order]
    return tuple(
        Confusion(
            a=names[i],
            b=names[j],
            similarity=float(w[i, j]),
            a_in_b=float(shares[i, j]),
            b_in_a=float(shares[j, i]),
        )
        for i, j in pairs
        if w[i, j] > 0
    )
