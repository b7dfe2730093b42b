"""The test of learning rates: where it decides, and that it leaves nothing behind but a number."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedkit.data import PhotoSet
from embedkit.errors import Interrupted
from embedkit.train import Run, checkpoint, find_rate, train, trainer
from embedkit.train.find_rate import STEPS, range_test, smoothed
from tests.tiny_recipe import tiny_recipe
from tests.train.listener import Listener


class _InTest(Listener):
    """Strikes at a step of the test, and counts them."""

    def __init__(self, at: int | None = None) -> None:
        super().__init__()
        self.tried, self._at = 0, at

    @contextlib.contextmanager
    def progress(self, what: str, total: int | None) -> Iterator[Callable[[int, int], None]]:
        def advance(done: int, failed: int) -> None:
            self.tried += what == "rates"
            if self.tried == self._at:
                signal.raise_signal(signal.SIGINT)

        yield advance


def _tensors(run: Run) -> dict[str, bytes]:
    tensors = checkpoint.read_checkpoint(run.path / "last.safetensors").tensors
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("valley", [0.1, 1.0, 8.0])
def test_it_takes_the_bottom_of_a_valley(valley: float) -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, STEPS)
    found = range_test(lambda n, factor: math.log10(factor / valley) ** 2 + float(noise[n]))
    assert found.reason == ""
    assert valley / 2 < found.factor < valley * 2
    assert len(found.losses) == len(found.factors) == STEPS
    assert found.factors[0] == pytest.approx(0.01)
    assert found.factors[-1] == pytest.approx(100)
    ratios = np.divide(found.factors[1:], found.factors[:-1])
    assert np.ptp(ratios) < 1e-12


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (lambda n, factor: (n * 37 % 11) / 11, "did not fall"),
        (lambda n, factor: float(n), "did not fall"),
        (lambda n, factor: 5.0, "did not fall"),
        (lambda n, factor: -float(n), "still falling"),
        (lambda n, factor: math.nan, "after 0 steps"),
        (lambda n, factor: 1.0 if n < 7 else math.inf, "after 7 steps"),
    ],
)
def test_where_it_says_nothing_the_rates_stay(
    loss: Callable[[int, float], float], reason: str
) -> None:
    found = range_test(loss)
    assert found.factor == 1
    assert reason in found.reason


def test_what_explodes_late_is_judged_by_what_came_before() -> None:
    found = range_test(lambda n, f: math.log10(f) ** 2 if n < 45 else math.nan)
    assert len(found.losses) == 45
    assert found.factor == pytest.approx(1, rel=0.3)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 30])
def test_the_smoothed_losses_are_means_written_as_loops(count: int) -> None:
    losses = np.random.default_rng(1).normal(size=count).tolist()
    wanted = []
    for place in range(count):
        reach = min(5, place, count - 1 - place)
        around = losses[place - reach : place + reach + 1]
        wanted.append(sum(around) / len(around))
    assert smoothed(losses).tolist() == pytest.approx(wanted)


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """Fewer steps, that it takes less time; what it decides is another test's matter."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (find_rate, trainer):
            patch.setattr(module, "STEPS", 8)
        patch.setattr(find_rate, "_decide", lambda factors, losses: (factors[3], ""))
        yield


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, photos: PhotoSet, quick: None) -> Run:
    """A training that looked for its rates; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "found"
    return train(_recipe(), photos, folder, device="cpu")


def _recipe(**changes: Any) -> Any:
    # With state of the loss, of BatchNorm and of an average: all of it could keep a trace.
    recipe = tiny_recipe(loss="proxy-anchor", epochs=2, ema=0.9, freeze_batch_norm=False)
    return dataclasses.replace(recipe, find_learning_rate=True, **changes)


def test_the_training_is_the_one_with_the_found_rates_bit_for_bit(
    found: Run, photos: PhotoSet, tmp_path: Path
) -> None:
    test = found.record["rate_test"]
    factor = test["factor"]
    assert factor == test["factors"][3] != 1
    recipe = found.recipe
    told = dataclasses.replace(
        recipe,
        find_learning_rate=False,
        learning_rate=recipe.backbone_learning_rate * factor,
        head_learning_rate=recipe.head_learning_rate * factor,
        proxy_learning_rate=recipe.proxy_learning_rate * factor,
    )
    same = train(told, photos, tmp_path / "told", device="cpu")
    assert _tensors(same) == _tensors(found)
    assert same.record["rate_test"] is None
    rows = [run.record["best"]["learning_rate"] for run in (same, found)]
    assert rows[0] == pytest.approx(rows[1])


def test_a_stop_in_the_test_and_after_it_changes_no_bit_and_it_is_made_once(
    found: Run, photos: PhotoSet, tmp_path: Path
) -> None:
    folder, first = tmp_path / "again", _InTest(at=5)
    with pytest.raises(Interrupted):
        train(_recipe(), photos, folder, device="cpu", reporter=first)
    assert first.tried == 5
    assert not (folder / "best.safetensors").exists()
    # In the first epoch after the test.
    second = Listener(at_step={1: lambda: signal.raise_signal(signal.SIGINT)})
    with pytest.raises(Interrupted):
        train(_recipe(), photos, folder, device="cpu", reporter=second, resume=True)
    third = _InTest()
    again = train(_recipe(), photos, folder, device="cpu", reporter=third, resume=True)
    assert third.tried == 0
    assert [label for label, _ in third.notes].count("rates") == 1
    assert _tensors(again) == _tensors(found)
    assert again.record["rate_test"] == found.record["rate_test"]


def test_it_is_told_and_drawn(found: Run, photos: PhotoSet, tmp_path: Path) -> None:
    from embedkit.report import write_run_report

    page = write_run_report(found.path).read_text()
    assert "Learning rates tried" in page
    plain = train(tiny_recipe(epochs=1), photos, tmp_path / "plain", device="cpu")
    assert "Learning rates tried" not in write_run_report(plain.path).read_text()
