"""Product quantisation against the formula written as loops, and what its parts must do."""

from __future__ import annotations

import cmath
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from embedkit.errors import UsageError
from embedkit.losses import create
from embedkit.losses.spq import ProductQuantizationLoss


def make(**options: Any) -> ProductQuantizationLoss:
    torch.manual_seed(0)
    given = {"subspaces": 2, "words": 3, "centre": 0.3, "even": 0.7, "sharp": 0.2, **options}
    loss = create("spq", num_classes=3, embedding_dim=4, **given)
    assert isinstance(loss, ProductQuantizationLoss)
    with torch.no_grad():
        loss.bias.copy_(torch.tensor([0.1, -0.2, 0.3]))
    return loss


def softmax(scores: list[complex]) -> list[complex]:
    top = max(score.real for score in scores)
    powers = [cmath.exp(score - top) for score in scores]
    return [power / sum(powers) for power in powers]


def formula(loss: ProductQuantizationLoss, loops: Any) -> Callable[..., complex]:
    words, centres, bias = (x.tolist() for x in (loss.quantizer.words, loss.centres, loss.bias))
    size = len(words[0][0])

    def shares(row: Any) -> list[list[complex]]:
        found = []
        for m, book in enumerate(words):
            part = row[m * size : (m + 1) * size]
            if loss.assign == "logits":
                book_of = loss.quantizer
                layer, shift = book_of.layer[m].tolist(), book_of.layer_bias[m].tolist()
                scores = [loops.dot(part, a) + b for a, b in zip(layer, shift, strict=True)]
            else:
                scores = [-loops.squared(part, word) / loss.temperature for word in book]
            found.append(softmax(scores))
        return found

    def read(weights: list[list[complex]]) -> list[complex]:
        return [
            sum((p * word[d] for p, word in zip(row, book, strict=True)), 0j)
            for row, book in zip(weights, words, strict=True)
            for d in range(size)
        ]

    def value(moved: Any, held: Any, labels: list[int], proxies: Any) -> complex:
        total = 0j
        all_shares = [shares(row) for row in moved]
        for share, still, label in zip(all_shares, map(shares, held), labels, strict=True):
            # The choice stands still, of equals the first; its slope is that of the shares.
            chosen = []
            for part, before in zip(share, still, strict=True):
                sizes = [p.real for p in before]
                first = sizes.index(max(sizes))
                chosen.append([float(k == first) + part[k] - before[k] for k in range(len(part))])
            for vector in (read(share), read(chosen)):
                logits = [loops.dot(vector, w) + b for w, b in zip(proxies, bias, strict=True)]
                total -= cmath.log(softmax(logits)[label])
                total += loss.centre / 2 * loops.squared(vector, centres[label])
            total -= loss.sharp * sum(p * p for part in share for p in part)
        mean = total / len(labels)
        for m, book in enumerate(words):
            for k in range(len(book)):
                mean += loss.even * loops.mean([share[m][k] for share in all_shares]) ** 2
        return mean

    return value


@pytest.mark.parametrize("assign", ["logits", "distance"])
def test_matches_the_formula_written_as_loops(
    agrees: Any, loops: Any, batch: Any, assign: str
) -> None:
    loss = make(assign=assign, temperature=0.8).double()
    agrees(loss, formula(loss, loops), batch)


@pytest.mark.parametrize("name", ["quantizer.words", "centres", "bias"])
def test_codebooks_centres_and_bias_have_the_slope_of_the_value(name: str) -> None:
    loss = make().double()
    x, labels = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) // 2
    loss(x, labels).backward()
    part = loss.get_parameter(name)
    slope, step = torch.zeros_like(part), 1e-6
    with torch.no_grad():
        for place in range(part.numel()):
            sides = []
            for sign in (1, -1):
                part.view(-1)[place] += sign * step
                sides.append(loss(x, labels))
                part.view(-1)[place] -= sign * step
            slope.view(-1)[place] = (sides[0] - sides[1]) / (2 * step)
    assert part.grad is not None
    torch.testing.assert_close(part.grad, slope, atol=1e-7, rtol=1e-6)


def test_the_hard_path_alone_teaches_the_layer_that_chooses() -> None:
    loss = make(centre=0, even=0, sharp=0)
    x = torch.randn(6, 4, requires_grad=True)
    loss(x, torch.arange(6) // 2).backward()
    for slope in (x.grad, *(part.grad for part in loss.quantizer.parameters())):
        assert slope is not None
        assert slope.any()


def test_codes_are_the_nearest_words_only_by_distance() -> None:
    x = torch.randn(200, 4)

    def nearest(loss: ProductQuantizationLoss) -> Tensor:
        parts = x.reshape(200, 2, 1, 2)
        return (parts - loss.quantizer.words.detach()[None]).square().sum(3).argmin(2)

    by_distance, by_logits = make(assign="distance"), make()
    assert torch.equal(by_distance.codes(x), nearest(by_distance))
    assert not torch.equal(by_logits.codes(x), nearest(by_logits))
    assert by_logits.codes(x).shape == (200, 2)


def test_training_makes_choices_sharp_keeps_words_in_use_and_tells_classes_apart() -> None:
    loss = make(words=4, centre=0.1, even=0.1, sharp=0.1)
    torch.manual_seed(1)
    labels = torch.arange(60) % 3
    x = torch.eye(3, 4)[labels] + 0.1 * torch.randn(60, 4)
    first = loss(x, labels).item()
    before = loss.stats
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss(x, labels).backward()
        optimizer.step()
    assert loss(x, labels).item() < first / 2
    assert loss.stats["sharpness"] > before["sharpness"]
    assert loss.stats["soft_to_hard"] < before["soft_to_hard"]
    assert loss.stats["words_in_use"] > 1.5
    codes = loss.codes(x)
    same = (codes[:, None] == codes[None]).all(2)
    assert (same == (labels[:, None] == labels[None])).float().mean() > 0.9


def test_a_width_that_cannot_be_cut_is_named() -> None:
    with pytest.raises(UsageError, match="subspaces must divide the width of the embedding, 9"):
        create("spq", num_classes=3, embedding_dim=9)
    for wrong in ({"words": 1}, {"subspaces": 0}, {"assign": "nearest"}, {"temperature": 0}):
        with pytest.raises(UsageError, match="spq cannot be made"):
            create("spq", num_classes=3, embedding_dim=16, **wrong)
