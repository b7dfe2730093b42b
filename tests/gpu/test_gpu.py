"""On a CUDA device: training, chunks and the exported model agree with the CPU and with PyTorch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from embedkit import losses
from embedkit.data import draw_products, read_photos
from embedkit.models import EmbeddingNet, create_network, freeze_batch_norm
from embedkit.train import Recipe, train
from embedkit.train.distributed import World
from embedkit.train.large_batch import divided
from tests.train.dividing import tiny_batch, tiny_recipe

# Each line is tried on the CPU as well, where there is no GPU to try it on.
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.fixture(autouse=True)
def _needs_cuda(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")


def _network(device: str) -> EmbeddingNet:
    torch.manual_seed(0)
    network = create_network(
        backbone="mobilenet_v3_small",
        weights="none",
        pooling="avg",
        dim=8,
        image_size=(32, 32),
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
    )
    freeze_batch_norm(network)
    return network.to(device).train()


@on_devices
@pytest.mark.parametrize("name", losses.names())
def test_a_loss_and_its_gradient_are_those_of_the_cpu(name: str, device: str) -> None:
    sizes = {"num_classes": 6, "embedding_dim": 8} if losses.needs_classes(name) else {}
    torch.manual_seed(0)
    loss = losses.create(name, **sizes)
    rows, labels = torch.randn(12, 8), torch.arange(12) // 2

    def run(place: str) -> tuple[Tensor, Tensor]:
        x = rows.to(place, copy=True).requires_grad_()
        value = loss.to(place)(x, labels.to(place))
        (slope,) = torch.autograd.grad(value, x)
        return value.detach().cpu(), slope.cpu()

    if name == "margin" and device == "cuda":
        pytest.skip("it draws random pairs, and a GPU draws others")
    torch.manual_seed(1)
    expected = run("cpu")
    torch.manual_seed(1)
    for ours, theirs in zip(run(device), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@on_devices
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_chunks_have_the_gradient_of_the_whole_batch(amp: torch.dtype | None, device: str) -> None:
    batch = tiny_batch(12, side=32)
    gradients = []
    for chunk in (None, 4):
        network = _network(device)
        with torch.autocast(device, amp, enabled=amp is not None):
            seen = divided(network, batch, chunk=chunk, world=World())
            rows = seen(batch.pixels.to(device)).float()
        losses.create("rll")(rows, batch.labels.to(device)).backward()
        slopes = [part.grad.flatten() for part in network.parameters() if part.grad is not None]
        gradients.append(torch.cat(slopes))
    apart = float((gradients[0] - gradients[1]).norm() / gradients[0].norm())
    assert apart < (1e-3 if amp is None else 0.1)


@on_devices
def test_a_training_learns_and_is_measured(device: str, tmp_path: Path) -> None:
    photos = read_photos(draw_products(tmp_path / "p", classes=6, images_per_class=4, size=40))
    recipe: Recipe = tiny_recipe(ema=0.9, clip_gradient=1.0, chunk=4, epochs=1)
    run = train(recipe, photos, tmp_path / "run", device=device)
    assert run.record["best"]["val"]["queries"] > 0
    assert run.record["device"].startswith(device)
