"""Say, before an engine is built, why TensorRT would not take a graph's quantisation, node by node.

TensorRT takes explicit quantisation of one kind: pairs of QuantizeLinear and DequantizeLinear to
int8, symmetric (zero point 0), one scale per activation, one per output channel for weights, and
biases left in float. Source: NVIDIA, "Working with Quantized Types", TensorRT 10 and 11.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper

from embedkit.errors import MismatchError

__all__ = ["check_qdq", "lint_qdq"]

_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
# Operators that compute in integers by themselves.
_INTEGER = {
    *("ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearAdd", "QLinearConv"),
    *("QLinearGlobalAveragePool", "QLinearMatMul", "QLinearMul", "QGemm"),
}
_BIAS_AT = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2}
_WEIGHT_AT = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}
_SHOWN = 8


def check_qdq(model: onnx.ModelProto) -> None:
    """See that TensorRT takes the quantisation of a graph; one without any passes.

    Raises:
        MismatchError: It does not; the facts name the nodes.
    """
    found = lint_qdq(model)
    if found:
        more = f"\nand {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise MismatchError(
            "TensorRT does not take the quantisation of this graph",
            facts="\n".join(found[:_SHOWN]) + more,
            hint="an int8 graph for the CPU is another one than for TensorRT: let "
            "embedkit export --quant int8 --trt make it from the run, or build from the fp32 ONNX",
        )


def lint_qdq(model: onnx.ModelProto) -> list[str]:
    """Every trouble as a line ``node (operator): what; what it should be``, in graph order."""
    return _Lint(model.graph).run()


class _Lint:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._makers: dict[str, onnx.NodeProto] = {}
        self._readers: dict[str, list[tuple[onnx.NodeProto, int]]] = defaultdict(list)
        for node in graph.node:
            for name in node.output:
                self._makers[name] = node
            for place, name in enumerate(node.input):
                if name:
                    self._readers[name].append((node, place))
            if node.op_type == "Constant":
                for attribute in node.attribute:
                    if attribute.name == "value":
                        self._constants[node.output[0]] = attribute.t
        self._outputs = {output.name for output in graph.output}
        self._found: list[str] = []

    def run(self) -> list[str]:
        for node in self._graph.node:
            if node.op_type in (_QUANTIZE, _DEQUANTIZE):
                self._scale_and_zero(node)
                self._pair(node)
                if node.op_type == _DEQUANTIZE:
                    self._use(node)
            elif node.op_type in _INTEGER:
                self._report(node, "computes in integers; TensorRT wants Q/DQ pairs around floats")
        return self._found

    def _report(self, node: onnx.NodeProto, text: str) -> None:
        name = node.name or (node.output[0] if node.output else "?")
        self._found.append(f"{name} ({node.op_type}): {text}")

    def _scale_and_zero(self, node: onnx.NodeProto) -> None:
        scale = self._value(node, 1)
        if scale is None:
            self._report(node, "its scale is computed; it must be a constant")
        elif not (np.isfinite(scale).all() and (scale > 0).all()):
            self._report(node, "its scale is not a positive number")
        if _attribute(node, "block_size", 0):
            self._report(node, "has a scale per block; TensorRT int8 takes one per tensor or axis")
        if len(node.input) < 3 or not node.input[2]:
            wanted = _attribute(node, "output_dtype", TensorProto.UINT8)
            if node.op_type == _QUANTIZE and wanted != TensorProto.INT8:
                self._report(node, "gives uint8; it must give int8 with zero point 0")
            return
        zero = self._constants.get(node.input[2])
        if zero is None:
            self._report(node, "its zero point is computed; it must be the constant 0")
        elif zero.data_type == TensorProto.INT32:
            pass  # a quantised bias: `_use` says so
        elif zero.data_type != TensorProto.INT8:
            kind = TensorProto.DataType.Name(zero.data_type).lower()
            self._report(node, f"is {kind}; it must be int8 with zero point 0")
        elif numpy_helper.to_array(zero).any():
            self._report(node, "its zero point is not 0; the quantisation must be symmetric")

    def _pair(self, node: onnx.NodeProto) -> None:
        """A Q leads to DQs only; a DQ comes from a Q or from stored int8."""
        if node.op_type == _QUANTIZE:
            readers = {reader.op_type for reader, _ in self._readers[node.output[0]]}
            if readers != {_DEQUANTIZE} or node.output[0] in self._outputs:
                self._report(node, "is not followed by DequantizeLinear alone")
            return
        stored = self._constants.get(node.input[0])
        if stored is None:
            maker = self._makers.get(node.input[0])
            if maker is None or maker.op_type != _QUANTIZE:
                self._report(node, "does not follow a QuantizeLinear")
        elif stored.data_type not in (TensorProto.INT8, TensorProto.INT32):
            kind = TensorProto.DataType.Name(stored.data_type).lower()
            self._report(node, f"reads a stored {kind}; it must be int8")

    def _use(self, node: onnx.NodeProto) -> None:
        """What a dequantised value is used for: no bias, and weights along the right axis."""
        stored = self._constants.get(node.input[0])
        source = node
        if stored is None:  # float, quantised in the graph
            maker = self._makers.get(node.input[0])
            if maker is not None and maker.op_type == _QUANTIZE:
                source = maker
                stored = self._constants.get(maker.input[0])
        readers = self._readers[node.output[0]]
        biased = [
            reader.name or reader.output[0]
            for reader, place in readers
            if _BIAS_AT.get(reader.op_type) == place
            or (reader.op_type == "Add" and stored is not None and len(stored.dims) <= 1)
        ]
        if biased or (stored is not None and stored.data_type == TensorProto.INT32):
            of = f" of {biased[0]}" if biased else ""
            self._report(node, f"quantises the bias{of}; biases must stay float")
            return
        for end in (source, node) if source is not node else (node,):
            self._axis(end, stored, readers)

    def _axis(
        self,
        node: onnx.NodeProto,
        stored: onnx.TensorProto | None,
        readers: list[tuple[onnx.NodeProto, int]],
    ) -> None:
        scale = self._value(node, 1)
        if scale is None or scale.size == 1:
            return
        if stored is None:
            self._report(node, f"has {scale.size} scales for an activation; it must have one")
            return
        rank = len(stored.dims)
        axis = int(_attribute(node, "axis", 1))
        axis += rank if axis < 0 else 0
        if not 0 <= axis < rank or stored.dims[axis] != scale.size:
            self._report(node, f"has {scale.size} scales along axis {axis} of {list(stored.dims)}")
            return
        for reader, place in readers:
            wanted = _output_axis(reader, rank)
            if _WEIGHT_AT.get(reader.op_type) == place and axis != wanted:
                self._report(
                    node,
                    f"has a scale per slice of axis {axis}, for the weights of {reader.op_type} "
                    f"{reader.name or reader.output[0]} it must be axis {wanted}",
                )

    def _value(self, node: onnx.NodeProto, place: int) -> npt.NDArray[np.float64] | None:
        tensor = self._constants.get(node.input[place]) if len(node.input) > place else None
        return None if tensor is None else numpy_helper.to_array(tensor).astype(np.float64)


def _output_axis(reader: onnx.NodeProto, rank: int) -> int:
    """Which axis of the weights counts the outputs."""
    if reader.op_type == "Conv":
        return 0
    if reader.op_type == "ConvTranspose":
        return 1
    if reader.op_type == "Gemm":
        return 0 if _attribute(reader, "transB", 0) else 1
    return rank - 1


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    for attribute in node.attribute:
        if attribute.name == name:
            return int(attribute.i)
    return default
