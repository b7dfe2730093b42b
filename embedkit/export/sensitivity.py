"""Which layers lose the most when they are reduced: each one alone, measured at the embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime

from embedkit.export.precision import Layer
from embedkit.imaging import Pixels
from embedkit.runtime.backends.base import Vectors

__all__ = ["LayerError", "layer_errors", "run_graph"]

# Pictures of the calibration; the order of layers settles with very few.
_PICTURES = 16

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LayerError:
    """What one layer costs.

    Attributes:
        layer: Which.
        error: Mean of 1 - cosine with the fp32 embedding when only this layer is reduced; infinity
            when vectors are no longer finite.
    """

    layer: Layer
    error: float


def layer_errors(
    model: Any,
    layers: Sequence[Layer],
    reduce: Callable[[Sequence[Layer]], Any],
    pixels: Pixels,
    *,
    progress: Progress | None = None,
) -> tuple[LayerError, ...]:
    """Every layer with its error, the worst first.

    Args:
        model: The fp32 graph, a ModelProto.
        layers: Of `find_layers`.
        reduce: Makes the graph in which just these layers are reduced.
        pixels: ``(N, height, width, 3)``, of the calibration; the first 16 are used.
        progress: Called as ``progress(done, failed)``, once a layer.

    Cost: one conversion and 16 pictures for every layer.
    """
    pixels = pixels[:_PICTURES]
    expected = _unit(run_graph(model, pixels))
    errors = []
    for layer in layers:
        vectors = _unit(run_graph(reduce([layer]), pixels))
        error = float(1 - (expected * vectors).sum(1).mean())
        errors.append(LayerError(layer, error if np.isfinite(error) else float("inf")))
        if progress:
            progress(1, 0)
    return tuple(sorted(errors, key=lambda one: -one.error))


def run_graph(model: Any, pixels: Pixels) -> Vectors:
    """Vectors of a graph in memory, on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (vectors,) = session.run([model.graph.output[0].name], {model.graph.input[0].name: pixels})
    return np.asarray(vectors, np.float32)


def _unit(vectors: Vectors) -> np.ndarray[Any, np.dtype[np.float64]]:
    rows = vectors.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite becomes NaN
        return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30))
