"""A run folder can be read again, says everything about its model, and is never written over."""

from __future__ import annotations

import dataclasses
import json
import shutil
import stat
from pathlib import Path

import pytest
import torch

from embedkit.data import PhotoSet, read_photos
from embedkit.errors import MismatchError, UsageError
from embedkit.models import weights_hash
from embedkit.runtime.contract import ModelContract
from embedkit.train import Recipe, Run, latest_run, new_run_dir, train
from embedkit.train.run import point_last


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, photos: PhotoSet) -> Run:
    """A short training with a test split; not to be changed."""
    names = photos.classes()
    split = tuple("test" if name in names[:3] else "train" for name in photos.labels)
    recipe = Recipe(
        backbone="mobilenet_v3_small",
        weights="none",
        dim=8,
        image_size=32,
        freeze=6,
        classes_per_batch=3,
        images_per_class=2,
        steps=2,
        val_share=0.3,
        loss_options={"alpha": 1.4},
    )
    folder = tmp_path_factory.mktemp("runs") / "mugs"
    return train(recipe, dataclasses.replace(photos, split=split), folder, device="cpu")


def test_a_run_is_read_by_its_folder_its_checkpoint_or_the_link(run: Run) -> None:
    for path in (run.path, run.path / "last.safetensors", run.path.parent / "last"):
        again = Run.load(path)
        assert again.path == run.path
        assert again.recipe == run.recipe
    assert latest_run(run.path.parent) == run.path
    assert (run.path.parent / "last").readlink() == Path("mugs")


def test_the_network_comes_back_in_evaluation_mode(run: Run) -> None:
    network = run.network()
    assert not any(module.training for module in network.modules())
    pixels = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    assert network(pixels).shape == (2, 8)
    assert weights_hash(network) == weights_hash(Run.load(run.path).network())


def test_the_contract_says_everything_and_survives_its_text(run: Run) -> None:
    contract = run.contract()
    assert ModelContract.loads(contract.dumps()) == contract
    assert contract.name == "mugs"
    assert contract.embedding_dim == 8
    assert (contract.normalizes, contract.metric) == (True, "cosine")
    assert contract.weights_hash == weights_hash(run.network())
    assert (contract.backbone, contract.pooling) == ("mobilenet_v3_small", "avg")
    assert contract.loss_options["alpha"] == 1.4
    assert contract.loss_options["margin"] == 0.4
    assert Recipe.from_json(contract.recipe) == run.recipe
    assert contract.data["held_out"] == "test"
    assert contract.data["splits"]["test"] == {"images": 15, "classes": 3}
    assert {"torch", "embedkit"} <= contract.versions.keys()
    assert contract.quality["fp32"]["map@r"] == run.record["test"]["map@r"]


def test_the_contract_names_no_place_on_this_machine(run: Run) -> None:
    assert str(run.photos().root) not in run.contract().dumps()


def test_files_are_as_readable_as_any_new_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    usual = stat.S_IMODE((tmp_path / "new").stat().st_mode)
    for path in run.path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == usual
    assert not [path for path in run.path.iterdir() if path.name.endswith(".tmp")]


def test_split_csv_is_a_data_set_of_its_own(run: Run, tmp_path: Path) -> None:
    root = run.photos().root
    shutil.copytree(root, tmp_path / "photos")
    shutil.copy(run.path / "split.csv", tmp_path / "photos" / "split.csv")
    again = read_photos(tmp_path / "photos" / "split.csv")
    assert again.split == run.photos().split
    assert again.labels == run.photos().labels


def test_a_run_without_a_finished_epoch_has_no_network(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "begun")
    (tmp_path / "begun" / "best.safetensors").unlink()
    with pytest.raises(MismatchError, match=r"(?s)no finished epoch.*--resume"):
        Run.load(tmp_path / "begun").network()


def test_weights_of_another_recipe_are_a_mismatch(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    other = dataclasses.replace(run.recipe, dim=9).to_toml()
    (tmp_path / "run" / "config.toml").write_text(other)
    with pytest.raises(MismatchError, match=r"another network(.|\n)*head"):
        Run.load(tmp_path / "run").network()


def test_what_is_no_run_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no run"):
        Run.load(tmp_path / "absent")
    with pytest.raises(MismatchError, match="is no run of embedkit"):
        Run.load(tmp_path)
    with pytest.raises(UsageError, match=r"there is no run in .* yet"):
        latest_run(tmp_path)
    shutil.copytree(run.path, tmp_path / "newer")
    record = json.loads((tmp_path / "newer" / "run.json").read_text())
    (tmp_path / "newer" / "run.json").write_text(json.dumps({**record, "schema": "x/9"}))
    with pytest.raises(MismatchError, match="another embedkit"):
        Run.load(tmp_path / "newer")
    (tmp_path / "newer" / "run.json").write_text("[1]")
    with pytest.raises(MismatchError, match="is no run of embedkit"):
        Run.load(tmp_path / "newer")


def test_names_are_numbered_and_never_taken_twice(tmp_path: Path) -> None:
    first = new_run_dir(tmp_path, Recipe())
    assert first.name.endswith("-rll-mobilenet_v3_small")
    for expected in (first.name, f"{first.name}-2", f"{first.name}-3"):
        path = new_run_dir(tmp_path, Recipe())
        assert path.name == expected
        path.mkdir()
    assert new_run_dir(tmp_path, Recipe(), name="mine") == tmp_path / "mine"
    (tmp_path / "mine").mkdir()
    with pytest.raises(UsageError, match="exists"):
        new_run_dir(tmp_path, Recipe(), name="mine")
    assert "/" not in new_run_dir(tmp_path, Recipe(loss="pml:A/B")).name


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "last", "/tmp"])
def test_a_name_that_is_no_folder_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot name a run"):
        new_run_dir(tmp_path, Recipe(), name=name)


def test_the_link_moves_and_is_a_text_file_where_links_are_impossible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        point_last(tmp_path / name)
        assert latest_run(tmp_path) == tmp_path / name
    (tmp_path / "last").unlink()

    def refuse(self: Path, target: object, target_is_directory: bool = False) -> None:
        raise OSError("links are not supported")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    point_last(tmp_path / "one")
    assert (tmp_path / "last.txt").read_text() == "one"
    assert latest_run(tmp_path) == tmp_path / "one"
