"""The Q/DQ lint says what TensorRT would refuse, and TensorRT for RTX agrees where it has a say."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from embedkit.errors import MismatchError
from embedkit.export.qdq_lint import check_qdq, lint_qdq

INT8, UINT8, INT32, FLOAT = (
    TensorProto.INT8,
    TensorProto.UINT8,
    TensorProto.INT32,
    TensorProto.FLOAT,
)

Change = Callable[[onnx.ModelProto], None]


def good() -> onnx.ModelProto:
    """A convolution and a matrix as TensorRT takes them: stored int8 for one, Q/DQ for the other.

    ``x (N, 3, 8, 8)`` -> Conv, 4 outputs -> mean -> Gemm, 5 outputs.
    """
    rng = np.random.default_rng(0)
    constants = {
        "x_scale": np.float32(0.05),
        "zero": np.int8(0),
        "conv_int8": rng.integers(-127, 128, (4, 3, 3, 3), dtype=np.int8),
        "conv_scale": np.linspace(0.01, 0.02, 4, dtype=np.float32),
        "conv_zero": np.zeros(4, np.int8),
        "conv_bias": rng.standard_normal(4, dtype=np.float32),
        "h_scale": np.float32(0.1),
        "gemm_float": rng.standard_normal((4, 5), dtype=np.float32),
        "gemm_scale": np.linspace(0.01, 0.02, 5, dtype=np.float32),
        "gemm_zero": np.zeros(5, np.int8),
        "gemm_bias": rng.standard_normal(5, dtype=np.float32),
    }
    q, dq = "QuantizeLinear", "DequantizeLinear"
    nodes = [
        helper.make_node(q, ["x", "x_scale", "zero"], ["x_q"], name="x_q"),
        helper.make_node(dq, ["x_q", "x_scale", "zero"], ["x_dq"], name="x_dq"),
        helper.make_node(
            dq, ["conv_int8", "conv_scale", "conv_zero"], ["w_dq"], name="conv_w", axis=0
        ),
        helper.make_node("Conv", ["x_dq", "w_dq", "conv_bias"], ["h"], name="conv"),
        helper.make_node("GlobalAveragePool", ["h"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node(q, ["flat", "h_scale", "zero"], ["h_q"], name="h_q"),
        helper.make_node(dq, ["h_q", "h_scale", "zero"], ["h_dq"], name="h_dq"),
        helper.make_node(
            q, ["gemm_float", "gemm_scale", "gemm_zero"], ["g_q"], name="gemm_wq", axis=1
        ),
        helper.make_node(dq, ["g_q", "gemm_scale", "gemm_zero"], ["g_dq"], name="gemm_wdq", axis=1),
        helper.make_node("Gemm", ["h_dq", "g_dq", "gemm_bias"], ["y"], name="gemm"),
    ]
    graph = helper.make_graph(
        nodes,
        "good",
        [helper.make_tensor_value_info("x", FLOAT, [2, 3, 8, 8])],
        [helper.make_tensor_value_info("y", FLOAT, [2, 5])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def node_of(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def put(model: onnx.ModelProto, name: str, value: np.ndarray | np.generic) -> None:
    """Add or replace a constant."""
    tensor = numpy_helper.from_array(np.asarray(value), name)
    for index, old in enumerate(model.graph.initializer):
        if old.name == name:
            model.graph.initializer[index].CopyFrom(tensor)
            return
    model.graph.initializer.append(tensor)


def uint8_activation(model: onnx.ModelProto) -> None:
    put(model, "zero8", np.uint8(128))
    for name in ("x_q", "x_dq"):
        node_of(model, name).input[2] = "zero8"


def shifted_activation(model: onnx.ModelProto) -> None:
    put(model, "shifted", np.int8(3))
    for name in ("x_q", "x_dq"):
        node_of(model, name).input[2] = "shifted"


def no_zero_point(model: onnx.ModelProto) -> None:
    for name in ("x_q", "x_dq"):
        del node_of(model, name).input[2]


def shifted_weights(model: onnx.ModelProto) -> None:
    put(model, "conv_zero", np.array([0, 0, 1, 0], np.int8))


def uint8_weights(model: onnx.ModelProto) -> None:
    put(model, "conv_int8", np.full((4, 3, 3, 3), 7, np.uint8))
    put(model, "conv_zero", np.zeros(4, np.uint8))


def negative_scale(model: onnx.ModelProto) -> None:
    put(model, "x_scale", np.float32(-0.05))


def not_a_number(model: onnx.ModelProto) -> None:
    put(model, "conv_scale", np.array([0.1, np.nan, 0.1, 0.1], np.float32))


def computed_scale(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("Abs", ["x_scale"], ["computed"]))
    for name in ("x_q", "x_dq"):
        node_of(model, name).input[1] = "computed"


def conv_bias_as_int32(model: onnx.ModelProto) -> None:
    put(model, "bias_int", np.arange(4, dtype=np.int32))
    put(model, "bias_zero", np.zeros(4, np.int32))
    bias = helper.make_node(
        "DequantizeLinear", ["bias_int", "conv_scale", "bias_zero"], ["b"], name="bias_dq", axis=0
    )
    model.graph.node.insert(0, bias)
    node_of(model, "conv").input[2] = "b"


def gemm_bias_as_int8(model: onnx.ModelProto) -> None:
    put(model, "bias_int", np.arange(5, dtype=np.int8))
    bias = helper.make_node(
        "DequantizeLinear", ["bias_int", "h_scale", "zero"], ["b"], name="bias_dq"
    )
    model.graph.node.insert(0, bias)
    node_of(model, "gemm").input[2] = "b"


def added_bias(model: onnx.ModelProto) -> None:
    """A MatMul and an Add with a quantised vector, as transformers have it."""
    gemm = node_of(model, "gemm")
    put(model, "bias_int", np.arange(5, dtype=np.int8))
    model.graph.node.remove(gemm)
    model.graph.node.extend(
        [
            helper.make_node("MatMul", ["h_dq", "g_dq"], ["product"], name="matmul"),
            helper.make_node(
                "DequantizeLinear", ["bias_int", "h_scale", "zero"], ["b"], name="bias_dq"
            ),
            helper.make_node("Add", ["product", "b"], ["y"], name="add"),
        ]
    )


def wrong_axis(model: onnx.ModelProto) -> None:
    put(model, "conv_scale", np.full(3, 0.01, np.float32))
    put(model, "conv_zero", np.zeros(3, np.int8))
    node_of(model, "conv_w").attribute[0].i = 1


def wrong_gemm_axis(model: onnx.ModelProto) -> None:
    put(model, "gemm_scale", np.full(4, 0.01, np.float32))
    put(model, "gemm_zero", np.zeros(4, np.int8))
    for name in ("gemm_wq", "gemm_wdq"):
        node_of(model, name).attribute[0].i = 0


def wrong_length(model: onnx.ModelProto) -> None:
    put(model, "conv_scale", np.full(3, 0.01, np.float32))
    put(model, "conv_zero", np.zeros(3, np.int8))


def scales_for_an_activation(model: onnx.ModelProto) -> None:
    put(model, "many", np.full(3, 0.05, np.float32))
    put(model, "many_zero", np.zeros(3, np.int8))
    for name in ("x_q", "x_dq"):
        node_of(model, name).input[1] = "many"
        node_of(model, name).input[2] = "many_zero"


def lonely_quantize(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Cast", ["x_q"], ["wide"], to=FLOAT))
    model.graph.output.append(helper.make_tensor_value_info("wide", FLOAT, [2, 3, 8, 8]))


def lonely_dequantize(model: onnx.ModelProto) -> None:
    node_of(model, "x_q").CopyFrom(helper.make_node("Cast", ["x"], ["x_q"], name="c", to=INT8))


def integer_operator(model: onnx.ModelProto) -> None:
    model.graph.node.append(
        helper.make_node("ConvInteger", ["x_q", "conv_int8"], ["i"], name="integer_conv")
    )


BAD: list[tuple[Change, set[str], str]] = [
    (uint8_activation, {"x_q", "x_dq"}, "is uint8; it must be int8 with zero point 0"),
    (shifted_activation, {"x_q", "x_dq"}, "must be symmetric"),
    (no_zero_point, {"x_q"}, "gives uint8"),
    (shifted_weights, {"conv_w"}, "must be symmetric"),
    (uint8_weights, {"conv_w"}, "uint8; it must be int8"),
    (negative_scale, {"x_q", "x_dq"}, "not a positive number"),
    (not_a_number, {"conv_w"}, "not a positive number"),
    (computed_scale, {"x_q", "x_dq"}, "must be a constant"),
    (conv_bias_as_int32, {"bias_dq"}, "quantises the bias of conv; biases must stay float"),
    (gemm_bias_as_int8, {"bias_dq"}, "quantises the bias of gemm"),
    (added_bias, {"bias_dq"}, "quantises the bias of add"),
    (wrong_axis, {"conv_w"}, "slice of axis 1, for the weights of Conv conv it must be axis 0"),
    (wrong_gemm_axis, {"gemm_wq", "gemm_wdq"}, "slice of axis 0, for the weights of Gemm gemm"),
    (wrong_length, {"conv_w"}, r"3 scales along axis 0 of \[4, 3, 3, 3\]"),
    (scales_for_an_activation, {"x_q", "x_dq"}, "3 scales for an activation; it must have one"),
    (lonely_quantize, {"x_q"}, "is not followed by DequantizeLinear alone"),
    (lonely_dequantize, {"x_dq"}, "does not follow a QuantizeLinear"),
    (integer_operator, {"integer_conv", "x_q"}, "computes in integers|not followed"),
]


def test_a_graph_as_tensorrt_wants_it_passes() -> None:
    model = good()
    onnx.checker.check_model(model, full_check=True)
    assert lint_qdq(model) == []
    check_qdq(model)


def test_a_graph_without_quantisation_passes() -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    value = [helper.make_tensor_value_info(name, FLOAT, [2]) for name in "xy"]
    assert lint_qdq(helper.make_model(helper.make_graph([node], "g", value[:1], value[1:]))) == []
    assert lint_qdq(onnx.ModelProto()) == []


@pytest.mark.parametrize(
    ("change", "nodes", "text"), BAD, ids=[change.__name__ for change, _, _ in BAD]
)
def test_each_trouble_is_named_at_its_node(change: Change, nodes: set[str], text: str) -> None:
    model = good()
    change(model)
    found = lint_qdq(model)
    assert {line.split(" (")[0] for line in found} == nodes, found
    with pytest.raises(MismatchError, match=text) as caught:
        check_qdq(model)
    assert caught.value.exit_code == 5
    assert "--quant int8 --trt" in (caught.value.hint or "")


def test_a_matrix_stored_the_other_way_wants_the_other_axis() -> None:
    model = good()
    put(model, "gemm_float", np.ones((5, 4), np.float32))
    node_of(model, "gemm").attribute.append(helper.make_attribute("transB", 1))
    for name in ("gemm_wq", "gemm_wdq"):
        node_of(model, name).attribute[0].i = 0
    assert lint_qdq(model) == []
    for name in ("gemm_wq", "gemm_wdq"):
        node_of(model, name).attribute[0].i = -2  # the same axis, counted from the end
    assert lint_qdq(model) == []


def test_constants_may_be_nodes() -> None:
    model = good()
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    del model.graph.initializer[:]
    for name, tensor in tensors.items():
        model.graph.node.insert(0, helper.make_node("Constant", [], [name], value=tensor))
    assert lint_qdq(model) == []


def test_many_troubles_are_counted_and_the_first_shown() -> None:
    model = good()
    for change in (uint8_activation, shifted_weights, conv_bias_as_int32, lonely_quantize):
        change(model)
    for number in range(20):
        model.graph.node.append(helper.make_node("QLinearAdd", [], [f"sum{number}"]))
    with pytest.raises(MismatchError) as caught:
        check_qdq(model)
    lines = (caught.value.facts or "").splitlines()
    assert len(lines) == 9
    assert lines[-1] == f"and {len(lint_qdq(model)) - 8} more"


# --- what TensorRT for RTX says of the same graphs ---


def parses(model: onnx.ModelProto) -> bool:
    rtx = pytest.importorskip("tensorrt_rtx")

    class Quiet(rtx.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            rtx.ILogger.__init__(self)

        def log(self, severity: object, message: str) -> None:
            pass

    log = Quiet()
    typed = 1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    builder = rtx.Builder(log)
    network = builder.create_network(typed)
    return bool(rtx.OnnxParser(network, log).parse(model.SerializeToString()))


def test_tensorrt_takes_the_good_graph() -> None:
    assert parses(good())


@pytest.mark.parametrize(
    "change",
    [
        *(uint8_activation, shifted_activation, shifted_weights, uint8_weights, negative_scale),
        *(not_a_number, conv_bias_as_int32, wrong_length, integer_operator),
    ],
)
def test_what_tensorrt_refuses_is_found_before(change: Change) -> None:
    """Seen with TensorRT for RTX 1.7; what it takes of `BAD` it takes to mean something else."""
    model = good()
    change(model)
    assert not parses(model)
    assert lint_qdq(model)
