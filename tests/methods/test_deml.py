"""DeML's channel attention: the network by its parts, the loss by loops."""

from __future__ import annotations

import cmath
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from embedkit import methods
from embedkit.errors import UsageError
from embedkit.methods import Batch
from embedkit.models import create_backbone, create_pooling
from embedkit.models.attended import AttendedNet
from embedkit.train import Recipe
from embedkit.train.run import create_untrained
from tests.losses.conftest import Loops

_PLAIN = {"mean": [0.0] * 3, "std": [1 / 255] * 3}


def _network(
    backbone: str, *, dim: int = 6, branches: int = 3, size: tuple[int, int] = (64, 64)
) -> AttendedNet:
    body = create_backbone(backbone, weights="none", image_size=size)
    pooling = create_pooling("avg", body.num_features)
    return AttendedNet(body, pooling, dim, branches=branches, image_size=size, **_PLAIN)


def _some(count: int, size: tuple[int, int] = (64, 64)) -> Tensor:
    torch.manual_seed(0)
    return torch.randint(0, 256, (count, *size, 3), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("backbone", "tap"),
    [
        ("resnet10", "layer3"),
        ("mobilenet_v2", "features.13"),
        ("squeezenet1_1", "features.7"),
        ("regnet_y_400mf", "trunk_output.block3"),
    ],
)
def test_open_gates_change_nothing_wherever_the_backbone_is_cut(backbone: str, tap: str) -> None:
    network = _network(backbone).eval()
    assert network.tap == tap
    for gate in network.gates:
        for last in gate.modules():
            if isinstance(last, nn.Conv2d):
                nn.init.zeros_(last.weight)
                nn.init.constant_(last.bias, 100.0)  # type: ignore[arg-type]
    with torch.no_grad():
        plain = network.head(network.features(_some(3))).view(3, 3, 2)
        given = network(_some(3))
    assert given.shape == (3, 6)
    assert torch.allclose(given, nn.functional.normalize(plain, dim=2).flatten(1), atol=1e-5)


@pytest.mark.parametrize("backbone", ["swin_t", "vit_b_16"])
def test_a_backbone_without_such_maps_is_refused(backbone: str) -> None:
    with pytest.raises(UsageError, match=f"{backbone} cannot be read at three depths"):
        _network(backbone)


@pytest.mark.parametrize(("dim", "branches", "wanted"), [(7, 3, 9), (3, 3, 6), (128, 3, 129)])
def test_a_width_that_cannot_be_cut_is_refused_with_one_that_can(
    dim: int, branches: int, wanted: int
) -> None:
    with pytest.raises(UsageError, match=f"{dim} numbers cannot be cut") as refused:
        _network("resnet10", dim=dim, branches=branches)
    assert refused.value.hint == f"--dim {wanted}"


def test_the_embedding_is_each_branch_computed_one_by_one() -> None:
    network = _network("resnet10", size=(64, 96)).eval()
    pixels = _some(2, (64, 96))
    with torch.no_grad():
        x = pixels.permute(0, 3, 1, 2).float()
        for name, part in network.backbone.body.named_children():
            x = part(x)
            if name == "layer3":
                attended = x
        parts = []
        for number, gate in enumerate(network.gates):
            first, second = gate.get_submodule("0"), gate.get_submodule("2")
            assert isinstance(first, nn.Conv2d)
            assert isinstance(second, nn.Conv2d)
            assert first.bias is not None
            assert second.bias is not None
            # A convolution 1 x 1 is one and the same layer at every place.
            hidden = torch.einsum("bchw,kc->bkhw", attended, first.weight[:, :, 0, 0])
            hidden = (hidden + first.bias[:, None, None]).clamp(min=0)
            opened = torch.einsum("bkhw,ck->bchw", hidden, second.weight[:, :, 0, 0])
            opened = 1 / (1 + (-opened - second.bias[:, None, None]).exp())
            last = network.backbone.body.get_submodule("layer4")(attended * opened)
            raw = last.mean((2, 3)) @ network.head.weight[2 * number : 2 * number + 2].T
            parts.append(raw / raw.square().sum(1, keepdim=True).sqrt())
        given = network(pixels)
    assert torch.allclose(given, torch.cat(parts, 1), atol=1e-5)
    assert not [m for m in network.modules() if m._forward_hooks]


class _Given(nn.Module):
    """A network whose embedding is what it was given."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, pixels: Tensor) -> Tensor:
        return self.rows


def _formula(rows: list[Any], labels: list[int], weight: float, margin: float) -> complex:
    """Two branches of three numbers; cosines, so the branches need not be unit vectors."""
    branches = [[Loops.unit(row[place : place + 3]) for row in rows] for place in (0, 3)]
    total = 0j
    for branch in branches:
        pull: list[complex] = []
        push: list[complex] = []
        for i, j in itertools.combinations(range(len(rows)), 2):
            gap = Loops.dot(branch[i], branch[j]) - 0.5
            same = labels[i] == labels[j]
            (pull if same else push).append(cmath.log(1 + cmath.exp((-2 if same else 70) * gap)))
        total += (Loops.mean(pull) + Loops.mean(push)) / 2
    gaps = [Loops.distance(one, other) for one, other in zip(*branches, strict=True)]
    return total + weight * Loops.mean([Loops.positive(margin - gap) ** 2 / 2 for gap in gaps])


@pytest.mark.parametrize(("diversity", "margin"), [(0.2, 2.0), (3.0, 0.9), (0.0, 2.0)])
def test_value_and_gradient_are_those_of_loops(diversity: float, margin: float) -> None:
    torch.manual_seed(1)
    raw = torch.randn(6, 6, dtype=torch.float64)
    raw[3, 3:] = raw[3, :3]  # of this picture the two branches agree
    rows, labels = raw.tolist(), [0, 0, 1, 1, 2, 2]

    def formula(moved: list[Any]) -> complex:
        return _formula(moved, labels, diversity, margin)

    value, slopes = Loops.gradient(formula, rows)
    moving = raw.clone().requires_grad_()
    unit = nn.functional.normalize(moving.view(-1, 3)).view(-1, 6)
    method = methods.create("deml", branches=2, diversity=diversity, margin=margin)
    places = torch.arange(6)
    batch = Batch(_some(6, (8, 8)), places, torch.tensor(labels), None, 0, 0)
    outcome = method.step(_Given(unit), batch)  # type: ignore[arg-type]
    outcome.loss.backward()  # type: ignore[no-untyped-call]
    assert outcome.loss.item() == pytest.approx(value, rel=1e-9)
    assert moving.grad is not None
    assert torch.allclose(moving.grad, torch.tensor(slopes, dtype=torch.float64), atol=1e-9)
    gaps = (unit[:, :3] - unit[:, 3:]).detach().square().sum(1).sqrt()
    assert method.stats["branch_distance"] == pytest.approx(float(gaps.mean()))
    assert set(method.stats) > {"spread", "diversity_loss", "active_negatives"}


def test_gates_head_and_backbone_learn_under_autocast_as_well(tiny: Callable[..., Recipe]) -> None:
    network = create_untrained(tiny(loss="deml", dim=8), weights="none")
    assert isinstance(network, AttendedNet)
    method, places = methods.create("deml"), torch.arange(6)
    batch = Batch(_some(6, (32, 32)), places, places // 2, None, 0, 0)
    with torch.autocast("cpu", torch.bfloat16):
        outcome = method.step(network, batch)
    assert outcome.loss.dtype == torch.float32
    outcome.loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in network.named_parameters():
        assert parameter.grad is None or bool(parameter.grad.isfinite().all()), name
    assert all(part.grad is not None and part.grad.any() for part in network.gates.parameters())
    assert [name for name, _ in network.head.named_parameters()] == ["weight"]


def test_impossible_options_are_refused() -> None:
    for options in ({"branches": 1}, {"diversity": -1.0}, {"margin": 0.0}, {"alpha": 0.0}):
        with pytest.raises(UsageError):
            methods.create("deml", **options)
