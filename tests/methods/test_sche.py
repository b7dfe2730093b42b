"""SCHE: the loss against loops, and what is mined against the rule written as loops."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from embedkit import losses, methods
from embedkit.data import PhotoSet
from embedkit.methods import Batch
from embedkit.methods.sche import FirstClassTripletLoss, mine
from embedkit.train import Recipe, make_plan
from embedkit.train.run import create_untrained


@pytest.mark.parametrize("labels", [[3, 3, 3, 1, 1, 2, 1], [5, 5, 5], [1, 2, 3], [4]])
def test_only_the_first_class_has_anchors(labels: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(len(labels), 4, generator=generator, dtype=torch.float64, requires_grad=True)
    x = raw / raw.norm(dim=1, keepdim=True)
    first = [row for row, label in enumerate(labels) if label == labels[0]]
    other = [row for row, label in enumerate(labels) if label != labels[0]]
    terms = [
        (x[a] - x[p]).norm() - (x[a] - x[n]).norm() + 0.2
        for a, p, n in itertools.product(first, first, other)
        if a != p
    ]
    active = [term for term in terms if term > 0]
    wanted = sum(active) / len(active) if active else raw.sum() * 0
    given = FirstClassTripletLoss(margin=0.2)(raw, torch.tensor(labels))
    assert given.item() == pytest.approx(wanted.item(), abs=1e-9)
    slopes = [torch.autograd.grad(value, raw)[0] for value in (wanted, given)]
    assert torch.allclose(*slopes, atol=1e-9)


@pytest.mark.parametrize("classes", [2, 5])
def test_negatives_are_among_the_hardest_of_the_hardest_classes(classes: int) -> None:
    rng = np.random.default_rng(0)

    def unit(count: int) -> np.ndarray:
        rows = rng.normal(size=(count, 4)).astype(np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    labels = rng.permutation(np.repeat(np.arange(40), 6))
    rows, signatures = unit(240), unit(40)
    breadths = set()
    for seed in range(12):
        rng_of_step = np.random.default_rng([seed])
        batch = mine(
            rows,
            labels,
            signatures,
            7,
            size=9,
            anchors=4,
            classes=classes,
            depth=2,
            rng=rng_of_step,
        )
        assert len(batch) == len(set(batch.tolist())) == 9
        anchors, negatives = batch[:4], batch[4:]
        assert all(labels[row] == 7 for row in anchors)

        def nearness(one: np.ndarray, anchors: np.ndarray = anchors) -> float:
            return max(float(np.dot(rows[a], one)) for a in anchors)

        ranked = sorted((c for c in range(40) if c != 7), key=lambda c: -nearness(signatures[c]))
        # Which breadth was drawn is not seen from outside; one of the three explains the batch.
        possible = []
        for breadth in (3, 4, 5):
            pool = ranked[: breadth * (classes - 1)]
            images = [row for row in range(240) if labels[row] in pool]
            hardest = sorted(images, key=lambda row: -nearness(rows[row]))[:10]
            if set(negatives.tolist()) <= set(hardest):
                possible.append(breadth)
        assert possible
        breadths.add(tuple(possible))
    assert len(breadths) > 1


def test_a_small_data_set_gives_what_it_has() -> None:
    rows = np.eye(5, dtype=np.float32)
    labels = np.array([0, 0, 0, 1, 1])
    rng = np.random.default_rng(0)
    batch = mine(rows, labels, rows[:2], 1, size=20, anchors=10, classes=5, depth=5, rng=rng)
    assert set(batch[:2].tolist()) == {3, 4}
    assert set(batch[2:].tolist()) == {0, 1, 2}


def test_signatures_learn_from_the_classifier_alone(
    photos: PhotoSet, tiny: Callable[..., Recipe]
) -> None:
    recipe = tiny(loss="sche", classes_per_batch=4)
    setting = make_plan(recipe, photos, device=torch.device("cpu")).setting()
    network = create_untrained(recipe, weights="none")
    method = methods.create("sche")
    method.prepare(setting, network)
    turns = [batch[0] for epoch in range(3) for batch in method.sampler(setting, 4).batches(epoch)]
    seen = [int(setting.labels[row]) for row in turns]
    for start in range(0, 12, 6):  # every class before any has its second turn
        assert sorted(seen[start : start + 6]) == list(range(6))
    pixels = torch.randint(0, 256, (8, 32, 32, 3), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 3, 4])
    outcome = method.step(network.eval(), Batch(pixels.byte(), labels, labels, None, 0, 0))
    alone = losses.create("softmax", num_classes=6, embedding_dim=8)
    alone.load_state_dict(method.signatures.state_dict())
    (slope,) = torch.autograd.grad(outcome.loss, method.signatures.proxies)
    (wanted,) = torch.autograd.grad(
        alone(outcome.embeddings.detach().float(), labels), alone.proxies
    )
    assert torch.allclose(slope, wanted, atol=1e-7)
