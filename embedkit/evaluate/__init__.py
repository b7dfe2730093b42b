"""How well vectors find their own kind, exact and with intervals. Torch-free."""

from embedkit.evaluate.clustering import Clustering, clustering
from embedkit.evaluate.evaluation import ClassResult, Evaluation, evaluate, read_per_query
from embedkit.evaluate.intervals import (
    Difference,
    Interval,
    confidence_intervals,
    paired_differences,
)
from embedkit.evaluate.open_set import OpenSet, open_set
from embedkit.evaluate.retrieval import (
    QueryResults,
    RetrievalMetrics,
    nearest,
    neighbour_overlap,
    query_results,
    retrieval_metrics,
)

__all__ = [
    "ClassResult",
    "Clustering",
    "Difference",
    "Evaluation",
    "Interval",
    "OpenSet",
    "QueryResults",
    "RetrievalMetrics",
    "clustering",
    "confidence_intervals",
    "evaluate",
    "nearest",
    "neighbour_overlap",
    "open_set",
    "paired_differences",
    "query_results",
    "read_per_query",
    "retrieval_metrics",
]
