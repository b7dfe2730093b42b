"""DAMLRRM: trees against Kruskal's algorithm, the loss against loops, the streams by counting."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from embedkit import methods
from embedkit.data import PhotoSet
from embedkit.errors import DataError
from embedkit.methods import Setting
from embedkit.methods.damlrrm import TreeTripletLoss, spanning_tree
from embedkit.train import Recipe
from embedkit.train.run import create_untrained


def kruskal(rows: np.ndarray) -> float:
    """The least total distance that joins all rows."""
    leader = list(range(len(rows)))
    total = 0.0
    pairs = itertools.combinations(range(len(rows)), 2)
    apart = {(i, j): float(np.sqrt(((rows[i] - rows[j]) ** 2).sum())) for i, j in pairs}
    for (i, j), cost in sorted(apart.items(), key=lambda item: item[1]):
        a, b = leader[i], leader[j]
        if a != b:
            total += cost
            leader = [a if one == b else one for one in leader]
    return total


@pytest.mark.parametrize("count", [1, 2, 3, 9, 30])
@pytest.mark.parametrize("equal", [False, True])
def test_the_tree_is_connected_and_as_short_as_kruskals(count: int, equal: bool) -> None:
    rows = np.random.default_rng(count).normal(size=(count, 3)).astype(np.float32)
    if equal:
        rows[: count // 2 + 1] = rows[0]
    parent = spanning_tree(rows)
    assert parent[0] == -1
    for row in range(1, count):
        seen, one = set(), row
        while one != 0:
            assert one not in seen
            seen.add(one)
            one = int(parent[one])
    total = sum(float(np.linalg.norm(rows[i] - rows[parent[i]])) for i in range(1, count))
    assert total == pytest.approx(kruskal(rows), abs=1e-5)


@pytest.mark.parametrize("edges", [1, 3, 6])
def test_the_loss_is_the_sum_over_edges_and_other_classes(edges: int) -> None:
    generator = torch.Generator().manual_seed(edges)
    raw = torch.randn(12, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1, 0, 0, 2, 2, 0, 0, 1, 1])
    x = raw / raw.norm(dim=1, keepdim=True)
    terms = []
    for i, n in itertools.product(range(2 * edges), range(12)):
        p = i + 1 if i % 2 == 0 else i - 1
        if labels[n] != labels[i]:
            terms.append((x[i] - x[p]).norm() - (x[i] - x[n]).norm() + 0.3)
    active = [term for term in terms if term > 0]
    wanted = sum(active) / max(len(active), 1)
    (slope,) = torch.autograd.grad(wanted, raw)
    given = TreeTripletLoss(edges, margin=0.3)(raw, labels)
    assert given.item() == pytest.approx(wanted.item(), abs=1e-9)
    assert torch.allclose(torch.autograd.grad(given, raw)[0], slope, atol=1e-9)


def test_rows_that_no_edge_joins_move_nothing() -> None:
    raw = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    value = TreeTripletLoss(1, margin=5.0)(raw, torch.zeros(6, dtype=torch.int64))
    value.backward()
    assert value.item() == 0
    assert raw.grad is not None
    assert not raw.grad.any()


def _setting(tiny: Callable[..., Recipe], sizes: list[int], **changes: int) -> Setting:
    numbers = np.repeat(np.arange(len(sizes)), sizes)
    labels = tuple(f"{number:02}" for number in numbers)
    paths = tuple(Path(f"{row}.jpg") for row in range(len(labels)))
    photos = PhotoSet(Path("/x"), paths, labels, ("train",) * len(labels))
    return Setting(tiny(**changes), photos, numbers, photos.classes(), 4, 3)


def test_both_streams_go_round_and_every_round_meets_otherwise(tiny: Callable[..., Recipe]) -> None:
    setting = _setting(tiny, [5, 4, 2, 7], classes_per_batch=4, images_per_class=3)
    method = methods.create("damlrrm")
    method.prepare(setting, create_untrained(setting.recipe, weights="none"))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(18, 8, generator=generator)
    method.begin_epoch(0, type("View", (), {"embeddings": lambda self: rows})())
    sampler = method.sampler(setting, None)
    assert sampler.steps == 4  # 14 edges, 4 in a batch
    edges, singles, met = [], [], set()
    for batch in itertools.chain.from_iterable(sampler.batches(epoch) for epoch in range(20)):
        assert len(batch) == 12
        pairs = [tuple(pair) for pair in batch[:8].reshape(-1, 2).tolist()]
        assert all(setting.labels[a] == setting.labels[b] for a, b in pairs)
        edges += pairs
        singles += batch[8:].tolist()
        met |= set(itertools.product(pairs, batch[8:].tolist()))
    assert set(edges[:14]) == set(edges[14:28])
    assert len(set(edges)) == 14
    assert len(set(singles[:18])) == 18
    assert len(met) == 14 * 18


def test_classes_of_one_photo_have_no_edge(tiny: Callable[..., Recipe]) -> None:
    with pytest.raises(DataError, match="two photos"):
        methods.create("damlrrm").sampler(_setting(tiny, [1, 1, 1]), None)
