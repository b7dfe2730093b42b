"""All settings of one training in one frozen record, and the TOML file that holds them.

Defaults marked "peer" are those of the comparison with pytorch-metric-learning on 3,000 phone
photos of groceries (pretrained MobileNetV2, AdamW, 200 steps of 16 classes x 4 images, nothing
tuned per loss).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embedkit.errors import UnknownNameError, UsageError
from embedkit.imaging import Preprocess

__all__ = ["MAY_CHANGE_ON_RESUME", "Recipe"]

MAY_CHANGE_ON_RESUME = ("max_time", "patience")
"""Settings that only say when to stop. All others shape the weights, `epochs` too: the learning
rate's cosine ends with it."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a training computes; where it runs is not part of it.

    Attributes:
        loss: Name of the loss.
        loss_options: Its options that differ from its defaults; None is written ``"none"`` in TOML.
        noise: What is done about wrong labels, ``none`` or a name of `embedkit.train.NOISES`: a
            classifier beside the embedding; see `embedkit.train.robust_labels`.
        noise_options: Its options that differ from its defaults.
        teacher: Path of an exported model to learn from; left out: none. See
            `embedkit.train.teacher`.
        distill: What of it: ``relative`` (distances), ``absolute`` (places) or ``both``.
        distill_weight: Of that, beside the loss.
        teacher_view: Whether it is shown what the student sees in a step (``augmented``) or the
            photos as they are, once (``plain``).
        backbone: Name of the backbone; the default is the smallest pretrained one, for machines
            without a GPU.
        weights: ``imagenet``, ``none`` or the path of a file with the backbone's weights.
        pooling: How the backbone's map becomes one vector.
        dim: Width of the embedding (peer: 128).
        nested: Narrower widths, rising, that are learned as well, so that the first so many numbers
            of an embedding are an embedding; see `embedkit.losses.NestedLoss`.
        image_size: Side of the square network input, pixels; ImageNet weights were trained at 224.
        crop_ratio: Share of the centred square that evaluation and the exported model look at (256
            -> 224: 0.875).
        freeze: Number of backbone stages, counted from the input, whose weights stay as they are.
        freeze_batch_norm: Whether BatchNorm keeps its statistics; left out: yes with pretrained
            weights (peer), no without, where the statistics do not exist yet.
        classes_per_batch: Classes in a batch (peer: 16); all of them where there are fewer. Classes
            of fewer than `images_per_class` images leave room, which further classes fill.
        images_per_class: Images of each class in a batch (peer: 4).
        batches: How classes come into a batch of a plain loss: ``pk`` (every class in its turn),
            ``varied`` (in a shape drawn anew for every batch, of the same size) or
            ``hard-classes`` (half of the classes near another one, by the embeddings at the
            beginning of the epoch, for one more pass over the photos); see
            `embedkit.data.class_batches`.
        memory_bank: Embeddings of earlier images that a loss of pairs compares a batch with too; 0:
            none. See `embedkit.losses._memory`.
        chunk: Images that go through the network at once, for batches larger than memory; left out:
            the whole batch. The gradient is the same; see `embedkit.train.large_batch`.
        epochs: Passes over the data; left out, with `steps` left out too: see `automatic_epochs`.
        steps: Length in optimiser steps instead of epochs; the last epoch may be a short one.
        epoch_steps: Steps of an epoch; left out: what reaches every training image about once, at
            least 20, so that a small set is not evaluated more often than it is trained on.
        learning_rate: Of the backbone; left out: 1e-4 with pretrained weights (peer), 1e-3 without:
            there is nothing yet that a large step could destroy (measured with resnet10 on 40
            classes of generated pictures, 120 steps: MAP@R .28 at 1e-4, .49 at 3e-4, .62 at 1e-3,
            .68 at 3e-3, which is worth trying).
        head_learning_rate: Of pooling and head (peer: 1e-3).
        proxy_learning_rate: Of the loss's own parameters (peer: 1e-2).
        find_learning_rate: Whether 0.01 to 100 times all three are tried before the training, and
            multiplied by what a rule of thumb makes of it; see `embedkit.train.find_rate`.
        layer_decay: By which the rate falls from a stage of the backbone to the one below it,
            nearer to the picture; 1: not at all. See `embedkit.train.layer_decay`.
        weight_decay: Of AdamW, on all weights (peer: 1e-4).
        clip_gradient: Greatest length of the gradient to all parameters together; left out: none.
        warmup: Share of all steps over which the learning rates rise from near 0 (peer: 0.1); a
            cosine to 0 follows.
        ema: Measure and keep a running average of the weights, of which this share stays in a step
            (0.99, 0.999); left out: the weights themselves. See `embedkit.train.ema`.
        amp: Number format of the network's arithmetic: ``auto`` (on CUDA bf16, or fp16 where the
            GPU knows no bf16; elsewhere off), ``off``, ``bf16`` or ``fp16`` (CUDA only). The loss
            is computed in float32 always.
        compile: Let PyTorch compile the backbone (`torch.compile`); the first steps then take a
            minute. Meant for CUDA; on the CPU it was slower.
        seed: Of everything random: held-out classes, batches, augmentation, first weights.
        patience: Evaluations without a better MAP@R after which training ends; 0: never.
        eval_every: Epochs from one evaluation to the next.
        max_time: Seconds of training after which it ends in good order; left out: no limit.
        val_share: Share of the classes held out to choose the checkpoint when the data brings no
            ``val`` split; 0: train on all classes and keep the last weights.
        augment_scale: Least and greatest share of a picture's area that a training crop shows
            (peer: 0.3 to 1).
        augment_ratio: Least and greatest width to height of that crop.
        augment_flip: Whether half of the crops are mirrored; turn off when left and right matter,
            as in writing.
    """

    loss: str = "rll"
    loss_options: dict[str, Any] = field(default_factory=dict)
    noise: str = "none"
    noise_options: dict[str, Any] = field(default_factory=dict)
    teacher: str | None = None
    distill: str = "relative"
    distill_weight: float = 1.0
    teacher_view: str = "augmented"
    backbone: str = "mobilenet_v3_small"
    weights: str = "imagenet"
    pooling: str = "avg"
    dim: int = 128
    nested: tuple[int, ...] = ()
    image_size: int = 224
    crop_ratio: float = 0.875
    freeze: int = 0
    freeze_batch_norm: bool | None = None
    classes_per_batch: int = 16
    images_per_class: int = 4
    batches: str = "pk"
    memory_bank: int = 0
    chunk: int | None = None
    epochs: int | None = None
    steps: int | None = None
    epoch_steps: int | None = None
    learning_rate: float | None = None
    head_learning_rate: float = 1e-3
    proxy_learning_rate: float = 1e-2
    find_learning_rate: bool = False
    layer_decay: float = 1.0
    weight_decay: float = 1e-4
    clip_gradient: float | None = None
    warmup: float = 0.1
    ema: float | None = None
    amp: str = "auto"
    compile: bool = False
    seed: int = 0
    patience: int = 5
    eval_every: int = 1
    max_time: float | None = None
    val_share: float = 0.2
    augment_scale: tuple[float, float] = (0.3, 1.0)
    augment_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    augment_flip: bool = True

    def __post_init__(self) -> None:
        for name, (least, greatest) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not (least <= value <= greatest and value < math.inf):
                limit = (
                    f"{least:g} or more" if greatest == math.inf else f"{least:g} to {greatest:g}"
                )
                raise UsageError(
                    f"{name} must be {limit}", facts=f"got {value}", hint=_without(name)
                )
        for name in ("crop_ratio", "clip_gradient", "layer_decay"):
            if getattr(self, name) == 0:
                raise UsageError(f"{name} must be greater than 0", hint=_without(name))
        rising = all(a < b for a, b in itertools.pairwise((0, *self.nested)))
        if not rising or max(self.nested, default=0) > self.dim:
            widest = max(self.nested)
            raise UsageError(
                f"nested must be rising widths from 1 to {self.dim}, the width of the embedding",
                facts=f"got {', '.join(map(str, self.nested))}",
                hint=f"--dim {widest}" if rising else "--nested 32,64,128",
            )
        if self.amp not in ("auto", "off", "bf16", "fp16"):
            raise UnknownNameError("number format", self.amp, ("auto", "off", "bf16", "fp16"))
        if self.batches not in _BATCHES:
            raise UnknownNameError("way of making batches", self.batches, _BATCHES)
        if self.epochs is not None and self.steps is not None:
            raise UsageError(
                "epochs and steps both say how long to train", facts="give one of the two"
            )
        for name in ("augment_scale", "augment_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high < math.inf:
                raise UsageError(
                    f"{name} must be two numbers, the least first", facts=f"got {low}, {high}"
                )

    @property
    def batch_size(self) -> int:
        """Images in a batch."""
        return self.classes_per_batch * self.images_per_class

    @property
    def widths(self) -> tuple[int, ...]:
        """All widths an embedding of this training has, rising; the last is `dim`."""
        return (*(width for width in self.nested if width < self.dim), self.dim)

    @property
    def pretrained(self) -> bool:
        """Whether the backbone starts from learned weights."""
        return self.weights != "none"

    @property
    def backbone_learning_rate(self) -> float:
        """`learning_rate`, or the default for these weights."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1e-4 if self.pretrained else 1e-3

    @property
    def batch_norm_frozen(self) -> bool:
        """`freeze_batch_norm`, or the default for these weights."""
        return self.pretrained if self.freeze_batch_norm is None else self.freeze_batch_norm

    def automatic_epochs(self, epoch_steps: int) -> int:
        """Epochs when neither `epochs` nor `steps` is given: 10, or as many as reach 300 steps.

        So every photo is seen ten times, and a small set is gone over until there were steps enough
        for a warm-up and a cosine. Without pretrained weights three times that. The peer comparison
        needs 200 steps on 3,000 photos (four epochs); what is too long, early stopping ends.
        """
        epochs = max(10, math.ceil(300 / epoch_steps))
        return epochs if self.pretrained else 3 * epochs

    def preprocess(self) -> Preprocess:
        """How evaluation and the exported model turn a photo into pixels."""
        return Preprocess(height=self.image_size, width=self.image_size, crop_ratio=self.crop_ratio)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, all settings."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> Recipe:
        """The recipe with these settings; what is missing keeps its default.

        Raises:
            UnknownNameError: A setting that does not exist; the message names the nearest.
            UsageError: A value of the wrong kind or out of range.
        """
        kinds = typing.get_type_hints(cls)
        for name in settings:
            if name not in kinds:
                raise UnknownNameError("recipe setting", name, kinds)
        return cls(**{name: _fit(name, value, kinds[name]) for name, value in settings.items()})

    def to_toml(self) -> str:
        """The recipe as a TOML document; settings that are left out stand as comments."""
        settings = dataclasses.asdict(self)
        tables = {name: settings.pop(name) for name in _TABLES}
        lines = [
            f"# {name}: automatic" if value is None else f"{name} = {_toml(value)}"
            for name, value in settings.items()
        ]
        for table, options in tables.items():
            lines += ["", f"[{table}]"]
            lines += [f"{_toml(name)} = {_toml(value)}" for name, value in options.items()]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_toml(cls, text: str) -> Recipe:
        """The recipe of a TOML document.

        Raises:
            UsageError: It is no TOML, or as for `from_json`.
        """
        try:
            settings = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UsageError("the recipe is not valid TOML", facts=str(error)) from error
        for table in _TABLES:
            options = settings.get(table)
            if isinstance(options, dict):
                settings[table] = {
                    name: None if value == "none" else value for name, value in options.items()
                }
        return cls.from_json(settings)

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """The recipe in a TOML file.

        Raises:
            UsageError: The file cannot be read, or as for `from_toml`.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the recipe {path} cannot be read", facts=str(error)) from error
        return cls.from_toml(text)

    def differences(self, other: Recipe) -> list[str]:
        """The settings in which the two differ, as ``name: ours, not theirs``."""
        ours, theirs = self.to_json(), other.to_json()
        return [
            f"{name}: {value}, not {theirs[name]}"
            for name, value in ours.items()
            if value != theirs[name]
        ]


_BATCHES = ("pk", "varied", "hard-classes")
_TABLES = ("loss_options", "noise_options")
_ANY = math.inf
_RANGES: dict[str, tuple[float, float]] = {
    "distill_weight": (0, _ANY),
    "dim": (1, 65536),
    "image_size": (16, 4096),
    "crop_ratio": (0, 1),
    "freeze": (0, _ANY),
    "classes_per_batch": (2, _ANY),
    "images_per_class": (2, _ANY),
    "memory_bank": (0, _ANY),
    "chunk": (1, _ANY),
    "epochs": (1, _ANY),
    "steps": (1, _ANY),
    "epoch_steps": (1, _ANY),
    "learning_rate": (0, _ANY),
    "head_learning_rate": (0, _ANY),
    "proxy_learning_rate": (0, _ANY),
    "layer_decay": (0, 1),
    "weight_decay": (0, _ANY),
    "clip_gradient": (0, _ANY),
    "warmup": (0, 1),
    "ema": (0, 0.99999),
    "seed": (0, 2**63 - 1),
    "patience": (0, _ANY),
    "eval_every": (1, _ANY),
    "max_time": (0, _ANY),
    "val_share": (0, 0.9),
}


def _fit(name: str, value: Any, kind: Any) -> Any:
    """`value` as the setting's kind, or a UsageError that names both."""
    choices = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for choice in choices:
        if choice is types.NoneType and value is None:
            return None
        if choice is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if choice is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if choice in (bool, str) and isinstance(value, choice):
            return value
        if choice == dict[str, Any] and isinstance(value, dict):
            return dict(value)
        if choice == tuple[int, ...] and isinstance(value, list | tuple):
            return tuple(_fit(name, number, int) for number in value)
        if choice == tuple[float, float] and isinstance(value, list | tuple) and len(value) == 2:
            return tuple(_fit(name, number, float) for number in value)
    expected = " or ".join(
        _KIND_WORDS[choice] for choice in choices if choice is not types.NoneType
    )
    raise UsageError(f"{name} must be {expected}", facts=f"got {value!r}")


_KIND_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    dict[str, Any]: "a table of options",
    tuple[float, float]: "two numbers",
    tuple[int, ...]: "a list of whole numbers",
}


def _without(name: str) -> str:
    """What to do when a setting was given that cannot be."""
    (default,) = (one.default for one in dataclasses.fields(Recipe) if one.name == name)
    taken = "then it is automatic" if default is None else f"it is then {default}"
    return f"leave {name} out: {taken}"


def _toml(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    # A JSON string is a TOML string, but for the one control character JSON leaves as it is.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
