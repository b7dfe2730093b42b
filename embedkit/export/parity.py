"""Where a file and the network it came from part, stage by stage from the pixels on."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from embedkit.export.precision import find_layers
from embedkit.imaging import Pixels
from embedkit.models import EmbeddingNet

__all__ = ["stage_errors"]

Activations = np.ndarray[Any, np.dtype[np.float32]]


def stage_errors(model: Any, network: EmbeddingNet, pixels: Pixels) -> dict[str, float]:
    """Relative error of the file's activations, by stage: ``pixels`` (as normalised), then those of
    `Backbone.stages` that are one module of the network and one tensor of the file, in order and
    without the last, whose end is not told from the pooling.

    Args:
        model: The fp32 graph, a ModelProto; left as it is.
        network: Left as it is.
        pixels: ``(N, height, width, 3)`` uint8; a few are enough.

    Values are ``|file - network| / |network|``; infinity where one is not finite. Cost: the pixels
    once through each, and all these activations in memory.
    """
    tensors = _tensors(model, network)
    expected = _of_network(network, list(tensors), pixels)
    given = _of_file(model, list(tensors.values()), pixels)
    errors = {}
    for (stage, tensor), wanted in zip(tensors.items(), expected, strict=True):
        found = given[tensor]
        if wanted is not None and found.shape == wanted.shape:
            length = max(float(np.linalg.norm(wanted)), 1e-30)
            with np.errstate(invalid="ignore", over="ignore"):
                error = float(np.linalg.norm(found - wanted))
            errors[stage] = error / length if np.isfinite(error) else float("inf")
    return errors


def _tensors(model: Any, network: EmbeddingNet) -> dict[str, str]:
    """By stage, the tensor of the file that should be its output."""
    nodes = {node.name: node for node in model.graph.node}
    layers = find_layers(model)
    tensors = {"pixels": nodes[layers[0].nodes[0]].input[0]} if layers else {}
    for stage in network.backbone.stages[:-1]:
        inside = [layer for layer in layers if f"{layer.name}.".startswith(f"{stage[0]}.")]
        if len(stage) == 1 and inside:
            tensors[stage[0]] = nodes[inside[-1].nodes[-1]].output[0]
    return tensors


def _of_network(
    network: EmbeddingNet, stages: list[str], pixels: Pixels
) -> list[Activations | None]:
    network = copy.deepcopy(network).cpu().eval()
    seen: dict[str, Activations] = {}

    def keep(stage: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            seen[stage] = value.float().numpy()

    network.backbone.register_forward_pre_hook(lambda _, given: keep("pixels", given[0]))
    for stage in stages[1:]:
        module = network.backbone.body.get_submodule(stage)
        module.register_forward_hook(lambda _, __, out, stage=stage: keep(stage, out))
    with torch.inference_mode():
        network(torch.from_numpy(pixels))
    return [seen.get(stage) for stage in stages]


def _of_file(model: Any, tensors: list[str], pixels: Pixels) -> dict[str, Activations]:
    model = copy.deepcopy(model)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    values = session.run(tensors, {model.graph.input[0].name: pixels})
    return dict(zip(tensors, values, strict=True))
