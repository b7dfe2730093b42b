"""DCES: its clusters, its turns, its slices and its loss, by counting, by search and by loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from embedkit.data import PhotoSet
from embedkit.errors import UsageError
from embedkit.methods import Batch, Setting
from embedkit.methods._clusters import k_means, match_clusters
from embedkit.methods.dces import DivideAndConquer
from embedkit.models import EmbeddingNet
from embedkit.train import Recipe
from embedkit.train.run import create_untrained

_Tiny = Callable[..., Recipe]


def _setting(recipe: Recipe, classes: int, *, epochs: int = 6, steps: int = 4) -> Setting:
    """Of photos that need not exist, five of a class."""
    labels = np.arange(5 * classes) // 5
    paths = tuple(Path(f"{row}.jpg") for row in range(len(labels)))
    names = tuple(f"{label:03}" for label in labels)
    photos = PhotoSet(Path("/x"), paths, names, ("train",) * len(labels))
    return Setting(recipe, photos, labels, photos.classes(), steps, epochs)


def _spread_within(rows: Tensor, clusters: Tensor) -> float:
    parts = [rows[clusters == number] for number in set(clusters.tolist())]
    return sum(float((part - part.mean(0)).square().sum()) for part in parts)


def test_k_means_finds_the_best_of_all_partitions() -> None:
    torch.manual_seed(0)
    rows = torch.randn(7, 2) + 2 * torch.eye(2)[torch.arange(7) % 2]
    best = min(
        _spread_within(rows, torch.tensor(choice))
        for choice in itertools.product(range(3), repeat=7)
    )
    found = k_means(rows, 3, restarts=20)
    assert _spread_within(rows, found) == pytest.approx(best, rel=1e-5)


def test_k_means_separates_what_is_separate() -> None:
    torch.manual_seed(0)
    places = torch.eye(5)[torch.arange(100) % 5] * 10
    found = k_means(places + 0.1 * torch.randn(100, 5), 5, restarts=20)
    assert all(len(set(found[number::5].tolist())) == 1 for number in range(5))
    assert len(set(found.tolist())) == 5


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_k_means_has_an_answer_for_equal_rows_and_for_few(count: int) -> None:
    found = k_means(torch.ones(count, 4), 4)
    assert found.shape == (count,)
    assert 0 <= int(found.min()) <= int(found.max()) < min(count, 4)


def test_new_names_of_the_same_clusters_are_undone() -> None:
    before = np.random.default_rng(0).integers(0, 4, 50)
    for names in itertools.permutations(range(4)):
        assert np.array_equal(match_clusters(before, np.array(names)[before]).numpy(), before)


def test_matching_keeps_as_many_rows_in_their_cluster_as_any_naming_does() -> None:
    rng = np.random.default_rng(1)
    before, after = rng.integers(0, 4, 60), rng.integers(0, 4, 60)
    # A naming that is not its own inverse would show a matching in the wrong direction.
    after[:40] = np.array([1, 2, 3, 0])[before[:40]]
    kept = int((match_clusters(before, after).numpy() == before).sum())
    namings = itertools.permutations(range(4))
    assert kept == max(int((np.array(names)[after] == before).sum()) for names in namings)
    assert kept > 40


def _prepared(tiny: _Tiny, classes: int = 8, **options: Any) -> tuple[DivideAndConquer, Setting]:
    method, setting = DivideAndConquer(**options), _setting(tiny(loss="dces"), classes)
    method.prepare(setting, create_untrained(setting.recipe, weights="none"))
    return method, setting


def test_learners_take_turns_each_with_its_cluster_and_the_last_epochs_have_all(
    tiny: _Tiny,
) -> None:
    method, setting = _prepared(tiny, clusters=3, finetune=0.3)  # 2 of 6 epochs
    method.clusters.copy_(torch.from_numpy(setting.labels % 3))
    sampler = method.sampler(setting, 4)
    seen: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    for epoch in range(4):
        for step, batch in enumerate(sampler.batches(epoch)):
            learner = method.learner(epoch, step)
            assert learner == (4 * epoch + step) % 3
            assert {int(label) % 3 for label in setting.labels[batch]} == {learner}
            seen[learner] |= set(batch.tolist())
    assert method.own_clusters == 3
    assert all(len(rows) > 9 for rows in seen.values())
    for epoch in (4, 5):
        together = np.concatenate(sampler.batches(epoch))
        assert {int(label) % 3 for label in setting.labels[together]} == {0, 1, 2}
        assert method.learner(epoch, 0) is None


@pytest.mark.parametrize(
    ("finetune", "epochs", "whole"), [(0.05, 1, 0), (0.05, 3, 1), (0.05, 200, 10), (0, 9, 0)]
)
def test_the_final_phase_is_never_the_first_epoch_and_else_at_least_one(
    tiny: _Tiny, finetune: float, epochs: int, whole: int
) -> None:
    method, setting = DivideAndConquer(finetune=finetune), _setting(tiny(), 4, epochs=epochs)
    method.prepare(setting, create_untrained(setting.recipe, weights="none"))
    assert sum(method.learner(epoch, 0) is None for epoch in range(epochs)) == whole


def test_a_cluster_of_one_class_gives_its_learner_all_photos(tiny: _Tiny) -> None:
    method, setting = _prepared(tiny, clusters=2)
    method.clusters.copy_(torch.from_numpy((setting.labels > 0).astype(np.int64)))
    sampler = method.sampler(setting, 40)
    batches = sampler.batches(0)
    assert {int(label) for label in setting.labels[np.concatenate(batches[0::2])]} == set(range(8))
    assert {int(label) for label in setting.labels[np.concatenate(batches[1::2])]} == set(
        range(1, 8)
    )
    assert method.own_clusters == 1


def test_clusters_are_made_anew_every_few_epochs_and_keep_their_names(tiny: _Tiny) -> None:
    method, setting = _prepared(tiny, clusters=2, every=2)
    looks: list[int] = []

    class View:
        def features(self) -> Tensor:
            looks.append(len(looks))
            side = torch.from_numpy(setting.labels % 2).float()
            return torch.stack([side, 1 - side], 1) * (1 + torch.rand(len(side), 1))

    names = []
    for epoch in range(6):
        torch.manual_seed(epoch)
        method.begin_epoch(epoch, View())  # type: ignore[arg-type]
        names.append(method.clusters.tolist())
    assert len(looks) == 3  # before epochs 0, 2, 4; the last epoch is the final phase
    assert all(one == names[0] for one in names)
    assert len(set(names[0])) == 2


def _batch(network: EmbeddingNet, epoch: int, step: int) -> Batch:
    pixels = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8)
    rows = torch.arange(6)
    return Batch(pixels, rows, rows // 2, None, epoch, step)


def test_a_learner_teaches_its_slice_alone_and_the_final_phase_all(tiny: _Tiny) -> None:
    torch.manual_seed(0)
    network = create_untrained(tiny(loss="dces"), weights="none").eval()
    method = DivideAndConquer(margin=1)
    method.prepare(_setting(tiny(), 4), network)
    for epoch, step, taught in [(0, 1, {1}), (1, 3, {3}), (5, 0, {0, 1, 2, 3})]:
        network.zero_grad()
        method.step(network, _batch(network, epoch, step)).loss.backward()  # type: ignore[no-untyped-call]
        assert network.head.weight.grad is not None
        slopes = network.head.weight.grad.view(4, -1).abs().sum(1)
        assert {place for place, slope in enumerate(slopes.tolist()) if slope} == taught


def test_the_embedding_is_unit_slices_side_by_side(tiny: _Tiny) -> None:
    torch.manual_seed(0)
    network = create_untrained(tiny(loss="dces", loss_options={"clusters": 2}), weights="none")
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        network.eval()
        raw, given = network.head(network.features(pixels)).tolist(), network(pixels).tolist()
    for before, after in zip(raw, given, strict=True):
        for start in (0, 4):
            length = math.sqrt(sum(x * x for x in before[start : start + 4]))
            wanted = [x / length for x in before[start : start + 4]]
            assert after[start : start + 4] == pytest.approx(wanted, abs=1e-6)
    with torch.no_grad():
        network.head.weight.zero_()
        assert network(pixels).abs().max() == 0  # the bias is 0: no direction, and no NaN
    with torch.autocast("cpu", torch.bfloat16):
        assert network(pixels).dtype == torch.float32


@pytest.mark.parametrize(("dim", "enough"), [(10, 12), (3, 8), (4, 8)])
def test_a_width_that_cannot_be_cut_is_refused_with_one_that_can(
    tiny: _Tiny, dim: int, enough: int
) -> None:
    with pytest.raises(UsageError, match=rf"of {dim} numbers cannot .* 4") as refusal:
        create_untrained(tiny(loss="dces", dim=dim), weights="none")
    assert refusal.value.hint == f"--dim {enough}"


def _nearest_by_loops(rows: list[list[float]], labels: list[int]) -> float:
    unit = [[x / math.hypot(*row) for x in row] for row in rows]
    apart = [[math.dist(a, b) for b in unit] for a in unit]
    count = len(rows)
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    positives = [(i, j) for i, j in pairs if labels[i] == labels[j]]
    each = round(len(positives) / count)
    terms = [apart[i][j] - 1.2 + 0.2 for i, j in positives]
    for i in range(count):
        others = [apart[i][j] for j in range(count) if labels[j] != labels[i]]
        terms += [1.2 - d + 0.2 for d in sorted(d for d in others if d >= 0.5)[:each]]
    active = [term for term in terms if term > 0]
    return sum(active) / max(len(active), 1)


@pytest.mark.parametrize(
    "labels", [[0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 0, 0, 0, 1, 1, 2, 2, 3], [1] * 9, [*range(9)]]
)
def test_nearest_mining_matches_loops(labels: list[int]) -> None:
    loss = DivideAndConquer(mining="nearest").loss
    torch.manual_seed(2)
    x = torch.randn(9, 3, dtype=torch.float64)
    x[4] = x[0]  # duplicates, across classes or within one
    x.requires_grad_()
    value = loss(x, torch.tensor(labels))
    assert value.item() == pytest.approx(_nearest_by_loops(x.tolist(), labels), abs=1e-9)
    value.backward()
    assert x.grad is not None
    step, slopes = 1e-6, x.grad.flatten().tolist()
    for place in range(3, 12):  # not the duplicates: there is no slope to compare with
        moved = []
        for sign in (1, -1):
            y = x.detach().flatten().clone()
            y[place] += sign * step
            moved.append(_nearest_by_loops(y.view(9, 3).tolist(), labels))
        assert slopes[place] == pytest.approx((moved[0] - moved[1]) / (2 * step), abs=1e-6)


def test_options_that_cannot_be_are_refused() -> None:
    wrong: list[dict[str, Any]]
    wrong = [{"clusters": 1}, {"every": 0}, {"finetune": 1.5}, {"mining": "hardest"}]
    for options in wrong:
        with pytest.raises(ValueError, match=next(iter(options))):
            DivideAndConquer(**options)
