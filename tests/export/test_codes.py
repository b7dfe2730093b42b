"""Codes out of the graph: those of torch and of numpy, and a gate that sees where they differ."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from embedkit import models
from embedkit.errors import GateError, MismatchError
from embedkit.export import (
    build_engine,
    compare,
    export_onnx,
    publish_checked,
    read_held_out,
)
from embedkit.export.gate import Thresholds
from embedkit.export.precision import with_contract
from embedkit.imaging import Pixels, Preprocess
from embedkit.models import weights_hash
from embedkit.models.quantized import QuantizedNet
from embedkit.runtime import Embedder, ModelContract, read_contract
from tests.export.small import MakeNetwork, Photos

PARTS, WORDS, DIM = 3, 5, 12


def quantized(
    temperature: float | None = None, seed: int = 0
) -> tuple[QuantizedNet, ModelContract]:
    torch.manual_seed(seed)
    side = Preprocess(height=32, width=48)
    backbone = models.create_backbone("resnet10", weights="none", image_size=(32, 48))
    network = QuantizedNet(
        backbone,
        models.create_pooling("gem", backbone.num_features),
        DIM,
        subspaces=PARTS,
        words=WORDS,
        temperature=temperature,
        mean=side.mean,
        std=side.std,
    ).eval()
    contract = ModelContract(
        name="coded",
        embedding_dim=DIM,
        normalizes=False,
        metric="l2",
        preprocess=side,
        weights_hash=weights_hash(network),
        backbone="resnet10",
        codebooks=network.codebooks(),
    )
    return network, contract


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, QuantizedNet, ModelContract]:
    network, contract = quantized()
    path = tmp_path_factory.mktemp("coded") / "model.onnx"
    return path, network, export_onnx(network, contract, path)


def noise(count: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 48, 3), dtype=np.uint8)


def by_numpy(network: QuantizedNet, pixels: Pixels) -> tuple[np.ndarray, np.ndarray]:
    """Soft rows and codes from the head's rows, one picture, part and word at a time."""
    with torch.inference_mode():
        rows = network.unquantized(torch.from_numpy(pixels)).double().numpy()
    quantizer, width = network.quantizer, DIM // PARTS
    words = quantizer.words.detach().double().numpy()
    soft, codes = np.zeros((len(rows), DIM)), np.zeros((len(rows), PARTS), np.uint8)
    for n, row in enumerate(rows):
        for m in range(PARTS):
            part = row[m * width : (m + 1) * width]
            if quantizer.temperature is None:
                layer = quantizer.layer.detach().double().numpy()[m]
                shift = quantizer.layer_bias.detach().double().numpy()[m]
                scores = np.array([part @ layer[k] + shift[k] for k in range(WORDS)])
            else:
                scores = np.array([-((part - words[m, k]) ** 2).sum() for k in range(WORDS)])
                scores /= quantizer.temperature
            share = np.exp(scores - scores.max())
            share /= share.sum()
            codes[n, m] = share.argmax()
            soft[n, m * width : (m + 1) * width] = share @ words[m]
    return soft, codes


@pytest.mark.parametrize("temperature", [None, 0.1])
def test_the_file_gives_the_soft_rows_and_codes_of_torch_and_of_numpy(
    tmp_path: Path, temperature: float | None
) -> None:
    network, contract = quantized(temperature)
    written = export_onnx(network, contract, tmp_path / "m.onnx")
    soft, codes = by_numpy(network, noise(7))
    assert len(np.unique(codes, axis=0)) > 1
    with torch.inference_mode():
        by_torch = network.with_codes(torch.from_numpy(noise(7)))
    with Embedder.load(tmp_path / "m.onnx") as embedder:
        assert embedder.contract == written == read_contract(tmp_path / "m.onnx")
        assert embedder.self_test() > 0.99999
        vectors, given = embedder.embed_coded(noise(7))
        np.testing.assert_array_equal(embedder.embed_pixels(noise(7)), vectors)
        one = embedder.embed_coded(noise(7)[:1])
        none = embedder.embed_coded(noise(0))
    assert given.dtype == np.uint8
    np.testing.assert_array_equal(given, codes)
    np.testing.assert_array_equal(given, by_torch[1].numpy())
    np.testing.assert_allclose(vectors, soft, atol=1e-5)
    np.testing.assert_array_equal(one[1], given[:1])
    assert (none[0].shape, none[1].shape) == ((0, DIM), (0, PARTS))


def test_files_come_with_their_codes(
    exported: tuple[Path, QuantizedNet, ModelContract], photos: Photos
) -> None:
    with Embedder.load(exported[0]) as embedder:
        found = list(embedder.embed_files(photos.paths[:3]))
        pixels = np.stack([embedder._read(path) for path in photos.paths[:3]])
        vectors, codes = embedder.embed_coded(pixels)
    for one, vector, code in zip(found, vectors, codes, strict=True):
        assert one.vector is not None
        assert one.codes is not None
        np.testing.assert_allclose(one.vector, vector, atol=1e-6)
        np.testing.assert_array_equal(one.codes, code)


def test_a_model_without_codebooks_says_that_it_gives_no_codes(
    make_network: MakeNetwork, tmp_path: Path
) -> None:
    network, contract = make_network()
    export_onnx(network, contract, tmp_path / "m.onnx")
    with Embedder.load(tmp_path / "m.onnx") as embedder:
        assert not embedder.gives_codes
        with pytest.raises(MismatchError, match="gives no codes of the model 'small'"):
            embedder.embed_coded(noise(1))


def test_codebooks_of_another_network_are_refused(tmp_path: Path) -> None:
    network, contract = quantized()
    other = dataclasses.replace(contract, codebooks=quantized(seed=1)[0].codebooks())
    for wrong in (other, dataclasses.replace(contract, codebooks=None)):
        with pytest.raises(MismatchError) as caught:
            export_onnx(network, wrong, tmp_path / "m.onnx")
        assert "the codebooks are others" in (caught.value.facts or "")
    assert not (tmp_path / "m.onnx").exists()


def altered(exported: Path, folder: Path) -> Path:
    """The file with codes that name another word, and the vectors as they were."""
    model = onnx.load(exported)
    (choice,) = [node for node in model.graph.node if node.op_type == "ArgMax"]
    for attribute in choice.attribute:
        if attribute.name == "select_last_index":
            choice.attribute.remove(attribute)
    choice.op_type = "ArgMin"
    (folder / "m.onnx").write_bytes(with_contract(model, read_contract(exported)))
    return folder / "m.onnx"


def test_the_gate_states_the_share_of_equal_codes_and_refuses_others(
    exported: tuple[Path, QuantizedNet, ModelContract], photos: Photos, tmp_path: Path
) -> None:
    path, network, contract = exported
    held_out = read_held_out(network, contract, photos.paths, photos.labels)
    assert held_out.codes is not None
    np.testing.assert_array_equal(held_out.codes, by_numpy(network, held_out.pixels)[1])
    report = compare(path, held_out)
    assert report.passed
    assert report.equal_codes == report.to_json()["equal_codes"] == 1.0

    wrong = compare(altered(path, tmp_path), held_out)
    assert wrong.equal_codes == 0.0
    assert wrong.min_cosine > 0.9999
    assert wrong.reasons == ("0.00% of the codes are the network's own, less than 99%",)

    almost = held_out.codes.copy()
    almost[0, 0] = (almost[0, 0] + 1) % WORDS
    share = 1 - 1 / almost.size
    nearly = compare(path, dataclasses.replace(held_out, codes=almost), thresholds=Thresholds())
    assert nearly.equal_codes == pytest.approx(share)
    assert nearly.passed == (share >= 0.99)


def test_what_fails_by_its_codes_is_not_published(
    exported: tuple[Path, QuantizedNet, ModelContract], photos: Photos, tmp_path: Path
) -> None:
    _, network, contract = exported
    held_out = read_held_out(network, contract, photos.paths, photos.labels)
    assert held_out.codes is not None
    shifted = dataclasses.replace(held_out, codes=(held_out.codes + 1) % WORDS)
    with pytest.raises(GateError) as caught:
        publish_checked(network, contract, tmp_path / "m.onnx", shifted)
    assert "of the codes are the network's own" in (caught.value.facts or "")
    assert not (tmp_path / "m.onnx").exists()


def test_an_engine_carries_the_codebooks_and_gives_codes(
    exported: tuple[Path, QuantizedNet, ModelContract], tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    engine = tmp_path / "m.engine"
    build_engine(exported[0], engine, gpu="sm89", batch=(1, 2, 4))
    assert read_contract(engine) == exported[2]
    # The outputs are named in the plan; running it needs a GPU.
    assert b"codes" in engine.read_bytes()
