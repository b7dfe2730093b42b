"""TensorBoard's event files say what metrics.jsonl says, once per step, also after a stop."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest

from embedkit.data import PhotoSet
from embedkit.errors import Interrupted, MissingExtraError
from embedkit.train import train
from tests.tiny_recipe import tiny_recipe
from tests.train.listener import Listener

_TINY = tiny_recipe(loss="proxy-anchor", freeze_batch_norm=False, epochs=2)


def _scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would show."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_every_step_and_every_evaluation_is_there(photos: PhotoSet, tmp_path: Path) -> None:
    run = train(_TINY, photos, tmp_path / "run", device="cpu", tensorboard=True)
    shown = _scalars(run.path)
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [step for step, _ in shown["train/loss"]] == [1, 2, 3, 4]
    for row, at in zip(rows, (0, 2), strict=True):
        mean = sum(value for _, value in shown["train/loss"][at : at + 2]) / 2
        assert mean == pytest.approx(row["loss"], rel=1e-6)
    assert {f"train/{name}" for name in rows[0]["stats"]} <= shown.keys()
    measured = [run.record["baseline"]["val"]["map@r"], *(row["val"]["map@r"] for row in rows)]
    assert [step for step, _ in shown["val/map@r"]] == [0, 2, 4]
    assert [value for _, value in shown["val/map@r"]] == pytest.approx(measured)
    rates = {tag for tag in shown if tag.startswith("learning_rate/")}
    assert rates == {f"learning_rate/{name}" for name in ("backbone", "head", "loss")}


@pytest.mark.parametrize("strike", [1, 2, 3])
def test_a_stopped_and_a_killed_training_go_on_without_a_step_twice(
    photos: PhotoSet, tmp_path: Path, strike: int
) -> None:
    straight = train(_TINY, photos, tmp_path / "straight", device="cpu", tensorboard=True)
    run_dir = tmp_path / "run"
    stop = Listener(at_step={strike: lambda: signal.raise_signal(signal.SIGINT)})
    with pytest.raises(Interrupted):
        train(_TINY, photos, run_dir, device="cpu", reporter=stop, tensorboard=True)

    class Killed(Exception): ...

    def kill() -> None:
        raise Killed

    again = Listener(at_step={2 + strike % 2: kill} if strike < 3 else {1: kill})
    with pytest.raises(Killed):
        train(_TINY, photos, run_dir, device="cpu", reporter=again, resume=True, tensorboard=True)
    train(_TINY, photos, run_dir, device="cpu", resume=True, tensorboard=True)
    assert _scalars(run_dir) == _scalars(straight.path)


def test_without_the_option_nothing_is_written(photos: PhotoSet, tmp_path: Path) -> None:
    run = train(_TINY, photos, tmp_path / "run", device="cpu")
    assert not (run.path / "tensorboard").exists()


def test_the_missing_package_is_named_before_anything_begins(
    photos: PhotoSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    listener = Listener()
    with pytest.raises(
        MissingExtraError, match=r"pip install \"embedkit\[tensorboard\]\""
    ) as caught:
        train(_TINY, photos, tmp_path / "run", device="cpu", tensorboard=True, reporter=listener)
    assert caught.value.exit_code == 6
    assert not listener.notes
    assert not (tmp_path / "run").exists()
