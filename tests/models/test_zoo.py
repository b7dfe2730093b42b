"""Every registered backbone keeps a backbone's promises; a new one is tested by being listed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from embedkit.errors import UnknownNameError, UsageError
from embedkit.models import (
    EmbeddingNet,
    backbone_entry,
    backbone_names,
    create_backbone,
    create_network,
    freeze_stages,
    weights_hash,
)


def network(name: str, *, weights: str | Path = "none", size: tuple[int, int]) -> EmbeddingNet:
    return create_network(
        backbone=name,
        weights=weights,
        pooling="avg",
        dim=5,
        image_size=size,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
    )


@pytest.mark.parametrize("size", [(64, 64), (64, 96)], ids=["square", "wide"])
@pytest.mark.parametrize("name", backbone_names())
def test_a_map_comes_out_and_the_gradient_reaches_the_first_layer(
    name: str, size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    net = network(name, size=size)
    pixels = torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8)

    feature_map = net.backbone(torch.rand(1, 3, *size))
    embedding = net(pixels)
    embedding.square().sum().backward()

    assert feature_map.shape[1] == net.backbone.num_features
    assert size[1] / size[0] == pytest.approx(feature_map.shape[3] / feature_map.shape[2], rel=0.4)
    assert embedding.shape == (2, 5)
    assert embedding.isfinite().all()
    first = next(net.backbone.parameters())
    assert first.grad is not None
    assert first.grad.abs().sum() > 0


@pytest.mark.parametrize("name", backbone_names())
def test_every_weight_belongs_to_exactly_one_stage(name: str) -> None:
    net = network(name, size=(32, 32))
    total = len(list(net.backbone.parameters()))
    free = []
    for n in range(len(net.backbone.stages) + 1):
        freeze_stages(net, n)
        free.append(sum(p.requires_grad for p in net.backbone.parameters()))
    assert free[0] == total
    assert free[-1] == 0
    assert free == sorted(free, reverse=True)
    assert all(p.requires_grad for p in net.head.parameters())


@pytest.mark.parametrize("name", backbone_names())
def test_weights_survive_a_file_and_the_hash_tells_one_changed_weight(
    name: str, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    net = network(name, size=(32, 32))
    state = {k: v.contiguous() for k, v in net.backbone.body.state_dict().items()}
    save_file({**state, "classifier.99.weight": torch.zeros(3)}, tmp_path / "w.safetensors")

    again = network(name, weights=tmp_path / "w.safetensors", size=(32, 32))
    assert weights_hash(again.backbone) == weights_hash(net.backbone)
    assert weights_hash(again) != weights_hash(net)  # the heads differ

    before = weights_hash(net)
    with torch.no_grad():
        next(reversed(list(net.backbone.parameters()))).view(-1)[-1] += 1e-3
    assert weights_hash(net) != before


@pytest.mark.parametrize("name", backbone_names())
def test_the_entry_names_weights_torchvision_really_has(name: str) -> None:
    from torchvision.models import get_weight

    entry = backbone_entry(name)
    assert entry.name == name
    assert entry.about
    assert "arXiv:" in entry.paper
    assert entry.image_size >= 224
    if entry.weights is not None:
        published = get_weight(entry.weights)
        assert published.url.startswith("https://download.pytorch.org/")
        assert published.meta["num_params"] > 0


def test_the_seed_decides_the_random_weights() -> None:
    torch.manual_seed(7)
    one = weights_hash(network("resnet10", size=(32, 32)))
    torch.manual_seed(7)
    two = weights_hash(network("resnet10", size=(32, 32)))
    three = weights_hash(network("resnet10", size=(32, 32)))
    assert one == two != three


def test_an_unknown_name_gets_the_nearest_real_one() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'resnet18'"):
        create_backbone("resnet-18", weights="none", image_size=(64, 64))


@pytest.mark.parametrize("size", [(31, 64), (64, 0), (-5, -5)])
def test_a_picture_too_small_for_a_map_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="at least 32"):
        create_backbone("resnet10", weights="none", image_size=size)


def test_vit_wants_multiples_of_its_patch_and_the_size_it_was_made_for() -> None:
    with pytest.raises(UsageError, match="112 x 96"):
        create_backbone("vit_b_16", weights="none", image_size=(113, 96))
    made_for = create_backbone("vit_b_16", weights="none", image_size=(32, 48))
    with pytest.raises(UsageError, match="32 x 48"):
        made_for(torch.zeros(1, 3, 48, 32))
