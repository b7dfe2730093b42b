"""On a CUDA device: training, chunks and the exported model agree with the CPU and with PyTorch."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from embedkit import losses
from embedkit.data import Augment, PhotoSet, draw_products, read_photos
from embedkit.data.resample import resample, resample_on
from embedkit.errors import Interrupted
from embedkit.imaging import Preprocess
from embedkit.models import EmbeddingNet, create_network, freeze_batch_norm
from embedkit.models.folded import unfold
from embedkit.train import Recipe, checkpoint, train
from embedkit.train.distributed import World
from embedkit.train.large_batch import divided
from tests.tiny_recipe import tiny_recipe
from tests.train.dividing import tiny_batch
from tests.train.listener import Listener

# Each line is tried on the CPU as well, where there is no GPU to try it on.
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.fixture(autouse=True)
def _needs_cuda(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")


@pytest.fixture
def photos(tmp_path: Path) -> PhotoSet:
    return read_photos(draw_products(tmp_path / "photos", classes=6, images_per_class=4, size=40))


def _network(device: str, backbone: str = "mobilenet_v3_small") -> EmbeddingNet:
    torch.manual_seed(0)
    network = create_network(
        backbone=backbone,
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


def _slopes(network: EmbeddingNet, device: str, number: torch.dtype) -> Tensor:
    """The gradient of one step, with its autocast."""
    batch = tiny_batch(12, side=32)
    with torch.autocast(device, number, enabled=number != torch.float32):
        rows = network(batch.pixels.to(device)).float()
    losses.create("rll")(rows, batch.labels.to(device)).backward()
    slopes = [part.grad.flatten() for part in network.parameters() if part.grad is not None]
    return torch.cat(slopes).double()


@on_devices
@pytest.mark.parametrize("backbone", ["resnet10", "mobilenet_v3_small"])
def test_folded_normalisations_are_as_near_the_truth_in_bf16(backbone: str, device: str) -> None:
    def slopes(number: torch.dtype, *, folded: bool) -> Tensor:
        network = _network(device, backbone)
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.uniform_(norm.weight, 0.5, 1.5)
        if not folded:
            unfold(network.backbone.body)
        return _slopes(network, device, number)

    truth = slopes(torch.float32, folded=False)

    def error(found: Tensor) -> float:
        return float((found - truth).norm() / truth.norm())

    assert error(slopes(torch.float32, folded=True)) < 1e-3
    rounding = error(slopes(torch.bfloat16, folded=False))
    assert 0 < error(slopes(torch.bfloat16, folded=True)) < 2 * rounding + 1e-3


@on_devices
def test_every_map_stays_channels_last(device: str) -> None:
    network = _network(device).to(memory_format=torch.channels_last)
    apart: list[str] = []
    seen: list[str] = []

    def look(name: str) -> None:
        def after(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
            seen.append(name)
            if not made.is_contiguous(memory_format=torch.channels_last):
                apart.append(name)

        network.get_submodule(name).register_forward_hook(after)

    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            look(name)
    assert bool(_slopes(network, device, torch.bfloat16).isfinite().all())
    assert seen
    assert apart == []


@on_devices
def test_a_resumed_training_is_the_uninterrupted_one(
    device: str, photos: PhotoSet, tmp_path: Path
) -> None:
    def recipe() -> Recipe:
        return tiny_recipe(ema=0.9, epochs=2)

    runs = []
    for stops in ({}, {3: lambda: signal.raise_signal(signal.SIGINT)}):
        folder = tmp_path / f"run-{len(stops)}"
        with pytest.raises(Interrupted) if stops else contextlib.nullcontext():
            train(recipe(), photos, folder, device=device, reporter=Listener(at_step=stops))
        if stops:
            train(recipe(), photos, folder, device=device, resume=True)
        runs.append(checkpoint.read_checkpoint(folder / "last.safetensors").tensors)
    assert runs[0].keys() == runs[1].keys()
    for name, whole in runs[0].items():
        if device == "cpu":
            assert torch.equal(whole, runs[1][name]), name
        elif whole.is_floating_point():
            # Sums of a GPU are taken in any order, and Adam makes steps of the smallest gradients.
            apart = float((whole - runs[1][name]).norm())
            assert apart <= 1e-2 * max(float(whole.norm()), 1), name


@on_devices
def test_a_training_learns_and_is_measured(device: str, photos: PhotoSet, tmp_path: Path) -> None:
    recipe: Recipe = tiny_recipe(ema=0.9, clip_gradient=1.0, chunk=4, epochs=1)
    run = train(recipe, photos, tmp_path / "run", device=device)
    assert run.record["best"]["val"]["queries"] > 0
    assert run.record["device"].startswith(device)


@on_devices
@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
def test_a_device_resamples_crops_as_the_cpu_does(filter: str, device: str) -> None:
    coarse = np.random.default_rng(0).integers(0, 256, size=(6, 8, 3), dtype=np.uint8)
    photo = np.asarray(Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC))
    preprocess = Preprocess(height=32, width=48, filter=filter)
    rngs = [np.random.default_rng(number) for number in range(6)]
    cuts = [Augment().cut(photo, preprocess, rng) for rng in rngs]
    got = resample_on(torch.device(device), cuts, preprocess)
    assert got.device.type == device
    wanted = torch.stack([resample(cut, preprocess) for cut in cuts])
    apart = (got.cpu().int() - wanted.int()).abs()
    assert int(apart.max()) <= (0 if device == "cpu" else 4)
    assert any(cut.mirrored for cut in cuts)
    assert not all(cut.mirrored for cut in cuts)
