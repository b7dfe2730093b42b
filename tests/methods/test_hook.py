"""What a method may do, done by one that does all of it: the trainer calls it as it promises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from embedkit import losses, methods
from embedkit.data import PhotoSet
from embedkit.errors import EmbedKitError, UnknownNameError, UsageError
from embedkit.methods import Batch, Group, Method, Outcome, Setting, Term, View
from embedkit.models import EmbeddingNet
from embedkit.train import Recipe, train
from tests.methods.conftest import TrainStopped

CALLS: list[tuple[Any, ...]] = []


class HalvedNet(EmbeddingNet):
    """Sees its embedding doubled, so that a wrong network would be noticed."""

    def forward(self, pixels: Tensor) -> Tensor:
        return 2 * super().forward(pixels)


class Everything(Method):
    """An own network, own parameters and state, batches that depend on it, and two losses."""

    centre: Tensor

    def __init__(self, *, weight: float = 0.5, chunks: int = 2) -> None:
        super().__init__()
        if weight < 0:
            raise ValueError(f"weight must be 0 or more, got {weight}")
        self.weight, self.chunks = weight, chunks
        self.loss = losses.create("multi-similarity")

    def create_network(self, recipe: Recipe, *, weights: str) -> EmbeddingNet:
        net = super().create_network(recipe, weights=weights)
        std, zeros = [1 / 255] * 3, [0.0] * 3
        return HalvedNet(net.backbone, net.pooling, recipe.dim, mean=zeros, std=std)

    def prepare(self, setting: Setting, network: EmbeddingNet) -> None:
        CALLS.append(("prepare", setting.epochs, setting.epoch_steps, len(setting.photos)))
        self.side = nn.Linear(network.pooling.num_features, 3)
        self.register_buffer("centre", torch.zeros(network.embedding_dim))
        self.register_buffer("order", torch.arange(len(setting.labels)))

    def sampler(self, setting: Setting, steps: int | None) -> Any:
        method = self

        class Ordered:
            def __init__(self) -> None:
                self.steps = steps or 7

            def batches(self, epoch: int) -> list[Any]:
                CALLS.append(("batches", epoch))
                order = method.order.cpu().numpy()
                return [np.roll(order, 6 * step)[:6] for step in range(self.steps)]

        return Ordered()

    def groups(self, network: EmbeddingNet, recipe: Recipe) -> list[Group]:
        first, second, _ = super().groups(network, recipe)
        return [first, second, Group("side", self.side.parameters(), 0.1, weight_decay=0.0)]

    def begin_epoch(self, epoch: int, view: View) -> None:
        CALLS.append(("begin", epoch))
        embeddings = view.embeddings()
        some = view.through(lambda pixels: pixels.float().mean((1, 2, 3)), [2, 0])
        assert embeddings.shape == (len(self.order), len(self.centre))
        assert view.features([1]).shape[0] == 1
        assert some.shape == (2,)
        # A random part, which must be the same again in a resumed run.
        noise = torch.rand(len(embeddings))
        self.centre.copy_(embeddings.mean(0))
        self.order.copy_((embeddings.norm(dim=1) + noise).argsort())

    def step(self, network: EmbeddingNet, batch: Batch) -> Outcome:
        CALLS.append(("step", batch.epoch, batch.step, batch.rows.tolist()))
        features = network.features(batch.pixels)
        embeddings = 2 * network.head(features)
        main = self.loss(embeddings.float(), batch.labels)
        guess = nn.functional.cross_entropy(self.side(features), batch.labels % 3)
        pull = (embeddings - self.centre).square().mean()

        def terms() -> Iterator[Term]:
            yield Term(main + 0.1 * pull, network.parameters())
            yield Term(self.weight * guess, self.side.parameters())

        return Outcome(main, embeddings, terms())


class FakeRegistry:
    def names(self) -> list[str]:
        return ["everything"]

    def get(self, name: str) -> type[Method]:
        return Everything


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_METHODS", FakeRegistry())
    CALLS.clear()


def test_it_is_called_in_the_promised_order(
    photos: PhotoSet, tmp_path: Path, tiny: Callable[..., Recipe]
) -> None:
    run = train(tiny(loss="everything"), photos, tmp_path / "run", device="cpu")
    assert CALLS[0] == ("prepare", 3, 2, 30)
    assert [call[:3] for call in CALLS[1:]] == [
        *(("begin", 0), ("batches", 0), ("step", 0, 0), ("step", 0, 1)),
        *(("begin", 1), ("batches", 1), ("step", 1, 0), ("step", 1, 1)),
        *(("begin", 2), ("batches", 2), ("step", 2, 0), ("step", 2, 1)),
    ]
    assert run.record["loss_options"] == {"weight": 0.5, "chunks": 2}
    assert isinstance(run.network(), HalvedNet)
    assert run.contract().normalizes is True


def test_the_sampler_says_how_long_an_epoch_is(photos: PhotoSet, tmp_path: Path) -> None:
    from embedkit.train import make_plan

    recipe = Recipe(loss="everything", weights="none", backbone="resnet10", epochs=2)
    plan = make_plan(recipe, photos, device=torch.device("cpu"))
    assert plan.epoch_steps == 20  # at least, where the sampler says 7


@pytest.mark.parametrize("stops", [[1], [2], [3], [4, 1], [5]])
def test_its_state_survives_a_stop_anywhere(
    photos: PhotoSet,
    tmp_path: Path,
    tiny: Callable[..., Recipe],
    train_stopped: TrainStopped,
    contents: Callable[[Path], dict[str, Any]],
    stops: list[int],
) -> None:
    recipe = tiny(loss="everything")
    straight = train_stopped(recipe, photos, tmp_path / "straight", [])
    again = train_stopped(recipe, photos, tmp_path / "again", stops)
    assert contents(straight) == contents(again)
    held = contents(again)["tensors"]
    assert {"method/centre", "method/order", "method/side.weight"} <= held.keys()
    assert "optimizer/exp_avg/method/side.weight" in held


def test_a_stop_while_it_looks_at_the_photos_changes_nothing(
    photos: PhotoSet,
    tmp_path: Path,
    tiny: Callable[..., Recipe],
    train_stopped: TrainStopped,
    contents: Callable[[Path], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import signal

    from embedkit.errors import Interrupted

    recipe = tiny(loss="everything")
    straight = train_stopped(recipe, photos, tmp_path / "straight", [])
    genuine = Everything.begin_epoch

    def struck(self: Everything, epoch: int, view: View) -> None:
        if epoch == 1:
            signal.raise_signal(signal.SIGINT)
        genuine(self, epoch, view)

    with monkeypatch.context() as patch:
        patch.setattr(Everything, "begin_epoch", struck)
        with pytest.raises(Interrupted):
            train(recipe, photos, tmp_path / "again", device="cpu")
    train(recipe, photos, tmp_path / "again", device="cpu", resume=True)
    assert contents(straight) == contents(tmp_path / "again")


def test_each_term_teaches_its_learners_alone() -> None:
    """The step by hand: gradients of both losses, one optimiser step on disjoint parameters."""
    from embedkit.train import trainer

    shared, side = nn.Linear(3, 2), nn.Linear(2, 1)
    x = torch.arange(6.0).view(2, 3)

    def values() -> tuple[Tensor, Tensor]:
        hidden = shared(x)
        return hidden.square().mean(), side(hidden).square().mean()

    first, second = values()
    expected = [*torch.autograd.grad(first, shared.parameters(), retain_graph=True)]
    expected += torch.autograd.grad(second, side.parameters())
    first, second = values()
    training = trainer._Training.__new__(trainer._Training)
    training.scaler = torch.amp.GradScaler("cuda", enabled=False)
    training.plan = type("Plan", (), {"amp": None, "device": torch.device("cpu")})()
    terms = (Term(term, part.parameters()) for term, part in ((first, shared), (second, side)))
    training._backward(Outcome(first, x, terms))
    given = [part.grad for part in (*shared.parameters(), *side.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True) if a is not None)
    assert all(part is not None for part in given)


def test_numbers_that_are_not_finite_are_found_in_its_embeddings_too(
    photos: PhotoSet, tmp_path: Path, tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(self: Everything, network: EmbeddingNet, batch: Batch) -> Outcome:
        embeddings = network(batch.pixels)
        return Outcome(embeddings.sum() * 0, embeddings * torch.nan)

    monkeypatch.setattr(Everything, "step", step)
    with pytest.raises(EmbedKitError, match="no longer finite"):
        train(tiny(loss="everything"), photos, tmp_path / "run", device="cpu")


def test_names_and_options_are_resolved_together_with_the_losses() -> None:
    assert {"everything", "rll", "softmax"} <= set(methods.names())
    assert methods.options("everything") == {"weight": 0.5, "chunks": 2}
    assert methods.options("rll") == losses.options("rll")
    assert methods.is_method("everything")
    assert not methods.is_method("rll")
    with pytest.raises(UnknownNameError, match="did you mean 'everything'"):
        methods.create("everythin")
    with pytest.raises(UnknownNameError, match="did you mean 'weight'"):
        methods.create("everything", weigth=1)
    with pytest.raises(UsageError, match="weight must be 0 or more"):
        methods.create("everything", weight=-1)


@pytest.mark.parametrize("name", [name for name in losses.names() if losses.special_batch(name)])
def test_a_loss_that_batches_by_class_would_deceive_is_refused_without_its_method(
    photos: PhotoSet, tmp_path: Path, tiny: Callable[..., Recipe], name: str
) -> None:
    with pytest.raises(UsageError, match=losses.special_batch(name)):
        train(tiny(loss=name), photos, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
