"""A tiny exported model for tests that need vectors but no torch: pooling, one matrix, unit length.

`write_tiny_model` writes the ONNX file an export would write, contract and all; `tiny_vectors`
computes the same vectors in numpy, so that a test can check the engine by another route.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from embedkit.imaging import Pixels, Preprocess
from embedkit.runtime.contract import CONTRACT_KEY, ModelContract, SelfTest

__all__ = ["tiny_contract", "tiny_graph", "tiny_vectors", "write_tiny_model"]

Floats = npt.NDArray[np.float32]

_GRID = 4
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)


def write_tiny_model(
    path: Path, *, dim: int = 8, size: int = 16, seed: int = 0, name: str = "tiny"
) -> ModelContract:
    """Write a single-file ONNX model and return its contract.

    ``pixels`` uint8 ``(N, size, size, 3)`` -> ``embedding`` float32 ``(N, dim)`` unit rows. Another
    `seed` is another network (another fingerprint); another `name` alone is the same network.

    Args:
        path: Where the file goes; replaced when there.
        dim: Width of a vector.
        size: Rows and columns of the input, a multiple of 4.
        seed: Of the weights.
        name: The contract's name, for people.
    """
    contract = tiny_contract(dim=dim, size=size, seed=seed, name=name)
    model = tiny_graph(dim=dim, size=size, seed=seed)
    model.metadata_props.add(key=CONTRACT_KEY, value=contract.dumps())
    path.write_bytes(model.SerializeToString())
    return contract


def tiny_contract(
    *, dim: int = 8, size: int = 16, seed: int = 0, name: str = "tiny"
) -> ModelContract:
    """The contract of `tiny_graph`, with its self-test vector from `tiny_vectors`."""
    preprocess = Preprocess(height=size, width=size, crop_ratio=1.0)
    weight, bias = _weights(dim, seed)
    pixels = SelfTest(seed=seed, vector=()).pixels(preprocess)
    vector = tiny_vectors(pixels, dim=dim, seed=seed)[0]
    return ModelContract(
        name=name,
        embedding_dim=dim,
        normalizes=True,
        metric="cosine",
        preprocess=preprocess,
        weights_hash=hashlib.sha256(weight.tobytes() + bias.tobytes()).hexdigest(),
        self_test=SelfTest(seed=seed, vector=tuple(float(value) for value in vector)),
        backbone="tiny",
        pooling="avg",
        loss="none",
    )


def tiny_graph(*, dim: int = 8, size: int = 16, seed: int = 0) -> onnx.ModelProto:
    """The graph alone, without a contract: for tests that damage it."""
    if size % _GRID:
        raise ValueError(f"size must be a multiple of {_GRID}, got {size}")
    weight, bias = _weights(dim, seed)
    step = size // _GRID
    nodes = [
        helper.make_node("Cast", ["pixels"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Sub", ["planes", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], ["scaled"]),
        helper.make_node(
            "AveragePool", ["scaled"], ["pooled"], kernel_shape=[step, step], strides=[step, step]
        ),
        helper.make_node("Flatten", ["pooled"], ["features"], axis=1),
        helper.make_node("Gemm", ["features", "weight", "bias"], ["raw"], transB=1),
        helper.make_node("LpNormalization", ["raw"], ["embedding"], axis=1, p=2),
    ]
    constants = {
        "mean": (255 * _MEAN).reshape(1, 3, 1, 1),
        "std": (255 * _STD).reshape(1, 3, 1, 1),
        "weight": weight,
        "bias": bias,
    }
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", size, size, 3])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", dim])],
        [numpy_helper.from_array(value, key) for key, value in constants.items()],
    )
    # An old opset and file version, so that every onnxruntime of the supported range opens it.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model


def tiny_vectors(pixels: Pixels, *, dim: int = 8, seed: int = 0) -> Floats:
    """``(N, size, size, 3)`` uint8 -> ``(N, dim)`` unit rows, by numpy alone."""
    count, size = pixels.shape[:2]
    weight, bias = _weights(dim, seed)
    scaled = (pixels.astype(np.float32) / 255 - _MEAN) / _STD
    step = size // _GRID
    pooled = scaled.reshape(count, _GRID, step, _GRID, step, 3).mean(axis=(2, 4))
    features = pooled.transpose(0, 3, 1, 2).reshape(count, -1)
    raw = features @ weight.T + bias
    unit: Floats = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    return unit


def _weights(dim: int, seed: int) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((dim, 3 * _GRID * _GRID), dtype=np.float32)
    return weight, rng.standard_normal(dim, dtype=np.float32)
