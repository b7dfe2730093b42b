"""Weights from files and from torchvision: what fits is loaded, everything else is a sentence."""

from __future__ import annotations

import pickle
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch import Tensor
from torchvision import models

from embedkit.errors import MismatchError, MissingError, UsageError
from embedkit.models import backbone_entry, create_backbone


def load(path: Path, name: str = "squeezenet1_1") -> dict[str, Tensor]:
    return create_backbone(name, weights=path, image_size=(32, 32)).body.state_dict()


@pytest.fixture
def published() -> dict[str, Tensor]:
    """torchvision's own state dict, classifier and all."""
    torch.manual_seed(0)
    state: dict[str, Tensor] = models.squeezenet1_1().state_dict()
    return state


def test_a_torchvision_file_fits_with_its_classifier_left_over(
    published: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(published, tmp_path / "w.pth")
    state = load(tmp_path / "w.pth")
    assert all(torch.equal(state[key], published[key]) for key in state)
    assert set(published) - set(state) == {"classifier.1.weight", "classifier.1.bias"}


@pytest.mark.parametrize("prefix", ["module.", "backbone.body.", "network.backbone.body."])
@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
def test_prefixes_and_the_usual_wrappings_are_understood(
    published: dict[str, Tensor], prefix: str, wrap: str | None, tmp_path: Path
) -> None:
    content: object = {prefix + key: value for key, value in published.items()}
    torch.save({wrap: content, "epoch": 3} if wrap else content, tmp_path / "w.pth")
    state = load(tmp_path / "w.pth")
    assert all(torch.equal(state[key], published[key]) for key in state)


def test_a_key_that_ends_like_the_first_one_does_not_mislead(tmp_path: Path) -> None:
    torch.manual_seed(0)
    published = models.resnet18().state_dict()
    torch.save(published, tmp_path / "w.pth")  # layer1.0.conv1.weight ends like conv1.weight
    state = load(tmp_path / "w.pth", "resnet18")
    assert all(torch.equal(state[key], published[key]) for key in state)


def test_old_files_without_batch_counters_still_load(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = models.resnet18().state_dict()
    torch.save({k: v for k, v in state.items() if "num_batches" not in k}, tmp_path / "w.pth")
    assert torch.equal(load(tmp_path / "w.pth", "resnet18")["conv1.weight"], state["conv1.weight"])


def test_a_missing_key_is_named(published: dict[str, Tensor], tmp_path: Path) -> None:
    del published["features.0.bias"]
    torch.save(published, tmp_path / "w.pth")
    with pytest.raises(MismatchError, match=r"missing: features\.0\.bias"):
        load(tmp_path / "w.pth")


def test_another_networks_file_is_named_in_a_few_lines(
    published: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(published, tmp_path / "w.pth")
    with pytest.raises(MismatchError, match="does not fit the backbone resnet50") as caught:
        load(tmp_path / "w.pth", "resnet50")
    assert caught.value.facts is not None
    assert len(caught.value.facts.splitlines()) == 5
    assert "more" in caught.value.facts


def test_another_shape_is_named_with_both_shapes(
    published: dict[str, Tensor], tmp_path: Path
) -> None:
    published["features.0.bias"] = torch.zeros(7)
    torch.save(published, tmp_path / "w.pth")
    with pytest.raises(MismatchError, match=r"features\.0\.bias: \(7,\), expected \(64,\)"):
        load(tmp_path / "w.pth")


def test_weights_that_are_not_numbers_are_refused(
    published: dict[str, Tensor], tmp_path: Path
) -> None:
    published["features.0.bias"][3] = float("nan")
    torch.save(published, tmp_path / "w.pth")
    with pytest.raises(MismatchError, match=r"not finite: features\.0\.bias"):
        load(tmp_path / "w.pth")


class _Attack:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("attacked"),)  # type: ignore[return-value]


def test_a_file_with_code_in_it_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"features.0.bias": _Attack()}, tmp_path / "w.pth")
    with pytest.raises(MismatchError, match="more than tensors"):
        load(tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes(pickle.dumps(_Attack(), protocol=2))
    with pytest.raises(MismatchError, match="no file of weights"):
        load(tmp_path / "w.pth")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"hello", b"PK\x03\x04 torn", b"\xff" * 64], ids=["empty", "text", "zip", "ff"]
)
def test_a_damaged_file_is_refused_in_a_sentence(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MismatchError, match="can be read"):
        load(tmp_path / name)


def test_a_file_cut_anywhere_is_refused_in_a_sentence(
    published: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(published, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    for share in (0.1, 0.5, 0.999):
        (tmp_path / "w.pth").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(MismatchError, match="can be read"):
            load(tmp_path / "w.pth")


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {1: torch.zeros(2)}, torch.zeros(3)])
def test_a_file_without_tensors_by_name_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(MismatchError, match="no tensors by name"):
        load(tmp_path / "w.pth")


def test_no_such_file_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no weights file"):
        load(tmp_path / "absent.pth")


def test_weights_that_are_no_known_word_are_wrong_usage() -> None:
    with pytest.raises(UsageError, match="'imagenet', 'none' or a Path"):
        create_backbone("resnet10", weights="image-net", image_size=(32, 32))


def test_a_backbone_without_published_weights_says_so() -> None:
    with pytest.raises(UsageError, match="no published ImageNet weights for resnet10"):
        create_backbone("resnet10", weights="imagenet", image_size=(32, 32))


@pytest.mark.parametrize(
    "failure", [URLError("no network"), TimeoutError("slow"), RuntimeError("invalid hash value")]
)
def test_without_network_the_error_says_where_to_put_the_file(
    failure: Exception,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def offline(*arguments: object, **options: object) -> None:
        raise failure

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    with pytest.raises(MissingError) as caught:
        create_backbone("resnet18", weights="imagenet", image_size=(32, 32))
    text = str(caught.value)
    assert caught.value.exit_code == 6
    assert str(tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth") in text
    assert "--weights ./resnet18-f37072fd.pth" in text
    assert capsys.readouterr().out == ""


def test_a_file_in_torchvisions_cache_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    state = models.mobilenet_v3_small().state_dict()
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(state, folder / "mobilenet_v3_small-047dcff4.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    body = create_backbone("mobilenet_v3_small", weights="imagenet", image_size=(32, 32)).body
    key = "features.0.0.weight"
    assert torch.equal(body.state_dict()[key], state[key])


def test_vit_positions_of_another_size_are_interpolated() -> None:
    torch.manual_seed(0)
    body = create_backbone("vit_b_16", weights="none", image_size=(128, 64)).body  # 8 x 4 patches
    fit = backbone_entry("vit_b_16").fit_state
    assert fit is not None
    # A plane over a 4 x 4 grid: bicubic keeps a plane, away from the border.
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    learned = torch.randn(1, 17, 768)
    learned[0, 1:, 0] = (rows + 10 * columns).flatten()

    got = fit({"encoder.pos_embedding": learned}, body)["encoder.pos_embedding"]
    assert got.shape == (1, 1 + 8 * 4, 768)
    table = got[0, 1:, 0].reshape(8, 4)
    assert table[3:5, 2].tolist() == pytest.approx([21.25, 21.75], abs=0.1)
    assert torch.equal(got[0, 0], learned[0, 0])

    same = {"encoder.pos_embedding": got}
    assert fit(same, body) is same
    for shape in [(1, 8, 768), (1, 1, 768), (1, 0, 768), (17, 768)]:
        with pytest.raises(MismatchError, match="position table"):
            fit({"encoder.pos_embedding": torch.zeros(shape)}, body)
