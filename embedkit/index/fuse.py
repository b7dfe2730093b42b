"""Several models answer together: the score of a picture is the mean of what each gives it.

Bai, Tang, Torr, Latecki, "Re-ranking via Metric Fusion", CVPR 2019, calls this naive fusion; with
equal weights their unified ensemble diffusion smooths the very same mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from embedkit.errors import MismatchError, UsageError
from embedkit.index.catalog import Catalog, Hit, Indices, Vectors

__all__ = ["Fusion"]

Doubles = npt.NDArray[np.float64]


class Fusion:
    """Catalogs of the same pictures, each by its own model, searched as one.

    A picture is the same where its path is; what is not in every catalog is left out.

    Args:
        catalogs: Two or more, with names, cosine.
        weights: One for each, positive; None: all the same. They are scaled to sum 1.

    Attributes:
        shared: How many pictures are in every catalog.
        left_out: How many are not.

    Raises:
        UsageError: Fewer than two, or weights that do not fit.
        MismatchError: Catalogs that cannot be fused, or have no picture in common.

    Cost: O(N) time and memory for the paths.
    """

    def __init__(self, catalogs: Sequence[Catalog], weights: Sequence[float] | None = None) -> None:
        given = np.ones(len(catalogs)) if weights is None else np.asarray(weights, np.float64)
        if len(catalogs) < 2 or given.shape != (len(catalogs),) or not (given > 0).all():
            raise UsageError(
                "fusion takes two catalogs or more, and a positive weight for each",
                facts=f"got {len(catalogs)} catalogs and {given.size} weights",
            )
        for catalog in catalogs:
            if catalog.metric != "cosine" or not catalog.has_names:
                raise MismatchError(
                    f"{catalog.path.name} cannot be fused with others",
                    facts="its names are gone"
                    if not catalog.has_names
                    else "its vectors are compared by distance, which has another scale per model",
                )
        self.catalogs = tuple(catalogs)
        self.weights: Doubles = given / given.sum()
        places = [_places(catalog) for catalog in self.catalogs]
        shared = [path for path in places[0] if all(path in one for one in places[1:])]
        if not shared:
            raise MismatchError(
                "these indexes have no picture in common",
                facts=", ".join(f"{one.path.name}: {one.root}" for one in self.catalogs),
                hint="index the same folder with each model",
            )
        # (shared, catalogs): where each shared picture stands in each catalog.
        self._positions: Indices = np.array(
            [[one[path] for one in places] for path in shared], np.int64
        )
        self.shared = len(shared)
        self.left_out = len(set().union(*places)) - len(shared)
        # From a position in a catalog to the shared picture's number; -1: not shared.
        self._number = [np.full(len(one), -1, np.int64) for one in self.catalogs]
        for column, number in enumerate(self._number):
            number[self._positions[:, column]] = np.arange(self.shared)

    def search(self, vectors: Sequence[npt.ArrayLike], k: int = 10) -> list[list[Hit]]:
        """The `k` pictures of the highest mean score, as hits of the first catalog.

        Exact where the catalogs are (the threshold algorithm of Fagin, Lotem and Naor, 2003): the
        lists of the single catalogs are taken deeper until what is not in them cannot reach the
        k-th any more. Equal scores stand in the order of the first catalog's ids.

        Args:
            vectors: For each catalog the same Q queries, embedded by its model: ``(Q, D_v)``.
            k: At least 1; more than `shared` gives all of them.

        Raises:
            UsageError: Not one array of the same Q for each catalog.

        Cost: searches of 4 k, 16 k, ... hits in each catalog; for queries on which the models do
        not agree at all, up to O(N D).
        """
        queries = [np.asarray(one, np.float32) for one in vectors]
        if len(queries) != len(self.catalogs) or len({len(one) for one in queries}) != 1:
            raise UsageError(
                "fusion takes the same queries once for each catalog",
                facts=f"got {[one.shape for one in queries]} for {len(self.catalogs)} catalogs",
            )
        if k < 1:
            raise UsageError(f"k must be at least 1, got {k}")
        return [
            self._search_one([one[row] for one in queries], min(k, self.shared))
            for row in range(len(queries[0]))
        ]

    def _search_one(self, query: list[Vectors], k: int) -> list[Hit]:
        most = max(map(len, self.catalogs))
        depth = min(4 * k, most)
        while True:
            lists = [
                catalog.search(one[None], min(depth, len(catalog)))[0]
                for catalog, one in zip(self.catalogs, query, strict=True)
            ]
            candidates = self._candidates(lists)
            scores = self._scores(query, candidates)
            order = np.lexsort((self._positions[candidates, 0], -scores))[:k]
            ends = np.array([hits[-1].score if hits else -1.0 for hits in lists])
            reach = float(self.weights @ ends) + 1e-6
            if depth >= most or (len(order) == k and scores[order[-1]] > reach):
                return [
                    self._hit(int(candidates[at]), rank, float(scores[at]))
                    for rank, at in enumerate(order, start=1)
                ]
            depth = min(4 * depth, most)

    def _candidates(self, lists: list[list[Hit]]) -> Indices:
        numbers = [
            number[catalog.positions(hits)]
            for number, catalog, hits in zip(self._number, self.catalogs, lists, strict=True)
        ]
        found = np.unique(np.concatenate(numbers))
        candidates: Indices = found[found >= 0]
        return candidates

    def _scores(self, query: list[Vectors], candidates: Indices) -> Vectors:
        total = np.zeros(len(candidates))
        for column, (catalog, one) in enumerate(zip(self.catalogs, query, strict=True)):
            scores = catalog.scores(one, self._positions[candidates, column])
            total += self.weights[column] * scores.astype(np.float64)
        return total.astype(np.float32)

    def _hit(self, number: int, rank: int, score: float) -> Hit:
        hit = self.catalogs[0].hit(int(self._positions[number, 0]))
        return replace(hit, rank=rank, score=score)


def _places(catalog: Catalog) -> dict[str, int]:
    """Every picture's path, and its position."""
    return {str(catalog.hit(at).path): at for at in range(len(catalog))}
