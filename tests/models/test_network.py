"""The whole network: normalisation, freezing and the hash."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from embedkit.errors import UsageError
from embedkit.imaging.preprocess import Preprocess
from embedkit.models import (
    EmbeddingNet,
    create_network,
    freeze_batch_norm,
    freeze_stages,
    weights_hash,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def network(name: str = "resnet10", *, dim: int = 4, weights: str | Path = "none") -> EmbeddingNet:
    return create_network(
        backbone=name,
        weights=weights,
        pooling="gem",
        dim=dim,
        image_size=(32, 48),
        mean=MEAN,
        std=STD,
    )


def some_pixels(count: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 32, 48, 3), dtype=torch.uint8, generator=generator)


def step(net: EmbeddingNet) -> None:
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    net(some_pixels()).square().mean().backward()
    optimizer.step()


def test_pixels_are_normalised_as_numpy_does_it() -> None:
    net = network().eval()
    seen = []
    net.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    pixels = some_pixels(1)
    net(pixels)
    wanted = (pixels.numpy()[0] / 255 - np.array(MEAN)) / np.array(STD)
    assert seen[0][0].numpy() == pytest.approx(wanted.transpose(2, 0, 1), abs=1e-6)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_the_head_reads_the_pooled_features() -> None:
    net = network().eval()
    with torch.no_grad():
        features, embedding = net.features(some_pixels()), net(some_pixels())
    wanted = features.numpy() @ net.head.weight.detach().numpy().T
    assert embedding.numpy() == pytest.approx(wanted, abs=1e-5)
    gram = net.head.weight.detach() @ net.head.weight.detach().T
    assert gram.numpy() == pytest.approx(np.eye(4), abs=1e-5)


def test_an_empty_batch_has_an_empty_answer() -> None:
    assert network().eval()(some_pixels(0)).shape == (0, 4)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(1, 3, 32, 48, dtype=torch.uint8),
        torch.zeros(1, 32, 48, 3),
        torch.zeros(32, 48, 3, dtype=torch.uint8),
    ],
    ids=["channels first", "float", "one picture"],
)
def test_other_pixels_are_refused_in_a_sentence(wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"uint8 of shape \(B, H, W, 3\)"):
        network()(wrong)


def test_frozen_batch_norm_keeps_its_statistics_but_learns_its_scale() -> None:
    net = network()
    freeze_batch_norm(net)
    net.train()
    before = copy.deepcopy(net.state_dict())
    step(net)
    after = net.state_dict()
    statistics = [k for k in before if "running_" in k or "num_batches" in k]
    assert statistics
    assert all(torch.equal(before[k], after[k]) for k in statistics)
    key = "backbone.body.bn1.weight"
    assert not torch.equal(before[key], after[key])
    assert net.training
    assert net.head.training


def test_batch_norm_that_is_not_frozen_moves() -> None:
    net = network().train()
    before = copy.deepcopy(net.state_dict())
    step(net)
    key = "backbone.body.bn1.running_mean"
    assert not torch.equal(before[key], net.state_dict()[key])


@pytest.mark.parametrize("name", ["resnet10", "mobilenet_v2"])
def test_frozen_stages_do_not_move_at_all(name: str) -> None:
    net = network(name)
    freeze_stages(net, 2)
    net.train()
    before = copy.deepcopy(net.state_dict())
    step(net)
    after = net.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    frozen = {
        "resnet10": ("backbone.body.conv1.", "backbone.body.bn1.", "backbone.body.layer1."),
        "mobilenet_v2": ("backbone.body.features.0.", "backbone.body.features.1."),
    }[name]
    assert not [key for key in changed if key.startswith(frozen)]
    assert [key for key in changed if key.startswith("backbone.body.") and "running_mean" in key]


def test_mobilenet_counts_its_features_as_the_peer_does() -> None:
    net = network("mobilenet_v2")
    freeze_stages(net, 7)
    got = {n for n, p in net.backbone.body.named_parameters() if not p.requires_grad}
    wanted = {
        name
        for name, _ in net.backbone.body.named_parameters()
        if int(name.split(".")[1]) < 7  # features.<i>.
    }
    assert got == wanted


@pytest.mark.parametrize("n", [-1, 6])
def test_more_stages_than_there_are_cannot_be_frozen(n: int) -> None:
    with pytest.raises(UsageError, match="resnet10 has 5"):
        freeze_stages(network(), n)


def test_a_frozen_copy_is_frozen_on_its_own() -> None:
    net = network()
    twin = copy.deepcopy(net)
    freeze_stages(twin, 5)
    assert all(p.requires_grad for p in net.parameters())
    assert not any(p.requires_grad for p in twin.backbone.parameters())


def test_the_hash_does_not_depend_on_the_memory_format() -> None:
    net = network()
    before = weights_hash(net)
    assert weights_hash(net.to(memory_format=torch.channels_last)) == before
    assert len(before) == 64


def test_a_width_below_one_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        network(dim=0)


def test_real_weights_put_a_photo_nearest_to_its_own_class(shared_data: Path) -> None:
    """A sanity check of keys and normalisation together: features of real photos mean something."""
    net = create_network(
        backbone="mobilenet_v2",
        weights=shared_data / "weights" / "mobilenet_v2_imagenet.pth",
        pooling="avg",
        dim=8,
        image_size=(96, 96),
        mean=MEAN,
        std=STD,
    ).eval()
    rows = (shared_data / "tiny" / "manifest.csv").read_text().splitlines()
    keys = rows[0].split(",")
    table = [dict(zip(keys, row.split(","), strict=True)) for row in rows[1:]]
    table = [row for row in table if row["split"] == "test"]
    spec = Preprocess(height=96, width=96)
    pixels = []
    for row in table:
        with Image.open(shared_data / "tiny" / row["path"]) as image:
            pixels.append(spec(image.convert("RGB")))
    with torch.no_grad():
        features = net.features(torch.from_numpy(np.stack(pixels))).numpy()
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    scores = unit @ unit.T
    np.fill_diagonal(scores, -9)
    hits = [table[i]["label"] == table[int(j)]["label"] for i, j in enumerate(scores.argmax(1))]
    assert len(hits) == 72
    assert np.mean(hits) > 0.8
