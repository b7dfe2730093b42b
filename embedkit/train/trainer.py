"""The training loop, top to bottom: batches, steps, an evaluation per epoch, the best weights kept.

On the CPU a seed reproduces a run bit for bit, with the same number of threads and the same
versions. Nothing random is carried from step to step: batches and augmentation are functions of
(seed, epoch, step), and torch's generator is seeded anew from the same three before every step. So
a resumed run is the uninterrupted run.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from embedkit.atomic import published
from embedkit.data import Augment, PhotoLoader, PhotoSet
from embedkit.errors import EmbedKitError, Interrupted, MismatchError, UsageError
from embedkit.evaluate import retrieval_metrics
from embedkit.imaging import Pixels
from embedkit.losses import MetricLoss, options
from embedkit.models import EmbeddingNet, freeze_batch_norm, freeze_stages
from embedkit.report import keep_embeddings
from embedkit.train.checkpoint import (
    pack,
    read_checkpoint,
    unpack,
    write_checkpoint,
)
from embedkit.train.guards import reproducible, seed_of, stop_requests
from embedkit.train.plan import Plan, check_names, choose_device, create_loss, make_plan
from embedkit.train.recipe import MAY_CHANGE_ON_RESUME, Recipe
from embedkit.train.run import SCHEMA, Run, create_untrained, point_last, versions, write_split
from embedkit.train.story import Reporter, Silent, describe, tell_baseline, tell_epoch, tell_result

__all__ = ["train"]

_EVALUATION_BATCH = 64
# Root mean square distance of unit embeddings to their mean; 0.1 is a mean cosine of 0.99.
_COLLAPSED = 0.1
# PyTorch's default; after 50 steps nothing is left of where the running statistics began (0.9^50).
_BATCH_NORM_MOMENTUM = 0.1
_SETTLED_STEPS = 50


def train(
    recipe: Recipe,
    photos: PhotoSet,
    run_dir: Path,
    *,
    device: str = "auto",
    reporter: Reporter | None = None,
    resume: bool = False,
    workers: int | None = None,
) -> Run:
    """Train by a recipe and leave everything in `run_dir`.

    Args:
        recipe: All settings that matter to the result.
        photos: With or without splits; see `make_plan`.
        run_dir: Empty or absent; with `resume`, the folder of the run to go on with. ``last``
            beside it will lead to it.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        reporter: Who is told the story; None: nobody.
        resume: Go on from ``last.safetensors``. Settings and photos must be those of the run, but
            for `max_time` and `patience`, which only say when to stop.
        workers: Decoding threads; None: one per core. Does not change the result.

    Raises:
        UsageError: A folder in use, a resume with other settings.
        DataError: The photos cannot be trained on.
        MissingError: The device or the weights are not there.
        MismatchError: The checkpoint is damaged, foreign, or of other photos.
        Interrupted: Ctrl-C or SIGTERM, after saving.
        EmbedKitError: The numbers are no longer finite; the last good checkpoint is kept.

    torch's global generator and its determinism flag are as before when this returns.
    """
    reporter = reporter or Silent()
    check_names(recipe)
    place = choose_device(device)
    saved = _read_saved(run_dir, recipe) if resume else None
    if saved is None and run_dir.exists() and any(run_dir.iterdir()):
        raise UsageError(
            f"the run {run_dir} exists",
            hint=f"another --name, or: embedkit train --resume {run_dir}",
        )
    with reproducible(place):
        torch.manual_seed(seed_of(recipe.seed, "network"))
        network = create_untrained(recipe, weights="none" if saved else recipe.weights)
        with reporter.progress("checking", len(photos)) as advance:
            plan = make_plan(recipe, photos, device=place, workers=workers, progress=advance)
        torch.manual_seed(seed_of(recipe.seed, "loss"))
        loss = create_loss(recipe, len(plan.classes))
        with stop_requests() as stop:
            training = _Training(plan, network, loss, run_dir, reporter, stop, workers)
            if saved:
                training.restore(*saved)
            training.run()
    return Run.load(run_dir)


@dataclass
class _Progress:
    """Everything scalar that a resumed run needs; JSON both ways.

    Attributes:
        epoch: Finished epochs.
        step: Finished steps of the epoch after those.
        elapsed: Seconds of training so far.
        rows: The lines of metrics.jsonl.
        best: The row of the weights that count.
        baseline: Metrics of the untrained network by split.
        skipped: How many files were unreadable, and how many classes had a single image.
        sums: Of the running epoch: loss and tell-tales over its finished steps.
        warned: Whether the collapse alarm has been given.
    """

    epoch: int = 0
    step: int = 0
    elapsed: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    baseline: dict[str, Any] | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    warned: bool = False


class _StopRequested(Exception):
    """Raised where the state is whole."""


class _Training:
    """One training: what it works on, and the loop."""

    def __init__(
        self,
        plan: Plan,
        network: EmbeddingNet,
        loss: MetricLoss,
        run_dir: Path,
        reporter: Reporter,
        stop: threading.Event,
        workers: int | None,
    ) -> None:
        recipe = plan.recipe
        self.plan, self.recipe, self.run_dir = plan, recipe, run_dir
        self.tell, self.stop = reporter, stop
        freeze_stages(network, recipe.freeze)
        if recipe.batch_norm_frozen:
            freeze_batch_norm(network)
        else:
            _settle_batch_norm_quickly(network)
        self.network = network.to(plan.device)
        if plan.device.type != "mps":
            network.to(memory_format=torch.channels_last)
        self.loss = loss.to(plan.device)
        self.optimizer = _create_optimizer(recipe, network, loss)
        self.scaler = torch.amp.GradScaler("cuda", enabled=plan.amp == torch.float16)
        self.train_rows, self.labels = plan.rows("train"), plan.labels()
        self.sampler = plan.sampler()
        self.loader = PhotoLoader(
            plan.photos.files(),
            recipe.preprocess(),
            augment=Augment(recipe.augment_scale, recipe.augment_ratio, recipe.augment_flip),
            seed=recipe.seed,
            workers=workers,
        )
        self.progress = _Progress(
            skipped={"unreadable": len(plan.failures), "lone_classes": len(plan.left_out)}
        )
        self.started = time.monotonic()
        self.waited = 0.0

    def run(self) -> None:
        """Train until a reason to stop, then measure the best weights on ``test``."""
        describe(self.plan, self.tell)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._save()
        point_last(self.run_dir)
        try:
            if self.progress.baseline is None:
                self.progress.baseline = self._measure_baseline()
            tell_baseline(self.progress.baseline, self.tell)
            while (reason := self._reason_to_stop()) is None:
                self._train_epoch()
                row = self._finish_epoch()
                self._keep_if_best(row)
                self._save(row)
            test = self._measure_best()
        except _StopRequested:
            self._save()
            raise Interrupted(
                f"interrupted after step {self._global_step()} of {self.plan.steps}, and saved",
                facts=f"in {self.run_dir}",
                hint=f"embedkit train --resume {self.run_dir}",
            ) from None
        self._write_record("finished", reason=reason, test=test)
        self.tell.note("stopped", reason)
        tell_result(self.progress.best, self.progress.baseline, test, self.tell)
        if not self.loss.normalizes:
            self.tell.note("metric", "this loss compares by distance; the numbers are by cosine")

    # --- one epoch, or what is left of it --------------------------------------------------------

    def _train_epoch(self) -> None:
        """Its batches still to come, each with torch's generator seeded for it."""
        progress, plan = self.progress, self.plan
        batches = self.sampler.batches(progress.epoch)[: plan.steps_of(progress.epoch)]
        sizes = [len(batch) for batch in batches]
        pictures = self.loader.batches(
            [self.train_rows[batch] for batch in batches],
            epoch=progress.epoch,
            start=progress.step,
        )
        self.network.train()
        self.loss.train()
        name = f"epoch {progress.epoch + 1}/{plan.epochs}"
        with self.tell.progress(name, sum(sizes)) as advance:
            advance(sum(sizes[: progress.step]), 0)
            ready = self._timed(pictures)
            for batch, pixels in zip(batches[progress.step :], ready, strict=True):
                torch.manual_seed(seed_of(self.recipe.seed, "step", progress.epoch, progress.step))
                labels = torch.from_numpy(self.labels[batch]).to(plan.device)
                self._step(self._to_device(pixels), labels)
                advance(len(batch), 0)
                if self._out_of_time():
                    break

    def _timed(self, pictures: Iterator[Pixels]) -> Iterator[Pixels]:
        """The same, adding up how long the network waits for them."""
        while True:
            began = time.monotonic()
            pixels = next(pictures, None)
            self.waited += time.monotonic() - began
            if pixels is None:
                return
            yield pixels

    def _step(self, pixels: Tensor, labels: Tensor) -> None:
        """Forward, loss, backward, update; then a place where the run may be left."""
        progress = self.progress
        rate = self._rate_of(self._global_step())
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_lr"] * rate
        with torch.autocast(pixels.device.type, self.plan.amp, enabled=self.plan.amp is not None):
            embeddings = self.network(pixels)
        # Raw and in float32: a loss normalises itself where it lives on the sphere.
        value = self.loss(embeddings.float(), labels)
        told = {"loss": float(value.detach()), **self.loss.stats}
        if not (math.isfinite(told["loss"]) and bool(embeddings.detach().isfinite().all())):
            raise self._not_finite(told["loss"])
        self.optimizer.zero_grad()
        self.scaler.scale(value).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for name, number in told.items():
            progress.sums[name] = progress.sums.get(name, 0.0) + number
        progress.step += 1
        self._leave_if_asked()

    def _not_finite(self, value: float) -> EmbedKitError:
        lower = self.recipe.backbone_learning_rate / 10
        return EmbedKitError(
            f"the network's output is no longer finite at epoch {self.progress.epoch + 1}, "
            f"step {self.progress.step + 1}",
            facts=f"the loss is {value}; the checkpoints of the last finished epoch are kept in "
            f"{self.run_dir}",
            hint=f"--learning-rate {lower:g}" + (" --amp off" if self.plan.amp else ""),
        )

    # --- end of an epoch -------------------------------------------------------------------------

    def _finish_epoch(self) -> dict[str, Any]:
        """Evaluate when it is time to; the epoch's line, already in the progress."""
        progress, plan, recipe = self.progress, self.plan, self.recipe
        if not all(bool(part.isfinite().all()) for part in self.network.parameters()):
            raise self._not_finite(math.nan)
        whole = progress.step >= plan.steps_of(progress.epoch)
        last = self._global_step() >= plan.steps or self._out_of_time()
        means = {name: total / max(progress.step, 1) for name, total in progress.sums.items()}
        row: dict[str, Any] = {
            "epoch": progress.epoch + 1,
            "step": self._global_step(),
            "loss": means.pop("loss", None),
            "learning_rate": self._rate_of(self._global_step() - 1) * recipe.backbone_learning_rate,
            "stats": means,
            "val": None,
        }
        if len(plan.rows("val")) and (last or (progress.epoch + 1) % recipe.eval_every == 0):
            row["val"], row["spread"] = self._measure(self.network, "val")
        row["seconds"], row["waited"] = round(self._elapsed(), 3), round(self.waited, 3)
        if whole:
            progress.epoch, progress.step, progress.sums = progress.epoch + 1, 0, {}
        progress.rows.append(row)
        tell_epoch(row, plan.epochs, self.tell)
        self._alarm_if_collapsed(row)
        return row

    def _keep_if_best(self, row: dict[str, Any]) -> None:
        """Without a ``val`` split every epoch is the best so far: the last weights count."""
        best = self.progress.best
        if len(self.plan.rows("val")):
            if row["val"] is None:
                return
            if best is not None and _quality(row) <= _quality(best):
                return
        self.progress.best = row
        state = {**self._identity(), "best": row}
        path = self.run_dir / "best.safetensors"
        write_checkpoint(path, pack(self.network, self.loss, None), state)

    def _reason_to_stop(self) -> str | None:
        """Why not to begin or go on with an epoch, as a sentence for people."""
        progress, recipe = self.progress, self.recipe
        if progress.epoch >= self.plan.epochs:
            return f"all {self.plan.steps} steps are done"
        if progress.rows and self._out_of_time():
            return f"the time of {recipe.max_time:g} s is over"
        if recipe.patience and progress.best:
            later = [
                row for row in progress.rows if row["val"] and row["step"] > progress.best["step"]
            ]
            if len(later) >= recipe.patience and len(self.plan.rows("val")):
                return f"no better MAP@R in {len(later)} evaluations"
        return None

    def _alarm_if_collapsed(self, row: dict[str, Any]) -> None:
        """Say once that all embeddings lie in one place, why, and what helps."""
        in_training = row["stats"].get("spread", 1.0)
        spread = row.get("spread", in_training)
        if self.progress.warned or spread >= _COLLAPSED:
            return
        baseline = (self.progress.baseline or {}).get("val")
        told_apart = (
            row["val"] is not None
            and baseline is not None
            and row["val"]["tie_share"] < 0.5  # where most tie, a good rank is an accident
            and _quality(row) > (baseline["map@r"] or 0)
        )
        if told_apart:
            return
        recipe = self.recipe
        if in_training >= _COLLAPSED:
            if row["step"] < min(_SETTLED_STEPS, self.plan.steps):
                return
            advice = "in evaluation only: BatchNorm's statistics have not settled. Train longer"
            advice += " or freeze them (--freeze-batch-norm)."
        else:
            advice = (
                f"lower the learning rate (--learning-rate {recipe.backbone_learning_rate / 10:g} "
                f"--head-learning-rate {recipe.head_learning_rate / 10:g})"
                + ("" if recipe.batch_norm_frozen else ", freeze BatchNorm (--freeze-batch-norm)")
                + (", mine gently (-s mining=semi-hard)" if recipe.loss == "triplet" else "")
                + " or put more classes in a batch (--batch)."
            )
        self.progress.warned = True
        self.tell.warn(
            f"the embeddings have collapsed (all within {spread:.3f} of one point; 1 is spread "
            f"out): {advice}"
        )

    # --- measuring -------------------------------------------------------------------------------

    def _measure_baseline(self) -> dict[str, Any]:
        """The network as it is, by its pooled features: the head is still random."""
        return {
            split: self._measure(self.network.features, split, keep="before")[0]
            for split in ("val", "test")
            if len(self.plan.rows(split))
        }

    def _measure_best(self) -> dict[str, Any] | None:
        """The best weights on ``test``, or again on ``val`` to keep its embeddings."""
        split = self._held_out()
        if not split:
            return None
        best = copy.deepcopy(self.network)
        unpack(read_checkpoint(self.run_dir / "best.safetensors").tensors, best, None, None)
        metrics = self._measure(best.eval(), split, keep="after")[0]
        return metrics if split == "test" else None

    def _held_out(self) -> str:
        """The split that is measured at the end, or an empty text."""
        return next((name for name in ("test", "val") if len(self.plan.rows(name))), "")

    def _measure(
        self,
        embed: Callable[[Tensor], Tensor],
        split: str,
        *,
        keep: Literal["before", "after"] | None = None,
    ) -> tuple[dict[str, Any], float]:
        """Retrieval metrics of one split, by cosine, and how far its embeddings are spread."""
        rows, photos = self.plan.rows(split), self.plan.photos
        self.network.eval()
        parts: list[npt.NDArray[np.float32]] = []
        with torch.no_grad():
            for pixels in self.loader.plain(rows, _EVALUATION_BATCH):
                parts.append(embed(self._to_device(pixels)).float().cpu().numpy())
                self._leave_if_asked()
        embeddings, labels = np.concatenate(parts), [photos.labels[row] for row in rows]
        if keep is not None and split == self._held_out():
            keep_embeddings(self.run_dir, keep, rows=rows, labels=labels, embeddings=embeddings)
        metrics = retrieval_metrics(
            embeddings,
            labels,
            query=_flags(photos.is_query, rows),
            gallery=_flags(photos.is_gallery, rows),
        )
        return metrics.to_json(), _spread(embeddings, unit=self.loss.normalizes)

    def _to_device(self, pixels: Pixels) -> Tensor:
        tensor = torch.from_numpy(pixels)
        if self.plan.device.type == "cuda":
            return tensor.pin_memory().to(self.plan.device, non_blocking=True)
        return tensor.to(self.plan.device)

    # --- saving and going on ---------------------------------------------------------------------

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Be where the checkpoint was written.

        Raises:
            MismatchError: It is of other photos.
        """
        ours = self._identity()
        if state["data"] != ours["data"]:
            raise MismatchError(
                f"the photos are not those the run {self.run_dir} was trained on",
                facts=f"{state['data']['images']} images then, {ours['data']['images']} now"
                if state["data"]["images"] != ours["data"]["images"]
                else "the same number, but other names, labels or splits",
                hint="resume without naming the data, or begin a new run",
            )
        unpack(tensors, self.network, self.loss, self.optimizer)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.progress = _Progress(**state["progress"])
        self.started = time.monotonic() - self.progress.elapsed
        # Killed between the two files: best.safetensors is then one evaluation ahead, and right.
        best = self.run_dir / "best.safetensors"
        if best.exists():
            self.progress.best = read_checkpoint(best).state["best"]
        lines = "".join(json.dumps(row) + "\n" for row in self.progress.rows)
        _write_text(self.run_dir / "metrics.jsonl", lines)
        self.tell.note("resume", f"from epoch {self.progress.epoch + 1}, step {self.progress.step}")

    def _save(self, row: dict[str, Any] | None = None) -> None:
        """last.safetensors, the epoch's line, run.json: a kill between them loses nothing."""
        self.progress.elapsed = self._elapsed()
        state = {
            **self._identity(),
            "progress": dict(vars(self.progress)),
            "scaler": self.scaler.state_dict(),
        }
        tensors = pack(self.network, self.loss, self.optimizer)
        write_checkpoint(self.run_dir / "last.safetensors", tensors, state)
        if row is not None:
            with (self.run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        else:
            _write_text(self.run_dir / "config.toml", self.recipe.to_toml())
            write_split(self.run_dir / "split.csv", self.plan.photos)
            self._write_failures()
        self._write_record("unfinished")

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint belongs to."""
        photos = self.plan.photos
        data = {"hash": photos.manifest_hash(), "images": len(photos.paths)}
        return {"recipe": self.recipe.to_json(), "data": data}

    def _write_record(
        self, status: str, *, reason: str | None = None, test: dict[str, Any] | None = None
    ) -> None:
        plan, recipe, progress = self.plan, self.recipe, self.progress
        record = {
            "schema": SCHEMA,
            "name": self.run_dir.resolve().name,
            "status": status,
            "stopped_because": reason,
            "device": str(plan.device),
            "amp": str(plan.amp or torch.float32).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "photos_root": str(plan.photos.root.resolve()),
            "data": {
                **self._identity()["data"],
                "splits": {split: plan.counts(split) for split in ("train", "val", "test")},
                **progress.skipped,
            },
            "normalizes": self.loss.normalizes,
            "loss_options": {**options(recipe.loss), **recipe.loss_options},
            "steps": self._global_step(),
            "elapsed": round(progress.elapsed, 3),
            "baseline": progress.baseline,
            "best": progress.best,
            "test": test,
            "versions": versions(),
        }
        _write_text(self.run_dir / "run.json", json.dumps(record, indent=1) + "\n")

    def _write_failures(self) -> None:
        if self.plan.failures:
            lines = "".join(
                json.dumps({"path": str(path), "code": error.code, "reason": error.reason}) + "\n"
                for path, error in self.plan.failures
            )
            _write_text(self.run_dir / "failed.jsonl", lines)

    # --- where we are ----------------------------------------------------------------------------

    def _global_step(self) -> int:
        return min(
            self.progress.epoch * self.plan.epoch_steps + self.progress.step, self.plan.steps
        )

    def _rate_of(self, step: int) -> float:
        """Share of the full learning rate in a step: a linear warm-up times a cosine to 0."""
        warmup = max(1, round(self.recipe.warmup * self.plan.steps))
        return min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * step / self.plan.steps)) / 2

    def _elapsed(self) -> float:
        return time.monotonic() - self.started

    def _out_of_time(self) -> bool:
        limit = self.recipe.max_time
        return limit is not None and self._elapsed() >= limit

    def _leave_if_asked(self) -> None:
        if self.stop.is_set():
            raise _StopRequested


def _write_text(path: Path, text: str) -> None:
    with published(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _quality(row: dict[str, Any]) -> float:
    """MAP@R of an evaluated row; 0 where no query had a match."""
    return float(row["val"]["map@r"] or 0)


def _flags(
    column: tuple[bool, ...] | None, rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_] | None:
    """Of one split; None where it marks nothing, because the data marks another split only."""
    if column is None or not any(column[row] for row in rows):
        return None
    return np.array(column)[rows]


def _spread(embeddings: npt.NDArray[np.float32], *, unit: bool) -> float:
    """Root mean square distance of rows to their mean, as a share of their length, 0 to 1."""
    rows = embeddings.astype(np.float64)
    if unit:
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    size = (rows**2).sum() / len(rows)
    return float(np.sqrt(max(1 - (rows.mean(0) ** 2).sum() / max(size, 1e-30), 0)))


def _settle_batch_norm_quickly(network: nn.Module) -> None:
    """Let running statistics follow within tens of steps.

    Some backbones (MobileNetV3: 0.01) average over hundreds, for trainings of hundred thousands;
    here the first epochs would be evaluated with statistics that are not the network's yet.
    """
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is not None:
            module.momentum = max(module.momentum, _BATCH_NORM_MOMENTUM)


def _create_optimizer(recipe: Recipe, network: EmbeddingNet, loss: nn.Module) -> torch.optim.AdamW:
    """AdamW with a rate each for backbone, head (with pooling) and the loss's own parameters."""
    groups = [
        (network.backbone, recipe.backbone_learning_rate),
        (nn.ModuleList([network.pooling, network.head]), recipe.head_learning_rate),
        (loss, recipe.proxy_learning_rate),
    ]
    settings = [
        {"params": learning, "lr": rate, "full_lr": rate}
        for module, rate in groups
        if (learning := [part for part in module.parameters() if part.requires_grad])
    ]
    return torch.optim.AdamW(settings, weight_decay=recipe.weight_decay)


def _read_saved(run_dir: Path, recipe: Recipe) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The last checkpoint of a run, when it was made with these settings."""
    saved = read_checkpoint(run_dir / "last.safetensors")
    if "progress" not in saved.state:
        raise MismatchError(f"{run_dir / 'last.safetensors'} holds a result, not a training")
    then = Recipe.from_json(saved.state["recipe"])
    free = {name: getattr(recipe, name) for name in MAY_CHANGE_ON_RESUME}
    differing = recipe.differences(dataclasses.replace(then, **free))
    if differing:
        raise UsageError(
            f"the run {run_dir} was begun with other settings",
            facts="\n".join(differing),
            hint=f"only {' and '.join(MAY_CHANGE_ON_RESUME)} may change; "
            f"embedkit train --resume {run_dir} takes its own settings",
        )
    return saved.tensors, saved.state
