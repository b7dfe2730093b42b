"""Product quantisation as a method: the network's own codebooks learn, and are checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from embedkit import methods
from embedkit.data import PhotoSet
from embedkit.errors import UsageError
from embedkit.methods import Batch
from embedkit.models.quantized import QuantizedNet
from embedkit.train import Recipe, Run, make_plan, train
from embedkit.train.run import create_untrained

OPTIONS = {"subspaces": 2, "words": 4}


def ready(recipe: Recipe, photos: PhotoSet) -> tuple[methods.Method, QuantizedNet]:
    torch.manual_seed(0)
    network = create_untrained(recipe, weights="none")
    method = methods.create("spq", **recipe.loss_options)
    method.prepare(make_plan(recipe, photos, device=torch.device("cpu")).setting(), network)
    assert isinstance(network, QuantizedNet)
    return method, network


def test_every_parameter_learns_in_one_group_and_words_as_fast_as_classes(
    tiny: Callable[..., Recipe], photos: PhotoSet
) -> None:
    recipe = tiny(loss="spq", loss_options=OPTIONS)
    method, network = ready(recipe, photos)
    groups = {group.name: list(group.parameters) for group in method.groups(network, recipe)}
    every = [id(part) for group in groups.values() for part in group]
    assert sorted(every) == sorted(map(id, [*network.parameters(), *method.parameters()]))
    assert {id(part) for part in network.quantizer.parameters()} <= set(map(id, groups["loss"]))


def test_a_step_teaches_the_codebooks_that_are_exported(
    tiny: Callable[..., Recipe], photos: PhotoSet
) -> None:
    recipe = tiny(loss="spq", loss_options=OPTIONS)
    method, network = ready(recipe, photos)
    side = recipe.preprocess()
    pixels = torch.randint(0, 256, (4, side.height, side.width, 3), dtype=torch.uint8)
    labels = torch.tensor([0, 0, 1, 1])
    batch = Batch(pixels, torch.arange(4), labels, None, 0, 0)
    network.eval()
    outcome = method.step(network, batch)
    outcome.loss.backward()
    for part in network.quantizer.parameters():
        assert part.grad is not None
        assert part.grad.any()
    # What a teacher and the collapse alarm see are the rows that are deployed.
    torch.testing.assert_close(outcome.embeddings, network(pixels))
    with torch.no_grad():
        codes = network.with_codes(pixels)[1]
        rows = network.unquantized(pixels)
        assert torch.equal(codes.long(), network.quantizer.codes(network.quantizer.shares(rows)))
    assert not method.normalizes


@pytest.mark.parametrize("assign", ["logits", "distance"])
def test_a_run_knows_its_codebooks_and_they_have_learned(
    tiny: Callable[..., Recipe], photos: PhotoSet, tmp_path: Path, assign: str
) -> None:
    recipe = tiny(loss="spq", loss_options=OPTIONS | {"assign": assign})
    path = train(recipe, photos, tmp_path / "run", device="cpu").path
    contract = Run.load(path).contract()
    assert contract.codebooks is not None
    assert (contract.codebooks.parts, contract.codebooks.words) == (2, 4)
    assert (contract.metric, contract.normalizes) == ("l2", False)
    network = Run.load(path).network()
    assert isinstance(network, QuantizedNet)
    learned = network.quantizer.words.detach().numpy()
    np.testing.assert_array_equal(contract.codebooks.array(), learned)
    _, untrained = ready(recipe, photos)
    assert not np.array_equal(learned, untrained.quantizer.words.detach().numpy())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"words": 257}, "words must be at most 256: a code is a byte, got 257"),
        ({"words": 1}, "words must be a whole number of at least 2"),
        ({"assign": "nearest"}, "assign must be 'logits' or 'distance'"),
        ({"temperature": 0}, "temperature must be"),
        ({"even": -1}, "even must be"),
    ],
)
def test_impossible_options_are_named(options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        methods.create("spq", **options)
    assert said in (caught.value.facts or "")


def test_a_width_that_cannot_be_cut_is_told_with_one_that_can(
    tiny: Callable[..., Recipe],
) -> None:
    recipe = tiny(loss="spq", dim=13, loss_options={"subspaces": 4})
    with pytest.raises(UsageError, match="13 numbers cannot be cut into 4 equal parts") as caught:
        create_untrained(recipe, weights="none")
    assert "--dim 12" in (caught.value.hint or "")
