"""Several vectors per picture: two pictures are as alike as their most alike vectors.

Such a picture is a row of K vectors side by side in files, stores and engines, and ``(K, D)`` where
pictures are compared: the shape says that there are several.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["greatest_cosines", "greatest_products", "split_rows"]

Doubles = npt.NDArray[np.float64]


def split_rows(rows: npt.NDArray[Any], vectors: int) -> npt.NDArray[Any]:
    """``(N, K D)`` -> ``(N, K, D)``, a view; for K = 1 the rows themselves.

    Raises:
        ValueError: The rows cannot be cut into `vectors` equal parts.
    """
    if vectors == 1:
        return rows
    if rows.ndim != 2 or rows.shape[1] % vectors:
        raise ValueError(f"rows of shape {rows.shape} are not {vectors} vectors side by side")
    return rows.reshape(len(rows), vectors, rows.shape[1] // vectors)


def greatest_cosines(queries: npt.NDArray[Any], found: npt.NDArray[Any]) -> Doubles:
    """``(Q, M)``: how alike pictures ``(Q, K, D)`` and ``(M, K, D)`` are, in float64.

    Vectors need not be of unit length; one without a direction has the cosine 0 with all. Cost:
    O(Q M K^2 D).
    """
    return greatest_products(_unit(queries), _unit(found))


def greatest_products(
    left: npt.NDArray[Any], right: npt.NDArray[Any], out: npt.NDArray[Any] | None = None
) -> npt.NDArray[Any]:
    """``(b, g)``: of pictures ``(b, K, D)`` and ``(g, K, D)`` the greatest of the inner products.

    Beside `out`, memory for one more block of scores.
    """
    best: npt.NDArray[Any] | None = None
    for one in range(left.shape[1]):
        for other in range(right.shape[1]):
            if best is None:
                best = np.matmul(left[:, one], right[:, other].T, out=out)
            else:
                np.maximum(best, left[:, one] @ right[:, other].T, out=best)
    assert best is not None, "a picture has at least one vector"
    return best


def _unit(vectors: npt.NDArray[Any]) -> Doubles:
    wide = vectors.astype(np.float64)
    lengths = np.sqrt((wide * wide).sum(axis=2, keepdims=True))
    unit: Doubles = wide / np.maximum(lengths, 1e-30)
    return unit
