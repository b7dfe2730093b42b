"""Every method there is trains on what it learns from, stops and resumes bit for bit, and exports.

A new method is tested by existing.
"""

from __future__ import annotations

import csv
import dataclasses
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedkit import methods
from embedkit.data import PhotoSet, read_photos
from embedkit.export import export_onnx
from embedkit.methods import Method
from embedkit.runtime import Embedder
from embedkit.train import Recipe, Run, find_rate, make_plan, trainer
from embedkit.train.run import create_untrained
from tests.methods.conftest import TrainStopped


@pytest.fixture(scope="session")
def numbered(photos: PhotoSet, tmp_path_factory: pytest.TempPathFactory) -> PhotoSet:
    """The photos with two numbers each: of the class, and of the picture."""
    path = tmp_path_factory.mktemp("data") / "numbers.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "target_0", "target_1"])
        for row, one in enumerate(photos.files()):
            writer.writerow([one, row // 5, (row % 5) / 10])
    return read_photos(path)


@pytest.fixture(scope="session")
def judged(photos: PhotoSet, tmp_path_factory: pytest.TempPathFactory) -> PhotoSet:
    """Triplets within three times three classes, of which two photos are of one class."""
    path = tmp_path_factory.mktemp("data") / "triplets.csv"
    rng = np.random.default_rng(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_a", "image_b", "image_c", "odd", "margin"])
        for number in range(60):
            alike, other = rng.permutation(3)[:2] + 3 * (number % 3)
            a, b = rng.permutation(5)[:2] + 5 * alike
            three = [a, b, rng.integers(5) + 5 * other]
            order = rng.permutation(3)
            cells = [photos.files()[three[place]] for place in order]
            writer.writerow([*cells, "abc"[list(order).index(2)], "0.1" if number % 2 else ""])
    return read_photos(path)


@pytest.fixture
def fitting(photos: PhotoSet, numbered: PhotoSet, judged: PhotoSet) -> Callable[[str], PhotoSet]:
    """The photos a method learns from."""
    kinds = {"classes": photos, "images": photos, "numbers": numbered, "triplets": judged}
    return lambda name: kinds[methods.learns_from(name)]


@pytest.mark.parametrize("name", methods.method_names())
def test_it_stops_anywhere_resumes_bit_for_bit_and_what_it_made_is_exported(
    name: str,
    fitting: Callable[[str], PhotoSet],
    tmp_path: Path,
    tiny: Callable[..., Recipe],
    train_stopped: TrainStopped,
    contents: Callable[[Path], dict[str, Any]],
) -> None:
    recipe, photos = tiny(loss=name), fitting(name)
    straight = train_stopped(recipe, photos, tmp_path / "straight", [])
    # After step 1 of 2, and in the evaluation at the end of the second epoch.
    again = train_stopped(recipe, photos, tmp_path / "again", [1, 4])
    assert contents(straight) == contents(again)
    rows = contents(straight)["rows"]
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert all(row["stats"] and row["val"] for row in rows)
    run = Run.load(straight)
    assert run.record["steps"] == 6
    assert run.photos().manifest_hash() == run.record["data"]["hash"]
    if type(methods.create(name)).create_network is not Method.create_network:
        _check_export(run, photos.files()[:3], tmp_path / "model.onnx")


def _check_export(run: Run, files: list[Path], path: Path) -> None:
    """Of a network of the method's own; the plain one has its own tests."""
    export_onnx(run.network(), run.contract(), path)
    with Embedder.load(path, device="cpu") as embedder:
        given = embedder.embed(files)
    with torch.no_grad():
        raw = run.network()(_pixels(run.recipe, files))
    wanted = torch.nn.functional.normalize(raw) if run.contract().normalizes else raw
    assert np.allclose(given, wanted.numpy(), atol=1e-4 * float(wanted.abs().max()))


def _pixels(recipe: Recipe, files: list[Path]) -> torch.Tensor:
    from embedkit.imaging import read_pixels

    return torch.from_numpy(np.stack([read_pixels(one, recipe.preprocess()) for one in files]))


@pytest.mark.parametrize("name", methods.method_names())
def test_a_test_of_learning_rates_before_it_leaves_no_trace(
    name: str,
    fitting: Callable[[str], PhotoSet],
    tmp_path: Path,
    tiny: Callable[..., Recipe],
    train_stopped: TrainStopped,
    contents: Callable[[Path], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Three steps decide nothing: the training is then that by the recipe's own rates.
    for module in (find_rate, trainer):
        monkeypatch.setattr(module, "STEPS", 3)
    recipe, photos = tiny(loss=name, epochs=1), fitting(name)
    plain = train_stopped(recipe, photos, tmp_path / "plain", [])
    tested = dataclasses.replace(recipe, find_learning_rate=True)
    after = train_stopped(tested, photos, tmp_path / "tested", [])
    assert contents(plain) == contents(after)
    assert len(Run.load(after).record["rate_test"]["losses"]) == 3


@pytest.mark.parametrize("name", methods.method_names())
def test_every_learning_parameter_is_in_one_group_and_every_batch_is_a_batch(
    name: str, fitting: Callable[[str], PhotoSet], tiny: Callable[..., Recipe]
) -> None:
    recipe = tiny(loss=name)
    plan = make_plan(recipe, fitting(name), device=torch.device("cpu"))
    network = create_untrained(recipe, weights="none")
    method = methods.create(name)
    method.prepare(plan.setting(), network)
    grouped = [part for group in method.groups(network, recipe) for part in group.parameters]
    assert len({id(part) for part in grouped}) == len(grouped)
    learning = [*network.parameters(), *method.parameters()]
    assert {id(part) for part in learning if part.requires_grad} <= {id(part) for part in grouped}
    sampler = method.sampler(plan.setting(), 5)
    assert sampler.steps == 5
    for epoch in range(3):
        batches = sampler.batches(epoch)
        assert len(batches) == 5
        for batch, same in zip(batches, sampler.batches(epoch), strict=True):
            assert np.array_equal(batch, same)
            assert 2 <= len(batch) <= recipe.batch_size
            assert batch.min() >= 0
            assert batch.max() < len(plan.rows("train"))
    assert method.sampler(plan.setting(), None).steps >= 1


@pytest.mark.parametrize("name", methods.method_names())
def test_it_says_what_it_is(name: str) -> None:
    kind = type(methods.create(name))
    module = inspect.getmodule(kind)
    assert issubclass(kind, Method)
    assert kind.certainty in ("paper", "code read", "secondary source", "reconstruction")
    assert module is not None
    assert module.__doc__
    assert kind.__doc__
    for option in methods.options(name):
        assert option in kind.__doc__
    assert name in methods.names()
    # The options of a loss of this name are among the method's, with the same defaults.
    from embedkit import losses

    if name in losses.names():
        given = methods.options(name)
        assert losses.options(name).items() <= given.items()
