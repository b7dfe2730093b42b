"""Losses of a classifier that is taught by labels some of which are wrong.

Write p for the softmax of an image's logits, q for 1 at its label and 0 elsewhere, H for entropies,
C for the number of classes. All means are over the batch.

- ``label-smoothing``: H(target, p), target (1-e) q + e/C. Szegedy et al., CVPR 2016.
- ``confidence-penalty``: (1-e) H(q, p) - e H(p). Pereyra et al., 2017, arXiv:1701.06548.
- ``boot-soft``: H(target, p), target (1-e) q + e p. Reed et al., 2014, arXiv:1412.6596.
- ``proselflc``: the same with e = g(t) (1 - H(p) / log C), where g rises from 0 to 1 with the time
  t of the training: trust in the network grows with its age and its certainty. Wang et al., CVPR
  2021.
- ``imae``, ``dm``: no loss but its gradient, which is that of the cross entropy scaled to length 1
  times a weight, exp(T p_l (1-p_l)) or exp(b p_l^a (1-p_l)), p_l the probability of the label.
  Weights are divided by their sum over the batch. What is shown is the mean of 2 (1-p_l). Wang et
  al., arXiv:1903.12141 and arXiv:1905.11233.
- ``disturblabel``: H(q', p), q' at a class drawn from all in a share of the images, anew each time.
  On the mean this is label smoothing. For clean labels. Xie et al., CVPR 2016, arXiv:1605.00055.
- ``pencil``: y, a learned distribution per image: KL(p || y) / C + a H(q, y) + b H(p) / C. Yi, Wu,
  CVPR 2019, arXiv:1903.07788; stages are in `embedkit.train.robust_labels`.

Logits ``(B, C)``, labels ``(B,)`` int64, B at least 1 -> a scalar. Cost: O(B C).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "boot_soft",
    "confidence_penalty",
    "derivative_manipulation",
    "disturb_label",
    "imae",
    "label_smoothing",
    "pencil",
    "proselflc",
]


def label_smoothing(logits: Tensor, labels: Tensor, *, epsilon: float) -> Tensor:
    """Cross entropy to the label, a share `epsilon` of it spread over all classes."""
    log_p = functional.log_softmax(logits, 1)
    given = functional.nll_loss(log_p, labels)
    return (1 - epsilon) * given - epsilon * log_p.mean(1).mean()


def confidence_penalty(logits: Tensor, labels: Tensor, *, epsilon: float) -> Tensor:
    """Cross entropy to the label, less a share of the entropy."""
    log_p = functional.log_softmax(logits, 1)
    given = functional.nll_loss(log_p, labels)
    return (1 - epsilon) * given - epsilon * _entropies(log_p).mean()


def boot_soft(logits: Tensor, labels: Tensor, *, epsilon: float) -> Tensor:
    """Cross entropy to a mixture of the label and the network's own, live distribution."""
    log_p = functional.log_softmax(logits, 1)
    given = functional.nll_loss(log_p, labels)
    return (1 - epsilon) * given + epsilon * _entropies(log_p).mean()


def proselflc(
    logits: Tensor, labels: Tensor, *, progress: float, sharpness: float, transit: float
) -> Tensor:
    """As `boot_soft`, each image with an epsilon of its own, which gets no gradient.

    Args:
        progress: Share of the training that is over, 0 to 1.
        sharpness: How suddenly trust in the network comes.
        transit: The share of the training at which half of it has come.
    """
    log_p = functional.log_softmax(logits, 1)
    entropies = _entropies(log_p)
    age = 1 / (1 + math.exp(-sharpness * (progress - transit)))
    epsilon = age * (1 - entropies.detach() / math.log(logits.shape[1]))
    given = functional.nll_loss(log_p, labels, reduction="none")
    return ((1 - epsilon) * given + epsilon * entropies).mean()


def imae(logits: Tensor, labels: Tensor, *, emphasis: float) -> Tensor:
    """Medium probabilities of the label weigh most; `emphasis` is the paper's T."""
    return derivative_manipulation(logits, labels, power=1.0, emphasis=emphasis)


def derivative_manipulation(
    logits: Tensor, labels: Tensor, *, power: float, emphasis: float
) -> Tensor:
    """The weight is greatest where the label's probability is ``power / (power + 1)``.

    Args:
        power: The paper's lambda; 0 weighs the least probable labels most.
        emphasis: The paper's beta; 0 weighs all alike.
    """
    with torch.no_grad():
        p = logits.softmax(1)
        given = p.gather(1, labels[:, None])[:, 0]
        others = p.scatter(1, labels[:, None], 0.0)
        rest = others.sum(1)  # 1 - given, without losing its digits near 1
        slopes = others.scatter(1, labels[:, None], -rest[:, None])
        weights = (emphasis * given**power * rest).softmax(0)
        slopes *= (weights / (2 * rest.clamp(min=1e-30)))[:, None]
        shown = 2 * rest.mean()
    carrier = (slopes * logits).sum()
    return shown + carrier - carrier.detach()


def disturb_label(logits: Tensor, labels: Tensor, *, rate: float) -> Tensor:
    """Cross entropy to labels, a share `rate` of which is drawn anew; by torch's generator."""
    drawn = torch.randint_like(labels, logits.shape[1])
    replaced = torch.rand(len(labels), device=labels.device) < rate
    return functional.cross_entropy(logits, torch.where(replaced, drawn, labels))


def pencil(
    logits: Tensor, guesses: Tensor, labels: Tensor, *, compatibility: float, certainty: float
) -> Tensor:
    """The network's distribution should be that of the guesses, and both should be sound.

    Args:
        guesses: ``(B, C)``, each image's distribution before its softmax.
        compatibility: How firmly guesses hold on to the labels, the paper's alpha.
        certainty: How much the network should make up its mind, the paper's beta.
    """
    log_p, log_y = functional.log_softmax(logits, 1), functional.log_softmax(guesses, 1)
    classes = logits.shape[1]
    apart = (log_p.exp() * (log_p - log_y)).sum(1).mean()
    given = functional.nll_loss(log_y, labels)
    undecided = _entropies(log_p).mean()
    return apart / classes + compatibility * given + certainty * undecided / classes


def _entropies(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(1)
