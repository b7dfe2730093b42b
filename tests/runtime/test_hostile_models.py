"""Model files from strangers: damaged in any way or reaching for other files, they are refused."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from embedkit.errors import MismatchError
from embedkit.runtime import CONTRACT_KEY, Embedder, read_contract
from embedkit.runtime.seal import SEAL_KEY, check_seal, sealed
from tests.runtime.hostile import PLACES, WAYS, hostile_model
from tests.tiny_model import tiny_contract, tiny_graph, write_tiny_model

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("way", "place"), list(itertools.product(WAYS, PLACES)))
def test_a_model_reads_no_file_but_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, place: str
) -> None:
    path = hostile_model(tmp_path, way, place)
    monkeypatch.chdir(tmp_path / "here")
    for load in (Embedder.load, read_contract):
        with pytest.raises(MismatchError, match="stands alone"):
            load(path)


@pytest.mark.parametrize("way", WAYS)
def test_the_same_models_run_where_their_tensor_is_inside(tmp_path: Path, way: str) -> None:
    """So it is the other file that is refused above, and not the way the tensor is kept."""
    path = hostile_model(tmp_path, way, "beside")
    model = onnx.load(path, load_external_data=False)
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            inside = numpy_helper.from_array(np.ones(8, np.float32), tensor.name)
            tensor.CopyFrom(inside)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (vectors,) = session.run(None, {"pixels": np.zeros((2, 16, 16, 3), np.uint8)})
    assert vectors.shape == (2, 8)


def _tensors(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    found = list(model.graph.initializer)
    found += [sparse.values for sparse in model.graph.sparse_initializer]
    for node in model.graph.node:
        for one in node.attribute:
            found += [one.t] * one.HasField("t")
            found += [one.sparse_tensor.values] * one.HasField("sparse_tensor")
    return found


def test_a_contract_that_is_no_text_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    write_tiny_model(path)
    data = path.read_bytes()
    at = data.index(b'"name"')
    path.write_bytes(data[:at] + b"\xff" + data[at + 1 :])
    for load in (Embedder.load, read_contract):
        with pytest.raises(MismatchError, match="damaged"):
            load(path)


def test_weights_that_were_exchanged_are_met_by_the_self_test(tmp_path: Path) -> None:
    model = tiny_graph(seed=1)
    model.metadata_props.add(key=CONTRACT_KEY, value=tiny_contract(seed=0).dumps())
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(MismatchError, match="vector"):
        Embedder.load(tmp_path / "m.onnx")


def test_every_bit_of_a_sealed_model_counts(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    contract = write_tiny_model(path)
    plain = path.read_bytes()
    data = sealed(plain)
    path.write_bytes(data)
    assert onnx.load(path).metadata_props[-1].key == SEAL_KEY
    assert read_contract(path) == contract
    for place in range(0, len(plain), 37):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(MismatchError):
            read_contract(path)
    path.write_bytes(plain)  # without a seal: from an older export, or another program
    assert read_contract(path) == contract


def test_a_sealed_model_that_another_program_wrote_again_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    write_tiny_model(path)
    path.write_bytes(sealed(path.read_bytes()))
    model = onnx.load(path)
    model.metadata_props.add(key="author", value="somebody")
    onnx.save(model, path)
    with pytest.raises(MismatchError, match="was changed") as caught:
        Embedder.load(path)
    assert "another program" in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"x", b"embedkit", bytes(83)])
def test_what_has_no_seal_passes_whatever_its_length(data: bytes) -> None:
    check_seal("m.onnx", data)
    check_seal("m.onnx", sealed(data))


def test_mutations_of_a_model_file_never_crash_and_never_change_an_answer() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.torture", "--tiny", "--seed", "7", "--only", "models"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
