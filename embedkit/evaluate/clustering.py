"""Do clusters of embeddings agree with the labels: NMI and AMI of k-means.

Older papers report them; "A Metric Learning Reality Check" (arXiv:2003.08505) advises against
leading with them. NMI is over the arithmetic mean of the entropies, as scikit-learn has it since
0.22; older papers took the geometric mean.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import MissingExtraError, UsageError
from embedkit.evaluate.ranking import prepare
from embedkit.evaluate.retrieval import Labels, class_codes

__all__ = ["Clustering", "clustering"]


@dataclass(frozen=True)
class Clustering:
    """One k-means, as many clusters as classes.

    Attributes:
        nmi: Normalised mutual information with the labels, 0..1.
        ami: Adjusted for chance: 0 is what a random grouping gets.
        clusters: How many.
        n_init: Starts of which the best by k-means' own measure counts.
        random_state: Of scikit-learn.
    """

    nmi: float
    ami: float
    clusters: int
    n_init: int
    random_state: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def clustering(
    embeddings: npt.ArrayLike,
    labels: Labels,
    *,
    metric: str = "cosine",
    n_init: int = 1,
    random_state: int = 0,
) -> Clustering:
    """Cluster the rows (unit rows for ``cosine``) and compare with the labels.

    Args:
        embeddings: ``(N, D)``, N at least 1.
        labels: ``(N,)``.
        metric: ``cosine`` or ``l2``.
        n_init: See `Clustering`.
        random_state: See `Clustering`.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        UsageError: K vectors per picture: k-means has no mean of such pictures.
        EmbedKitError: An embedding holds NaN or infinity.

    Cost: O(N x classes x D) for each of at most 300 rounds.
    """
    shape = np.asarray(embeddings).shape
    if len(shape) == 3:
        raise UsageError(
            "NMI and AMI need one vector per picture",
            facts=f"there are {shape[1]}, and k-means has no mean of such pictures",
        )
    try:
        from sklearn.cluster import KMeans
        from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
    except ImportError as error:
        raise MissingExtraError("NMI and AMI", package="scikit-learn", extra="train") from error
    rows, _ = prepare(embeddings, metric)
    codes = class_codes(labels, len(rows))
    clusters = int(codes.max()) + 1
    found = KMeans(clusters, n_init=n_init, random_state=random_state).fit_predict(rows)
    return Clustering(
        nmi=float(normalized_mutual_info_score(codes, found)),
        ami=float(adjusted_mutual_info_score(codes, found)),
        clusters=clusters,
        n_init=n_init,
        random_state=random_state,
    )
