"""HDML: the pull and all three objectives against loops in numpy, and who learns from what."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from embedkit.data import PhotoSet
from embedkit.methods import Batch, Setting
from embedkit.methods.hdml import HardnessAware, pull_towards
from embedkit.models import freeze_batch_norm
from embedkit.models.standardized import StandardizedNet
from embedkit.train import Recipe
from embedkit.train.run import create_untrained

_Tiny = Callable[..., Recipe]


def _by_loops(anchors: Any, positives: Any, average: float) -> Any:
    """Every negative as the paper moves it, in plain Python."""
    moved = np.array([list(positives)] * len(anchors))
    for i, a in enumerate(anchors):
        near = math.dist(a, positives[i])
        for j, n in enumerate(positives):
            far = math.dist(a, n)
            if near < far:
                factor = (near + (far - near) * math.exp(-90 / average)) / far
                moved[i][j] = [x + factor * (y - x) for x, y in zip(a, n, strict=True)]
    return moved


@pytest.mark.parametrize("average", [1e6, 90.0, 20.0, 1.0])
def test_the_pull_matches_loops(average: float) -> None:
    torch.manual_seed(0)
    anchors, positives = torch.randn(2, 5, 3, dtype=torch.float64)
    given = pull_towards(anchors, positives, math.exp(-90 / average))
    wanted = _by_loops(anchors.tolist(), positives.tolist(), average)
    assert np.allclose(given.numpy(), wanted, atol=1e-12)


@pytest.mark.parametrize("reach", [0.0, 0.3, 1.0])
def test_a_pulled_negative_lies_between_the_positive_and_where_it_was(reach: float) -> None:
    torch.manual_seed(1)
    anchors, positives = torch.randn(2, 6, 4, dtype=torch.float64)
    before = torch.cdist(anchors, positives)
    after = (pull_towards(anchors, positives, reach) - anchors[:, None]).norm(dim=2)
    own = before.diagonal()[:, None]
    wanted = torch.where(before > own, own + (before - own) * reach, before)
    assert torch.allclose(after, wanted, atol=1e-12)


def test_equal_rows_have_finite_slopes() -> None:
    anchors = torch.ones(3, 2, requires_grad=True)
    positives = torch.ones(3, 2, requires_grad=True)
    pull_towards(anchors, positives, 0.0).square().sum().backward()  # type: ignore[no-untyped-call]
    assert anchors.grad is not None
    assert positives.grad is not None
    assert anchors.grad.isfinite().all()
    assert positives.grad.isfinite().all()


@pytest.fixture
def prepared(tiny: _Tiny) -> Callable[..., tuple[HardnessAware, StandardizedNet]]:
    def make(**options: Any) -> tuple[HardnessAware, StandardizedNet]:
        torch.manual_seed(0)
        recipe = tiny(loss="hdml")
        network = create_untrained(recipe, weights="none")
        method = HardnessAware(**options)
        labels = np.arange(20) // 4
        paths = tuple(Path(f"{row}.jpg") for row in range(20))
        photos = PhotoSet(Path("/x"), paths, tuple(map(str, labels)), ("train",) * 20)
        method.prepare(Setting(recipe, photos, labels, photos.classes(), 2, 3), network)
        assert isinstance(network, StandardizedNet)
        return method, network

    return make


def _batch() -> Batch:
    pixels = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8)
    return Batch(pixels, torch.arange(6), torch.tensor([3, 3, 0, 0, 4, 4]), None, 0, 0)


def _standard(rows: Any) -> Any:
    return (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5)


def _cross_entropy(scores: Any, right: int) -> float:
    return float(np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[right])


def _linear(layer: Any, rows: Any) -> Any:
    return rows @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_all_three_objectives_match_the_formulas_written_out(
    prepared: Callable[..., tuple[HardnessAware, StandardizedNet]], dtype: torch.dtype | None
) -> None:
    method, network = prepared()
    method.hardness.fill_(60.0)
    method.generation.fill_(2e4)
    batch = _batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        network.eval()
        y = network.features(batch.pixels).double().numpy()
        network.train()
    network.backbone.eval()  # the same features again
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        outcome = method.step(network, batch)
    metric, generation, guess = (float(term.value.detach()) for term in outcome.terms)

    labels = batch.labels.tolist()
    z = _linear(network.head, _standard(y))
    # The first of a class is its anchor; classes in order of their numbers.
    anchors, positives, classes = [2, 0, 4], [3, 1, 5], [0, 3, 4]
    moved = _by_loops(z[anchors].tolist(), z[positives].tolist(), 60.0)
    first, _, _, last = method.generator
    hidden = _standard(np.maximum(_linear(first, np.vstack([z, moved.reshape(9, -1)])), 0))
    made = _linear(last, hidden)
    chosen = np.vstack([made[anchors], made[6:]])
    again = _linear(network.head, _standard(chosen))
    real = synthetic = kept_pulled = kept_anchors = 0.0
    for i in range(3):
        real += _cross_entropy(z[positives] @ z[anchors[i]], i) / 3
        synthetic += _cross_entropy(again[3 + 3 * i : 6 + 3 * i] @ again[i], i) / 3
        kept_anchors += _cross_entropy(_linear(method.classifier, chosen[i]), classes[i]) / 3
        for j in range(3):
            scores = _linear(method.classifier, made[6 + 3 * i + j])
            kept_pulled += _cross_entropy(scores, classes[j]) / 9

    def lengths(rows: Any) -> float:
        return float((rows**2).sum(1).mean())

    real += 0.25 * 3e-3 * (lengths(z[anchors]) + lengths(z[positives]))
    synthetic += 0.25 * 3e-3 * (lengths(again[:3]) + lengths(again[3:]))
    weight = math.exp(-1e4 / 2e4)
    assert metric == pytest.approx(weight * real + (1 - weight) * synthetic, rel=1e-4)
    recovered = ((made[:6] - y) ** 2).sum()
    assert generation == pytest.approx(
        0.5 * recovered + 0.5 * 1e4 * (kept_pulled + kept_anchors), rel=1e-4
    )
    guesses = _linear(method.classifier, y)
    wanted = sum(_cross_entropy(guesses[row], labels[row]) for row in range(6)) / 6
    assert guess == pytest.approx(wanted, rel=1e-4)
    assert outcome.loss.item() == metric
    assert method.stats["synthetic_loss"] == pytest.approx(synthetic, rel=1e-4)


def test_the_made_up_part_teaches_the_network_but_not_the_other_way_round(
    prepared: Callable[..., tuple[HardnessAware, StandardizedNet]],
) -> None:
    method, network = prepared()
    method.generation.fill_(1e-3)  # so good a generator that only the made-up part counts
    outcome = method.step(network, _batch())
    learners = []
    for term in outcome.terms:
        assert term.learners is not None
        given = list(term.learners)
        learners.append({id(part) for part in given})
        learning = [part for part in given if part.requires_grad]
        slopes = torch.autograd.grad(term.value, learning, retain_graph=True, allow_unused=True)
        assert any(slope is not None and slope.abs().sum() > 0 for slope in slopes)
    assert not learners[0] & learners[1]
    assert not (learners[0] | learners[1]) & learners[2]
    assert method.stats["synthetic_weight"] == 1


def test_running_numbers_are_means_of_a_window(
    prepared: Callable[..., tuple[HardnessAware, StandardizedNet]],
) -> None:
    method, network = prepared(window=3)
    seen, made = [], []
    for step in range(5):
        outcome = method.step(network, _batch())
        seen.append(float(outcome.loss.detach()))
        made.append(method.stats["generator_loss"])
        if step < 2:
            assert float(method.hardness) == float(method.generation) == 1e6
    # The metric loss itself: before the first window is over the made-up part has 1 %.
    assert float(method.hardness) == pytest.approx(np.mean(seen[:3]), rel=0.05)
    assert float(method.generation) == pytest.approx(np.mean(made[:3]), rel=1e-5)
    assert float(method.sums[2]) == 2


def test_batches_are_pairs(tiny: _Tiny, prepared: Any) -> None:
    method, _ = prepared()
    labels = np.arange(40) // 4
    recipe = tiny(loss="hdml", classes_per_batch=4, images_per_class=3)
    photos = PhotoSet(Path("/x"), (Path("0.jpg"),) * 40, tuple(map(str, labels)), ("train",) * 40)
    sampler = method.sampler(Setting(recipe, photos, labels, photos.classes()), None)
    for batch in sampler.batches(0):
        assert np.array_equal(np.unique(labels[batch], return_counts=True)[1], [2] * 6)


def test_made_up_features_leave_the_running_statistics_alone(prepared: Any) -> None:
    _, network = prepared()
    before = network.norm.running_mean.clone()
    network.embed_made_up(torch.randn(4, network.pooling.num_features))
    assert torch.equal(before, network.norm.running_mean)
    network.embed(torch.randn(4, network.pooling.num_features))
    assert not torch.equal(before, network.norm.running_mean)


def test_frozen_batch_norm_leaves_the_new_one_free(prepared: Any) -> None:
    _, network = prepared()
    freeze_batch_norm(network)
    norms = [one for one in network.modules() if isinstance(one, nn.BatchNorm2d | nn.BatchNorm1d)]
    assert [one for one in norms if one.training] == [network.norm]
