"""Training against other trainers in one run: images a second, and time to the same recall.

    python -m benchmarks.training [--data ../shared/data/grocery] [--weights FILE] [--oml PYTHON]

The same photos, network, first weights, batches of 16 classes x 4 images, learning rates, crops,
flips and losses for all, as many decoding workers each as there are cores. They take turns.

embedkit  `embedkit.train`.
pml       pytorch-metric-learning's `trainers.MetricLossOnly` with a DataLoader.
oml       open-metric-learning's documented loop (`benchmarks/training_oml.py`). It wants an older
          NumPy, so it runs in an environment of its own, which `--oml` names:
          python -m venv oml && oml/bin/pip install open-metric-learning omegaconf \\
          pytorch-metric-learning safetensors
plain     the same DataLoader in a plain PyTorch loop; only its rate.
bound     forward, loss and backward of our network on one ready batch, without an update, in
          memory kept from step to step: our trainer cannot be faster.

Each runs in a process of its own. Ours trains frozen batch normalisations as part of their
convolutions (`embedkit.models.folded`); the others get the network as torchvision wrote it.

Without rates (`--rounds 0`) what is found is kept as `training-recall.json`.

Rates are of 24 classes x 8 photos after three steps, in which workers start and photos are read the
first time: ours keeps photos decoded, the others decode them in each epoch. On the way to recall
all photos of the training classes are used, and ours too decodes each a first time. Recall@1 is
that of held-out classes and is measured off the clock, as is what ours writes to disk; the time is
that to the first measurement at which all of a loss have the recall that all of them reach.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import io
import json
import logging
import multiprocessing
import os
import statistics
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pytorch_metric_learning import trainers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.course import WARM, Course, Stopwatch, Update
from benchmarks.figures import machine, save
from embedkit import losses
from embedkit.data import PhotoLoader, PhotoSet, PKSampler, draw_products, read_photos
from embedkit.models import EmbeddingNet
from embedkit.train import Recipe, train
from embedkit.train.checkpoint import read_checkpoint, unpack
from embedkit.train.guards import kept_memory, seed_of
from embedkit.train.run import create_untrained
from embedkit.train.story import Silent

__all__ = ["Task", "make_course", "measure_rates", "measure_recall", "time_to_recall"]

_RATE_CLASSES, _RATE_IMAGES = 24, 8
_ROOT = Path(__file__).parents[1]

Found = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """One training for each of the trainers.

    Attributes:
        recipe: Ours; `course` says the same to the others.
        photos: That are trained on.
        course: With the same batches.
    """

    recipe: Recipe
    photos: PhotoSet
    course: Course


def make_course(
    recipe: Recipe, photos: PhotoSet, *, held_out: str, recall: bool, workers: int
) -> Task:
    """The task of a recipe with `epochs` and `epoch_steps`; an epoch ends with a measurement."""
    assert recipe.epochs is not None
    names = sorted(set(photos.labels))
    labels = [names.index(label) for label in photos.labels]
    sampler = PKSampler(
        labels,
        classes_per_batch=recipe.classes_per_batch,
        images_per_class=recipe.images_per_class,
        seed=recipe.seed,
        steps=recipe.epoch_steps,
    )
    batches = [batch.tolist() for epoch in range(recipe.epochs) for batch in sampler.batches(epoch)]
    preprocess = recipe.preprocess()
    course = Course(
        files=[str(path) for path in photos.files()],
        labels=labels,
        batches=batches,
        held_out=held_out,
        every=(recipe.epoch_steps or 0) if recall else 0,
        loss=recipe.loss,
        network={
            "backbone": recipe.backbone,
            "weights": recipe.weights,
            "pooling": recipe.pooling,
            "dim": recipe.dim,
            "image_size": (preprocess.height, preprocess.width),
            "mean": preprocess.mean,
            "std": preprocess.std,
        },
        freeze=recipe.freeze,
        batch_norm_frozen=recipe.batch_norm_frozen,
        crop=recipe.augment_scale,
        rates=(
            recipe.backbone_learning_rate,
            recipe.head_learning_rate,
            recipe.proxy_learning_rate,
        ),
        weight_decay=recipe.weight_decay,
        workers=workers,
        seed=seed_of(recipe.seed, "network"),
    )
    return Task(recipe, photos, course)


def measure_rates(task: Task, *, oml: Path | None, rounds: int) -> Found:
    """Images per second, medians over rounds in which the trainers take turns."""
    ways = {**_trainers(oml), "plain": partial(_apart, _plain), "bound": partial(_apart, _bound)}
    found: dict[str, list[Found]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(way(task))
            print(f"  {name:<10}{found[name][-1]['images/s']:8.1f} images/s", flush=True)
    rates: Found = {}
    for unit in ("images/s", "images/processor second"):
        rates[unit] = {
            name: statistics.median(row[unit] for row in rows) for name, rows in found.items()
        }
        ours = rates[unit]["embedkit"]
        rates[f"{unit}, embedkit against"] = {
            name: ours / rate for name, rate in rates[unit].items() if name != "embedkit"
        }
    return rates


def measure_recall(tasks: Sequence[Task], *, oml: Path | None) -> Found:
    """`time_to_recall` of one loss; `tasks` differ in their seed."""
    found: dict[str, list[list[dict[str, float]]]] = {name: [] for name in _trainers(oml)}
    for task in tasks:
        for name, way in _trainers(oml).items():
            found[name].append(way(task)["marks"])
            last = found[name][-1][-1]
            print(
                f"  {task.recipe.loss:<14}{name:<10}recall@1 {last['recall']:.3f} after "
                f"{last['seconds']:.0f} s, {last['processor']:.0f} of the processor",
                flush=True,
            )
    return time_to_recall(
        {
            name: [
                {key: statistics.mean(mark[key] for mark in marks) for key in marks[0]}
                for marks in zip(*curves, strict=True)
            ]
            for name, curves in found.items()
        }
    )


def time_to_recall(curves: dict[str, list[dict[str, float]]]) -> Found:
    """When each first has the recall that all of them reach.

    Args:
        curves: Of each trainer ``step, recall, seconds, processor``, from step 0 on.
    """
    target = min(max(mark["recall"] for mark in curve) for curve in curves.values())
    reached = {
        name: next(mark for mark in curve if mark["recall"] >= target)
        for name, curve in curves.items()
    }
    ours = reached["embedkit"]
    against = {
        name: {
            unit: ours[unit] / mark[unit] if mark[unit] else None
            for unit in ("seconds", "processor")
        }
        for name, mark in reached.items()
        if name != "embedkit"
    }
    best = {name: max(mark["recall"] for mark in curve) for name, curve in curves.items()}
    return {
        "recall@1": target,
        "reached": reached,
        "time of embedkit against": against,
        "best recall@1": best,
        "curves": curves,
    }


# --- the trainers ----------------------------------------------------------------------------


def _trainers(oml: Path | None) -> dict[str, Callable[[Task], Found]]:
    ways: dict[str, Callable[[Task], Found]] = {
        "embedkit": partial(_apart, _ours),
        "pml": partial(_apart, _pml),
    }
    if oml is not None:
        ways["oml"] = partial(_oml, python=oml)
    return ways


def _apart(way: Callable[[Task], Found], task: Task) -> Found:
    """In a process of its own, whose memory no other trainer has touched."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(_quietly, way, task).result()


def _quietly(way: Callable[[Task], Found], task: Task) -> Found:
    warnings.simplefilter("ignore")  # The peer's trainer is written for an older PyTorch.
    logging.disable(logging.INFO)
    return way(task)


def _ours(task: Task) -> Found:
    watch = Stopwatch(task.course)
    with tempfile.TemporaryDirectory() as folder:
        seen = _Watched(task, watch, Path(folder) / "run")
        train(
            task.recipe,
            task.photos,
            seen.run_dir,
            device="cpu",
            workers=task.course.workers,
            reporter=seen,
        )
        seen.mark()
    return watch.result()


class _Watched(Silent):
    """Starts and stops the watch with the epochs, and measures what each has left behind."""

    def __init__(self, task: Task, watch: Stopwatch, run_dir: Path) -> None:
        self._task, self._watch, self.run_dir = task, watch, run_dir

    @contextlib.contextmanager
    def progress(self, what: str, total: int | None) -> Iterator[Callable[[int, int], None]]:
        if not what.startswith("epoch"):
            yield lambda done, failed: None
            return

        def advance(done: int, failed: int) -> None:
            if done:
                self._watch.step()

        self.mark()
        self._watch.go()
        try:
            yield advance
        finally:
            self._watch.stand()

    def mark(self) -> None:
        """The recall of the last checkpoint."""
        if not self._task.course.every:
            return
        network = create_untrained(self._task.recipe, weights="none")
        saved = read_checkpoint(self.run_dir / "last.safetensors")
        unpack(saved.tensors, network, None, None)
        self._watch.mark(network)


def _pml(task: Task) -> Found:
    course = task.course
    network = course.first_network()
    loss = course.peer_loss()
    # Its trainer has an optimiser for each part; the groups are those of `Update`.
    parts: dict[str, nn.Module] = {
        "trunk": _Trunk(network),
        "embedder": network.head,
        "metric_loss": loss,
    }
    update = Update(course, network, loss)
    groups = [group["params"] for group in update.optimizer.param_groups]
    optimizers = {
        f"{name}_optimizer": torch.optim.AdamW(group, rate, weight_decay=course.weight_decay)
        for name, group, rate in zip(parts, groups, course.rates, strict=False)
    }
    watch = Stopwatch(course)
    trainer = trainers.MetricLossOnly(
        models={"trunk": parts["trunk"], "embedder": parts["embedder"]},
        optimizers=optimizers,
        lr_schedulers={
            name.replace("_optimizer", "_scheduler_by_iteration"): update.follow(optimizer)
            for name, optimizer in optimizers.items()
        },
        batch_size=len(course.batches[0]),
        loss_funcs={"metric_loss": loss},
        dataset=_Files(course),
        # Its loader takes single places in order, and these are those of the batches.
        sampler=[row for batch in course.batches for row in batch],
        iterations_per_epoch=len(course.batches),
        freeze_trunk_batchnorm=course.batch_norm_frozen,
        dataloader_num_workers=course.workers,
        end_of_iteration_hook=lambda trainer: watch.step_and_mark(network),
    )
    if course.every:
        watch.mark(network)
    watch.go()
    with contextlib.redirect_stderr(io.StringIO()):  # its bar
        trainer.train(num_epochs=1)
    watch.stand()
    return watch.result()


def _oml(task: Task, python: Path) -> Found:
    done = subprocess.run(
        [str(python), "-m", "benchmarks.training_oml"],
        input=json.dumps(dataclasses.asdict(task.course)),
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        cwd=_ROOT,
    )
    found: Found = json.loads(done.stdout.splitlines()[-1])
    return found


def _plain(task: Task) -> Found:
    course = task.course
    network = course.first_network()
    loss = _our_loss(task)
    update = Update(course, network, loss)
    loader = DataLoader(_Files(course), batch_sampler=course.batches, num_workers=course.workers)
    watch = Stopwatch(course)
    watch.go()
    for pixels, labels in loader:
        torch.autograd.backward(loss(network(pixels), labels))
        update()
        watch.step()
    watch.stand()
    return watch.result()


def _bound(task: Task) -> Found:
    course = task.course
    network = course.first_network(EmbeddingNet)
    loss = _our_loss(task)
    size = len(course.batches[0])
    pixels = torch.randint(0, 256, (size, course.side, course.side, 3)).to(torch.uint8)
    labels = torch.tensor([course.labels[row] for row in course.batches[0]])
    watch = Stopwatch(course)
    with kept_memory():
        watch.go()
        for _ in course.batches:
            network.zero_grad()
            torch.autograd.backward(loss(network(pixels), labels))
            watch.step()
        watch.stand()
    return watch.result()


def _our_loss(task: Task) -> nn.Module:
    name = task.recipe.loss
    sizes = {"num_classes": max(task.course.labels) + 1, "embedding_dim": task.recipe.dim}
    return losses.create(name, **(sizes if losses.needs_classes(name) else {}))


class _Trunk(nn.Module):
    """Our network before its head."""

    def __init__(self, network: EmbeddingNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network.features(pixels)


class _Files(Dataset[tuple[Tensor, int]]):
    """Photos as such scripts read them; uint8, since the network normalises."""

    def __init__(self, course: Course) -> None:
        self._files, self._labels = course.files, course.labels
        self._crop = transforms.Compose(
            [
                transforms.RandomResizedCrop(course.side, course.crop),
                transforms.RandomHorizontalFlip(),
                transforms.PILToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        with Image.open(self._files[row]) as image:
            pixels: Tensor = self._crop(image.convert("RGB"))
        return pixels.permute(1, 2, 0).contiguous(), self._labels[row]


# --- the photos ------------------------------------------------------------------------------


def _few(photos: PhotoSet) -> PhotoSet:
    """The first photos of the first classes, as many as are read within the first steps."""
    names = sorted(set(photos.labels))[:_RATE_CLASSES]
    rows = [
        row
        for name in names
        for row in [row for row, label in enumerate(photos.labels) if label == name][:_RATE_IMAGES]
    ]
    return photos.subset(rows)


def _read(data: Path) -> tuple[PhotoSet, PhotoSet, list[bool]]:
    """Photos to train on, photos of other classes, and which of these ask; none: all do."""
    photos = read_photos(data / "manifest.csv" if (data / "manifest.csv").exists() else data)
    sides = {
        side: photos.subset([row for row, name in enumerate(photos.split) if name == side])
        for side in ("train", "test")
    }
    visits = data / "original_split.csv"
    if not visits.exists():
        return sides["train"], sides["test"], [False] * len(sides["test"].paths)
    with visits.open(encoding="utf-8") as file:
        visit = {row["path"]: row["original_split"] for row in csv.DictReader(file)}
    asks = [visit[str(path)] == "test" for path in sides["test"].paths]
    return sides["train"], sides["test"], asks


def _draw(folder: Path) -> tuple[PhotoSet, PhotoSet, list[bool]]:
    """Generated products, a third of the classes held out."""
    draw_products(folder, classes=72, images_per_class=_RATE_IMAGES, size=384)
    photos = read_photos(folder)
    names = sorted(set(photos.labels))
    held = set(names[::3])
    rows = range(len(photos.paths))
    train_rows = [row for row in rows if photos.labels[row] not in held]
    test_rows = [row for row in rows if photos.labels[row] in held]
    return photos.subset(train_rows), photos.subset(test_rows), [False] * len(test_rows)


def _keep_held_out(
    path: Path, photos: PhotoSet, asks: Sequence[bool], recipe: Recipe, *, most: int
) -> None:
    """Pixels, labels and who asks, of `most` photos evenly spread over the set."""
    rows = np.unique(np.linspace(0, len(photos.paths) - 1, most).round().astype(int))
    loader = PhotoLoader(photos.files(), recipe.preprocess(), augment=None, seed=0, cache_bytes=0)
    np.savez(
        path,
        pixels=np.concatenate(list(loader.plain(rows, 64))),
        labels=np.array([photos.labels[row] for row in rows]),
        query=np.array(asks)[rows],
    )


def _about(asked: argparse.Namespace) -> Found:
    """What a run is read with; parts are added as they are measured."""
    plain = {name: value for name, value in vars(asked).items() if name not in ("data", "oml")}
    return {
        "machine": machine(),
        **plain,
        "weights": Path(asked.weights).name,
        "data": asked.data.name if asked.data else "generated products",
        "threads": torch.get_num_threads(),
        "skipped": {} if asked.oml else {"oml": "no environment with it was named by --oml"},
        "recall": {},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="a folder with manifest.csv (generated photos)")
    parser.add_argument("--backbone", default="mobilenet_v3_small")
    parser.add_argument("--weights", default="none")
    parser.add_argument("--freeze", type=int, default=0)
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--losses", nargs="*", default=["rll", "triplet", "proxy-anchor"])
    parser.add_argument("--steps", type=int, default=120, help="on the way to recall")
    parser.add_argument("--every", type=int, default=20, help="steps between measurements")
    parser.add_argument("--held-out", type=int, default=600, help="photos that measure recall")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rate-steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3, help="of the rates; 0: none")
    parser.add_argument("--oml", type=Path, help="Python of an environment with it")
    asked = parser.parse_args()
    workers = len(os.sched_getaffinity(0))
    recipe = Recipe(
        backbone=asked.backbone,
        weights=asked.weights,
        freeze=asked.freeze,
        image_size=asked.image_size,
        freeze_batch_norm=True,
        learning_rate=1e-4 if asked.weights != "none" else None,
        val_share=0,
    )
    found = _about(asked)
    results = "training" if asked.rounds else "training-recall"
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sets = _read(asked.data) if asked.data else _draw(work / "products")
        photos, held_out, asks = sets
        file = work / "held-out.npz"
        _keep_held_out(file, held_out, asks, recipe, most=asked.held_out)
        if asked.rounds:
            steps = WARM + asked.rate_steps
            timed = dataclasses.replace(recipe, loss="triplet", epochs=1, epoch_steps=steps)
            task = make_course(timed, _few(photos), held_out="", recall=False, workers=workers)
            found["rates"] = measure_rates(task, oml=asked.oml, rounds=asked.rounds)
            print(json.dumps(found["rates"], indent=1))
            save(results, found)
        for name in asked.losses:
            tasks = [
                make_course(
                    dataclasses.replace(
                        recipe,
                        loss=name,
                        seed=seed,
                        epochs=asked.steps // asked.every,
                        epoch_steps=asked.every,
                    ),
                    photos,
                    held_out=str(file),
                    recall=True,
                    workers=workers,
                )
                for seed in asked.seeds
            ]
            row = measure_recall(tasks, oml=asked.oml)
            found["recall"][name] = row
            save(results, found)
            print(f"{name}: recall@1 {row['recall@1']:.3f}, {row['time of embedkit against']}")


if __name__ == "__main__":
    # Decoding threads want the cores that idle OpenMP threads would spin on.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
