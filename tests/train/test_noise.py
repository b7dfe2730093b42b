"""Losses for doubted labels equal loops over their formulas; labels are corrected, doubts named."""

from __future__ import annotations

import csv
import dataclasses
import math
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from embedkit.data import PhotoSet, inject_noise, read_photos, write_noisy
from embedkit.errors import (
    DataError,
    EmbedKitError,
    Interrupted,
    MismatchError,
    UnknownNameError,
    UsageError,
)
from embedkit.methods import Batch, Method, Setting
from embedkit.report import write_run_report
from embedkit.train import NOISES, Recipe, Run, noise, train
from embedkit.train.assisted import Assisted
from embedkit.train.checkpoint import read_checkpoint
from embedkit.train.robust_labels import RobustLabels, noise_options
from embedkit.train.suspects import find_suspects
from tests.tiny_recipe import tiny_recipe
from tests.train.listener import Listener

Loss = Callable[[Tensor, Tensor], Tensor]


def _p(row: Tensor) -> list[Tensor]:
    total = sum((z.exp() for z in row), torch.zeros((), dtype=row.dtype))
    return [z.exp() / total for z in row]


def _entropy(p: list[Tensor]) -> Tensor:
    return torch.stack([-x * x.log() for x in p]).sum()


def _towards(target: Callable[[list[Tensor], int], list[Tensor]]) -> Loss:
    """Mean of H(target, p), with the target's own gradient."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        values = []
        for row, label in zip(logits, labels.tolist(), strict=True):
            p = _p(row)
            mixed = target(p, label)
            values.append(sum(-t * x.log() for t, x in zip(mixed, p, strict=True)))
        return torch.stack(values).mean()

    return loss


def _mixed(share: Callable[[list[Tensor]], Any], other: Callable[[Tensor, int], Any]) -> Loss:
    """The target (1 - share) q + share other."""

    def target(p: list[Tensor], label: int) -> list[Tensor]:
        e = share(p)
        return [(1 - e) * float(k == label) + e * other(x, len(p)) for k, x in enumerate(p)]

    return _towards(target)


def _trust(progress: float) -> Callable[[list[Tensor]], float]:
    def share(p: list[Tensor]) -> float:
        age = 1 / (1 + math.exp(-16 * (progress - 0.5)))
        return age * (1 - float(_entropy(p).detach()) / math.log(len(p)))

    return share


def _penalised(logits: Tensor, labels: Tensor) -> Tensor:
    values = []
    for row, label in zip(logits, labels.tolist(), strict=True):
        p = _p(row)
        values.append(0.75 * -p[label].log() - 0.25 * _entropy(p))
    return torch.stack(values).mean()


_CLOSED: dict[str, tuple[Loss, Loss]] = {
    "label-smoothing": (
        lambda z, y: noise.label_smoothing(z, y, epsilon=0.25),
        _mixed(lambda p: 0.25, lambda x, classes: 1 / classes),
    ),
    "confidence-penalty": (
        lambda z, y: noise.confidence_penalty(z, y, epsilon=0.25),
        _penalised,
    ),
    "boot-soft": (
        lambda z, y: noise.boot_soft(z, y, epsilon=0.25),
        _mixed(lambda p: 0.25, lambda x, classes: x),
    ),
    "proselflc, young": (
        lambda z, y: noise.proselflc(z, y, progress=0.3, sharpness=16, transit=0.5),
        _mixed(_trust(0.3), lambda x, classes: x),
    ),
    "proselflc, old": (
        lambda z, y: noise.proselflc(z, y, progress=0.9, sharpness=16, transit=0.5),
        _mixed(_trust(0.9), lambda x, classes: x),
    ),
}


def _batch_of_logits(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(7, 5, dtype=torch.float64, generator=generator)
    logits[2] = 0  # nothing is known
    return logits.requires_grad_(), torch.tensor([0, 4, 2, 2, 1, 0, 3])


@pytest.mark.parametrize("name", _CLOSED)
def test_a_loss_and_its_gradient_are_those_of_the_formula(name: str) -> None:
    ours, formula = _CLOSED[name]
    logits, labels = _batch_of_logits()
    value, expected = ours(logits, labels), formula(logits, labels)
    assert float(value.detach()) == pytest.approx(float(expected.detach()), abs=1e-9)
    (slope,) = torch.autograd.grad(value, logits)
    (expected_slope,) = torch.autograd.grad(expected, logits)
    assert (slope - expected_slope).abs().max() < 1e-9


@pytest.mark.parametrize(("power", "emphasis"), [(1.0, 8.0), (0.5, 8.0), (0.0, 2.0), (2.0, 0.0)])
def test_a_manipulated_gradient_is_that_of_the_formula(power: float, emphasis: float) -> None:
    logits, labels = _batch_of_logits()
    if power == 1.0:
        value = noise.imae(logits, labels, emphasis=emphasis)
    else:
        value = noise.derivative_manipulation(logits, labels, power=power, emphasis=emphasis)
    (slope,) = torch.autograd.grad(value, logits)
    expected, weights, shown = np.zeros((7, 5)), [], []
    for i, (row, label) in enumerate(zip(logits.detach(), labels.tolist(), strict=True)):
        p = [float(x) for x in _p(row)]
        weights.append(math.exp(emphasis * p[label] ** power * (1 - p[label])))
        shown.append(2 * (1 - p[label]))
        for k in range(5):
            expected[i, k] = (p[k] - float(k == label)) / (2 * (1 - p[label])) * weights[i]
    expected /= sum(weights)
    assert np.abs(slope.numpy() - expected).max() < 1e-9
    assert np.abs(slope.numpy()).sum() == pytest.approx(1)  # the weights' shares
    assert float(value.detach()) == pytest.approx(sum(shown) / 7, abs=1e-9)


def test_a_certain_network_gives_no_gradient_that_is_not_finite() -> None:
    logits = torch.tensor([[200.0, 0.0, 0.0], [0.0, 200.0, 0.0]], requires_grad=True)
    labels = torch.tensor([0, 0])
    for name in NOISES[:-1]:
        robust = _prepared(name)[0]
        batch = _batch(labels, torch.tensor([0, 1]))
        (slope,) = torch.autograd.grad(robust._judge(logits, batch), logits)
        assert bool(slope.isfinite().all()), name


def test_disturbed_labels_are_smoothed_labels_on_the_mean() -> None:
    torch.manual_seed(0)
    logits, labels = _batch_of_logits()
    logits = logits.detach()
    draws = [float(noise.disturb_label(logits, labels, rate=0.4)) for _ in range(4000)]
    expected = float(noise.label_smoothing(logits, labels, epsilon=0.4))
    assert np.mean(draws) == pytest.approx(expected, abs=4 * np.std(draws) / math.sqrt(4000))
    plain = float(nn.functional.cross_entropy(logits, labels))
    assert float(noise.disturb_label(logits, labels, rate=0)) == pytest.approx(plain)


def test_pencil_is_its_formula_for_the_network_and_for_the_guesses() -> None:
    logits, labels = _batch_of_logits()
    guesses = _batch_of_logits(seed=1)[0]
    value = noise.pencil(logits, guesses, labels, compatibility=0.3, certainty=0.8)
    parts = []
    for z, t, label in zip(logits, guesses, labels.tolist(), strict=True):
        p, y = _p(z), _p(t)
        apart = sum(a * (a.log() - b.log()) for a, b in zip(p, y, strict=True))
        parts.append(apart / 5 - 0.3 * y[label].log() + 0.8 * _entropy(p) / 5)
    expected = torch.stack(parts).mean()
    assert float(value.detach()) == pytest.approx(float(expected.detach()), abs=1e-9)
    for ours, theirs in zip(
        torch.autograd.grad(value, (logits, guesses)),
        torch.autograd.grad(expected, (logits, guesses)),
        strict=True,
    ):
        assert (ours - theirs).abs().max() < 1e-9


# --- the classifier ------------------------------------------------------------------------------


def _recipe(**changes: Any) -> Recipe:
    return tiny_recipe(**{"loss": "contrastive"} | changes)


class _Net:
    embedding_dim = 4


def _prepared(name: str, **options: float) -> tuple[RobustLabels, Setting]:
    """For 6 photos of 3 classes and 10 epochs of 2 steps."""
    labels = np.array([0, 0, 1, 1, 2, 2])
    photos = PhotoSet(
        Path("/"), tuple(Path(f"{n}.jpg") for n in range(6)), tuple("aabbcc"), ("train",) * 6
    )
    setting = Setting(_recipe(), photos, labels, ("a", "b", "c"), epoch_steps=2, epochs=10)
    torch.manual_seed(0)
    robust = RobustLabels(name, options)
    robust.prepare(setting, _Net())  # type: ignore[arg-type]
    return robust, setting


def _batch(labels: Tensor, rows: Tensor, epoch: int = 0) -> Batch:
    return Batch(torch.zeros(len(rows), 1), rows, labels, None, epoch, 0)


@pytest.mark.parametrize("name", NOISES)
def test_every_way_teaches_embeddings_and_vectors(name: str) -> None:
    # Nobody's label should be corrected by these random embeddings.
    robust, setting = _prepared(name, **({"reach": 1.0} if name == "pencil" else {}))
    labels = torch.from_numpy(setting.labels)
    for epoch in range(10):
        robust.begin_epoch(epoch)
        embeddings = torch.randn(6, 4, requires_grad=True)
        value = robust(embeddings, _batch(labels, torch.arange(6), epoch))
        value.backward()
        assert embeddings.grad is not None
        assert bool(embeddings.grad.isfinite().all())
        assert bool(embeddings.grad.any())
        assert all(math.isfinite(number) for number in robust.stats.values())


def test_pencil_moves_a_photos_guess_by_the_formula_and_only_in_the_second_stage() -> None:
    robust, _ = _prepared("pencil")
    assert (robust.second_from, robust.third_from) == (2, 6)
    views = 4 * 2 * 6 / 6  # epochs x steps x batch / photos
    rows, labels = torch.tensor([0, 5, 0]), torch.tensor([0, 2, 0])
    embeddings = torch.randn(3, 4)
    before = robust.guesses.clone()
    robust(embeddings, _batch(labels, rows, epoch=1))
    assert torch.equal(robust.guesses, before)
    p = robust.logits(embeddings).softmax(1).detach()
    robust(embeddings, _batch(labels, rows, epoch=2))
    expected = before.clone()
    for place, row in enumerate(rows.tolist()):
        expected[row] -= 60 / views * (before[row].softmax(0) - p[place])
    assert (robust.guesses - expected).abs().max() < 1e-4
    moved = robust.guesses.clone()
    robust(embeddings, _batch(labels, rows, epoch=6))
    assert torch.equal(robust.guesses, moved)


def test_in_pencils_third_stage_batches_and_pair_loss_have_the_corrected_labels() -> None:
    robust, setting = _prepared("pencil")
    method = Assisted(Method(), robust, None)
    sampler = method.sampler(setting, 2)
    batch = _batch(torch.tensor([0, 1]), torch.tensor([0, 3]), epoch=6)
    given = [rows.tolist() for rows in sampler.batches(6)]
    robust.guesses[3] = torch.tensor([50.0, 0.0, 0.0])
    robust.begin_epoch(5)
    assert robust.labels(batch).tolist() == [0, 1]
    assert [rows.tolist() for rows in sampler.batches(6)] == given
    robust.begin_epoch(6)
    assert robust.labels(batch).tolist() == [0, 0]
    # Class b has one photo left, and a lone photo is in no batch.
    assert all(2 not in rows for rows in sampler.batches(6))
    assert any(3 in rows for epoch in range(6, 10) for rows in sampler.batches(epoch))
    robust.guesses[:] = torch.tensor([50.0, 0.0, 0.0])
    with pytest.raises(EmbedKitError, match="all become one class"):
        robust.begin_epoch(6)


def test_what_is_wrong_is_said_before_the_training(photos: PhotoSet, tmp_path: Path) -> None:
    def refused(error: type[EmbedKitError], match: str, **changes: Any) -> None:
        with pytest.raises(error, match=match):
            train(_recipe(**changes), photos, tmp_path / "run", device="cpu")
        assert not (tmp_path / "run").exists()

    refused(UnknownNameError, "pencli", noise="pencli")
    refused(UnknownNameError, "alpha", noise="pencil", noise_options={"alpha": 1})
    refused(UsageError, "cannot be made", noise="boot-soft", noise_options={"epsilon": 2})
    refused(UsageError, "no --noise", noise_options={"epsilon": 0.1})
    refused(UsageError, "learns from images", noise="imae", loss="isif")
    refused(UsageError, "three stages", noise="pencil", epochs=2)
    assert noise_options("dm", {"power": 1})["power"] == 1.0


# --- whole trainings -----------------------------------------------------------------------------


def _contents(folder: Path) -> dict[str, bytes]:
    tensors = read_checkpoint(folder / "last.safetensors").tensors
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize(("name", "loss"), [("pencil", "contrastive"), ("proselflc", "hdml")])
def test_a_stopped_training_goes_on_bit_for_bit_and_names_its_suspects(
    photos: PhotoSet, tmp_path: Path, name: str, loss: str
) -> None:
    options = {"reach": 400.0} if name == "pencil" else {}
    recipe = _recipe(noise=name, noise_options=options, loss=loss)
    whole = train(recipe, photos, tmp_path / "whole", device="cpu")
    # In the middle of an epoch, and at the last step of one.
    for resume, step in ((False, 3), (True, 1)):
        stop = Listener(at_step={step: lambda: signal.raise_signal(signal.SIGINT)})
        with pytest.raises(Interrupted):
            train(recipe, photos, tmp_path / "again", device="cpu", reporter=stop, resume=resume)
    train(recipe, photos, tmp_path / "again", device="cpu", resume=True)
    assert _contents(tmp_path / "whole") == _contents(tmp_path / "again")
    lists = [(tmp_path / run / "suspects.csv").read_bytes() for run in ("whole", "again")]
    assert lists[0] == lists[1]
    with (tmp_path / "whole/suspects.csv").open(newline="") as file:
        suspects = list(csv.DictReader(file))
    labels = {path.as_posix(): label for path, label in zip(*_train(whole.photos()), strict=True)}
    assert suspects
    for suspect in suspects:
        assert labels[suspect["path"]] == suspect["label"] != suspect["suggested_label"]
        assert float(suspect["suggested_probability"]) >= float(suspect["label_probability"])
    # The classifier stays behind.
    assert whole.network().embedding_dim == 8


def _train(photos: PhotoSet) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    rows = [row for row, split in enumerate(photos.split) if split == "train"]
    chosen = photos.subset(rows)
    return chosen.paths, chosen.labels


def test_suspects_are_those_likelier_elsewhere_the_surest_first() -> None:
    beliefs = np.array([[0.6, 0.4], [0.3, 0.7], [0.9, 0.1], [0.5, 0.5]], np.float32)
    paths = [Path(name) for name in "abcd"]
    found = find_suspects(paths, np.array([0, 0, 1, 1]), ("x", "y"), beliefs)
    assert [(one.path.name, one.label, one.suggested_label) for one in found] == [
        ("c", "y", "x"),
        ("b", "x", "y"),
        ("d", "y", "x"),
    ]
    assert found[0].suggested_probability == pytest.approx(0.9)
    assert find_suspects(paths[:1], np.array([0]), ("x", "y"), beliefs[:1]) == []


# --- wrong labels on purpose ---------------------------------------------------------------------


def test_as_many_training_labels_are_flipped_as_asked_for_and_no_others(
    photos: PhotoSet, tmp_path: Path
) -> None:
    noisy, flipped = inject_noise(photos, rate=0.3, seed=3)
    train_rows = [row for row, split in enumerate(noisy.split) if split == "train"]
    assert len(flipped) == round(0.3 * len(train_rows))
    differing = [row for row in range(len(photos)) if noisy.labels[row] != photos.labels[row]]
    assert differing == flipped.tolist()
    assert set(differing) <= set(train_rows)
    seen = {noisy.labels[row] for row in train_rows}
    held_out = {photos.labels[row] for row, split in enumerate(noisy.split) if split == "val"}
    assert held_out
    assert not seen & held_out
    write_noisy(tmp_path / "noisy.csv", noisy, photos.labels)
    again = read_photos(tmp_path / "noisy.csv")
    assert (again.labels, again.split) == (noisy.labels, noisy.split)
    assert again.files() == photos.files()
    with (tmp_path / "noisy.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["true_label"] for row in rows] == list(photos.labels)
    assert [n for n, row in enumerate(rows) if row["flipped"] == "1"] == differing
    assert inject_noise(photos, rate=0.3, seed=3)[0] == noisy
    assert inject_noise(photos, rate=0.3, seed=4)[0] != noisy
    every, all_rows = inject_noise(again, rate=1)
    assert all_rows.tolist() == train_rows
    assert all(every.labels[row] != again.labels[row] for row in train_rows)


def test_asymmetric_noise_moves_every_class_to_the_next_of_its_category(photos: PhotoSet) -> None:
    clean = dataclasses.replace(photos, split=("train",) * (len(photos) - 1) + ("val",))
    classes = sorted({clean.labels[row] for row in range(len(clean) - 1)})
    pairs = zip(classes, [*classes[1:], classes[0]], strict=True)

    def flips(photos: PhotoSet, **options: Any) -> tuple[Counter[tuple[str, str]], list[int]]:
        noisy, flipped = inject_noise(photos, rate=0.4, **options)
        moves = Counter((photos.labels[row], noisy.labels[row]) for row in flipped)
        assert moves.total() == round(0.4 * (len(photos) - 1))
        assert noisy.labels[-1] == photos.labels[-1]
        return moves, flipped.tolist()

    moves, flipped = flips(clean, kind="asymmetric")
    assert set(moves) <= set(pairs)
    assert len(moves) > 1
    spread, same = flips(clean)
    assert same == flipped
    assert len(spread) > len(moves)
    # Two of a category change places, and one alone goes where the next category begins.
    wanted = {classes[0]: classes[2], classes[2]: classes[0], classes[1]: classes[3]}
    kinds = {classes[0]: "a", classes[2]: "a", classes[1]: "b"}
    sorts = tuple(kinds.get(label, "c") for label in clean.labels)
    moves, _ = flips(dataclasses.replace(clean, category=sorts), kind="asymmetric")
    assert {wrong for wrong in moves if wrong[0] in wanted} <= set(wanted.items())
    assert {label for label, _ in moves} >= set(wanted)
    assert not {to for label, to in moves if label not in wanted} & set(wanted)


def test_labels_that_cannot_be_flipped_are_refused(photos: PhotoSet) -> None:
    for rate in (0, 1.1, math.nan, -1):
        with pytest.raises(UsageError, match="above 0"):
            inject_noise(photos, rate=rate)
    with pytest.raises(UsageError, match="symmetric or asymmetric, not 'pairs'"):
        inject_noise(photos, rate=0.5, kind="pairs")
    bare = dataclasses.replace(photos, labels=("",) * len(photos))
    with pytest.raises(DataError, match="no labels"):
        inject_noise(bare, rate=0.5)
    one = photos.subset([n for n, label in enumerate(photos.labels) if label == photos.labels[0]])
    with pytest.raises(DataError):
        inject_noise(one, rate=0.5)


def test_the_runs_page_shows_the_doubted_photos(photos: PhotoSet, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(_recipe(epochs=1, noise="imae"), photos, folder, device="cpu")
    assert "Labels to look at" in write_run_report(folder).read_text()
    paths, _ = _train(Run.load(folder).photos())
    header = "path,label,suggested_label,suggested_probability,label_probability\n"
    (folder / "suspects.csv").write_text(f"{header}{paths[0].as_posix()},<mug>,lamp,0.9,0.1\n")
    page = write_run_report(folder).read_text()
    assert f"have 1 of {len(paths)} training photos in another class" in page
    assert "&lt;mug&gt; &rarr; <strong>lamp</strong>" in page
    (folder / "suspects.csv").write_text(header)
    assert "have 0 of" in write_run_report(folder).read_text()
    (folder / "suspects.csv").write_text("path\nx\n")
    with pytest.raises(MismatchError, match="damaged"):
        write_run_report(folder)
