"""Reduced graphs are valid, reduce what they say, and keep the tail in float."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

from embedkit.export.calibration import calibrate
from embedkit.export.precision import (
    Ranges,
    find_layers,
    overflowing,
    rounded_everywhere,
    to_fp16,
    to_int8,
    with_contract,
)
from embedkit.export.qdq_lint import lint_qdq
from tests.export.small import Exported, Photos


@pytest.fixture(scope="module")
def model(exported: Exported) -> Any:
    return onnx.load(exported.path)


@pytest.fixture(scope="module")
def ranges(exported: Exported, photos: Photos, tmp_path_factory: pytest.TempPathFactory) -> Ranges:
    folder = tmp_path_factory.mktemp("cache")
    return calibrate(exported.path, photos.paths, photos.labels, cache=folder).ranges


def run(model: Any, seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 32, 48, 3), dtype=np.uint8)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (vectors,) = session.run(None, {"pixels": pixels})
    return np.asarray(vectors)


def types(model: Any) -> dict[str, int]:
    return {tensor.name: tensor.data_type for tensor in model.graph.initializer}


def overflowed(model: Any) -> Any:
    """The same function, but its second layer's activations are far past 65504."""
    model = copy.deepcopy(model)
    for name, factor in (("layer1.0.conv1", 1e6), ("layer1.0.conv2", 1e-6)):
        for tensor in model.graph.initializer:
            bias = tensor.name.endswith("bias") and factor < 1
            if tensor.name.startswith(f"network.backbone.body.{name}.") and not bias:
                values = numpy_helper.to_array(tensor) * np.float32(factor)
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return model


def test_layers_are_named_as_in_the_network_and_no_node_is_in_two(
    exported: Exported, model: Any
) -> None:
    layers = find_layers(model)
    modules = dict(exported.network.backbone.body.named_modules())
    assert [layer.name for layer in layers][:3] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
    assert all(layer.name in modules for layer in layers)
    nodes = [name for layer in layers for name in layer.nodes]
    assert len(nodes) == len(set(nodes))
    operators = {node.name: node.op_type for node in model.graph.node}
    assert not {operators[name] for name in nodes} & {"Cast", "Gemm", "Pow", "ReduceL2"}


def test_int8_for_the_cpu_has_unsigned_activations_and_a_float_tail(
    model: Any, ranges: Ranges
) -> None:
    before = model.SerializeToString()
    reduced = to_int8(model, ranges, find_layers(model))
    assert model.SerializeToString() == before
    onnx.checker.check_model(reduced, full_check=True)
    kinds = types(reduced)
    assert kinds["network.head.weight"] == TensorProto.FLOAT
    assert TensorProto.UINT8 in kinds.values()
    heavy = [t for t in reduced.graph.initializer if len(t.dims) == 4 and np.prod(t.dims) > 100]
    assert {t.data_type for t in heavy} == {TensorProto.INT8}
    assert len(reduced.SerializeToString()) < 0.3 * len(before)
    assert (run(model) * run(reduced)).sum(1).min() > 0.98


def test_int8_for_tensorrt_is_symmetric_with_float_biases(model: Any, ranges: Ranges) -> None:
    reduced = to_int8(model, ranges, find_layers(model), target="tensorrt")
    onnx.checker.check_model(reduced, full_check=True)
    assert lint_qdq(reduced) == []
    points = [t for t in reduced.graph.initializer if t.name.endswith("zero_point")]
    assert points
    assert all(t.data_type == TensorProto.INT8 for t in points)
    assert not any(numpy_helper.to_array(t).any() for t in points)
    assert TensorProto.INT32 not in types(reduced).values()
    assert (run(model) * run(reduced)).sum(1).min() > 0.98


def test_a_layer_that_is_kept_stays_as_it_was(model: Any, ranges: Ranges) -> None:
    layers = find_layers(model)
    reduced = to_int8(model, ranges, [one for one in layers if one.name != "layer3.0.conv2"])
    name = "network.backbone.body.layer3.0.conv2.weight"
    assert types(reduced)[name] == TensorProto.FLOAT
    only = to_int8(model, ranges, [one for one in layers if one.name == "layer3.0.conv2"])
    weights = [t.data_type for t in only.graph.initializer if len(t.dims) == 4]
    assert weights.count(TensorProto.INT8) == 1


def test_fp16_halves_the_backbone_and_leaves_pixels_tail_and_vectors(model: Any) -> None:
    half = to_fp16(model, find_layers(model))
    onnx.checker.check_model(half, full_check=True)
    assert [list(map(str, part)) for part in (half.graph.input, half.graph.output)] == [
        list(map(str, part)) for part in (model.graph.input, model.graph.output)
    ]
    kinds = types(half)
    assert kinds["network.head.weight"] == kinds["network.scale"] == TensorProto.FLOAT
    assert {kind for name, kind in kinds.items() if name.startswith("network.backbone")} == {
        TensorProto.FLOAT16
    }
    casts = [node for node in half.graph.node if node.op_type == "Cast"]
    into = [node for node in casts if node.attribute[0].i == TensorProto.FLOAT16]
    assert len(into) == 1  # from then on no island of float
    assert len(half.SerializeToString()) < 0.52 * len(model.SerializeToString())


def test_on_a_cpu_only_the_rounded_graph_shows_what_fp16_does(model: Any) -> None:
    half = to_fp16(model, find_layers(model))
    wanted = run(model).astype(np.float64)
    loss = [1 - float((wanted * run(one)).sum(1).min()) for one in (half, rounded_everywhere(half))]
    assert loss[1] < 1e-3
    assert np.abs(run(rounded_everywhere(half)) - wanted).max() > 1e-5


def test_an_overflow_is_seen_and_a_float_island_mends_it(
    model: Any, exported: Exported, photos: Photos, tmp_path: Path
) -> None:
    spoilt = overflowed(model)
    assert run(spoilt) == pytest.approx(run(model), abs=1e-4)
    layers = find_layers(spoilt)
    assert not np.isfinite(run(rounded_everywhere(to_fp16(spoilt, layers)))).all()

    path = tmp_path / "spoilt.onnx"
    path.write_bytes(with_contract(copy.deepcopy(spoilt), exported.contract))
    seen = calibrate(path, photos.paths, photos.labels, cache=tmp_path).ranges
    nodes = set(overflowing(spoilt, seen))
    kept = [layer for layer in layers if nodes.intersection(layer.nodes)]
    assert 1 <= len(kept) <= 3
    assert "layer1.0.conv1" in [layer.name for layer in kept]
    mended = to_fp16(spoilt, [layer for layer in layers if layer not in kept])
    onnx.checker.check_model(mended, full_check=True)
    assert (run(spoilt) * run(rounded_everywhere(mended))).sum(1).min() > 0.999


def test_a_sound_network_overflows_nowhere(model: Any, ranges: Ranges) -> None:
    assert overflowing(model, ranges) == ()
    assert overflowing(model, {**ranges, "relu": (0.0, float("nan"))})
