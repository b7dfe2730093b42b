"""The training loop, top to bottom: batches, steps, an evaluation per epoch, the best weights kept.

On the CPU a seed reproduces a run bit for bit, with the same number of threads and the same
versions. Nothing random is carried from step to step: batches and augmentation are functions of
(seed, epoch, step), and torch's generator is seeded anew from the same three before every step. So
a resumed run is the uninterrupted run.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from embedkit import methods
from embedkit.atomic import published
from embedkit.data import Augment, PhotoLoader, PhotoSet
from embedkit.data.resample import resample_on
from embedkit.errors import (
    Interrupted,
    MismatchError,
    NotFiniteError,
    UsageError,
)
from embedkit.evaluate import split_rows
from embedkit.imaging import Pixels
from embedkit.losses import CrossBatchMemory
from embedkit.methods import Batch, Group, Method, Outcome
from embedkit.models import EmbeddingNet, freeze_batch_norm, freeze_stages
from embedkit.report import keep_embeddings
from embedkit.train.assisted import Assisted, assisted, check_assistance
from embedkit.train.checkpoint import (
    pack,
    read_checkpoint,
    unpack,
    write_checkpoint,
)
from embedkit.train.distributed import World, joined
from embedkit.train.ema import WeightAverage
from embedkit.train.events import EventLog, check_tensorboard
from embedkit.train.examine import brief_check, examine, failure_lines, read_failures
from embedkit.train.find_rate import STEPS, RangeTest, range_test
from embedkit.train.guards import kept_memory, reproducible, seed_of, stop_requests
from embedkit.train.large_batch import check_divisible, divided
from embedkit.train.layer_decay import split_by_stage
from embedkit.train.measure import brief, measure, quality, quality_name
from embedkit.train.plan import Plan, check_data, check_names, choose_device, make_plan
from embedkit.train.recipe import MAY_CHANGE_ON_RESUME, Recipe
from embedkit.train.run import SCHEMA, Run, create_untrained, point_last, versions, write_split
from embedkit.train.story import (
    Reporter,
    Silent,
    describe,
    tell_baseline,
    tell_epoch,
    tell_rates,
    tell_result,
)
from embedkit.train.suspects import SUSPECTS_FILE, find_suspects, write_suspects
from embedkit.train.teacher import Teacher

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
    cache: Path | None = None,
    tensorboard: bool = False,
    teacher: Teacher | None = None,
) -> Run:
    """Train by a recipe and leave everything in `run_dir`.

    Args:
        recipe: All settings that matter to the result.
        photos: With or without splits; see `make_plan`.
        run_dir: Empty or absent; with `resume`, the folder of the run to go on with. ``last``
            beside it will lead to it.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``. Processes that torchrun has
            started share the work, one GPU each; see `embedkit.train.distributed`.
        reporter: Who is told the story; None: nobody.
        resume: Go on from ``last.safetensors``. Settings and photos must be those of the run, but
            for `max_time` and `patience`, which only say when to stop.
        workers: Decoding threads; None: one per core. Does not change the result.
        cache: Remembers what `embedkit check` and this have seen of photos; see `examine`.
        tensorboard: Also write ``tensorboard/`` in the run's folder; see `embedkit.train.events`.
        teacher: The one the recipe names.

    Raises:
        UsageError: A folder in use, a resume with other settings.
        DataError: The photos cannot be trained on.
        MissingError: The device, the weights or the package tensorboard are not there.
        MismatchError: The checkpoint is damaged, foreign, of other photos or of another teacher.
        Interrupted: Ctrl-C or SIGTERM, after saving.
        NotFiniteError: The numbers ran away; the last good checkpoint is kept.

    torch's global generator and its determinism flag are as before when this returns.
    """
    reporter = reporter or Silent()
    check_names(recipe)
    check_assistance(recipe, teacher)
    check_data(recipe, photos)
    if tensorboard:
        check_tensorboard()
    told = World.told()
    place = choose_device(told.device(device))
    reporter, workers = reporter if told.leads else Silent(), told.workers(workers)
    saved = _read_saved(run_dir, recipe) if resume else None
    if saved is None and run_dir.exists() and any(run_dir.iterdir()):
        raise UsageError(
            f"the run {run_dir} exists",
            hint=f"another --name, or: embedkit train --resume {run_dir}",
        )
    memory = kept_memory() if place.type == "cpu" else contextlib.nullcontext()
    with joined() as world, world.folder(run_dir) as folder, reproducible(place), memory:
        torch.manual_seed(seed_of(recipe.seed, "network"))
        network = create_untrained(recipe, weights="none" if saved else recipe.weights)
        check = None
        if saved:
            failures = read_failures(run_dir)
        else:
            checkup = world.of_leader(
                lambda: examine(recipe, photos, reporter, cache=cache, workers=workers)
            )
            failures, check = checkup.failures(), brief_check(recipe, checkup)
        plan = make_plan(recipe, photos, device=place, failures=failures)
        method = methods.create(recipe.loss, **recipe.loss_options)
        torch.manual_seed(seed_of(recipe.seed, "loss"))
        method.prepare(plan.setting(), network)
        method.nest(plan.setting())
        if recipe.memory_bank:
            method.loss = CrossBatchMemory(
                method.loss, size=recipe.memory_bank, embedding_dim=network.embedding_dim
            )
        method = assisted(method, recipe, teacher)
        if isinstance(method, Assisted):
            method.prepare(plan.setting(), network)
        with stop_requests() as stop:
            training = _Training(plan, network, method, folder, reporter, stop, workers, world)
            if saved:
                training.restore(*saved)
            else:
                training.progress.check = check
            with training.logged(tensorboard):
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
        check: What the check before the training found.
        sums: Of the running epoch: loss and tell-tales over its finished steps.
        warned: Whether the collapse alarm has been given.
        rate_test: What the test of learning rates gave, as `RangeTest.to_json` has it.
    """

    epoch: int = 0
    step: int = 0
    elapsed: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    baseline: dict[str, Any] | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    check: dict[str, Any] | None = None
    sums: dict[str, float] = field(default_factory=dict)
    warned: bool = False
    rate_test: dict[str, Any] | None = None


class _StopRequested(Exception):
    """Raised where the state is whole."""


class _Training:
    """One training: what it works on, and the loop."""

    def __init__(
        self,
        plan: Plan,
        network: EmbeddingNet,
        method: Method,
        run_dir: Path,
        reporter: Reporter,
        stop: threading.Event,
        workers: int | None,
        world: World,
    ) -> None:
        recipe = plan.recipe
        self.plan, self.recipe, self.run_dir = plan, recipe, run_dir
        self.tell, self.stop, self.world = reporter, stop, world
        freeze_stages(network, recipe.freeze)
        if recipe.batch_norm_frozen:
            freeze_batch_norm(network)
        else:
            _settle_batch_norm_quickly(network)
        self.network = network.to(plan.device)
        if plan.device.type != "mps":
            network.to(memory_format=torch.channels_last)
        if recipe.compile:
            # Not its body: PyTorch 2.11 takes an nn.Sequential apart and compiles piece by piece.
            network.backbone.compile()
        check_divisible(network, chunk=recipe.chunk, world=world)
        self.average = WeightAverage(network, recipe.ema) if recipe.ema else None
        # Its weights are measured and kept.
        self.result = self.average.network if self.average else network
        self.method = method.to(plan.device)
        groups = method.groups(network, recipe)
        groups = split_by_stage(groups, network.backbone, recipe.layer_decay)
        self.optimizer = _create_optimizer(groups, recipe.weight_decay)
        self.scaler = torch.amp.GradScaler("cuda", enabled=plan.amp == torch.float16)
        self.setting, self.train_rows = plan.setting(), plan.rows("train")
        targets = self.setting.photos.targets
        self.targets = None if targets is None else torch.tensor(targets, dtype=torch.float32)
        self.sampler = method.sampler(self.setting, plan.epoch_steps)
        self.loader = PhotoLoader(
            plan.photos.files(),
            recipe.preprocess(),
            augment=Augment(recipe.augment_scale, recipe.augment_ratio, recipe.augment_flip),
            seed=recipe.seed,
            workers=workers,
        )
        self.progress = _Progress(
            skipped={
                "unreadable": len(plan.failures),
                "lone_classes": len(plan.left_out),
                **({"lost_triplets": plan.lost_triplets} if plan.photos.triplets else {}),
            }
        )
        self.events = EventLog(None, 0)
        self.started = time.monotonic()
        self.waited = 0.0

    @contextlib.contextmanager
    def logged(self, tensorboard: bool) -> Iterator[None]:
        """With TensorBoard's event files when asked for."""
        if not tensorboard:
            yield
            return
        # The baseline stands at step 0, and is not measured again.
        again = self._global_step() + 1 if self.progress.baseline else 0
        self.events = EventLog(self.run_dir / "tensorboard", again)
        try:
            yield
        finally:
            self.events.close()

    def run(self) -> None:
        """Train until a reason to stop, then measure the best weights on ``test``."""
        describe(self.plan, self.tell)
        if not self.world.alone:
            self.tell.note("together", f"{self.world.size} processes, each a part of every batch")
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._save()
        point_last(self.run_dir)
        try:
            if self.progress.baseline is None:
                self.progress.baseline = self._measure_baseline()
                for split, metrics in self.progress.baseline.items():
                    self.events.write(split, metrics, 0)
            tell_baseline(self.progress.baseline, self.tell)
            if self.recipe.find_learning_rate:
                self._take_found_rates()
            while (reason := self._reason_to_stop()) is None:
                self._train_epoch()
                row = self._finish_epoch()
                self._keep_if_best(row)
                self._save(row)
            test, nested = self._measure_best()
            self._write_suspects()
        except _StopRequested:
            self._save()
            raise Interrupted(
                f"interrupted after step {self._global_step()} of {self.plan.steps}, and saved",
                facts=f"in {self.run_dir}",
                hint=f"embedkit train --resume {self.run_dir}",
            ) from None
        self.events.write(
            "test", test or {}, self.progress.best["step"] if self.progress.best else 0
        )
        self._write_record("finished", reason=reason, test=test, nested=nested)
        self.tell.note("stopped", reason)
        tell_result(self.progress.best, self.progress.baseline, test, self.tell)
        for width, metrics in nested.items():
            self.tell.note("", f"{self._held_out()}: {brief(metrics)}  first {width} numbers")
        if not self.method.normalizes and self.plan.measured_by() == "classes":
            self.tell.note("metric", "this loss compares by distance; the numbers are by cosine")

    # --- one epoch, or what is left of it --------------------------------------------------------

    def _train_epoch(self) -> None:
        """Its batches still to come, each with torch's generator seeded for it."""
        progress, plan = self.progress, self.plan
        if progress.step == 0:
            self._begin_epoch()
        batches = self.sampler.batches(progress.epoch)[: plan.steps_of(progress.epoch)]
        sizes = [len(batch) for batch in batches]
        pictures = self._pictures(batches, progress.epoch, progress.step)
        self.network.train()
        self.method.train()
        name = f"epoch {progress.epoch + 1}/{plan.epochs}"
        with self.tell.progress(name, sum(sizes)) as advance:
            advance(sum(sizes[: progress.step]), 0)
            ready = self._timed(pictures)
            for rows, pixels in zip(batches[progress.step :], ready, strict=True):
                torch.manual_seed(seed_of(self.recipe.seed, "step", progress.epoch, progress.step))
                self._step(self._batch(rows, pixels))
                advance(len(rows), 0)
                if self._out_of_time():
                    break

    def _begin_epoch(self) -> None:
        torch.manual_seed(seed_of(self.recipe.seed, "epoch", self.progress.epoch))
        self.method.begin_epoch(self.progress.epoch, _View(self))
        self.world.align(self.network, self.method)

    def _pictures(
        self, batches: Sequence[npt.NDArray[np.int64]], epoch: int, start: int
    ) -> Iterator[Tensor]:
        """Of each batch from `start` on, this process's pictures with their noise, on the device.

        A GPU resamples the crops itself: threads on the CPU could not keep up with it.
        """
        device, part = self.plan.device, self.world.part
        places = [self.train_rows[batch] for batch in batches]
        if device.type == "cuda":
            preprocess = self.recipe.preprocess()
            for cuts in self.loader.cuts(places, epoch=epoch, start=start, part=part):
                yield resample_on(device, cuts, preprocess)
        else:
            for pixels in self.loader.batches(places, epoch=epoch, start=start, part=part):
                yield torch.from_numpy(pixels).to(device)

    def _timed(self, pictures: Iterator[Tensor]) -> Iterator[Tensor]:
        """The same, adding up how long the network waits for them."""
        while True:
            began = time.monotonic()
            pixels = next(pictures, None)
            self.waited += time.monotonic() - began
            if pixels is None:
                return
            yield pixels

    def _batch(self, rows: npt.NDArray[np.int64], pixels: Tensor) -> Batch:
        place = self.plan.device
        return Batch(
            pixels=pixels,
            rows=torch.from_numpy(rows).to(place),
            labels=torch.from_numpy(self.setting.labels[rows]).to(place),
            targets=None if self.targets is None else self.targets[rows].to(place),
            epoch=self.progress.epoch,
            step=self.progress.step,
        )

    def _step(self, batch: Batch) -> None:
        """Forward, loss, backward, update; then a place where the run may be left."""
        progress = self.progress
        told = self._learn(batch, self._rate_of(self._global_step()))
        for name, number in told.items():
            progress.sums[name] = progress.sums.get(name, 0.0) + number
        progress.step += 1
        if self.average is not None:
            self.average.update(self.network, self._global_step())
        self.events.write("train", told, self._global_step())
        rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        self.events.write("learning_rate", rates, self._global_step())
        self._leave_if_asked()

    def _learn(self, batch: Batch, rate: float) -> dict[str, float]:
        """One update at this share of the full learning rates; the loss before it, and more.

        Raises:
            NotFiniteError: Nothing was updated.
        """
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_lr"] * rate
        with self._autocast():
            network = divided(self.network, batch, chunk=recipe.chunk, world=self.world)
            outcome = self.method.step(network, batch)
        told = {"loss": float(outcome.loss.detach()), **self.method.stats}
        finite = math.isfinite(told["loss"]) and bool(outcome.embeddings.detach().isfinite().all())
        if not finite:
            raise self._not_finite(told["loss"])
        self.optimizer.zero_grad()
        self._backward(outcome)
        learning = [part for group in self.optimizer.param_groups for part in group["params"]]
        self.world.average_gradients(learning)
        if recipe.clip_gradient is not None:
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(learning, recipe.clip_gradient)
            told["gradient_norm"] = float(norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return told

    def _backward(self, outcome: Outcome) -> None:
        """The gradients of the loss, or of the terms in its place, one graph at a time."""
        terms = iter(outcome.terms)
        with self._autocast():
            term = next(terms, None)
        if term is None:
            torch.autograd.backward(self.scaler.scale(outcome.loss))
        while term is not None:
            value = self.scaler.scale(term.value)
            if term.learners is None:
                torch.autograd.backward(value)
            else:
                learners = [part for part in term.learners if part.requires_grad]
                torch.autograd.backward(value, retain_graph=True, inputs=learners)
            with self._autocast():
                term = next(terms, None)

    def _autocast(self) -> torch.autocast:
        amp = self.plan.amp
        return torch.autocast(self.plan.device.type, amp, enabled=amp is not None)

    def _not_finite(self, value: float) -> NotFiniteError:
        lower = self.recipe.backbone_learning_rate * self._found_factor() / 10
        return NotFiniteError(
            f"the network's output is no longer finite at epoch {self.progress.epoch + 1}, "
            f"step {self.progress.step + 1}",
            facts=f"the loss is {value}; the checkpoints of the last finished epoch are kept in "
            f"{self.run_dir}",
            hint=f"--learning-rate {lower:g}" + (" --amp off" if self.plan.amp else ""),
        )

    # --- the test of learning rates --------------------------------------------------------------

    def _take_found_rates(self) -> None:
        """Multiply all rates by what the test makes of them; it is made once in a training."""
        if self.progress.rate_test is None:
            self.progress.rate_test = self._find_rates().to_json()
            self._save()
        for group in self.optimizer.param_groups:
            group["full_lr"] *= self._found_factor()
        tell_rates(self.progress.rate_test, self.recipe, self.tell)

    def _find_rates(self) -> RangeTest:
        """Try them; afterwards, also when stopped, all is as if nothing had been tried."""
        before = pack(self.network, self.method, None)
        before = {name: tensor.clone() for name, tensor in before.items()}
        scaler = self.scaler.state_dict()
        try:
            found = self._try_rates()
        finally:
            unpack(before, self.network, self.method, None)
            self.optimizer.state.clear()
            if scaler:
                self.scaler.load_state_dict(scaler)
        return self.world.of_leader(lambda: found)

    def _try_rates(self) -> RangeTest:
        """The batches and pictures are those of a first epoch of so many steps."""
        self._begin_epoch()
        batches = self.method.sampler(self.setting, STEPS).batches(0)
        pictures = self._pictures(batches, 0, 0)
        self.network.train()
        self.method.train()
        with self.tell.progress("rates", STEPS) as advance:

            def step(number: int, factor: float) -> float:
                torch.manual_seed(seed_of(self.recipe.seed, "step", 0, number))
                batch = self._batch(batches[number], next(pictures))
                try:
                    loss = self._learn(dataclasses.replace(batch, step=number), factor)["loss"]
                except NotFiniteError:
                    return math.nan
                advance(1, 0)
                self._leave_if_asked()
                return loss

            return range_test(step)

    def _found_factor(self) -> float:
        """By which the recipe's learning rates are multiplied."""
        found = self.progress.rate_test
        return 1.0 if found is None else float(found["factor"])

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
            "learning_rate": self._rate_of(self._global_step() - 1)
            * recipe.backbone_learning_rate
            * self._found_factor(),
            "stats": means,
            "val": None,
        }
        if len(plan.measured("val")) and (last or (progress.epoch + 1) % recipe.eval_every == 0):
            row["val"], row["spread"] = self._measure(self.result, "val")
            self.events.write("val", {**row["val"], "spread": row["spread"]}, row["step"])
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
        if len(self.plan.measured("val")):
            if row["val"] is None:
                return
            if best is not None and quality(row["val"]) <= quality(best["val"]):
                return
        self.progress.best = row
        state = {**self._identity(), "best": row}
        path = self.run_dir / "best.safetensors"
        write_checkpoint(path, pack(self.result, self.method, None), state)

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
            if len(later) >= recipe.patience and len(self.plan.measured("val")):
                name = quality_name(progress.best["val"])
                return f"no better {name} in {len(later)} evaluations"
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
            and row["val"].get("tie_share", 0) < 0.5  # where most tie, a good rank is an accident
            and quality(row["val"]) > quality(baseline)
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
            tenth = self._found_factor() / 10
            lower = recipe.backbone_learning_rate * tenth, recipe.head_learning_rate * tenth
            advice = (
                f"lower the learning rate (--learning-rate {lower[0]:g} "
                f"--head-learning-rate {lower[1]:g})"
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
            if len(self.plan.measured(split))
        }

    def _measure_best(self) -> tuple[dict[str, Any] | None, dict[str, dict[str, Any]]]:
        """The best weights on ``test``, or again on ``val`` to keep its embeddings.

        And there the metrics of each narrower width.
        """
        split = self._held_out()
        if not split:
            return None, {}
        best = copy.deepcopy(self.network)
        unpack(read_checkpoint(self.run_dir / "best.safetensors").tensors, best, None, None)
        embeddings = self.embed(best.eval(), self.plan.rows(split)).numpy()
        metrics = self._judge(embeddings, split, keep="after")[0]
        nested = {
            str(width): self._judge(np.ascontiguousarray(embeddings[:, :width]), split)[0]
            for width in self.recipe.widths[:-1]
        }
        return (metrics if split == "test" else None), nested

    def _write_suspects(self) -> None:
        """Name the photos whose labels the classifier doubts, where there is one."""
        noise = self.method.noise if isinstance(self.method, Assisted) else None
        if noise is None:
            return
        photos, labels = self.setting.photos, self.setting.labels
        beliefs = noise.beliefs(_View(self).embeddings()).numpy()
        found = find_suspects(photos.paths, labels, self.setting.classes, beliefs)
        path = self.run_dir / SUSPECTS_FILE
        write_suspects(path, found)
        self.tell.note(
            "suspects", f"{len(found):,} of {len(labels):,} labels of train are doubted: {path}"
        )

    def _held_out(self) -> str:
        """The split that is measured at the end, or an empty text."""
        return next((name for name in ("test", "val") if len(self.plan.measured(name))), "")

    def _measure(
        self,
        embed: Callable[[Tensor], Tensor],
        split: str,
        *,
        keep: Literal["before", "after"] | None = None,
    ) -> tuple[dict[str, Any], float]:
        """Metrics of one split, and how far its embeddings are spread."""
        return self._judge(self.embed(embed, self.plan.rows(split)).numpy(), split, keep=keep)

    def _judge(
        self,
        given: npt.NDArray[np.float32],
        split: str,
        *,
        keep: Literal["before", "after"] | None = None,
    ) -> tuple[dict[str, Any], float]:
        """The same of what the network gave for the split's rows."""
        rows, photos = self.plan.rows(split), self.plan.photos
        # The pooled features before training are one vector, whatever the network makes of them.
        vectors = 1 if keep == "before" else self.network.vectors
        embeddings = split_rows(given, vectors)
        if keep is not None and split == self._held_out():
            labels = [photos.labels[row] for row in rows]
            keep_embeddings(self.run_dir, keep, rows=rows, labels=labels, embeddings=embeddings)
        unit = self.method.normalizes
        # The untrained features are always compared by cosine, at which they are best.
        metric = "cosine" if unit or keep == "before" else "l2"
        metrics = measure(self.plan, rows, embeddings, metric=metric)
        return metrics, _spread(embeddings.reshape(len(rows), -1), unit=unit)

    def embed(
        self,
        embed: Callable[[Tensor], Tensor],
        rows: npt.NDArray[np.int64],
        done: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """``(len(rows), ...)`` float32 on the CPU, of photos without noise, in evaluation mode."""
        self.network.eval()
        parts = []
        with torch.no_grad():
            for pixels in self.loader.plain(rows[self.world.part(len(rows))], _EVALUATION_BATCH):
                parts.append(embed(self._to_device(pixels)).float().cpu())
                if done is not None:
                    done(len(pixels) * self.world.size, 0)
                if self.world.alone:  # Others may have no more batches, and would not be asked.
                    self._leave_if_asked()
            return self.world.gather(torch.cat(parts), len(rows))

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
        if state.get("teacher") != ours["teacher"]:
            raise MismatchError(
                f"the teacher is not the one the run {self.run_dir} was begun with",
                facts=f"the model {self.recipe.teacher} has other weights now",
                hint="put the old file back, or begin a new run",
            )
        average = self.average.network if self.average else None
        unpack(tensors, self.network, self.method, self.optimizer, average)
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
        average = self.average.network if self.average else None
        tensors = pack(self.network, self.method, self.optimizer, average)
        write_checkpoint(self.run_dir / "last.safetensors", tensors, state)
        if row is not None:
            with (self.run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        else:
            _write_text(self.run_dir / "config.toml", self.recipe.to_toml())
            write_split(self.run_dir / "split.csv", self.plan.photos)
            if self.plan.failures:
                _write_text(self.run_dir / "failed.jsonl", failure_lines(self.plan.failures))
        self._write_record("unfinished")

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint belongs to."""
        photos = self.plan.photos
        data = {"hash": photos.manifest_hash(), "images": len(photos.paths)}
        distillation = self.method.distillation if isinstance(self.method, Assisted) else None
        teacher = distillation.teacher.fingerprint if distillation is not None else None
        return {"recipe": self.recipe.to_json(), "data": data, "teacher": teacher}

    def _write_record(
        self,
        status: str,
        *,
        reason: str | None = None,
        test: dict[str, Any] | None = None,
        nested: dict[str, dict[str, Any]] | None = None,
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
            "processes": self.world.size,
            "photos_root": str(plan.photos.root.resolve()),
            "data": {
                **self._identity()["data"],
                "splits": {split: plan.counts(split) for split in ("train", "val", "test")},
                **progress.skipped,
            },
            "check": progress.check,
            "normalizes": self.method.normalizes,
            "loss_options": {**methods.options(recipe.loss), **recipe.loss_options},
            "steps": self._global_step(),
            "elapsed": round(progress.elapsed, 3),
            "baseline": progress.baseline,
            "best": progress.best,
            "test": test,
            "nested": nested or {},
            "rate_test": progress.rate_test,
            "versions": versions(),
        }
        _write_text(self.run_dir / "run.json", json.dumps(record, indent=1) + "\n")

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
        return limit is not None and self.world.any(self._elapsed() >= limit)

    def _leave_if_asked(self) -> None:
        if self.world.any(self.stop.is_set()):
            raise _StopRequested


class _View:
    """The training photos as the network sees them now; see `embedkit.methods.View`."""

    def __init__(self, training: _Training) -> None:
        self._training = training

    def embeddings(self, rows: Sequence[int] | npt.NDArray[np.int64] | None = None) -> Tensor:
        return self.through(self._training.network, rows)

    def features(self, rows: Sequence[int] | npt.NDArray[np.int64] | None = None) -> Tensor:
        return self.through(self._training.network.features, rows)

    def through(
        self,
        embed: Callable[[Tensor], Tensor],
        rows: Sequence[int] | npt.NDArray[np.int64] | None = None,
    ) -> Tensor:
        training = self._training
        places = training.train_rows if rows is None else training.train_rows[np.asarray(rows)]
        with training.tell.progress("looking", len(places)) as advance:
            return training.embed(embed, places, advance)


def _write_text(path: Path, text: str) -> None:
    with published(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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


def _create_optimizer(groups: Iterable[Group], weight_decay: float) -> torch.optim.AdamW:
    """AdamW with a rate for each group; what does not learn is left out."""
    settings = [
        {
            "name": group.name,
            "params": learning,
            "lr": group.learning_rate,
            "full_lr": group.learning_rate,
            "weight_decay": weight_decay if group.weight_decay is None else group.weight_decay,
        }
        for group in groups
        if (learning := [part for part in group.parameters if part.requires_grad])
    ]
    return torch.optim.AdamW(settings, fused=True)


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
