"""The embedder: pictures of every kind in, the vectors of the formula out, trouble named."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from embedkit.errors import (
    EmbedKitError,
    ImageError,
    MismatchError,
    UnknownNameError,
    UsageError,
)
from embedkit.imaging import Pixels, Preprocess, read_pixels
from embedkit.runtime import (
    CONTRACT_KEY,
    Embedder,
    ModelContract,
    SelfTest,
    Vectors,
    read_contract,
)
from tests.runtime.fake_nvidia import write_engine
from tests.tiny_model import tiny_contract, tiny_graph, tiny_vectors, write_tiny_model


def _photos(folder: Path, count: int) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
        path = folder / f"{number:03}.jpg"
        small.resize((40 + number, 30), Image.Resampling.BICUBIC).save(path, quality=90)
        paths.append(path)
    return paths


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_tiny_model(tmp_path / "tiny.onnx")
    return tmp_path / "tiny.onnx"


def test_files_give_the_vectors_of_the_formula(model: Path, tmp_path: Path) -> None:
    paths = _photos(tmp_path, 9)
    spec = tiny_contract().preprocess
    wanted = tiny_vectors(np.stack([read_pixels(path, spec) for path in paths]))
    with Embedder.load(model) as embedder:
        assert (embedder.device, embedder.embedding_dim) == ("cpu", 8)
        np.testing.assert_allclose(embedder.embed(paths), wanted, atol=2e-6)
        streamed = list(embedder.embed_files(iter(paths), batch=4))
    assert [one.path for one in streamed] == paths
    np.testing.assert_allclose(np.stack([one.vector for one in streamed]), wanted, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(wanted, axis=1), 1, atol=1e-6)


def test_paths_texts_pictures_and_arrays_of_one_photo_agree(model: Path, tmp_path: Path) -> None:
    (path,) = _photos(tmp_path, 1)
    spec = dataclasses.replace(tiny_contract().preprocess)
    with Image.open(path) as opened, Embedder.load(model) as embedder:
        array = np.asarray(opened)
        grey = np.full((20, 20), 90, np.uint8)
        vectors = embedder.embed([path, str(path), opened, array, grey, np.dstack([grey] * 3)])
    assert vectors.shape == (6, 8)
    np.testing.assert_allclose(vectors[1:4], np.repeat(vectors[:1], 3, axis=0), atol=2e-6)
    np.testing.assert_allclose(vectors[4], vectors[5], atol=2e-6)
    assert spec.decode_size() == 32


def test_one_core_a_run_gives_the_same_vectors_with_a_run_for_every_core(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedkit.runtime.embedder.usable_cores", lambda: 3)
    paths = _photos(tmp_path, 20)
    with (
        Embedder.load(model, device="cpu") as whole,
        Embedder.load(model, device="cpu", threads=1) as narrow,
    ):
        assert (whole.runs_at_once(), narrow.runs_at_once()) == (1, 3)
        assert [narrow.runs_at_once(workers) for workers in (1, 2, 9)] == [1, 2, 3]
        rows = [one.vector for one in narrow.embed_files(paths, batch=6)]
        np.testing.assert_allclose(np.array(rows), whole.embed(paths), atol=2e-6)
    with Embedder.load(model, device="cpu", threads=2) as half:
        assert half.runs_at_once() == 1


@pytest.mark.parametrize("batch", [1, 2, 7, 64])
def test_a_files_vector_hangs_on_its_batch_by_rounding_only(
    model: Path, tmp_path: Path, batch: int
) -> None:
    paths = _photos(tmp_path, 15)
    with Embedder.load(model) as embedder:
        alone = np.stack([embedder.embed([path])[0] for path in paths])
        again = np.stack([embedder.embed([path])[0] for path in paths])
        batched = np.stack([one.vector for one in embedder.embed_files(paths, batch=batch)])
    np.testing.assert_array_equal(again, alone)  # the same batch: the same bits
    np.testing.assert_allclose(batched, alone, rtol=0, atol=1e-6)


def test_nothing_in_gives_nothing_out(model: Path) -> None:
    with Embedder.load(model) as embedder:
        assert embedder.embed([]).shape == (0, 8)
        assert embedder.embed_pixels(np.empty((0, 16, 16, 3), np.uint8)).shape == (0, 8)
        assert list(embedder.embed_files([])) == []


def test_a_stream_goes_on_past_broken_files_and_counts_them(model: Path, tmp_path: Path) -> None:
    paths = _photos(tmp_path, 7)
    paths[2].write_bytes(paths[2].read_bytes()[:200])
    paths[5].write_text("no picture")
    paths.append(tmp_path / "absent.jpg")
    with Embedder.load(model) as embedder:
        results = list(embedder.embed_files(paths, batch=3))
    codes = {one.path: one.error.code for one in results if one.error is not None}
    assert codes == {paths[2]: "truncated", paths[5]: "not-an-image", paths[7]: "unreadable"}
    assert [one.path for one in results] == paths
    assert all((one.vector is None) == (one.error is not None) for one in results)


def test_the_first_bad_picture_is_named(model: Path, tmp_path: Path) -> None:
    good, bad, worse = _photos(tmp_path, 3)
    bad.write_bytes(b"")
    worse.write_bytes(b"")
    with Embedder.load(model) as embedder:
        with pytest.raises(ImageError, match=r"001\.jpg: the file is empty") as caught:
            embedder.embed([good, bad, worse])
        assert caught.value.code == "empty"
        with pytest.raises(ImageError, match="picture 1: an array must be uint8"):
            embedder.embed([good, np.zeros((4, 4, 3), np.float32)])  # type: ignore[list-item]
        for shape in ((4, 4, 4), (4, 4, 1), (4,), (1, 4, 4, 3)):
            with pytest.raises(ImageError, match="an array must be uint8"):
                embedder.embed([np.zeros(shape, np.uint8)])
        with pytest.raises(ImageError, match="no pixels"):
            embedder.embed([np.zeros((0, 4, 3), np.uint8)])


def test_what_is_no_picture_at_all_is_wrong_usage(model: Path) -> None:
    with Embedder.load(model) as embedder:
        with pytest.raises(UsageError, match="a sequence of pictures"):
            embedder.embed("photo.jpg")  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="got int"):
            embedder.embed([5])  # type: ignore[list-item]


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((2, 16, 16, 3), np.float32),
        np.zeros((2, 3, 16, 16), np.uint8),
        np.zeros((16, 16, 3), np.uint8),
        np.zeros((2, 17, 16, 3), np.uint8),
        np.zeros((0,), np.uint8),
    ],
)
def test_pixels_of_another_shape_or_type_are_wrong_usage(model: Path, pixels: Pixels) -> None:
    with Embedder.load(model) as embedder, pytest.raises(UsageError, match="pixels must be uint8"):
        embedder.embed_pixels(pixels)


def test_pixels_need_not_lie_in_one_piece(model: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    with Embedder.load(model) as embedder:
        every_second = embedder.embed_pixels(pixels[::2])
    np.testing.assert_allclose(every_second, tiny_vectors(pixels)[::2], atol=2e-6)


def test_threads_may_share_one_embedder(model: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), dtype=np.uint8)
    found: dict[int, Vectors] = {}
    with Embedder.load(model) as embedder:

        def work(number: int) -> None:
            for _ in range(20):
                found[number] = embedder.embed_pixels(pixels[number::4])

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number in range(4):
        np.testing.assert_allclose(found[number], tiny_vectors(pixels)[number::4], atol=2e-6)


def test_leaving_a_stream_early_stops_its_threads(model: Path, tmp_path: Path) -> None:
    paths = _photos(tmp_path, 12)
    with Embedder.load(model) as embedder:
        stream = embedder.embed_files(paths, batch=2, workers=2)
        assert next(stream).path == paths[0]
        stream.close()
        assert not [one for one in threading.enumerate() if "embedkit" in one.name]
        with pytest.raises(UsageError, match="at least 1"):
            embedder.embed_files(paths, batch=0)


# --- trust --------------------------------------------------------------------------------------


def test_the_self_test_is_a_cosine_of_one(model: Path) -> None:
    with Embedder.load(model) as embedder:
        assert embedder.self_test() == pytest.approx(1, abs=1e-6)


def _with_contract(path: Path, contract: ModelContract) -> Path:
    graph = tiny_graph()
    graph.metadata_props.add(key=CONTRACT_KEY, value=contract.dumps())
    path.write_bytes(graph.SerializeToString())
    return path


def test_a_model_that_fails_its_self_test_is_refused(tmp_path: Path) -> None:
    contract = tiny_contract()
    test = contract.self_test
    assert test is not None
    turned = SelfTest(seed=test.seed, vector=tuple(-value for value in test.vector))
    path = _with_contract(tmp_path / "m.onnx", dataclasses.replace(contract, self_test=turned))
    with pytest.raises(MismatchError, match="does not give the vectors") as caught:
        Embedder.load(path)
    assert "cosine -1.0000" in str(caught.value)


def test_weights_that_were_damaged_are_found_by_the_self_test(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    write_tiny_model(path)
    graph = onnx.load(path)
    (weight,) = [one for one in graph.graph.initializer if one.name == "weight"]
    values = numpy_helper.to_array(weight).copy()
    values[:, 10:30] = 0
    weight.raw_data = values.tobytes()
    path.write_bytes(graph.SerializeToString())
    with pytest.raises(MismatchError, match="does not give the vectors"):
        Embedder.load(path)


def test_a_self_test_of_another_width_is_refused(tmp_path: Path) -> None:
    short = dataclasses.replace(tiny_contract(), self_test=SelfTest(seed=0, vector=(1.0, 0.0)))
    with pytest.raises(MismatchError, match="self-test does not fit"):
        Embedder.load(_with_contract(tmp_path / "m.onnx", short))


def test_a_model_without_a_self_test_loads_and_cannot_be_tested(tmp_path: Path) -> None:
    without = dataclasses.replace(tiny_contract(), self_test=None)
    with (
        Embedder.load(_with_contract(tmp_path / "m.onnx", without)) as embedder,
        pytest.raises(MismatchError, match="no self-test"),
    ):
        embedder.self_test()


class _Broken:
    """An engine whose numbers went wrong."""

    name, device = "broken", "cpu"
    contract = tiny_contract()

    def __init__(self, vectors: Vectors) -> None:
        self._vectors = vectors

    def run(self, pixels: Pixels) -> Vectors:
        return self._vectors

    def close(self) -> None:
        """Nothing to give back."""


@pytest.mark.parametrize(
    "vectors",
    [
        np.full((2, 8), np.nan, np.float32),
        np.full((2, 8), np.inf, np.float32),
        np.ones((1, 8), np.float32),
        np.ones((2, 9), np.float32),
    ],
)
def test_vectors_that_cannot_be_used_never_get_out(vectors: Vectors) -> None:
    with pytest.raises(EmbedKitError, match="cannot be used"):
        Embedder(_Broken(vectors)).embed_pixels(np.zeros((2, 16, 16, 3), np.uint8))


# --- choosing -----------------------------------------------------------------------------------


def test_an_unknown_backend_is_named_with_the_known(model: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'onnxruntime'"):
        Embedder.load(model, backend="onnxruntim")
    Embedder.load(str(model), backend="onnxruntime", device="cpu", threads=1).close()


def test_an_engines_contract_is_read_from_beside_it(tmp_path: Path) -> None:
    engine, contract = tmp_path / "m.engine", tiny_contract()
    with pytest.raises(UsageError, match="no engine"):
        read_contract(engine)
    write_engine(engine, contract)
    assert read_contract(engine) == contract
    write_engine(engine, contract, schema="embedkit.engine/0")
    with pytest.raises(MismatchError):
        read_contract(engine)


def test_importing_the_runtime_loads_no_engine_and_no_torch() -> None:
    code = (
        "import sys, embedkit.runtime, embedkit.imaging; "
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'faiss'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_the_real_photos_agree_with_the_formula(model: Path, shared_data: Path) -> None:
    paths = sorted((shared_data / "tiny").rglob("*.jpg"))[:20]
    spec: Preprocess = tiny_contract().preprocess
    wanted = tiny_vectors(np.stack([read_pixels(path, spec) for path in paths]))
    with Embedder.load(model) as embedder:
        np.testing.assert_allclose(embedder.embed(paths), wanted, atol=2e-6)
