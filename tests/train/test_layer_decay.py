"""Stages nearer to the picture learn slower, by one factor; no parameter is lost or twice there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from embedkit import methods, models
from embedkit.data import PhotoSet
from embedkit.errors import UsageError
from embedkit.models import create_backbone
from embedkit.train import train
from embedkit.train.guards import seed_of
from embedkit.train.layer_decay import split_by_stage
from embedkit.train.run import create_untrained
from tests.tiny_recipe import tiny_recipe


@pytest.mark.parametrize("name", models.backbone_names())
def test_every_parameter_is_in_one_group_at_the_rate_of_its_stage(name: str) -> None:
    size = models.backbone_entry(name).image_size
    backbone = create_backbone(name, weights="none", image_size=(size, size))
    other = torch.nn.Linear(2, 2)
    whole = [
        methods.Group("backbone", backbone.parameters(), 0.1, 0.5),
        methods.Group("head", other.parameters(), 1.0),
    ]
    rate_of = {
        part: group.learning_rate
        for group in split_by_stage(whole, backbone, 0.5)
        for part in group.parameters
    }
    assert len(rate_of) == len([*backbone.parameters(), *other.parameters()])
    # By another route: go through the stages from the top, halving as we go down.
    rate = 0.1
    for prefixes in reversed(backbone.stages):
        for key, part in backbone.body.named_parameters():
            if key in prefixes or key.startswith(tuple(f"{prefix}." for prefix in prefixes)):
                assert rate_of.pop(part) == pytest.approx(rate)
        rate /= 2
    # All that is left is no part of the backbone.
    assert list(rate_of.values()) == [1.0, 1.0]
    assert set(rate_of) == set(other.parameters())


def test_groups_keep_their_weight_decay_and_get_a_name_of_their_own() -> None:
    network = create_untrained(tiny_recipe(backbone="resnet10"), weights="none")
    group = methods.Group("body", network.backbone.parameters(), 1.0, 0.25)
    split = split_by_stage([group], network.backbone, 0.1)
    assert [one.name for one in split] == [f"body/{number}" for number in range(1, 6)]
    assert [one.weight_decay for one in split] == [0.25] * 5


def test_the_first_step_moves_each_stage_half_as_far_as_the_one_above(
    photos: PhotoSet, tmp_path: Path
) -> None:
    recipe = tiny_recipe(backbone="resnet10", freeze=1, steps=1, epochs=None, weight_decay=0.0)
    recipe = dataclasses.replace(recipe, layer_decay=0.5, patience=0)
    run = train(recipe, photos, tmp_path / "run", device="cpu")
    after = dict(run.network().named_parameters())
    torch.manual_seed(seed_of(0, "network"))
    before = dict(create_untrained(recipe, weights="none").named_parameters())
    # Adam's first step is the learning rate, whatever the gradient.
    names = ("conv1", *(f"layer{number}.0.conv1" for number in range(1, 5)))
    steps = [
        float((after[key] - before[key]).detach().abs().max())
        for key in (f"backbone.body.{name}.weight" for name in names)
    ]
    assert steps[0] == 0  # frozen
    full = run.record["best"]["learning_rate"]
    assert steps[1:] == pytest.approx([full / 8, full / 4, full / 2, full], rel=0.05)


@pytest.mark.parametrize("decay", [0, -0.5, 1.5])
def test_other_decays_are_refused(decay: float) -> None:
    with pytest.raises(UsageError, match="layer_decay") as refused:
        tiny_recipe(layer_decay=decay)
    assert refused.value.hint == "leave layer_decay out: it is then 1.0"
