"""RLL-(L,M,H): the network by its parts, the loss by its branches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from embedkit import losses, methods
from embedkit.errors import UsageError
from embedkit.methods import Batch
from embedkit.models import create_backbone, create_pooling, freeze_batch_norm
from embedkit.models.branched import BranchedNet, _windows, branch_widths
from embedkit.train import Recipe
from embedkit.train.run import create_untrained

_PLAIN = {"mean": [0.0] * 3, "std": [1 / 255] * 3}


def _network(backbone: str, *, dim: int = 8, size: tuple[int, int] = (64, 64)) -> BranchedNet:
    body = create_backbone(backbone, weights="none", image_size=size)
    pooling = create_pooling("avg", body.num_features)
    return BranchedNet(body, pooling, dim, image_size=size, **_PLAIN)


def _some(count: int, size: tuple[int, int] = (64, 64)) -> Tensor:
    torch.manual_seed(0)
    return torch.randint(0, 256, (count, *size, 3), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("backbone", "taps"),
    [
        ("resnet10", ("layer2", "layer3")),
        ("mobilenet_v2", ("features.6", "features.13")),
        ("squeezenet1_1", ("features.4", "features.7")),
        ("regnet_y_400mf", ("trunk_output.block2", "trunk_output.block3")),
    ],
)
def test_it_reads_where_the_map_is_last_of_its_size(backbone: str, taps: tuple[str, str]) -> None:
    network = _network(backbone)
    assert network.taps == taps
    assert network.training
    assert network(_some(2)).shape == (2, 8)


@pytest.mark.parametrize("backbone", ["swin_t", "vit_b_16"])
def test_a_backbone_without_such_maps_is_refused(backbone: str) -> None:
    with pytest.raises(UsageError, match=f"{backbone} cannot be read at three depths"):
        _network(backbone)


def test_the_embedding_is_high_low_middle_computed_one_by_one() -> None:
    network = _network("resnet10", dim=11, size=(64, 96)).eval()
    pixels = _some(3, (64, 96))
    with torch.no_grad():
        x = pixels.permute(0, 3, 1, 2).float()
        maps = {}
        for name, part in network.backbone.body.named_children():
            x = maps[name] = part(x)
        parts = [
            x.mean((2, 3)) @ network.head.weight.T,
            network.low(maps["layer2"]),
            network.middle(maps["layer3"]),
        ]
        given = network(pixels)
    assert [part.shape[1] for part in parts] == [4, 4, 3] == list(branch_widths(11))
    assert torch.allclose(given, torch.cat(parts, 1), atol=1e-5)
    assert not [m for m in network.modules() if m._forward_hooks]


@pytest.mark.parametrize("dim", [3, 4, 5, 128, 1536])
def test_the_widths_add_up_and_differ_by_one_at_most(dim: int) -> None:
    widths = branch_widths(dim)
    assert sum(widths) == dim
    assert max(widths) - min(widths) <= 1


def test_fewer_than_three_numbers_are_refused() -> None:
    with pytest.raises(UsageError, match="three branches need three numbers, got 2"):
        _network("resnet10", dim=2)


def test_windows_cover_a_map_exactly_and_are_the_papers_on_its_own() -> None:
    assert _windows(14) == (4, 5, 3)
    assert _windows(7)[0] == 2
    for side in range(1, 200):
        count, wide, apart = _windows(side)
        assert apart * (count - 1) + wide == side
        assert 1 <= apart <= wide
        assert count <= 4


def test_frozen_batch_norm_leaves_the_new_branches_free_to_learn_their_statistics() -> None:
    network = _network("resnet10")
    freeze_batch_norm(network)
    norms = {n: m for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {name for name, norm in norms.items() if norm.training} == {"low.2", "middle.2"}
    network.eval()
    assert not any(norm.training for norm in norms.values())


def test_the_loss_is_the_sum_of_three_each_of_its_branch(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny(loss="rll-lmh", dim=9)
    network = create_untrained(recipe, weights="none").eval()
    method = methods.create("rll-lmh", margin=0.3, temperature=5.0)
    rows = torch.arange(6)
    outcome = method.step(network, Batch(_some(6, (32, 32)), rows, rows // 2, None, 0, 0))
    rll = losses.create("rll", margin=0.3, temperature=5.0)
    parts = [outcome.embeddings[:, place : place + 3].detach() for place in (0, 3, 6)]
    values, spreads = [], []
    for part in parts:
        values.append(float(rll(part, rows // 2)))
        spreads.append(rll.stats["spread"])
    assert outcome.loss.item() == pytest.approx(sum(values), rel=1e-5)
    assert method.stats["spread"] == pytest.approx(min(spreads))
    total = sum(float(part.square().sum()) for part in parts)
    for name, part in zip(("high", "low", "middle"), parts, strict=True):
        share = float(part.square().sum()) / total
        assert method.stats[f"share_{name}"] == pytest.approx(share, rel=1e-4)
    outcome.loss.backward()  # type: ignore[no-untyped-call]
    assert isinstance(network, BranchedNet)
    for head in (network.head, network.low[-1], network.middle[-1]):
        assert isinstance(head, nn.Linear)
        assert [name for name, _ in head.named_parameters()] == ["weight"]
        assert head.weight.grad is not None
        assert float(head.weight.grad.abs().sum()) > 0
    with torch.autocast("cpu", torch.bfloat16):
        again = method.step(network, Batch(_some(6, (32, 32)), rows, rows // 2, None, 0, 0))
    assert again.loss.dtype == torch.float32
    assert again.loss.item() == pytest.approx(outcome.loss.item(), rel=0.05)
