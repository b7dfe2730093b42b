"""A small network, its contract, and photos of generated colours to check an export with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from embedkit.export import export_onnx
from embedkit.imaging import Preprocess
from embedkit.models import EmbeddingNet, create_network, weights_hash
from embedkit.runtime import ModelContract
from tests.export.small import Exported, MakeNetwork, Photos


@pytest.fixture(scope="session")
def make_network() -> MakeNetwork:
    """A network of random weights in evaluation mode, and its contract."""

    def make(
        backbone: str = "resnet10",
        *,
        pooling: str = "gem",
        size: tuple[int, int] = (32, 48),
        normalizes: bool = True,
        seed: int = 0,
    ) -> tuple[EmbeddingNet, ModelContract]:
        torch.manual_seed(seed)
        preprocess = Preprocess(height=size[0], width=size[1])
        network = create_network(
            backbone=backbone,
            weights="none",
            pooling=pooling,
            dim=12,
            image_size=size,
            mean=preprocess.mean,
            std=preprocess.std,
        ).eval()
        # Running statistics like those of a trained network: without them a lost batch
        # normalisation would hardly show.
        generator = torch.Generator().manual_seed(seed)
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
        contract = ModelContract(
            name="small",
            embedding_dim=12,
            normalizes=normalizes,
            metric="cosine" if normalizes else "l2",
            preprocess=preprocess,
            weights_hash=weights_hash(network),
            backbone=backbone,
            pooling=pooling,
        )
        return network, contract

    return make


@pytest.fixture(scope="session")
def exported(make_network: MakeNetwork, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """resnet10 with GeM at 32 x 48, unit vectors."""
    network, contract = make_network()
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    return Exported(path, network, export_onnx(network, contract, path))


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Photos:
    """24 PNG files of 4 classes: a colour each, with noise."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    paths, labels = [], []
    for label in "abcd":
        color = rng.integers(0, 256, size=3)
        for number in range(6):
            noise = rng.normal(0, 60, size=(40, 56, 3))
            pixels = np.clip(color + noise, 0, 255).astype(np.uint8)
            paths.append(folder / f"{label}{number}.png")
            labels.append(label)
            Image.fromarray(pixels).save(paths[-1])
    return Photos(paths, labels)
