"""Cross-batch memory: every loss that takes one against loops, and the queue against a list."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from embedkit import losses
from embedkit.errors import UsageError
from embedkit.losses import CrossBatchMemory

Ranked = list[tuple[list[Tensor], list[Tensor]]]
"""Per anchor its distances to positives and to negatives."""


def zero(terms: list[Tensor]) -> Tensor:
    return sum(terms) if terms else torch.zeros((), dtype=torch.float64)


def over_active(terms: list[Tensor]) -> Tensor:
    active = [term for term in terms if term > 0]
    return zero(active) / max(len(active), 1)


def contrastive(ranked: Ranked) -> Tensor:
    pull = [d for near, _ in ranked for d in near]
    return over_active(pull) + over_active([1 - d for _, far in ranked for d in far])


def triplet(ranked: Ranked) -> Tensor:
    return over_active([p - n + 0.2 for near, far in ranked for p in near for n in far])


def margin(ranked: Ranked) -> Tensor:
    terms = [p - 1.2 + 0.2 for near, far in ranked for p in near for _ in far]
    terms += [1.2 - n + 0.2 for near, far in ranked for _ in near for n in far]
    return over_active(terms)


def multi_similarity(ranked: Ranked) -> Tensor:
    terms = []
    for near, far in ranked:
        same, other = ([1 - d**2 / 2 for d in side] for side in (near, far))
        kept = [s for s in same if other and s - 0.1 < max(other)]
        pushed = [s for s in other if same and s + 0.1 > min(same)]
        terms.append((1 + zero([(-2 * (s - 0.5)).exp() for s in kept])).log() / 2)
        terms.append((1 + zero([(50 * (s - 0.5)).exp() for s in pushed])).log() / 50)
    return zero(terms) / len(ranked)


def binomial_deviance(ranked: Ranked) -> Tensor:
    pull = [(1 + (-2 * (0.5 - d**2 / 2)).exp()).log() for near, _ in ranked for d in near]
    push = [(1 + (70 * (0.5 - d**2 / 2)).exp()).log() for _, far in ranked for d in far]
    return zero(pull) / max(len(pull), 1) + zero(push) / max(len(push), 1)


def ranked_list(ranked: Ranked, *, alpha: float = 1.2, gap: float = 0.4) -> Tensor:
    terms = []
    for near, far in ranked:
        pull = [d - (alpha - gap) for d in near if d > alpha - gap]
        push = [d for d in far if d < alpha]
        weights = [(10 * (alpha - d)).exp().detach() for d in push]
        terms.append(zero(pull) / max(len(pull), 1))
        if push:
            pairs = zip(weights, push, strict=True)
            terms.append(zero([w * (alpha - d) for w, d in pairs]) / sum(weights))
    return zero(terms) / len(ranked)


def simpler(ranked: Ranked) -> Tensor:
    return ranked_list(ranked, alpha=1.2, gap=0.4) / 2


def multibatch(ranked: Ranked) -> Tensor:
    terms = [(1 - (1 - d**2)).clamp(min=0) for near, _ in ranked for d in near]
    terms += [(1 + (1 - d**2)).clamp(min=0) for _, far in ranked for d in far]
    return zero(terms) / len(terms)


def fastap(ranked: Ranked) -> Tensor:
    terms = []
    for near, far in ranked:
        if not near:
            continue
        knots = [4 * place / 10 for place in range(11)]
        held: list[list[Tensor]] = [
            [zero([(1 - (d**2 - k).abs() / 0.4).clamp(min=0) for d in side]) for k in knots]
            for side in (near, far)
        ]
        total = torch.zeros((), dtype=torch.float64)
        for place in range(11):
            positives = zero(held[0][: place + 1])
            every = positives + zero(held[1][: place + 1])
            if every > 0:
                total = total + held[0][place] * positives / every
        terms.append(total / len(near))
    return 1 - zero(terms) / len(terms)


LOOPS: dict[str, tuple[Callable[[Ranked], Tensor], dict[str, str]]] = {
    "binomial-deviance": (binomial_deviance, {}),
    "contrastive": (contrastive, {}),
    "fastap": (fastap, {}),
    "margin": (margin, {"mining": "all"}),
    "multi-similarity": (multi_similarity, {}),
    "multibatch": (multibatch, {}),
    "rll": (ranked_list, {}),
    "rll-simpler": (simpler, {}),
    "triplet": (triplet, {}),
}


def test_the_losses_that_take_a_memory_are_those_with_a_reference() -> None:
    assert [name for name in losses.names() if losses.takes_memory(name)] == sorted(LOOPS)


@pytest.mark.parametrize("name", sorted(LOOPS))
@pytest.mark.parametrize("held", [0, 1, 8])
def test_a_batch_against_a_memory_is_the_loss_written_as_loops(name: str, held: int) -> None:
    generator = torch.Generator().manual_seed(held)
    raw = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1, 2, 9])
    earlier = 3 * torch.randn(held, 4, generator=generator, dtype=torch.float64)
    earlier_labels = torch.randint(0, 3, (held,), generator=generator)
    x, others = (rows / rows.norm(dim=1, keepdim=True) for rows in (raw, earlier))
    columns = [*x.detach(), *others]
    their_labels = [*labels.tolist(), *earlier_labels.tolist()]
    ranked: Ranked = []
    for i, label in enumerate(labels.tolist()):
        pairs = [
            ((x[i] - columns[j]).norm(), their_labels[j] == label)
            for j in range(len(columns))
            if j != i
        ]
        ranked.append(([d for d, same in pairs if same], [d for d, same in pairs if not same]))
    reference, options = LOOPS[name]
    wanted = reference(ranked)
    (slope,) = torch.autograd.grad(wanted, raw)
    given = losses.create(name, **options)(raw, labels, (earlier, earlier_labels))
    assert given.item() == pytest.approx(wanted.item(), abs=1e-9)
    assert torch.allclose(torch.autograd.grad(given, raw)[0], slope, atol=1e-9)


@pytest.mark.parametrize("size", [1, 5, 7, 40])
def test_the_queue_holds_the_newest_and_is_used_beside_the_batch(size: int) -> None:
    loss = losses.create("multi-similarity")
    memory = CrossBatchMemory(losses.create("multi-similarity"), size=size, embedding_dim=3)
    generator = torch.Generator().manual_seed(0)
    newest: list[tuple[list[float], int]] = []
    for count in (4, 6, 0, 9, 3):
        rows = torch.randn(count, 3, generator=generator).requires_grad_()
        labels = torch.randint(0, 3, (count,), generator=generator)
        held = torch.tensor([row for row, _ in newest]).reshape(-1, 3)
        held_labels = torch.tensor([label for _, label in newest], dtype=torch.int64)
        wanted = loss(rows, labels) + loss(rows, labels, (held, held_labels))
        assert memory(rows, labels).item() == pytest.approx(wanted.item(), abs=1e-6)
        newest += zip(rows.tolist(), labels.tolist(), strict=True)
        newest = newest[-size:]
        there = min(int(memory.count), size)
        kept = zip(memory.rows[:there].tolist(), memory.labels[:there].tolist(), strict=True)
        assert sorted(kept) == sorted(newest)
    assert math.isfinite(memory.stats["memory_loss"])
    assert "spread" in memory.stats


def test_a_loss_that_compares_no_pairs_with_others_is_refused() -> None:
    for name in ("npair", "lifted", "snr"):
        with pytest.raises(UsageError, match="earlier batches"):
            CrossBatchMemory(losses.create(name), size=4, embedding_dim=3)
        with pytest.raises(UsageError, match="earlier batches"):
            losses.create(name)(torch.randn(2, 3), torch.zeros(2).long(), (torch.zeros(1, 3),) * 2)
