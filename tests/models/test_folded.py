"""Folded normalisations give what they gave apart, and nothing of the folding stays behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from embedkit.models import (
    EmbeddingNet,
    backbone_names,
    create_network,
    freeze_batch_norm,
    freeze_stages,
)
from embedkit.models.folded import fold, unfold


def network(backbone: str) -> EmbeddingNet:
    """In float64, with statistics unlike those of a new network."""
    torch.manual_seed(0)
    net = create_network(
        backbone=backbone,
        weights="none",
        pooling="avg",
        dim=4,
        image_size=(64, 64),
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.25),
    ).double()
    for norm in norms(net):
        for values, least, most in (
            (norm.running_mean, -0.2, 0.2),
            (norm.running_var, 0.5, 1.5),
            (norm.weight, -1.5, 1.5),
            (norm.bias, -0.2, 0.2),
        ):
            assert values is not None
            nn.init.uniform_(values, least, most)
    return net


def norms(net: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


def trained(net: EmbeddingNet) -> tuple[Tensor, dict[str, Tensor]]:
    """The embedding of two pictures and every parameter's gradient, without drop-out."""
    for module in net.modules():
        if type(module).__name__ in {"Dropout", "StochasticDepth"}:
            module.eval()
    pixels = torch.randint(0, 256, (2, 64, 64, 3), generator=torch.Generator().manual_seed(1))
    embedding = net(pixels.to(torch.uint8))
    (embedding * torch.arange(8.0).view(2, 4)).sum().backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return embedding.detach(), gradients


@pytest.mark.parametrize("backbone", backbone_names())
def test_every_normalisation_of_a_backbone_is_folded_and_gives_the_same(backbone: str) -> None:
    apart = network(backbone)
    if not norms(apart):
        pytest.skip(f"{backbone} has no batch normalisation")
    folded = copy.deepcopy(apart)
    freeze_batch_norm(folded)
    # `fold` is not reached by this one: its normalisations are switched by hand.
    apart.train()
    for norm in norms(apart):
        norm.eval()
    called: list[nn.Module] = []
    for norm in norms(folded):
        assert type(norm) is not nn.BatchNorm2d
    for module in folded.modules():
        if type(module) is nn.BatchNorm2d:
            module.register_forward_hook(lambda module, *_: called.append(module))

    wanted, wanted_gradients = trained(apart)
    given, gradients = trained(folded)

    assert not called
    assert torch.allclose(given, wanted, rtol=1e-9, atol=1e-9)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in wanted_gradients.items():
        scale = float(gradient.abs().max())
        assert torch.allclose(gradients[name], gradient, rtol=1e-8, atol=1e-9 * max(scale, 1)), name


def test_names_weights_and_parameters_are_the_same_objects() -> None:
    net = network("mobilenet_v2")
    names, parameters = list(net.state_dict()), dict(net.named_parameters())
    modules = [name for name, _ in net.named_modules()]
    freeze_batch_norm(net)
    assert list(net.state_dict()) == names
    assert [name for name, _ in net.named_modules()] == modules
    assert all(now is parameters[name] for name, now in net.named_parameters())


def test_evaluation_is_of_the_plain_network() -> None:
    net = network("resnet10")
    freeze_batch_norm(net)
    assert all(type(norm) is not nn.BatchNorm2d for norm in norms(net))
    net.eval()
    assert all(type(norm) is nn.BatchNorm2d for norm in norms(net))
    assert all("norm" not in vars(module) for module in net.modules())


def test_a_copy_reads_its_own_normalisation() -> None:
    net = network("resnet10")
    freeze_batch_norm(net)
    before = trained(net)[0]
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for norm in norms(net):
            norm.weight.zero_()
    assert torch.equal(trained(twin)[0], before)
    assert not torch.equal(trained(net)[0], before)


def test_frozen_stages_are_folded_too_and_get_no_gradient() -> None:
    net = network("mobilenet_v2")
    freeze_batch_norm(net)
    freeze_stages(net, 7)
    assert all(type(norm) is not nn.BatchNorm2d for norm in norms(net))
    _, gradients = trained(net)
    assert not [name for name in gradients if name.startswith("backbone.body.features.0.")]


def test_what_learns_its_statistics_or_stands_apart_is_left_alone() -> None:
    learning = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    between = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    bare = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)).eval()
    batchwise = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)
    ).eval()
    assert [fold(body) for body in (learning, between, bare, batchwise)] == [0, 0, 0, 0]
    both = nn.Sequential(nn.Conv2d(3, 4, 1, padding="same"), nn.BatchNorm2d(4)).eval()
    assert fold(both) == 1
    assert fold(both) == 0
    unfold(both)
    assert [type(module) for module in both] == [nn.Conv2d, nn.BatchNorm2d]
