"""Models that keep a tensor in another file: every way the format has, every place it may name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from embedkit.runtime import CONTRACT_KEY
from tests.tiny_model import tiny_contract, tiny_graph

__all__ = ["PLACES", "WAYS", "hostile_model"]

WAYS = ("initializer", "constant", "sparse initializer", "sparse constant")
PLACES = ("beside", "in the working folder", "above", "absolute", "link", "hard link")


def hostile_model(folder: Path, way: str, place: str) -> Path:
    """A tiny model whose bias is in `folder/secret`; to be loaded with `folder/here` as cwd.

    The bytes there would fit: were they read, the model would run.
    """
    models, here, secret = folder / "models", folder / "here", folder / "secret"
    models.mkdir(parents=True)
    here.mkdir()
    secret.write_bytes(np.ones(8, np.float32).tobytes())
    location = {"above": "../secret", "absolute": str(secret)}.get(place, "data")
    if place == "beside":
        (models / "data").write_bytes(secret.read_bytes())
    elif place == "in the working folder":
        (here / "data").write_bytes(secret.read_bytes())
    elif place in ("link", "hard link"):
        for beside in (models, here):
            if place == "link":
                (beside / "data").symlink_to(secret)
            else:
                (beside / "data").hardlink_to(secret)
    path = models / "m.onnx"
    model = _model(way, location)
    model.metadata_props.add(key=CONTRACT_KEY, value=tiny_contract().dumps())
    path.write_bytes(model.SerializeToString())
    return path


def _model(way: str, location: str) -> onnx.ModelProto:
    model = tiny_graph()
    graph = model.graph
    (bias,) = [one for one in graph.initializer if one.name == "bias"]
    shape = tuple(bias.dims)
    if way.startswith("sparse"):
        values = numpy_helper.from_array(np.ones(8, np.float32), "bias")
        sparse = onnx.SparseTensorProto(
            values=_elsewhere(values, location),
            indices=numpy_helper.from_array(np.arange(8, dtype=np.int64), "bias_indices"),
            dims=[8],
        )
    graph.initializer.remove(bias)
    if way == "initializer":
        graph.initializer.append(_elsewhere(bias, location))
    elif way == "constant":
        graph.node.insert(
            0, helper.make_node("Constant", [], ["bias"], value=_elsewhere(bias, location))
        )
    elif way == "sparse initializer":
        assert shape == (8,), shape
        graph.sparse_initializer.append(sparse)
    else:
        node = helper.make_node("Constant", [], ["bias"])
        node.attribute.add(
            name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR, sparse_tensor=sparse
        )
        graph.node.insert(0, node)
    return model


def _elsewhere(tensor: TensorProto, location: str) -> TensorProto:
    moved = TensorProto()
    moved.CopyFrom(tensor)
    moved.ClearField("raw_data")
    moved.ClearField("float_data")
    moved.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "32")):
        moved.external_data.add(key=key, value=value)
    return moved
