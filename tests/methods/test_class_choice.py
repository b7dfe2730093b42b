"""The recipe's way of making batches, and its memory: chosen, refused, resumed bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from embedkit import methods
from embedkit.data import HardClassSampler, PhotoSet, PKSampler, VariedPKSampler
from embedkit.errors import UnknownNameError, UsageError
from embedkit.methods._plain import nearest_classes
from embedkit.train import Recipe, make_plan
from embedkit.train.run import create_untrained
from tests.methods.conftest import TrainStopped


def test_hard_classes_and_a_memory_are_resumed_bit_for_bit(
    photos: PhotoSet,
    tmp_path: Path,
    tiny: Callable[..., Recipe],
    train_stopped: TrainStopped,
    contents: Callable[[Path], dict[str, Any]],
) -> None:
    recipe = tiny(batches="hard-classes", memory_bank=9, epochs=2)
    straight = contents(train_stopped(recipe, photos, tmp_path / "straight", []))
    assert straight == contents(train_stopped(recipe, photos, tmp_path / "again", [3]))
    assert {"method/loss.rows", "method/loss.labels", "method/near"} <= straight["tensors"].keys()
    assert all(row["stats"]["memory_loss"] > 0 for row in straight["rows"])


def test_each_way_has_its_sampler(photos: PhotoSet, tiny: Callable[..., Recipe]) -> None:
    kinds = {"pk": PKSampler, "varied": VariedPKSampler, "hard-classes": HardClassSampler}
    for name, kind in kinds.items():
        recipe = tiny(batches=name)
        setting = make_plan(recipe, photos, device=torch.device("cpu")).setting()
        method = methods.create("rll")
        method.prepare(setting, create_untrained(recipe, weights="none"))
        sampler = method.sampler(setting, 3)
        assert type(sampler) is kind
        assert len(sampler.batches(0)) == sampler.steps == 3
    with pytest.raises(UnknownNameError, match="did you mean 'hard-classes'"):
        tiny(batches="hard-clases")


def test_a_method_with_batches_of_its_own_and_a_loss_without_pairs_are_refused(
    photos: PhotoSet, tiny: Callable[..., Recipe]
) -> None:
    for changes, words in (
        ({"loss": "sche", "batches": "varied"}, "sche makes its own batches"),
        ({"loss": "sche", "memory_bank": 4}, "sche cannot use the embeddings of earlier"),
        ({"loss": "softmax", "memory_bank": 4}, "softmax cannot use the embeddings of earlier"),
    ):
        with pytest.raises(UsageError, match=words):
            make_plan(tiny(**changes), photos, device=torch.device("cpu"))
    make_plan(tiny(loss="fastap", memory_bank=4), photos, device=torch.device("cpu"))


@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_nearest_classes_are_sorted_by_distance(count: int) -> None:
    means = torch.randn(9, 4, generator=torch.Generator().manual_seed(count))
    means[3] = means[5]
    for number, given in enumerate(nearest_classes(means, count).tolist()):
        others = [one for one in range(9) if one != number]
        apart = {one: float((means[one] - means[number]).norm()) for one in others}
        assert [apart[one] for one in given] == pytest.approx(sorted(apart.values())[:count])
        assert len({number, *given}) == count + 1
