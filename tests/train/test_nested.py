"""A training at several widths, from the recipe to the exported file, each number checked anew."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from embedkit import methods
from embedkit.data import PhotoSet
from embedkit.errors import Interrupted, UsageError
from embedkit.evaluate import retrieval_metrics
from embedkit.export import HeldOut, compare, export_checked
from embedkit.imaging import Pixels, read_pixels
from embedkit.runtime import Embedder, ModelContract, read_contract
from embedkit.runtime.backends.base import Vectors
from embedkit.runtime.contract import Prefix
from embedkit.train import Recipe, Run, checkpoint, train
from embedkit.train.plan import check_names
from tests.tiny_model import tiny_contract
from tests.tiny_recipe import tiny_recipe
from tests.train.listener import Listener


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, photos: PhotoSet) -> Run:
    """Trained at 3, 5 and 8 numbers; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "nested"
    return train(_recipe(), photos, folder, device="cpu")


def _recipe() -> Recipe:
    # A network whose embeddings differ by more than rounding before it has learned anything.
    return tiny_recipe(
        loss="proxy-anchor",
        nested=(3, 5),
        epochs=2,
        backbone="resnet10",
        freeze=0,
        freeze_batch_norm=False,
    )


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read_checkpoint(folder / "last.safetensors").tensors


def test_it_learns_class_vectors_of_every_width_and_tells_each_loss(run: Run) -> None:
    shapes = {
        tuple(tensor.shape)
        for name, tensor in _tensors(run.path).items()
        if name.startswith("method/") and name.endswith("proxies")
    }
    classes = run.record["data"]["splits"]["train"]["classes"]
    assert shapes == {(classes, 3), (classes, 5), (classes, 8)}
    stats = run.record["best"]["stats"]
    mean = (stats["loss_3"] + stats["loss_5"] + stats["loss_8"]) / 3
    assert run.record["best"]["loss"] == pytest.approx(mean, rel=1e-5)


def test_a_stop_changes_no_bit(run: Run, photos: PhotoSet, tmp_path: Path) -> None:
    stop = Listener(at_step={3: lambda: signal.raise_signal(signal.SIGINT)})
    with pytest.raises(Interrupted):
        train(_recipe(), photos, tmp_path / "run", device="cpu", reporter=stop)
    again = train(_recipe(), photos, tmp_path / "run", device="cpu", resume=True)
    one, other = _tensors(run.path), _tensors(again.path)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert again.record["nested"] == run.record["nested"]


def test_the_measured_figures_are_those_of_the_first_numbers(run: Run) -> None:
    files, labels = run.held_out()
    pixels = np.stack([read_pixels(one, run.recipe.preprocess()) for one in files])
    with torch.no_grad():
        raw = run.network()(torch.from_numpy(pixels))
    contract = run.contract()
    assert contract.widths == (3, 5, 8)
    for width in (3, 5):
        wanted = retrieval_metrics(normalize(raw[:, :width]).numpy(), labels).to_json()
        assert run.record["nested"][str(width)] == pytest.approx(wanted, abs=1e-6)
        quality = contract.cut(width).quality["fp32"]
        assert quality == pytest.approx({k: v for k, v in wanted.items() if v is not None})


def test_the_exported_file_gives_what_torch_gives_at_every_width(run: Run, tmp_path: Path) -> None:
    files, labels = run.held_out()
    path = tmp_path / "model.onnx"
    written, report = export_checked(run.network(), run.contract(), path, files, labels)
    assert report.passed
    assert read_contract(path) == written
    assert written.widths == (3, 5, 8)
    pixels = np.stack([read_pixels(one, written.preprocess) for one in files])
    with torch.no_grad():
        raw = run.network()(torch.from_numpy(pixels))
    for width in written.widths:
        with Embedder.load(path, device="cpu", dim=width) as embedder:
            given = embedder.embed(files)
        np.testing.assert_allclose(given, normalize(raw[:, :width]).numpy(), atol=1e-5)


class _Numbered:
    """Pictures are numbers, and their vectors those of a table."""

    name, device = "table", "cpu"

    def __init__(self, contract: ModelContract, table: Vectors) -> None:
        self.contract, self._table = contract, table

    def run(self, pixels: Pixels) -> Vectors:
        return self._table[pixels[:, 0, 0, 0]]

    def close(self) -> None: ...


def test_the_gate_looks_at_every_width_and_names_the_one_that_is_wrong() -> None:
    rows = np.random.default_rng(0).normal(size=(60, 8))
    rows[:, 0] *= 1e-3  # next to nothing of the whole, and all of the first number
    vectors = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    pixels = np.zeros((60, 16, 16, 3), np.uint8)
    pixels[:, 0, 0, 0] = np.arange(60)
    labels = tuple(str(row % 12) for row in range(60))
    held_out = HeldOut(pixels, vectors, labels, (), "cosine")
    contract = dataclasses.replace(tiny_contract(), prefixes=(Prefix(1), Prefix(4)))
    assert compare(_Numbered(contract, vectors), held_out).passed
    wrong = vectors.copy()
    wrong[:, 0] *= -1
    report = compare(_Numbered(contract, wrong), held_out)
    assert report.min_cosine > 0.9999
    assert report.reasons
    assert all(one.startswith("of the first 1 numbers alone: ") for one in report.reasons)


def test_the_recipe_comes_back_and_widths_that_cannot_be_are_refused() -> None:
    recipe = tiny_recipe(nested=(2, 4))
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert recipe.widths == (2, 4, 8)
    assert tiny_recipe(nested=(2, 8)).widths == (2, 8)
    assert tiny_recipe().widths == (8,)
    for widths, hint in (
        ((4, 2), "--nested 32,64,128"),
        ((0, 4), "--nested"),
        ((4, 16), "--dim 16"),
    ):
        with pytest.raises(UsageError, match="rising widths from 1 to 8") as refused:
            tiny_recipe(nested=widths)
        assert refused.value.hint is not None
        assert refused.value.hint.startswith(hint)


def test_methods_that_make_more_of_an_embedding_refuse_in_a_sentence() -> None:
    able = {name for name in methods.names() if methods.nests(name)}
    assert {"rll", "fastap", "isif", "log-ratio", "margin"} <= able
    assert not {"dces", "rll-lmh", "hdml", "spq"} & able
    for name in set(methods.method_names()) - able:
        with pytest.raises(UsageError, match=f"{name} cannot be trained at several widths"):
            check_names(tiny_recipe(loss=name, nested=(4,)))


def test_it_goes_together_with_a_memory_and_with_doubted_labels(
    photos: PhotoSet, tmp_path: Path
) -> None:
    recipe = tiny_recipe(nested=(4,), epochs=1, memory_bank=16, noise="label-smoothing")
    made = train(recipe, photos, tmp_path / "run", device="cpu")
    assert made.record["best"]["stats"]["memory_loss"] > 0
    assert made.record["nested"].keys() == {"4"}
