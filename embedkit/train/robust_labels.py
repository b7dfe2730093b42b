"""``--noise NAME``: a classifier beside the embedding, for labels some of which are wrong.

It exists in training only: cosines of the embedding with one vector per class, over a temperature,
judged by one of the losses of `embedkit.train.noise`, in addition to the loss of the pairs. What it
makes of the photos in the end tells whose labels to doubt. The losses are of papers on
classification; that they help retrieval of new classes is shown there for ``dm`` alone.

PENCIL has three stages, each of whole epochs: the classifier learns the labels; it and a
distribution per photo, at first nearly the label, move towards each other; the distributions stay,
and their likeliest class is the label from then on, for batches and pair loss as well. Two parts
are ours. How far a photo's distribution moves in a step does not depend on the sizes of batch and
data, as it does in the authors' code: a `reach` of 60 in all is what their settings for CIFAR-10
(30 to 60), CUB (61) and Clothing1M (67) come to. And the pair loss goes along from the beginning.

What ``pencil`` and ``proselflc`` do depends on how much of the training is over: early stopping
takes the end of it away.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from embedkit.errors import EmbedKitError, UnknownNameError, UsageError
from embedkit.losses._base import check_number, unit_rows
from embedkit.methods import Batch, Group, Setting
from embedkit.models import EmbeddingNet
from embedkit.train import noise

__all__ = ["NOISES", "RobustLabels", "noise_options"]

_COMMON: dict[str, float] = {"weight": 1.0, "temperature": 0.05}

# Defaults: 0.125 is the least the ProSelfLC paper tries, T = 8 IMAE's, 0.5 and 8 within DM's range;
# PENCIL's are those of its setting for CUB, the nearest to retrieval.
_OPTIONS: dict[str, dict[str, float]] = {
    "label-smoothing": {"epsilon": 0.125},
    "confidence-penalty": {"epsilon": 0.125},
    "boot-soft": {"epsilon": 0.125},
    "proselflc": {"sharpness": 16.0, "transit": 0.5},
    "imae": {"emphasis": 8.0},
    "dm": {"power": 0.5, "emphasis": 8.0},
    "disturblabel": {"rate": 0.1},
    "pencil": {
        "compatibility": 0.0,
        "certainty": 0.8,
        "reach": 60.0,
        "first": 0.2,
        "second": 0.4,
    },
}
_SHARES = ("epsilon", "transit", "rate", "first", "second")

_LOSSES: dict[str, Callable[..., Tensor]] = {
    "label-smoothing": noise.label_smoothing,
    "confidence-penalty": noise.confidence_penalty,
    "boot-soft": noise.boot_soft,
    "proselflc": noise.proselflc,
    "imae": noise.imae,
    "dm": noise.derivative_manipulation,
    "disturblabel": noise.disturb_label,
}

_CERTAIN = 10.0
_MOST_BYTES = 2 * 2**30

NOISES = tuple(_OPTIONS)
"""The names of ``--noise``."""


def noise_options(name: str, given: Mapping[str, Any] | None = None) -> dict[str, float]:
    """All options of a name, `given` in place of the defaults.

    Raises:
        UnknownNameError: No such name or option.
        UsageError: A value out of range.
    """
    if name not in _OPTIONS:
        raise UnknownNameError("way with noisy labels", name, NOISES)
    options = {**_OPTIONS[name], **_COMMON}
    for option, value in (given or {}).items():
        if option not in options:
            raise UnknownNameError(f"option of {name}", option, options)
        try:
            most = 1.0 if option in _SHARES else float("inf")
            above = 0.0 if option == "temperature" else float("-inf")
            options[option] = check_number(option, value, least=0, most=most, above=above)
        except ValueError as error:
            raise UsageError(f"--noise {name} cannot be made", facts=str(error)) from error
    return options


class RobustLabels(nn.Module):
    """The classifier, its loss, and for PENCIL the labels as they are believed to be.

    Args:
        name: One of `NOISES`.
        options: Those that differ from the defaults of `noise_options`.

    Attributes:
        proxies: ``(C, D)``, a vector per class.
        guesses: ``(N, C)``, for PENCIL: the photos' distributions before their softmax.
        believed: ``(N,)``, for PENCIL: the labels that count.
        stats: Of the last step.
    """

    proxies: nn.Parameter
    guesses: Tensor
    believed: Tensor

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.name, self.options = name, noise_options(name, options)
        self.stats: dict[str, float] = {}

    @property
    def corrects(self) -> bool:
        """Whether labels are changed."""
        return self.name == "pencil"

    def prepare(self, setting: Setting, network: EmbeddingNet) -> None:
        """Make vectors and distributions.

        Raises:
            UsageError: PENCIL with fewer epochs than stages, or more photos times classes than
                can be kept.
        """
        count, classes = len(setting.labels), len(setting.classes)
        self._epoch_steps = setting.epoch_steps
        self._steps = max(1, setting.epochs * setting.epoch_steps)
        self.proxies = nn.Parameter(torch.randn(classes, network.embedding_dim))
        if not self.corrects:
            return
        if setting.epochs < 3:
            raise UsageError(
                "--noise pencil has three stages of whole epochs",
                facts=f"this training has {setting.epochs} epochs of {setting.epoch_steps} steps",
                hint="more --epochs, or shorter ones: --epoch-steps",
            )
        if count * classes * 4 > _MOST_BYTES:
            raise UsageError(
                "--noise pencil keeps a number for every photo and class, here too many",
                facts=f"{count:,} photos x {classes:,} classes are "
                f"{count * classes * 4 / 2**30:.1f} GiB, at most 2 are kept",
                hint="--noise proselflc keeps nothing",
            )
        first, second = self.options["first"], self.options["second"]
        self.second_from = min(max(1, round(first * setting.epochs)), setting.epochs - 2)
        third = max(self.second_from + 1, round((first + second) * setting.epochs))
        self.third_from = min(third, setting.epochs - 1)
        shown = (self.third_from - self.second_from) * setting.epoch_steps
        views = max(1.0, shown * setting.recipe.batch_size / count)
        self._stride = self.options["reach"] / views
        labels = torch.from_numpy(setting.labels)
        self.register_buffer("believed", labels.clone())
        self.register_buffer("guesses", _CERTAIN * functional.one_hot(labels, classes).float())

    def groups(self, learning_rate: float) -> list[Group]:
        """The vectors learn as those of a loss do."""
        return [Group("noise", self.parameters(), learning_rate)]

    def begin_epoch(self, epoch: int) -> None:
        """At the beginning of PENCIL's third stage, believe the distributions.

        Raises:
            EmbedKitError: Two classes of two photos are no longer among them.
        """
        if not self.corrects or epoch != self.third_from:
            return
        believed = self.guesses.argmax(1)
        if int((believed.bincount() > 1).sum()) < 2:
            raise EmbedKitError(
                "PENCIL's corrected labels have all become one class",
                hint="hold on to the given ones: --noise-option compatibility=0.1",
            )
        self.believed.copy_(believed)

    def labels(self, batch: Batch) -> Tensor:
        """``(B,)``: those the pair loss should learn."""
        return self.believed[batch.rows] if self.corrects else batch.labels

    def forward(self, embeddings: Tensor, batch: Batch) -> Tensor:
        """The classifier's loss, times its weight.

        Args:
            embeddings: ``(B, D)`` raw.
            batch: Whose `labels` are those of the data.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            logits = self.logits(embeddings.float())
            value = self._judge(logits, batch)
            with torch.no_grad():
                sure = logits.softmax(1).gather(1, batch.labels[:, None]).mean()
                self.stats = {"noise_loss": float(value.detach()), "label_probability": float(sure)}
                if self.corrects:
                    guessed = self.guesses[batch.rows].argmax(1)
                    self.stats["relabelled"] = float((guessed != batch.labels).float().mean())
        return self.options["weight"] * value

    def logits(self, embeddings: Tensor) -> Tensor:
        """``(B, C)`` of raw embeddings."""
        return unit_rows(embeddings) @ unit_rows(self.proxies).T / self.options["temperature"]

    @torch.no_grad()
    def beliefs(self, embeddings: Tensor) -> Tensor:
        """``(N, C)`` probabilities of the training photos' classes, on the CPU.

        PENCIL's are its distributions, once they have begun to move.

        Args:
            embeddings: ``(N, D)`` raw, of all training photos.
        """
        if self.corrects and not bool((self.guesses.max(1).values == _CERTAIN).all()):
            return self.guesses.softmax(1).cpu()
        return self.logits(embeddings.to(self.proxies.device)).softmax(1).cpu()

    def _judge(self, logits: Tensor, batch: Batch) -> Tensor:
        if self.corrects:
            return self._judge_pencil(logits, batch)
        own = {name: self.options[name] for name in _OPTIONS[self.name]}
        if "progress" in inspect.signature(_LOSSES[self.name]).parameters:
            own["progress"] = (batch.epoch * self._epoch_steps + batch.step) / self._steps
        return _LOSSES[self.name](logits, batch.labels, **own)

    def _judge_pencil(self, logits: Tensor, batch: Batch) -> Tensor:
        if batch.epoch < self.second_from:
            return functional.cross_entropy(logits, batch.labels)
        guesses = self.guesses[batch.rows]
        if batch.epoch >= self.third_from:
            return noise.pencil(logits, guesses, batch.labels, compatibility=0, certainty=0)
        own = {name: self.options[name] for name in ("compatibility", "certainty")}
        value = noise.pencil(logits, guesses, batch.labels, **own)
        with torch.enable_grad():
            free = guesses.clone().requires_grad_()
            moving = noise.pencil(logits.detach(), free, batch.labels, **own)
            (slopes,) = torch.autograd.grad(moving, free)
        # Of the mean over B, and C times less than it looks: undone, a photo's step is its own.
        stride = self._stride * logits.shape[0] * logits.shape[1]
        self.guesses.index_add_(0, batch.rows, -stride * slopes)
        return value
