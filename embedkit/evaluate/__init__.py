"""How well vectors find their own kind, exact and with intervals. Torch-free."""

from embedkit.evaluate.clustering import Clustering, clustering
from embedkit.evaluate.continuous import (
    ContinuousMetrics,
    TripletMetrics,
    continuous_metrics,
    triplet_metrics,
)
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
from embedkit.evaluate.several import greatest_cosines, split_rows
from embedkit.evaluate.thresholds import calibrate

__all__ = [
    "ClassResult",
    "Clustering",
    "ContinuousMetrics",
    "Difference",
    "Evaluation",
    "Interval",
    "OpenSet",
    "QueryResults",
    "RetrievalMetrics",
    "TripletMetrics",
    "calibrate",
    "clustering",
    "confidence_intervals",
    "continuous_metrics",
    "evaluate",
    "greatest_cosines",
    "nearest",
    "neighbour_overlap",
    "open_set",
    "paired_differences",
    "query_results",
    "read_per_query",
    "retrieval_metrics",
    "split_rows",
    "triplet_metrics",
]
