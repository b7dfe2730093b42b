"""DE-DSP: a small network learns which classes to put into a batch beside a given one.

Paper: Duan, Chen, Lu, Zhou, "Deep Embedding Learning with Discriminative Sampling Policy", CVPR
2019. A reconstruction: of the paper we have the abstract alone. Its idea is a deep sampler that is
trained together with the embedding and knows enough of the relations between samples to choose
without sending all candidates through the network, under several objectives. Which policy, scores,
reward and estimator it has is not known to us; all of these are ours, and so is that whole classes
are chosen.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from embedkit import losses
from embedkit.data import HardClassSampler
from embedkit.losses._base import check_choice, check_number, check_whole, unit_rows
from embedkit.losses._pairs import pair_distances
from embedkit.methods._base import Batch, Method, Outcome, Sampler, Setting, Term, View
from embedkit.models import EmbeddingNet

__all__ = ["SamplingPolicy", "rewards"]

_HIDDEN = 32


class SamplingPolicy(Method):
    """PK batches of a class in turn, as many classes that the policy drew for it, and any others.

    The policy is a distribution over the candidates of a class: the softmax of a two-layer
    network's score of both signatures, ``s_q * s_c`` and ``|s_q - s_c|``. Signatures are the
    classes' mean embeddings at the beginning of the epoch, and that is when companions are drawn.
    The policy learns at every step by REINFORCE: what a companion is worth is the mean
    ``[d_ap - d_an + margin]+`` of its photos as negatives, less the mean of that over the batch's
    other classes, which nobody chose.

    Args:
        objective: What the embedding learns by, as the losses of these names are: ``"triplet"``,
            or ``"npair"``, by which the paper reports; its dot products of raw embeddings are in
            the thousands with some pretrained backbones, and then need smaller learning rates.
        margin: Of the reward, and of the triplets, at least 0.
        candidates: Classes that a class's companions are drawn from, at least 1; more classes than
            that, and they are a random part every epoch.
        entropy: Weight of the policy's entropy, which keeps it from settling early, at least 0.

    Cost: a pass over the training photos and O(C candidates D) per epoch.
    """

    certainty = "reconstruction"

    signatures: Tensor
    companions: Tensor

    def __init__(
        self,
        *,
        objective: Literal["npair", "triplet"] = "triplet",
        margin: float = 0.2,
        candidates: int = 100,
        entropy: float = 0.01,
    ) -> None:
        super().__init__()
        self.margin = check_number("margin", margin, least=0)
        self.candidates = check_whole("candidates", candidates, least=1)
        self.entropy = check_number("entropy", entropy, least=0)
        name: str = check_choice("objective", objective, ["npair", "triplet"])
        options: dict[str, Any] = {"margin": self.margin} if name == "triplet" else {}
        self.loss = losses.create(name, **options)
        self._told: dict[str, float] = {}

    @property
    def stats(self) -> dict[str, float]:
        return {**self.loss.stats, **self._told}

    def prepare(self, setting: Setting, network: EmbeddingNet) -> None:
        self._seed = setting.recipe.seed
        count, width = len(setting.classes), network.embedding_dim
        self._members = [np.flatnonzero(setting.labels == number) for number in range(count)]
        self.score = nn.Sequential(
            nn.Linear(2 * width, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, 1), nn.Flatten(0)
        )
        self.register_buffer("signatures", torch.zeros(count, width))
        drawn = min(setting.recipe.classes_per_batch // 2, self.candidates, count - 1)
        self.register_buffer("companions", torch.zeros(count, drawn, dtype=torch.int64))

    def sampler(self, setting: Setting, steps: int | None) -> Sampler:
        recipe = setting.recipe
        return HardClassSampler(
            setting.labels,
            near=lambda: self.companions.cpu().numpy(),
            classes_per_batch=recipe.classes_per_batch,
            images_per_class=recipe.images_per_class,
            seed=recipe.seed,
            steps=steps,
        )

    @torch.no_grad()
    def begin_epoch(self, epoch: int, view: View) -> None:
        rows = unit_rows(view.embeddings())
        means = torch.stack([rows[members].mean(0) for members in self._members])
        self.signatures.copy_(unit_rows(means))
        for number in range(len(self.companions)):
            candidates = self._candidates(number, epoch)
            # The greatest of scores with Gumbel noise are draws without repeats.
            noise = -torch.empty(len(candidates)).exponential_().log()
            order = (self._log_chances(number, candidates).cpu() + noise).argsort(descending=True)
            drawn = candidates[order[: self.companions.shape[1]].numpy()]
            self.companions[number] = torch.from_numpy(drawn).to(self.companions.device)

    def step(self, network: EmbeddingNet, batch: Batch) -> Outcome:
        embeddings = network(batch.pixels)
        value = self.loss(embeddings.float(), batch.labels)
        policy = self._policy_loss(embeddings.detach().float(), batch)
        return Outcome(value, embeddings, (Term(value), Term(policy)))

    def _policy_loss(self, embeddings: Tensor, batch: Batch) -> Tensor:
        number = int(batch.labels[0])
        others, worth = rewards(unit_rows(embeddings), batch.labels, margin=self.margin)
        chosen = torch.isin(others, self.companions[number])
        unchosen = ~chosen if bool((~chosen).any()) else torch.ones_like(chosen)
        gain = worth[chosen] - worth[unchosen].mean()
        candidates = self._candidates(number, batch.epoch)
        with torch.autocast(embeddings.device.type, enabled=False):
            log_chances = self._log_chances(number, candidates)
        place = torch.from_numpy(np.searchsorted(candidates, others[chosen].cpu().numpy()))
        taken = log_chances[place.to(log_chances.device)]
        spread = -(log_chances.exp() * log_chances).sum()
        self._told = {"policy_gain": float(gain.mean()), "policy_entropy": float(spread.detach())}
        return -(gain * taken).mean() - self.entropy * spread

    def _candidates(self, number: int, epoch: int) -> npt.NDArray[np.int64]:
        """Classes other than this one, ascending; the same whenever asked."""
        others = np.delete(np.arange(len(self.signatures)), number)
        rng = np.random.default_rng([self._seed, epoch, number])
        return np.sort(rng.permutation(others)[: self.candidates])

    def _log_chances(self, number: int, candidates: npt.NDArray[np.int64]) -> Tensor:
        """``(M,)`` log-probabilities of one draw among the candidates."""
        theirs = self.signatures[torch.from_numpy(candidates).to(self.signatures.device)]
        own = self.signatures[number].expand_as(theirs)
        scores: Tensor = self.score(torch.cat([own * theirs, (own - theirs).abs()], dim=1))
        return scores.log_softmax(0)


@torch.no_grad()
def rewards(rows: Tensor, labels: Tensor, *, margin: float) -> tuple[Tensor, Tensor]:
    """The classes of a batch but the first row's, and how hard each is for that one.

    Returns:
        ``(M,)`` classes, ascending, and ``(M,)`` means of ``[d_ap - d_an + margin]+`` over anchors
        and positives of the first row's class and negatives of each. Cost: O(K^2 B), K the rows of
        the first class.
    """
    first = labels == labels[0]
    distances = pair_distances(rows)[first]
    near = distances[:, first]
    pairs = ~torch.eye(len(near), dtype=torch.bool, device=rows.device)
    terms = (near[pairs][:, None] - distances.repeat_interleave(pairs.sum(1), 0) + margin).clamp(
        min=0
    )
    others, place = torch.unique(labels[~first], return_inverse=True)
    sums = rows.new_zeros(len(others)).index_add_(0, place, terms[:, ~first].mean(0))
    return others, sums / place.bincount(minlength=len(others))
