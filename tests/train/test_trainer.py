"""A training repeats itself bit for bit, survives being stopped anywhere, and tells the truth."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from embedkit import losses
from embedkit.data import PhotoSet, read_photos
from embedkit.errors import (
    DataError,
    EmbedKitError,
    Interrupted,
    MismatchError,
    MissingError,
    UnknownNameError,
    UsageError,
)
from embedkit.imaging import read_pixels
from embedkit.train import Recipe, Run, checkpoint, choose_device, make_plan, train, trainer
from tests.tiny_recipe import tiny_recipe
from tests.train.listener import Listener

_TIMES = ("seconds", "waited", "elapsed")


def _tensors(run_dir: Path, name: str) -> dict[str, bytes]:
    tensors = checkpoint.read_checkpoint(run_dir / f"{name}.safetensors").tensors
    return {key: tensor.numpy().tobytes() for key, tensor in tensors.items()}


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the times."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in _TIMES} for row in rows]


def _state(run_dir: Path) -> dict[str, Any]:
    """What last.safetensors says, without the times."""

    def without_times(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: without_times(v) for k, v in value.items() if k not in _TIMES}
        return [without_times(v) for v in value] if isinstance(value, list) else value

    state: dict[str, Any] = without_times(
        checkpoint.read_checkpoint(run_dir / "last.safetensors").state
    )
    return state


def _assert_same(one: Path, other: Path) -> None:
    for name in ("best", "last"):
        assert _tensors(one, name) == _tensors(other, name)
    assert _lines(one) == _lines(other)
    assert _state(one) == _state(other)
    assert (one / "split.csv").read_bytes() == (other / "split.csv").read_bytes()
    assert Run.load(one).metrics() == Run.load(other).metrics()


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, photos: PhotoSet) -> Path:
    """One uninterrupted training by the recipe of these tests; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    return train(_recipe(), photos, folder, device="cpu").path


def _recipe(**changes: Any) -> Recipe:
    """3 epochs of 2 steps with class vectors and live BatchNorm: all there is to go wrong."""
    return tiny_recipe(**{"loss": "proxy-anchor", "freeze_batch_norm": False} | changes)


# --- the same again -----------------------------------------------------------------------------


def test_a_seed_repeats_bit_for_bit_with_any_number_of_workers(
    straight: Path, photos: PhotoSet, tmp_path: Path
) -> None:
    torch.manual_seed(99)
    again = train(_recipe(), photos, tmp_path / "again", device="cpu", workers=3).path
    _assert_same(straight, again)


def test_another_seed_is_another_training(straight: Path, photos: PhotoSet, tmp_path: Path) -> None:
    other = train(_recipe(seed=1), photos, tmp_path / "other", device="cpu").path
    assert (straight / "split.csv").read_bytes() != (other / "split.csv").read_bytes()
    assert _tensors(straight, "last").keys() == _tensors(other, "last").keys()
    assert _lines(straight) != _lines(other)


@pytest.mark.parametrize(
    ("steps", "note"),
    [
        ((1,), None),
        ((2,), None),  # the signal comes before the evaluation that ends the epoch
        ((3, 4, 5), None),
        ((6,), None),
        ((), "device"),  # before the first measurement
        ((), "stopped"),
    ],
)
def test_an_interrupted_and_resumed_training_is_the_uninterrupted_one(
    straight: Path, photos: PhotoSet, tmp_path: Path, steps: tuple[int, ...], note: str | None
) -> None:
    run_dir = tmp_path / "run"

    def interrupt() -> None:
        signal.raise_signal(signal.SIGINT)

    stops: list[Listener] = [Listener(at_note={note: interrupt})] if note else []
    done = 0
    for step in steps:
        stops.append(Listener(at_step={step - done + (done % 2 > 0): interrupt}))
        done = step
    for number, stop in enumerate(stops):
        if note == "stopped":
            train(_recipe(), photos, run_dir, device="cpu", reporter=stop)
            continue
        with pytest.raises(Interrupted, match="embedkit train --resume"):
            train(_recipe(), photos, run_dir, device="cpu", reporter=stop, resume=number > 0)
        assert Run.load(run_dir).record["status"] == "unfinished"
    train(_recipe(), photos, run_dir, device="cpu", resume=True)
    _assert_same(straight, run_dir)


class _Killed(Exception):
    """Stands for SIGKILL: what is on the disk stays as it is."""


def _kill() -> None:
    raise _Killed


@pytest.mark.parametrize("step", [1, 3])
def test_a_killed_training_goes_on_from_its_last_epoch(
    straight: Path, photos: PhotoSet, tmp_path: Path, step: int
) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(_Killed):
        train(_recipe(), photos, run_dir, device="cpu", reporter=Listener(at_step={step: _kill}))
    listener = Listener()
    train(_recipe(), photos, run_dir, device="cpu", resume=True, reporter=listener)
    assert listener.steps == 6 - step // 2 * 2
    _assert_same(straight, run_dir)


@pytest.mark.parametrize("victim", ["best.safetensors", "last.safetensors", "run.json"])
@pytest.mark.parametrize("after", [False, True])
def test_a_kill_between_two_files_loses_nothing(
    straight: Path,
    photos: PhotoSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    victim: str,
    after: bool,
) -> None:
    run_dir = tmp_path / "run"
    genuine = checkpoint.published
    seen = 0

    @contextlib.contextmanager
    def dying(path: Path) -> Iterator[Path]:
        nonlocal seen
        # The second time is at the end of the first or second epoch, by the file.
        seen += path.name == victim
        strikes = path.name == victim and seen == (1 if victim == "best.safetensors" else 3)
        if strikes and not after:
            raise _Killed
        with genuine(path) as temporary:
            yield temporary
        if strikes:
            raise _Killed

    for module in (checkpoint, trainer):
        monkeypatch.setattr(module, "published", dying)
    with pytest.raises(_Killed):
        train(_recipe(), photos, run_dir, device="cpu")
    monkeypatch.undo()
    train(_recipe(), photos, run_dir, device="cpu", resume=True)
    _assert_same(straight, run_dir)


def test_a_resumed_run_reads_its_photos_from_its_own_folder(
    straight: Path, photos: PhotoSet, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(_Killed):
        train(_recipe(), photos, run_dir, device="cpu", reporter=Listener(at_step={3: _kill}))
    train(_recipe(), Run.load(run_dir).photos(), run_dir, device="cpu", resume=True)
    _assert_same(straight, run_dir)


def test_resuming_a_finished_run_changes_nothing(straight: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    listener = Listener()
    train(
        _recipe(), Run.load(run_dir).photos(), run_dir, device="cpu", resume=True, reporter=listener
    )
    assert listener.steps == 0
    _assert_same(straight, run_dir)


def test_the_process_is_left_as_it_was(photos: PhotoSet, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    handler = signal.getsignal(signal.SIGINT)
    train(_recipe(epochs=1), photos, tmp_path / "run", device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert signal.getsignal(signal.SIGINT) is handler


def test_it_trains_in_another_thread_than_the_main_one(photos: PhotoSet, tmp_path: Path) -> None:
    done: list[Run] = []
    thread = threading.Thread(
        target=lambda: done.append(train(_recipe(epochs=1), photos, tmp_path / "r", device="cpu"))
    )
    thread.start()
    thread.join()
    assert done[0].record["status"] == "finished"


# --- refusals on resume -------------------------------------------------------------------------


def test_other_settings_are_refused_by_name(
    straight: Path, photos: PhotoSet, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"(?s)other settings.*dim: 16, not 8.*seed: 3, not 0"):
        train(_recipe(dim=16, seed=3), photos, straight, device="cpu", resume=True)


def test_when_to_stop_may_change_on_resume(photos: PhotoSet, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    short = train(_recipe(max_time=0.0), photos, run_dir, device="cpu")
    assert short.record["steps"] < 6
    assert short.record["stopped_because"].startswith("the time of 0 s is over")
    assert short.network() is not None
    long = train(_recipe(max_time=None, patience=9), photos, run_dir, device="cpu", resume=True)
    assert long.record["steps"] == 6
    assert long.recipe.patience == 9


def test_other_photos_are_refused(straight: Path, photos: PhotoSet) -> None:
    fewer = photos.subset(range(len(photos) - 1))
    with pytest.raises(MismatchError, match=r"(?s)photos are not those.*45 images then, 44 now"):
        train(_recipe(), fewer, straight, device="cpu", resume=True)
    renamed = dataclasses.replace(photos, labels=tuple(f"{name}2" for name in photos.labels))
    with pytest.raises(MismatchError, match=r"(?s)photos are not those.*same number"):
        train(_recipe(), renamed, straight, device="cpu", resume=True)


def test_a_damaged_checkpoint_is_refused(straight: Path, photos: PhotoSet, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    path = run_dir / "last.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(MismatchError, match="damaged"):
        train(_recipe(), photos, run_dir, device="cpu", resume=True)
    shutil.copy(run_dir / "best.safetensors", path)
    with pytest.raises(MismatchError, match="holds a result, not a training"):
        train(_recipe(), photos, run_dir, device="cpu", resume=True)
    path.unlink()
    with pytest.raises(MismatchError, match="there is no checkpoint"):
        train(_recipe(), photos, run_dir, device="cpu", resume=True)


def test_a_folder_in_use_is_never_written_to(
    straight: Path, photos: PhotoSet, tmp_path: Path
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in straight.iterdir()}
    with pytest.raises(UsageError, match="exists"):
        train(_recipe(), photos, straight, device="cpu")
    assert before == {path.name: path.stat().st_mtime_ns for path in straight.iterdir()}


def test_nothing_is_left_behind_when_the_data_is_unusable(photos: PhotoSet, tmp_path: Path) -> None:
    one_class = photos.subset([row for row, name in enumerate(photos.labels) if row < 5])
    with pytest.raises(DataError):
        train(_recipe(), one_class, tmp_path / "runs" / "run", device="cpu")
    assert not list(tmp_path.iterdir())


# --- what it computes ---------------------------------------------------------------------------


def test_the_best_weights_are_those_of_the_best_line(photos: PhotoSet, tmp_path: Path) -> None:
    # Frozen BatchNorm, because its statistics of six steps would let all embeddings tie.
    recipe = _recipe(backbone="resnet10", freeze=4, freeze_batch_norm=True)
    run = train(recipe, photos, tmp_path / "run", device="cpu")
    rows = _lines(run.path)
    best = max(rows, key=lambda row: (row["val"]["map@r"], -row["epoch"]))
    assert run.record["best"]["epoch"] == best["epoch"]
    # MAP@R once more, by loops over the pixels of the deployed model.
    val, network = run.val_photos(), run.network()
    pixels = np.stack([read_pixels(path, recipe.preprocess()) for path in val.files()])
    with torch.no_grad():
        vectors = nn.functional.normalize(network(torch.from_numpy(pixels)).double(), dim=1).numpy()
    total = 0.0
    for query, label in enumerate(val.labels):
        others = [row for row in range(len(val)) if row != query]
        others.sort(key=lambda row: -float(vectors[row] @ vectors[query]))
        relevant = sum(val.labels[row] == label for row in others)
        hits, precision = 0, 0.0
        for rank, row in enumerate(others[:relevant], start=1):
            if val.labels[row] == label:
                hits += 1
                precision += hits / rank
        total += precision / relevant
    assert total / len(val) == pytest.approx(best["val"]["map@r"], abs=1e-6)


def test_held_out_classes_are_not_trained_on(straight: Path) -> None:
    photos = Run.load(straight).photos()
    by_split = {
        split: {name for name, s in zip(photos.labels, photos.split, strict=True) if s == split}
        for split in ("train", "val", "test")
    }
    assert len(by_split["val"]) == 3
    assert len(by_split["train"]) == 6
    assert not by_split["train"] & by_split["val"]


def test_the_learning_rate_warms_up_and_falls_as_a_cosine(
    photos: PhotoSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[float]] = []

    class Watched(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            seen.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    recipe = _recipe(
        epochs=None, epoch_steps=2, steps=5, warmup=0.4, learning_rate=0.1, val_share=0.0
    )
    train(recipe, photos, tmp_path / "run", device="cpu")
    shape = [min(1, (k + 1) / 2) * 0.5 * (1 + math.cos(math.pi * k / 5)) for k in range(5)]
    assert np.allclose(seen, [[0.1 * s, 1e-3 * s, 1e-2 * s] for s in shape])


def test_frozen_stages_and_frozen_batch_norm_stay_as_they_are(
    photos: PhotoSet, tmp_path: Path
) -> None:
    recipe = _recipe(freeze=2, freeze_batch_norm=True, epochs=1, val_share=0.0, learning_rate=0.01)
    first = train(dataclasses.replace(recipe, learning_rate=0.0), photos, tmp_path / "a").network()
    after = train(recipe, photos, tmp_path / "b", device="cpu").network()
    moved = {
        name
        for name, tensor in after.state_dict().items()
        if not torch.equal(tensor, first.state_dict()[name])
    }
    assert any("features.5." in name for name in moved)
    assert not [name for name in moved if "features.0." in name or "features.1." in name]
    assert not [name for name in moved if "running_" in name]


@pytest.mark.parametrize(
    "name", [name for name in losses.names() if not losses.special_batch(name)]
)
def test_every_other_loss_trains(photos: PhotoSet, tmp_path: Path, name: str) -> None:
    # An axis per class, which one of them asks for.
    recipe = _recipe(loss=name, dim=16, epochs=None, steps=2, epoch_steps=2, val_share=0.0)
    run = train(recipe, photos, tmp_path / "run", device="cpu")
    (row,) = _lines(run.path)
    assert math.isfinite(row["loss"])
    assert row["stats"]
    assert run.contract().normalizes == losses.create(name, **_sizes(name)).normalizes


def _sizes(name: str) -> dict[str, int]:
    return {"num_classes": 2, "embedding_dim": 8} if losses.needs_classes(name) else {}


def test_without_a_held_out_split_the_last_weights_count(photos: PhotoSet, tmp_path: Path) -> None:
    run = train(_recipe(val_share=0.0), photos, tmp_path / "run", device="cpu")
    last = checkpoint.read_checkpoint(run.path / "last.safetensors").tensors
    for name, tensor in run.network().state_dict().items():
        assert torch.equal(tensor, last[f"network/{name}"])
    assert run.metrics() is None
    assert run.contract().quality == {}
    with pytest.raises(DataError, match="held no photos out"):
        run.held_out()


def test_early_stopping_counts_evaluations_without_gain(photos: PhotoSet, tmp_path: Path) -> None:
    still = _recipe(
        learning_rate=0.0,
        head_learning_rate=0.0,
        freeze_batch_norm=True,
        epochs=9,
        patience=2,
    )
    run = train(still, photos, tmp_path / "run", device="cpu")
    assert run.record["stopped_because"] == "no better MAP@R in 2 evaluations"
    assert len(_lines(run.path)) == 3
    assert run.record["best"]["epoch"] == 1


def test_evaluations_may_be_rarer_than_epochs(photos: PhotoSet, tmp_path: Path) -> None:
    run = train(_recipe(eval_every=2), photos, tmp_path / "run", device="cpu")
    assert [row["val"] is None for row in _lines(run.path)] == [True, False, False]


# --- alarms -------------------------------------------------------------------------------------


def test_a_collapsed_network_is_announced_once_with_what_to_do(
    photos: PhotoSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = trainer.create_untrained

    def collapsed(recipe: Recipe, *, weights: str) -> nn.Module:
        network = genuine(recipe, weights=weights)
        nn.init.zeros_(network.head.weight)
        nn.init.ones_(network.head.bias)
        return network

    monkeypatch.setattr(trainer, "create_untrained", collapsed)
    listener = Listener()
    still = _recipe(loss="rll", learning_rate=1e-9, head_learning_rate=1e-9)
    train(still, photos, tmp_path / "run", device="cpu", reporter=listener)
    (warning,) = listener.alarms()
    assert "--learning-rate" in warning
    assert "--freeze-batch-norm" in warning


def test_a_healthy_training_raises_no_alarm(photos: PhotoSet, tmp_path: Path) -> None:
    listener = Listener()
    recipe = _recipe(loss="rll", backbone="resnet10", freeze=4, freeze_batch_norm=True)
    train(recipe, photos, tmp_path / "run", device="cpu", reporter=listener)
    assert not listener.alarms()


def test_batch_norm_that_has_not_settled_is_told_from_a_collapse(
    photos: PhotoSet, tmp_path: Path
) -> None:
    listener = Listener()
    train(_recipe(loss="rll"), photos, tmp_path / "run", device="cpu", reporter=listener)
    (warning,) = listener.alarms()
    assert "BatchNorm's statistics have not settled" in warning


def test_numbers_that_are_not_finite_stop_and_keep_the_last_good_checkpoint(
    straight: Path, photos: PhotoSet, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"

    trainings: list[Any] = []
    genuine = trainer._Training.run

    def run(self: Any) -> None:
        trainings.append(self)
        genuine(self)

    def poison() -> None:
        # The 3rd step has been taken; the 4th meets a weight that is no number.
        trainings[0].network.head.weight.data.fill_(math.nan)

    says = r"(?s)no longer finite at epoch 2, step 2.*--learning-rate"
    listener = Listener(at_step={3: poison})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer._Training, "run", run)
        with pytest.raises(EmbedKitError, match=says):
            train(_recipe(), photos, run_dir, device="cpu", reporter=listener)
    assert _state(run_dir)["progress"]["epoch"] == 1
    train(_recipe(), photos, run_dir, device="cpu", resume=True)
    _assert_same(straight, run_dir)


def test_weights_broken_by_the_last_step_of_an_epoch_are_not_saved(
    photos: PhotoSet, tmp_path: Path
) -> None:
    recipe = _recipe(learning_rate=1e30, head_learning_rate=1e30, val_share=0.0, epoch_steps=1)
    with pytest.raises(EmbedKitError, match="no longer finite"):
        train(recipe, photos, tmp_path / "run", device="cpu")
    saved = checkpoint.read_checkpoint(tmp_path / "run" / "last.safetensors").tensors
    assert all(bool(t.isfinite().all()) for n, t in saved.items() if n.startswith("network/"))


# --- the plan -----------------------------------------------------------------------------------

_CPU = torch.device("cpu")


def test_lone_classes_and_broken_files_are_left_out_and_counted(
    photos: PhotoSet, tmp_path: Path
) -> None:
    root = tmp_path / "photos"
    shutil.copytree(photos.root, root)
    names = photos.classes()
    for path in sorted((root / names[0]).iterdir())[1:]:
        path.unlink()
    broken = sorted((root / names[1]).iterdir())[:2]
    for path in broken:
        path.write_bytes(b"no picture")
    run = train(_recipe(epochs=1), read_photos(root), tmp_path / "run", device="cpu")
    assert run.record["data"]["unreadable"] == 2
    assert run.record["data"]["lone_classes"] == 1
    assert len(run.photos()) == 45 - 4 - 1 - 2
    lines = [json.loads(line) for line in (run.path / "failed.jsonl").read_text().splitlines()]
    assert [root / line["path"] for line in lines] == broken
    assert {line["code"] for line in lines} == {"not-an-image"}
    resumed = train(run.recipe, run.photos(), run.path, device="cpu", resume=True)
    assert resumed.record["data"] == run.record["data"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # split of class 0..8 as given, and the classes that end in train, val, test
        ("ttttttvvv", (6, 3, 0)),
        ("ttttttxxx", (4, 2, 3)),
        ("tttvvvxxx", (3, 3, 3)),
        ("         ", (6, 3, 0)),
        ("  t   vvv", (6, 3, 0)),
    ],
)
def test_given_splits_are_used_and_a_missing_val_is_held_out_of_train(
    photos: PhotoSet, given: str, expected: tuple[int, int, int]
) -> None:
    words = {"t": "train", "v": "val", "x": "test", " ": ""}
    number = {name: place for place, name in enumerate(photos.classes())}
    split = tuple(words[given[number[name]]] for name in photos.labels)
    plan = make_plan(_recipe(), dataclasses.replace(photos, split=split), device=_CPU)
    assert tuple(plan.counts(name)["classes"] for name in ("train", "val", "test")) == expected
    for name, was in zip(plan.photos.labels, plan.photos.split, strict=True):
        if given[number[name]] in "vx":
            assert was == words[given[number[name]]]


def test_the_test_split_is_measured_at_the_start_and_at_the_end(
    photos: PhotoSet, tmp_path: Path
) -> None:
    names = photos.classes()
    split = tuple("test" if name in names[:3] else "" for name in photos.labels)
    run = train(
        _recipe(val_share=0.3),
        dataclasses.replace(photos, split=split),
        tmp_path / "r",
        device="cpu",
    )
    assert set(run.record["baseline"]) == {"val", "test"}
    assert run.held_out_split == "test"
    assert run.metrics() == run.record["test"]
    paths, labels = run.held_out()
    assert len(paths) == 15
    assert set(labels) == set(names[:3])
    assert all(path.is_file() for path in paths)


def test_queries_and_galleries_of_the_data_are_used(photos: PhotoSet, tmp_path: Path) -> None:
    is_query = tuple(row % 5 == 0 for row in range(len(photos)))
    marked = dataclasses.replace(
        photos, is_query=is_query, is_gallery=tuple(not flag for flag in is_query)
    )
    run = train(_recipe(epochs=1), marked, tmp_path / "run", device="cpu")
    assert run.record["best"]["val"]["queries"] == 3
    assert run.photos().is_query == marked.subset(range(45)).is_query
    unmarked = dataclasses.replace(marked, is_query=(False,) * 45, is_gallery=(False,) * 45)
    run = train(_recipe(epochs=1), unmarked, tmp_path / "other", device="cpu")
    assert run.record["best"]["val"]["queries"] == 15


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"loss": "rl"}, UnknownNameError, "did you mean 'rll'"),
        ({"loss_options": {"alfa": 1}}, UnknownNameError, "did you mean 'alpha'"),
        ({"loss_options": {"alpha": "much"}}, UsageError, "alpha must be a number"),
        ({"backbone": "resnet5"}, UnknownNameError, "no backbone named 'resnet5'"),
        ({"pooling": "max"}, UnknownNameError, "no pooling named 'max'"),
        ({"amp": "fp16"}, UsageError, "fp16 training needs a CUDA device"),
        ({"weights": "absent.pth"}, UsageError, "there is no weights file"),
        ({"freeze": 99}, UsageError, "99 stages cannot be frozen"),
    ],
)
def test_a_wrong_name_is_refused_before_anything_is_written(
    photos: PhotoSet, tmp_path: Path, changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        train(_recipe(**changes), photos, tmp_path / "run", device="cpu")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["gpu", "cpu:0", "cuda:", "cuda:x", "cuda:-1", "", "tpu"])
def test_a_device_that_is_no_device_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match="no device"):
        choose_device(name)


def test_an_absent_device_is_missing() -> None:
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(MissingError, match="cuda:97 is not here") as caught:
        choose_device("cuda:97")
    assert caught.value.exit_code == 6


# --- where there is a GPU -----------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["auto", "off", "bf16", "fp16"])
def test_it_trains_and_resumes_on_cuda(photos: PhotoSet, tmp_path: Path, amp: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    recipe = _recipe(amp=amp)
    with pytest.raises(_Killed):
        train(recipe, photos, tmp_path / "r", device="cuda", reporter=Listener(at_step={3: _kill}))
    run = train(recipe, photos, tmp_path / "r", device="cuda", resume=True)
    assert run.record["steps"] == 6
    assert all(math.isfinite(row["loss"]) for row in _lines(run.path))
