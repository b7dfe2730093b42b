"""Signal-to-noise losses against variances and sums, written as loops."""

from __future__ import annotations

import cmath
from typing import Any

import pytest
import torch

from embedkit.errors import UsageError
from embedkit.losses import create

OBJECTIVES = ["contrastive", "triplet", "lifted"]
SETTINGS: list[dict[str, Any]] = [
    *({"objective": o, "reduction": r} for o in OBJECTIVES for r in ("mean", "nonzero", "sum")),
    {"objective": "lifted", "beta": 0.3, "margin": 2.0},
    {"objective": "npair"},
    {"objective": "contrastive", "zero_mean": 0.05, "margin": 3.0},
]


def variance(row: Any) -> complex:
    mean = sum(row, 0j) / len(row)
    return sum(((value - mean) ** 2 for value in row), 0j) / len(row)


def signal_to_noise(loops: Any, rows: Any, labels: list[int], **options: Any) -> complex:
    settings = {"beta": 1.0, "zero_mean": 0.0, "reduction": "mean", **options}
    margins = {"contrastive": 1.0, "triplet": 0.2, "lifted": 1.0, "npair": 0.0}
    margin, beta = settings.get("margin", margins[settings["objective"]]), settings["beta"]
    powers = [variance(row) for row in rows]
    least = 1e-6 * sum(power.real for power in powers) / len(powers)

    def d(i: int, j: int) -> complex:
        noise = variance([p - q for p, q in zip(rows[j], rows[i], strict=True)])
        return noise / (powers[i] if powers[i].real > least else least)

    def reduce(terms: list[complex]) -> complex:
        if settings["reduction"] == "sum":
            return sum(terms, 0j)
        if settings["reduction"] == "nonzero":
            terms = [term for term in terms if term.real > 0]
        return loops.mean(terms)

    everyone = range(len(rows))
    positives = [(i, j) for i in everyone for j in loops.positives(labels, i)]
    match settings["objective"]:
        case "contrastive":
            pushed = [(i, j) for i in everyone for j in loops.negatives(labels, i)]
            value = reduce([d(i, j) for i, j in positives])
            value += reduce([loops.positive(margin - d(i, j)) for i, j in pushed])
        case "triplet":
            value = reduce(
                [
                    loops.positive(d(i, p) - d(i, n) + margin)
                    for i, p in positives
                    for n in loops.negatives(labels, i)
                ]
            )
        case "lifted":
            terms = []
            for i, j in positives:
                reaches = []
                for end in (i, j):
                    found = [margin - beta * d(end, k) for k in loops.negatives(labels, end)]
                    if found:
                        top = max(value.real for value in found)
                        reaches.append(loops.mean([v for v in found if v.real > top - 1e-11]))
                if reaches:
                    top = max(reach.real for reach in reaches)
                    reach = loops.mean([v for v in reaches if v.real > top - 1e-11])
                    terms.append(loops.positive(reach + beta * d(i, j)))
                else:
                    terms.append(0j)
            value = reduce(terms) / 2
        case _:
            seen: dict[int, list[int]] = {}
            for i in everyone:
                seen.setdefault(labels[i], []).append(i)
            pairs = [(of[0], of[1]) for of in seen.values() if len(of) > 1]

            def score(i: int, j: int) -> complex:
                return d(i, j) ** -2 if d(i, j).real > 0.1 else 100 + 0j

            terms = []
            for a, p in pairs:
                gaps = [score(a, q) - score(a, p) for b, q in pairs if b != a]
                terms.append(cmath.log(1 + sum(cmath.exp(gap) for gap in gaps)))
            value = loops.mean(terms)
    sums = [sum(row, 0j) for row in rows]
    lengths = [loops.positive(total) + loops.positive(-total) for total in sums]
    return value + settings["zero_mean"] * loops.mean(lengths)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_matches_the_paper_written_as_loops(
    options: dict[str, Any], batch: Any, agrees: Any, loops: Any, request: Any
) -> None:
    agrees(
        create("snr", **options),
        lambda moving, still, labels: signal_to_noise(loops, moving, labels, **options),
        batch,
    )


def test_contrastive_equals_pytorch_metric_learnings_without_its_normalisation() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    torch.manual_seed(0)
    x, labels = torch.randn(24, 16, dtype=torch.float64), torch.arange(24) // 4
    raw = distances.SNRDistance(normalize_embeddings=False)
    theirs = losses.SignalToNoiseRatioContrastiveLoss(neg_margin=2.5, distance=raw)(x, labels)
    ours = create("snr", margin=2.5, reduction="nonzero")(x, labels)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)


def test_a_common_scale_of_all_rows_changes_nothing() -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(12, 8, dtype=torch.float64), torch.arange(12) // 3
    for objective in [*OBJECTIVES, "npair"]:
        loss = create("snr", objective=objective)
        assert loss(1000 * x, labels).item() == pytest.approx(loss(x, labels).item())


@pytest.mark.parametrize(
    "options",
    [{"objective": "pairs"}, {"margin": -1}, {"beta": 0}, {"zero_mean": -1}, {"reduction": "max"}],
    ids=str,
)
def test_impossible_options_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"{next(iter(options))} must be"):
        create("snr", **options)
