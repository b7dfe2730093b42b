"""The same graph with 16-bit floats or 8-bit integers: precision is written into the ONNX itself.

Typed graphs (casts for fp16; QuantizeLinear and DequantizeLinear, in short Q/DQ, for int8) serve
every runtime, because TensorRT 11 and TensorRT for RTX take precision from nowhere else. The CPU
and TensorRT want different int8 graphs:

- ``cpu``: unsigned asymmetric activations on every operator; on Conv, MatMul and Gemm only where
  there is attention, which loses too much otherwise. Only this one is fast in ONNX Runtime.
- ``tensorrt``: signed symmetric activations, zero point 0, on Conv, MatMul and Gemm, biases in
  float: what NVIDIA's builders accept.

Both scale weights per output channel and take the activations' range from calibration, least to
greatest. Never reduced: casting and normalising the pixels, and the tail (pooling, head, L2 norm).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from embedkit.runtime.contract import CONTRACT_KEY, ModelContract
from embedkit.runtime.seal import sealed

__all__ = ["FP16_MAX", "Layer", "Ranges", "find_layers", "overflowing", "to_fp16", "to_int8"]
__all__ += ["rounded_everywhere", "with_contract"]

Ranges = Mapping[str, tuple[float, float]]
"""Least and greatest value seen, by the tensor's name."""

FP16_MAX = 65504.0
# Calibration sees few photos: what comes this near to the limit may pass it on another.
_HEADROOM = 2.0

_WEIGHTED = ("Conv", "Gemm", "MatMul")
# Sums over many values, and exponentials: in float in every reduced precision.
_FLOAT_OPERATORS = ("LayerNormalization", "Softmax", "ReduceMean", "ReduceSum", "ReduceL2", "Pow")
# Operators whose floats need not all be of one type.
_SEVERAL_TYPES = ("Cast", "ConstantOfShape", "Range", "Resize")
_BODY, _BACKBONE = "network.backbone.body.", "network.backbone."


@dataclass(frozen=True)
class Layer:
    """One weighted node with what follows it up to the next: what is reduced or kept together.

    Attributes:
        name: As in the network: ``layer1.0.conv1``.
        nodes: Names of its nodes in the graph.
    """

    name: str
    nodes: tuple[str, ...]


def find_layers(model: Any) -> tuple[Layer, ...]:
    """The backbone's layers in order; the pixels' normalisation and the tail belong to none."""
    nodes = list(model.graph.node)
    constants = {tensor.name for tensor in model.graph.initializer}
    weighted = [i for i, node in enumerate(nodes) if _is_weighted(node, constants)]
    ours = [i for i, node in enumerate(nodes) if any(n.startswith(_BACKBONE) for n in node.input)]
    # What the exporter transposed has lost its name, so the last named node may come before it.
    last = max(ours, default=-1)
    starts = [i for i in weighted if i <= last]
    ends = [*starts[1:], last + 1]
    return tuple(
        Layer(_name(nodes[start:end]), tuple(node.name for node in nodes[start:end]))
        for start, end in zip(starts, ends, strict=bool(starts))
    )


def to_int8(model: Any, ranges: Ranges, reduced: Collection[Layer], *, target: str = "cpu") -> Any:
    """`model` with `reduced` in 8 bits and everything else as it is.

    Args:
        model: The fp32 graph, a ModelProto; left as it is.
        ranges: Of every float tensor, from calibration.
        reduced: Of `find_layers`; at least one.
        target: ``cpu`` or ``tensorrt``.

    Cost: one copy of the model.
    """
    from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType, TensorsData
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    attention = any(node.op_type == "Softmax" for node in model.graph.node)
    everything = sorted({*QDQRegistry, *QLinearOpsRegistry} - set(_FLOAT_OPERATORS))
    on_gpu = target == "tensorrt"
    seen = TensorsData(
        CalibrationMethod.MinMax,
        {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()},
    )
    quantizer = QDQQuantizer(
        copy.deepcopy(model),
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8 if on_gpu else QuantType.QUInt8,
        tensors_range=seen,
        nodes_to_quantize=[name for layer in reduced for name in layer.nodes],
        nodes_to_exclude=[],
        op_types_to_quantize=list(_WEIGHTED) if on_gpu or attention else everything,
        extra_options={
            "ActivationSymmetric": on_gpu,
            "WeightSymmetric": True,
            "QuantizeBias": not on_gpu,
        },
    )
    _quietly(quantizer.quantize_model)
    result = quantizer.model.model
    _sort(result.graph)
    return result


def to_fp16(model: Any, reduced: Collection[Layer]) -> Any:
    """`model` with `reduced` in 16-bit floats; pixels in and vectors out stay as they are.

    The converters of onnxruntime and onnxconverter-common round to 16 bits between any two nodes
    that are to stay in float, the tail's among them, and name a cast twice where two such nodes
    read one tensor, which is no valid ONNX; so this is done here.

    Args:
        model: The fp32 graph, a ModelProto; left as it is.
        reduced: Of `find_layers`; normalisation layers, softmax and means among their nodes stay
            in 32 bits.

    Cost: one copy of the model.
    """
    result = onnx.shape_inference.infer_shapes(model)
    graph = result.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    values = [*graph.input, *graph.output, *graph.value_info]
    floats = {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    floats |= {name for name, t in constants.items() if t.data_type == TensorProto.FLOAT}
    wanted = {name for layer in reduced for name in layer.nodes}
    stay = {*_FLOAT_OPERATORS, *_SEVERAL_TYPES}
    halved = [n for n in graph.node if n.name in wanted and n.op_type not in stay]
    narrow = {name for node in halved for name in node.output} & floats
    in_half = {node.name for node in halved}
    nodes: list[Any] = []
    there: set[str] = set()
    for node in graph.node:
        wants_half = node.name in in_half
        for place, name in enumerate(node.input):
            if name not in floats or (name in narrow) == wants_half:
                continue
            other = f"{name}.{'half' if wants_half else 'float'}"
            node.input[place] = other
            if other in there:
                continue
            there.add(other)
            if name in constants:
                array = onnx.numpy_helper.to_array(constants[name])
                with np.errstate(over="ignore"):  # the gate says what an infinite weight does
                    graph.initializer.append(
                        onnx.numpy_helper.from_array(array.astype(np.float16), other)
                    )
            else:
                kind = TensorProto.FLOAT16 if wants_half else TensorProto.FLOAT
                nodes.append(helper.make_node("Cast", [name], [other], name=other, to=kind))
        nodes.append(node)
    _replace_all(graph.node, nodes)
    read = {name for node in graph.node for name in node.input}
    needed = [tensor for tensor in graph.initializer if tensor.name in read]
    _replace_all(graph.initializer, needed)
    del graph.value_info[:]  # types of before
    return result


def overflowing(model: Any, ranges: Ranges) -> tuple[str, ...]:
    """Nodes that 16-bit floats cannot hold: they make or take a value near or past 65504."""
    limit = FP16_MAX / _HEADROOM
    large = {
        name
        for name, (low, high) in ranges.items()
        if not (abs(low) < limit and abs(high) < limit)  # so that NaN counts
    }
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            values = onnx.numpy_helper.to_array(tensor)
            if values.size and not np.abs(values).max() < FP16_MAX:
                large.add(tensor.name)
    return tuple(
        node.name for node in model.graph.node if large.intersection([*node.input, *node.output])
    )


def rounded_everywhere(model: Any) -> Any:
    """An fp16 graph in which every 16-bit tensor really is rounded, wherever it runs.

    ONNX Runtime computes 16-bit nodes in 32 bits on a CPU and drops the casts between them, so
    that rounding errors and overflow of a GPU would go unseen. Casts that are written into the
    graph it keeps.
    """
    result = onnx.shape_inference.infer_shapes(model)
    halves = {
        value.name
        for value in [*result.graph.value_info, *result.graph.output]
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16
    }
    nodes = []
    for node in result.graph.node:
        nodes.append(node)
        for place, name in enumerate(node.output):
            if name in halves:
                node.output[place] = f"{name}.unrounded"
                wide = f"{name}.rounded"
                nodes += [
                    helper.make_node("Cast", [f"{name}.unrounded"], [wide], to=TensorProto.FLOAT),
                    helper.make_node("Cast", [wide], [name], to=TensorProto.FLOAT16),
                ]
    _replace_all(result.graph.node, nodes)
    return result


def with_contract(model: Any, contract: ModelContract) -> bytes:
    """The file's bytes, with `contract` in the place of any other."""
    del model.metadata_props[:]
    model.metadata_props.add(key=CONTRACT_KEY, value=contract.dumps())
    return sealed(model.SerializeToString())


def _is_weighted(node: Any, constants: Collection[str]) -> bool:
    return node.op_type in _WEIGHTED and node.input[1] in constants


def _name(nodes: Sequence[Any]) -> str:
    """The network's name for the first node: of its weight, or of the bias that is added next."""
    for node in nodes[:2]:
        for name in node.input:
            if name.startswith(_BODY):
                return str(name.removeprefix(_BODY).rpartition(".")[0])
    return str(nodes[0].name)


def _quietly(work: Any) -> None:
    """The quantiser tells its own developers about every tensor that has no constant scale."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        work()
    finally:
        root.setLevel(level)


def _sort(graph: Any) -> None:
    """Every node after those it reads from, as ONNX asks; the converters append at the end."""
    made_by = {name: node for node in graph.node for name in node.output}
    done: set[int] = set()
    ordered: list[Any] = []
    for last in graph.node:
        waiting = [last]
        while waiting:
            node = waiting[-1]
            first = [
                made_by[name]
                for name in node.input
                if name in made_by and id(made_by[name]) not in done
            ]
            if first and id(node) not in done:
                waiting += first
                continue
            waiting.pop()
            if id(node) not in done:
                done.add(id(node))
                ordered.append(node)
    _replace_all(graph.node, ordered)


def _replace_all(field: Any, values: Sequence[Any]) -> None:
    """The repeated field holds `values`, some of which may live in it."""
    copies = [copy.deepcopy(value) for value in values]
    del field[:]
    field.extend(copies)
