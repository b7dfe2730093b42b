"""DE-DSP: rewards against loops, a policy that learns what pays, and batches that follow it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from embedkit import methods
from embedkit.data import PhotoSet
from embedkit.methods import Batch, Method, Setting
from embedkit.methods.de_dsp import rewards
from embedkit.models import EmbeddingNet
from embedkit.train import Recipe, make_plan
from embedkit.train.run import create_untrained


@pytest.mark.parametrize("labels", [[4, 4, 4, 1, 1, 9], [0, 0, 7], [2, 2, 2, 2, 0, 1, 0, 1]])
def test_a_reward_is_the_mean_hinge_over_triplets(labels: list[int]) -> None:
    rows = torch.randn(len(labels), 3, generator=torch.Generator().manual_seed(0)).double()
    first = [row for row, label in enumerate(labels) if label == labels[0]]
    classes, worth = rewards(rows, torch.tensor(labels), margin=0.3)
    assert classes.tolist() == sorted({*labels} - {labels[0]})
    for number, given in zip(classes.tolist(), worth.tolist(), strict=True):
        negatives = [row for row, label in enumerate(labels) if label == number]
        terms = [
            max(0.0, float((rows[a] - rows[p]).norm() - (rows[a] - rows[n]).norm()) + 0.3)
            for a, p, n in itertools.product(first, first, negatives)
            if a != p
        ]
        assert given == pytest.approx(sum(terms) / len(terms), abs=1e-9)


class View:
    """Fixed embeddings."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def embeddings(self) -> torch.Tensor:
        return self.rows


@pytest.fixture
def ready(
    photos: PhotoSet, tiny: Callable[..., Recipe]
) -> Callable[..., tuple[Method, Setting, EmbeddingNet]]:
    def make(**options: float) -> tuple[Method, Setting, EmbeddingNet]:
        torch.manual_seed(0)
        recipe = tiny(loss="de-dsp", classes_per_batch=4)
        setting = make_plan(recipe, photos, device=torch.device("cpu")).setting()
        network = create_untrained(recipe, weights="none").eval()
        method = methods.create("de-dsp", **options)
        method.prepare(setting, network)
        return method, setting, network

    return make


def test_batches_hold_the_companions_of_the_class_in_turn(
    ready: Callable[..., tuple[Method, Setting, EmbeddingNet]],
) -> None:
    method, setting, _ = ready()
    rows = torch.randn(30, 8, generator=torch.Generator().manual_seed(1))
    method.begin_epoch(0, View(rows))
    sampler = method.sampler(setting, None)
    turns = set()
    for batch in sampler.batches(0):
        seen = list(dict.fromkeys(setting.labels[batch].tolist()))
        assert len(seen) == 4
        assert seen[1:3] == method.companions[seen[0]].tolist()
        turns |= {seen[0], seen[3]}
    assert turns == set(range(6))
    for number, drawn in enumerate(method.companions.tolist()):
        assert len({number, *drawn}) == 3


def test_the_policy_comes_to_choose_what_is_hard_and_the_network_is_left_to_the_objective(
    ready: Callable[..., tuple[Method, Setting, EmbeddingNet]],
) -> None:
    method, setting, network = ready(entropy=0.0)
    # Classes 0 and 1 are the same to the embedding, all others far away.
    means = torch.eye(8)[:6].clone()
    means[1] = means[0] + 0.1 * torch.eye(8)[7]
    rows = means[torch.from_numpy(setting.labels)] + 0.01 * torch.randn(30, 8)
    method.begin_epoch(0, View(rows))
    candidates = method._candidates(0, 0)
    optimizer = torch.optim.Adam(method.score.parameters(), 1e-2)
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5])
    before = method._log_chances(0, candidates).detach().exp()
    for _ in range(60):
        drawn = method._log_chances(0, candidates).detach().exp().multinomial(2)
        method.companions[0] = torch.from_numpy(candidates)[drawn]
        batch = Batch(torch.zeros(12), labels, labels, None, 0, 0)
        optimizer.zero_grad()
        method._policy_loss(means[labels] + 0.01 * torch.randn(12, 8), batch).backward()
        optimizer.step()
    after = method._log_chances(0, candidates).detach().exp()
    assert candidates[0] == 1
    assert float(before[0]) < 0.5 < 0.8 < float(after[0])
    pixels = torch.randint(0, 256, (12, 32, 32, 3)).byte()
    _, policy = method.step(network, Batch(pixels, labels, labels, None, 0, 0)).terms
    policy.value.backward()
    assert all(part.grad is None for part in network.parameters())


def test_candidates_are_a_new_part_every_epoch_and_the_same_when_asked_again(
    ready: Callable[..., tuple[Method, Setting, EmbeddingNet]],
) -> None:
    method, _, _ = ready(candidates=3)
    parts = [tuple(method._candidates(2, epoch)) for epoch in range(8)]
    assert parts == [tuple(method._candidates(2, epoch)) for epoch in range(8)]
    assert len(set(parts)) > 1
    assert all(len(part) == 3 and 2 not in part for part in parts)
