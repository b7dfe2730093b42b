"""HDML: negatives are pulled towards their anchor, as hard as the network can already bear.

Paper: Zheng, Chen, Lu, Zhou, "Hardness-Aware Deep Metric Learning", CVPR 2019, arXiv:1903.05503, on
the N-pair loss. The authors' code was read; unlike there and as in the paper, the average that sets
the hardness is of the metric loss itself, not of what is left of it after weighting. Ours are: all
three parts learn with AdamW under one warm-up and cosine, and the statistics of made-up features
stay out of the exported BatchNorm. The paper's triplet form is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from embedkit import losses
from embedkit.data import PKSampler
from embedkit.losses._base import check_number, check_whole
from embedkit.losses._pairs import first_two
from embedkit.methods._base import Batch, Group, Method, Outcome, Sampler, Setting, Term
from embedkit.models import EmbeddingNet
from embedkit.models.standardized import StandardizedNet

if TYPE_CHECKING:
    from embedkit.train.recipe import Recipe

__all__ = ["HardnessAware", "pull_towards"]

_HIDDEN = 512
# Both running numbers begin here: no pull, and next to no weight on what is made up.
_BEFORE_ANY_MEAN = 1e6


class HardnessAware(Method):
    """Batches of ``batch / 2`` classes x 2 images: an anchor and a positive of each.

    With y the pooled features, z = head(BatchNorm(y)) the embedding, not normalised:

    1. Of every anchor, each other positive is a negative, and is pulled (`pull_towards`).
    2. A generator turns pulled and original z into features; head(BatchNorm()) of those are the
       made-up embeddings, for which the N-pair loss is computed again: anchor i against its own
       pulled negatives.
    3. The network learns ``w J_m + (1 - w) J_syn`` with ``w = exp(-beta / J_gen)``; the generator
       learns ``J_gen``, to give back the original features and to keep the class of pulled ones; a
       classifier learns the classes of real features.

    J_gen and the mean of J_m, which sets how far negatives are pulled, are means over `window`
    steps; before the first are over nothing is pulled, and J_syn has 1 %: a training that is not
    much longer is one with N-pair, and wants a shorter window. The generator's rate is
    --proxy-learning-rate, the classifier's a tenth of it, as in the authors' code.

    Args:
        pull: How soon negatives are pulled, as J_m falls.
        beta: How good the generator must be for J_syn to count.
        balance: Share of the class part in J_gen, 0 to 1.
        class_factor: Of the class part.
        l2: Weight of the squared lengths, a quarter of their means as in the authors' code; 0.003
            for Cars, 0.015 for CUB.
        window: Steps.

    Cost: with m classes in a batch, m² rows of features go through generator and head.
    """

    certainty = "code read"

    hardness: Tensor
    generation: Tensor
    sums: Tensor

    def __init__(
        self,
        *,
        pull: float = 90.0,
        beta: float = 1e4,
        balance: float = 0.5,
        class_factor: float = 1e4,
        l2: float = 3e-3,
        window: int = 64,
    ) -> None:
        super().__init__()
        self.pull = check_number("pull", pull, least=0)
        self.beta = check_number("beta", beta, least=0)
        self.balance = check_number("balance", balance, least=0, most=1)
        self.class_factor = check_number("class_factor", class_factor, least=0)
        self.l2 = check_number("l2", l2, least=0)
        self.window = check_whole("window", window, least=1)
        # N-pair's own weight is of the mean over all rows, which is half the sum of two means.
        self.loss = losses.create("npair", l2=self.l2 / 2)
        self._told: dict[str, float] = {}

    def network_class(self, recipe: Recipe) -> Callable[..., EmbeddingNet]:
        return StandardizedNet

    def sampler(self, setting: Setting, steps: int | None) -> Sampler:
        return PKSampler(
            setting.labels,
            classes_per_batch=setting.recipe.batch_size // 2,
            images_per_class=2,
            seed=setting.recipe.seed,
            steps=steps,
        )

    def prepare(self, setting: Setting, network: EmbeddingNet) -> None:
        features = network.pooling.num_features
        # Always in training mode, so statistics would be kept for nothing.
        norm = nn.BatchNorm1d(_HIDDEN, track_running_stats=False)
        self.generator = nn.Sequential(
            nn.Linear(network.embedding_dim, _HIDDEN), nn.ReLU(), norm, nn.Linear(_HIDDEN, features)
        )
        self.classifier = nn.Linear(features, len(setting.classes))
        for name in ("hardness", "generation"):
            self.register_buffer(name, torch.tensor(_BEFORE_ANY_MEAN))
        # Of J_m, of J_gen, and of how many steps.
        self.register_buffer("sums", torch.zeros(3, dtype=torch.float64))

    def groups(self, network: EmbeddingNet, recipe: Recipe) -> list[Group]:
        backbone, head, _ = super().groups(network, recipe)
        rate = recipe.proxy_learning_rate
        return [
            backbone,
            head,
            Group("generator", self.generator.parameters(), rate),
            Group("classifier", self.classifier.parameters(), rate / 10),
        ]

    def step(self, network: EmbeddingNet, batch: Batch) -> Outcome:
        assert isinstance(network, StandardizedNet)
        features = network.features(batch.pixels)
        with torch.autocast(features.device.type, enabled=False):
            return self._judge(network, features.float(), batch.labels)

    def _judge(self, network: StandardizedNet, features: Tensor, labels: Tensor) -> Outcome:
        embeddings = network.embed(features)
        first, second = first_two(labels)
        anchors, classes = embeddings[first], labels[first]
        count = len(first)
        pulled = pull_towards(anchors, embeddings[second], self._reach()).flatten(0, 1)
        made = self.generator(torch.cat([embeddings, pulled]))
        made_anchors, made_pulled = made[: len(features)][first], made[len(features) :]
        again = network.embed_made_up(torch.cat([made_anchors, made_pulled]))
        synthetic = _n_pair(again[:count], again[count:].view(count, count, -1), self.l2)
        real = self.loss(embeddings, labels)
        weight = math.exp(-self.beta / max(float(self.generation), 1e-30))
        metric = weight * real + (1 - weight) * synthetic
        kept = functional.cross_entropy(self.classifier(made_pulled), classes.repeat(count))
        kept = kept + functional.cross_entropy(self.classifier(made_anchors), classes)
        recovered = (made[: len(features)] - features).square().sum()
        generation = (1 - self.balance) * recovered + self.balance * self.class_factor * kept
        guess = functional.cross_entropy(self.classifier(features.detach()), labels)
        self._count(real.detach(), generation.detach())
        self._told = {
            **self.loss.stats,
            "synthetic_loss": float(synthetic.detach()),
            "synthetic_weight": 1 - weight,
            "generator_loss": float(generation.detach()),
        }
        terms = (
            Term(metric, network.parameters()),
            Term(generation, self.generator.parameters()),
            Term(guess, self.classifier.parameters()),
        )
        return Outcome(metric, embeddings, terms)

    @property
    def stats(self) -> dict[str, float]:
        return self._told

    def _reach(self) -> float:
        """What is left of a negative's distance beyond the positive's: 1 nothing is pulled."""
        return math.exp(-self.pull / max(float(self.hardness), 1e-30))

    def _count(self, real: Tensor, generation: Tensor) -> None:
        """Add a step to the window, and begin a new one when it is full."""
        self.sums += torch.stack([real, generation, torch.ones_like(real)]).double()
        if float(self.sums[2]) >= self.window:
            self.hardness.copy_(self.sums[0] / self.sums[2])
            self.generation.copy_(self.sums[1] / self.sums[2])
            self.sums.zero_()


def pull_towards(anchors: Tensor, positives: Tensor, reach: float) -> Tensor:
    """``(m, m, D)``: of anchor i, the positive j of class j, pulled towards i.

    A negative n at the distance d_an, farther than the own positive (d_ap), moves along its line to
    ``d_ap + (d_an - d_ap) reach``; a nearer one, and the own positive, stay.

    Args:
        anchors: ``(m, D)``.
        positives: ``(m, D)``, of the same classes.
        reach: 0 (as near as the positive) to 1 (stays).
    """
    way = positives[None] - anchors[:, None]
    square = way.square().sum(2)
    # The root of 0 has no slope.
    apart = torch.where(square > 0, square, 1).sqrt() * (square > 0)
    own = apart.diagonal()[:, None]
    beyond = apart > own
    moved = (own + (apart - own) * reach) / torch.where(beyond, apart, 1)
    return anchors[:, None] + torch.where(beyond, moved, 1)[:, :, None] * way


def _n_pair(anchors: Tensor, rows: Tensor, l2: float) -> Tensor:
    """Cross-entropy of anchors ``(m, D)`` with their own rows ``(m, m, D)``, the i-th being right;
    and a quarter of `l2` of the mean squared lengths of both."""
    scores = (rows @ anchors[:, :, None]).squeeze(2)
    right = torch.arange(len(anchors), device=anchors.device)
    lengths = anchors.square().sum(1).mean() + rows.square().sum(2).mean()
    return functional.cross_entropy(scores, right) + l2 / 4 * lengths
