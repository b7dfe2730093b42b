"""PVSE: loss and network by their formulas, and a small training through to an answered search."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from embedkit import methods
from embedkit.data import PhotoSet
from embedkit.errors import UsageError
from embedkit.evaluate import retrieval_metrics, split_rows
from embedkit.export import HeldOut, export_checked
from embedkit.export.gate import _nearest_in
from embedkit.index import Catalog, sync_folder
from embedkit.methods import Batch
from embedkit.methods.pvse import SeveralVectors, diversity_of, greatest_cosines
from embedkit.models import create_backbone, create_pooling
from embedkit.models.polysemous import PolysemousNet
from embedkit.runtime import Embedder, ModelContract
from embedkit.train import Recipe, Run
from embedkit.train.distributed import World
from embedkit.train.large_batch import divided
from embedkit.train.run import create_untrained
from tests.methods.conftest import TrainStopped


def loop_reference(
    rows: Tensor, labels: list[int], several: int, margin: float, how: str
) -> Tensor:
    """The ranking hinge, one pair, one negative and one pair of vectors after the other."""
    unit = [[part / part.norm().clamp(min=1e-12) for part in row.chunk(several)] for row in rows]

    def score(i: int, j: int) -> Tensor:
        return torch.stack([a @ b for a in unit[i] for b in unit[j]]).amax()

    places = range(len(labels))
    total, pairs = rows.sum() * 0, 0
    for a in places:
        for p in places:
            if a == p or labels[a] != labels[p]:
                continue
            pairs += a < p
            negatives = [score(a, n) for n in places if labels[n] != labels[a]]
            if how == "hardest" and negatives:
                total = total + (margin + torch.stack(negatives).amax() - score(a, p)).clamp(min=0)
            elif negatives:
                terms = [(margin + one - score(a, p)).clamp(min=0) for one in negatives]
                total = total + torch.stack(terms).sum() / len(labels)
    return total / max(pairs, 1)


@pytest.mark.parametrize("how", ["sum", "hardest"])
@pytest.mark.parametrize("several", [1, 2, 3])
@pytest.mark.parametrize(
    "labels",
    [
        [0, 0, 1, 1, 2, 2, 2, 3],
        [4, 4],  # no negatives
        [0, 1, 2],  # no positives
        [7, 7, 8],
    ],
)
def test_value_and_gradient_are_those_of_the_loops(
    how: str, several: int, labels: list[int]
) -> None:
    torch.manual_seed(0)
    rows = torch.randn(len(labels), 4 * several, dtype=torch.float64, requires_grad=True)
    loss = methods.create("pvse", vectors=several, margin=0.3, mining=how).loss
    value = loss(rows, torch.tensor(labels))
    (given,) = torch.autograd.grad(value, rows)
    wanted = loop_reference(rows, labels, several, 0.3, how)
    (slope,) = torch.autograd.grad(wanted, rows)
    assert value.item() == pytest.approx(wanted.item(), abs=1e-12)
    assert torch.allclose(given, slope, atol=1e-12)


@pytest.mark.parametrize("how", ["sum", "hardest"])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_odd_batches_give_finite_numbers(how: str, scale: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = torch.randn(6, 8)
    rows[1], rows[4], rows[2, 4:] = rows[0], rows[0], 0  # copies within and across; no direction
    rows = (rows * scale).to(dtype).requires_grad_()
    loss = methods.create("pvse", mining=how).loss
    value = loss(rows, torch.tensor([0, 0, 1, 1, 2, 2]))
    value.backward()
    assert rows.grad is not None
    assert value.isfinite()
    assert rows.grad.isfinite().all()
    assert loss(rows[:0], torch.zeros(0, dtype=torch.long)) == 0


def test_in_a_batch_of_pairs_the_divisors_are_the_papers() -> None:
    # B pairs of one class each: B^2 for the sum over both directions of the same side, B for the
    # hardest; here the B of the columns are all pictures.
    vectors = torch.nn.functional.normalize(torch.randn(6, 2, 3, dtype=torch.float64), dim=2)
    scores = torch.einsum("ikd,jld->ijkl", vectors, vectors).amax((2, 3))
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    positive = scores[torch.arange(6), torch.tensor([1, 0, 3, 2, 5, 4])]
    hinge = (0.1 + scores - positive[:, None]).clamp(min=0) * (labels[:, None] != labels)
    total = methods.create("pvse", mining="sum").loss(vectors.flatten(1), labels)
    hardest = methods.create("pvse", mining="hardest").loss(vectors.flatten(1), labels)
    assert total.item() == pytest.approx(hinge.sum().item() / (3 * 6))
    assert hardest.item() == pytest.approx(hinge.amax(1).sum().item() / 3)


def test_diversity_is_the_norm_of_the_cosines_between_residuals() -> None:
    torch.manual_seed(0)
    residuals = torch.rand(5, 3, 4, dtype=torch.float64, requires_grad=True)
    norms = []
    for several in residuals:
        squares = [
            torch.nn.functional.cosine_similarity(several[k], several[j], dim=0) ** 2
            for k in range(3)
            for j in range(3)
            if k != j
        ]
        norms.append(torch.stack(squares).sum().sqrt() / 9)
    wanted, given = torch.stack(norms).mean(), diversity_of(residuals)
    assert given.item() == pytest.approx(wanted.item(), abs=1e-12)
    slopes = [torch.autograd.grad(one, residuals)[0] for one in (given, wanted)]
    assert torch.allclose(*slopes, atol=1e-12)
    alike = torch.ones(2, 3, 4)
    assert diversity_of(alike).item() == pytest.approx(6**0.5 / 9)
    assert diversity_of(torch.rand(2, 1, 4)).item() == 0
    apart = torch.eye(3)[None].requires_grad_()
    diversity_of(apart).backward()  # type: ignore[no-untyped-call]
    assert apart.grad is not None
    assert not apart.grad.any()


def test_the_least_used_vector_is_told() -> None:
    used = torch.tensor([[[1.0, 0], [0, 1]], [[1, 0], [0, 1]], [[1, 0], [0, 1]]])
    dead = torch.tensor([[[1.0, 0], [0, 1]], [[1, 0], [0, -1]], [[1, 0], [-0.6, -0.8]]])
    assert greatest_cosines(used)[0].tolist() == [[1, 1, 1]] * 3
    assert greatest_cosines(dead)[1].item() == 0
    uneven = torch.tensor([[[1.0, 0], [0, 1]], [[-1, 0], [0, 1]], [[1, 0], [0, -1]]])
    assert greatest_cosines(uneven)[1].item() == pytest.approx(2 / 6)


@pytest.mark.parametrize(("backbone", "pooling"), [("resnet10", "avg"), ("squeezenet1_1", "gem")])
def test_the_network_is_its_formula_one_picture_and_one_vector_at_a_time(
    backbone: str, pooling: str
) -> None:
    torch.manual_seed(0)
    body = create_backbone(backbone, weights="none", image_size=(64, 96))
    net = PolysemousNet(
        body,
        create_pooling(pooling, body.num_features),
        15,
        vectors=3,
        mean=[0.4] * 3,
        std=[0.2] * 3,
    ).eval()
    pixels = torch.randint(0, 256, (2, 64, 96, 3), dtype=torch.uint8)
    with torch.no_grad():
        given, both = net(pixels), net.vectors_and_residuals(pixels)
        maps = net.backbone(pixels.permute(0, 3, 1, 2).float() * net.scale + net.shift)
        shared = net.head(net.pooling(maps))
        first, second = (net.attention[at].weight for at in (0, 2))
        for picture, (row, g) in enumerate(zip(maps, shared, strict=True)):
            places = [row[:, i, j] for i in range(row.shape[1]) for j in range(row.shape[2])]
            for k in range(3):
                power = torch.stack([second[k] @ torch.tanh(first @ place) for place in places])
                share = power.exp() / power.exp().sum()
                seen = torch.stack([s * p for s, p in zip(share, places, strict=True)]).sum(0)
                residual = 1 / (1 + torch.exp(-net.residual(seen)))
                mixed = g + residual
                vector = (mixed - mixed.mean()) / (mixed.var(unbiased=False) + 1e-5).sqrt()
                part = slice(5 * k, 5 * k + 5)
                assert torch.allclose(given[picture, part], vector / vector.norm(), atol=1e-5)
                assert torch.allclose(both[picture, 15:][part], residual, atol=1e-5)
    assert torch.equal(both[:, :15], given)
    assert (net.embedding_dim, net.vectors) == (15, 3)


@pytest.mark.parametrize(("dim", "several", "fits"), [(8, 3, 9), (4, 2, 6), (2, 5, 15)])
def test_a_width_that_cannot_be_cut_is_refused_with_one_that_can(
    dim: int, several: int, fits: int
) -> None:
    body = create_backbone("resnet10", weights="none", image_size=(32, 32))
    pool = create_pooling("avg", body.num_features)
    with pytest.raises(UsageError, match=f"{dim} numbers cannot be cut into {several}") as caught:
        PolysemousNet(body, pool, dim, vectors=several, mean=[0.5] * 3, std=[0.2] * 3)
    assert caught.value.hint == f"--dim {fits}"


@pytest.mark.parametrize(
    "options",
    [{"vectors": 0}, {"vectors": 2.0}, {"margin": -1}, {"mining": "all"}, {"diversity": -0.1}],
)
def test_impossible_options_are_refused(options: dict[str, float | str]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        methods.create("pvse", **options)


def test_a_step_in_chunks_is_the_step(tiny: Callable[..., Recipe]) -> None:
    torch.manual_seed(0)
    recipe = tiny(loss="pvse", image_size=32)
    network = create_untrained(recipe, weights="none").eval()
    method = methods.create("pvse", diversity=0.5)
    rows = torch.arange(6)
    pixels = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8)
    batch = Batch(pixels, rows, rows // 2, None, 0, 0)
    slopes = []
    for chunk in (None, 4):
        network.zero_grad()
        outcome = method.step(divided(network, batch, chunk=chunk, world=World.told()), batch)
        outcome.loss.backward()  # type: ignore[no-untyped-call]
        slopes.append([one.grad.clone() for one in network.parameters() if one.grad is not None])
    assert len(slopes[0]) == len(slopes[1]) > 0
    for one, other in zip(*slopes, strict=True):
        assert torch.allclose(one, other, atol=1e-5 * float(one.abs().max()) + 1e-9)
    assert isinstance(method, SeveralVectors)
    assert {"diversity", "least_used", "spread", "active_triplets"} <= set(method.stats)
    plain = method.loss(outcome.embeddings.detach(), batch.labels)
    assert outcome.loss.item() == pytest.approx(
        plain.item() + 0.5 * method.stats["diversity"], rel=1e-5
    )


@pytest.fixture(scope="module")
def held_out() -> HeldOut:
    """Made by hand: the gate's own arithmetic needs neither network nor file."""
    vectors = np.random.default_rng(0).standard_normal((30, 2, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True) * 2**0.5
    return HeldOut(
        pixels=np.zeros((30, 2, 2, 3), np.uint8),
        vectors=vectors.reshape(30, 8),
        labels=tuple("abc"[at % 3] for at in range(30)),
        skipped=(),
        metric="cosine",
        parts=2,
    )


def test_the_gate_finds_neighbours_as_a_search_does(held_out: HeldOut) -> None:
    parts = held_out.vectors.reshape(30, 2, 4)
    near = np.einsum("ikd,jld->ijkl", parts, parts).max(axis=(2, 3))
    np.fill_diagonal(near, -9)
    order = np.argsort(-near, axis=1, kind="stable")[:, :10]
    assert np.array_equal(held_out.neighbours, order)
    turned = parts[:, ::-1].reshape(30, 8)  # the same vectors the other way round
    assert np.array_equal(_nearest_in(held_out, turned, 10), order)


def test_from_training_to_an_answered_search(
    photos: PhotoSet, tiny: Callable[..., Recipe], train_stopped: TrainStopped, tmp_path: Path
) -> None:
    # Without BatchNorm, so that a network from scratch tells pictures apart at once.
    recipe = tiny(
        loss="pvse",
        dim=12,
        loss_options={"vectors": 3},
        backbone="squeezenet1_1",
        freeze=0,
        epochs=1,
        image_size=64,
    )
    run = Run.load(train_stopped(recipe, photos, tmp_path / "run", []))
    assert run.record["loss_options"]["vectors"] == 3
    contract, files = run.contract(), run.val_photos().files()
    assert (contract.vectors, contract.embedding_dim, contract.metric) == (3, 12, "cosine")
    assert ModelContract.loads(contract.dumps()) == contract
    assert dataclasses.replace(contract, vectors=1).fingerprint != contract.fingerprint
    model = tmp_path / "model.onnx"
    _, report = export_checked(run.network(), contract, model, files, run.val_photos().labels)
    assert report.passed
    folder = photos.root
    with Embedder.load(model, device="cpu") as embedder:
        vectors = split_rows(embedder.embed(files), 3)
        sync_folder(folder, tmp_path / "c.faiss", embedder, model=model)
        catalog = Catalog.open(tmp_path / "c.faiss")
        found = catalog.search(embedder.embed(photos.files()), 2)
    assert np.allclose(np.linalg.norm(vectors, axis=2), 3**-0.5, atol=1e-5)
    # The training's own validation, and that of the search, are the figures of the greatest cosine.
    said = retrieval_metrics(vectors, run.val_photos().labels)
    assert run.metrics() is not None
    assert run.metrics()["map@r"] == pytest.approx(said.map_at_r, abs=1e-6)  # type: ignore[index]
    stored = catalog.vectors(np.arange(len(catalog))).reshape(-1, 3, 4)
    near = 3 * np.einsum("ikd,jld->ijkl", stored, stored).max(axis=(2, 3))
    for file, hits in zip(photos.files(), found, strict=True):
        own = next(at for at in range(len(catalog)) if catalog.hit(at).path == file)
        best = np.argsort(-near[own], kind="stable")[:2]
        assert [hit.score for hit in hits] == pytest.approx(near[own][best].tolist(), abs=1e-4)


def test_a_teacher_is_refused_before_the_first_step(
    photos: PhotoSet, tiny: Callable[..., Recipe], tmp_path: Path
) -> None:
    from embedkit.train import Teacher, train

    teacher = Teacher(
        lambda pixels: np.ones((len(pixels), 4), np.float32), 4, 32, 32, fingerprint="t"
    )
    with pytest.raises(UsageError, match="a teacher teaches one vector per picture"):
        train(
            tiny(loss="pvse", teacher="t.onnx"), photos, tmp_path / "run", device="cpu",
            teacher=teacher,
        )  # fmt: skip
