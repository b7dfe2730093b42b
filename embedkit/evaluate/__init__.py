"""How well vectors find their own kind: recall@k, MAP@R, R-precision, neighbours. Torch-free."""

from embedkit.evaluate.retrieval import (
    RetrievalMetrics,
    nearest,
    neighbour_overlap,
    retrieval_metrics,
)

__all__ = ["RetrievalMetrics", "nearest", "neighbour_overlap", "retrieval_metrics"]
