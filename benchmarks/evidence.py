"""Every loss and method under one short budget on real photos, beside pytorch-metric-learning.

    python -m benchmarks.evidence [--data ../shared/data] [--steps 60] [--only rll "peer rll"]

Each is trained as `embedkit train` does: MobileNetV2 from the same ImageNet weights, 128 pixels,
BatchNorm and the first 7 blocks frozen, 128-d, batches of 16 classes x 4 photos, AdamW 1e-4 / head
1e-3 / class vectors 1e-2, warm-up over a tenth and a cosine, one seed, nothing tuned per loss. The
rows of pytorch-metric-learning are its loss and miner in that same training, so that the loss is
all that differs; a method's own batches are ours alone. Judged on the 40 products nobody has seen:
recall@1 and MAP@R leave-one-out, and recall@1 of photos from other shop visits than the gallery's,
all by cosine. Losses that learn from numbers have 89 portions of food, whose number is the log2 of
the volume, seen from above and looked for among those seen from the side; triplets are drawn from
the products' labels.

One row per training goes to the results as soon as it is done: an interrupted benchmark goes on
where it was, and a training that failed is tried again. Those named by --only are done anew.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pytorch_metric_learning import losses as pml
from torch import Tensor, nn

from benchmarks.figures import machine
from benchmarks.losses import PEERS, ByLabel
from embedkit import methods
from embedkit.atomic import published
from embedkit.data import PhotoLoader, PhotoSet, Triplet, read_photos
from embedkit.data.doctor_facts import default_cache
from embedkit.errors import EmbedKitError, Interrupted, UsageError
from embedkit.evaluate import continuous_metrics, retrieval_metrics
from embedkit.imaging import Pixels
from embedkit.models import create_network
from embedkit.train import Recipe, train

__all__ = ["Cell", "Task", "all_cells", "measure_cells", "table"]

# Peers with class vectors, by our name; the others are made by benchmarks.losses as they are.
_SIZED: dict[str, Callable[[int, int], nn.Module]] = {
    "proxy-anchor": pml.ProxyAnchorLoss,
    "softmax": pml.NormalizedSoftmaxLoss,
    "arcface": partial(pml.ArcFaceLoss, margin=math.degrees(0.5)),
    "proxy-nca": partial(pml.ProxyNCALoss, softmax_scale=9),
    "edms": lambda classes, width: ByLabel(pml.ManifoldLoss(l=width, K=classes)),
}
_UNTRAINED = "pretrained features"
_BATCH = 64
_RESULTS = Path(__file__).parent / "results" / "evidence.json"


@dataclass(frozen=True)
class Task:
    """What is learned from, and what it is judged on.

    Attributes:
        train: Every photo with what the losses of this task learn from.
        test: Photos of classes or portions that `train` has none of.
        asks: ``(len(test),)`` photos that ask in the harder protocol, the others answer; or None.
    """

    train: PhotoSet
    test: PhotoSet
    asks: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Cell:
    """One training. `peer` is a case of `benchmarks.losses.PEERS`; then `loss` is unused."""

    task: str
    loss: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    peer: str = ""

    @property
    def name(self) -> str:
        """As it stands in the table and in the results."""
        if self.peer:
            return f"peer {_case_name(self.peer)}"
        if not self.loss:
            return f"{_UNTRAINED}, {self.task}"
        return _named(self.loss, self.options)


def all_cells() -> list[Cell]:
    """The untrained network, every name that can be trained, and the peers, in this order."""
    tasks = {"classes": "products", "images": "products", "triplets": "triplets", "numbers": "food"}
    cells = [Cell("products"), Cell("food")]
    for name in methods.names():
        try:
            methods.create(name)
        except UsageError:
            continue  # no use in a training of its own; the method that feeds it has another name
        cells.append(Cell(tasks[methods.learns_from(name)], name))
    cells += [Cell("products", _loss_of(case), PEERS[case][0]) for case in PEERS if PEERS[case][0]]
    return [*cells, *(Cell("products", peer=case) for case in PEERS)]


def measure_cells(
    cells: Sequence[Cell],
    tasks: dict[str, Task],
    recipe: Recipe,
    results: Path,
    *,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Train and judge what has no row yet, and write a row for each.

    Args:
        cells: Of any of `tasks`.
        tasks: By name.
        recipe: The budget; the loss in it does not matter.
        results: JSON file; a former one must be of the same budget.
        cache: See `embedkit.train.train`.

    Returns:
        The content of `results`.

    Raises:
        UsageError: `results` is of another budget.
        Interrupted: Ctrl-C; the training it struck has no row.
    """
    _offer_peers()
    content = _read(results, _budget(recipe))
    pixels: dict[str, Pixels] = {}
    for number, cell in enumerate(cells, start=1):
        if cell.name in content["rows"] and "failed" not in content["rows"][cell.name]:
            continue
        task = tasks[cell.task]
        if cell.task not in pixels:
            pixels[cell.task] = _read_pixels(task.test, recipe)
        began = time.perf_counter()
        try:
            row = _measure(cell, task, recipe, pixels[cell.task], cache)
        except Interrupted:
            raise
        except Exception as error:
            # One that fails, in whatever way, is a result; the others still have their turn.
            row = {"failed": f"{type(error).__name__}: {error}"}
        row = {**dataclasses.asdict(cell), **row, "seconds": round(time.perf_counter() - began, 1)}
        content["rows"][cell.name] = row
        with published(results) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        print(f"{number}/{len(cells)}  {_line(cell.name, row)}", flush=True)
    return content


def table(content: dict[str, Any]) -> str:
    """Ours with its peer beside it, the best MAP@R first; what is below the untrained is marked."""
    rows = content["rows"]
    lines = [f"{'':<32}{'recall@1':>9}{'MAP@R':>7}{'visits':>8}{'peer recall@1':>16}{'MAP@R':>7}"]
    found = [row for row in rows.values() if row["task"] != "food" and not row["peer"]]
    floor = rows.get(f"{_UNTRAINED}, products", {}).get("map@r", 0.0)
    for row in sorted(found, key=lambda row: -row.get("map@r", -1)):
        name = _named(row["loss"], row["options"]) if row["loss"] else _UNTRAINED
        if "failed" in row:
            lines.append(f"{name:<32} failed: {row['failed'].splitlines()[0]}")
            continue
        peer = rows.get(f"peer {name}", {})
        beside = f"{peer['recall@1']:>14.3f}{peer['map@r']:>7.3f}" if "map@r" in peer else ""
        below = " <" if row["map@r"] < floor else ""
        lines.append(f"{_line(name, row)}{below:<2}{beside}".rstrip())
    food = [(name, row) for name, row in rows.items() if row["task"] == "food"]
    if food:
        lines += ["", f"{'':<32}{'nDCG@10':>9}{'volume off by':>15}"]
        lines += [_line(name, row) for name, row in food]
    return "\n".join(lines)


def _measure(
    cell: Cell, task: Task, recipe: Recipe, pixels: Pixels, cache: Path | None
) -> dict[str, Any]:
    if not (cell.loss or cell.peer):
        network = create_network(
            backbone=recipe.backbone,
            weights=Path(recipe.weights) if recipe.weights != "none" else "none",
            pooling=recipe.pooling,
            dim=recipe.dim,
            image_size=(recipe.image_size, recipe.image_size),
            mean=recipe.preprocess().mean,
            std=recipe.preprocess().std,
        )
        return _judge(task, _embed(network.eval().features, pixels), "cosine")
    loss = _peer_name(cell.peer) if cell.peer else cell.loss
    chosen = dataclasses.replace(recipe, loss=loss, loss_options=cell.options)
    with tempfile.TemporaryDirectory() as folder:
        run = train(chosen, task.train, Path(folder) / "run", device="cpu", cache=cache)
        embeddings = _embed(run.network(), pixels)
    metric = "cosine" if run.record["normalizes"] else "l2"
    return {**_judge(task, embeddings, metric), "training": round(run.record["elapsed"], 1)}


def _judge(task: Task, embeddings: npt.NDArray[np.float32], metric: str) -> dict[str, Any]:
    asks = task.asks
    answers = None if asks is None else ~asks
    if task.test.targets is not None:
        found = continuous_metrics(
            embeddings, task.test.targets, ks=(1, 10), query=asks, gallery=answers, metric=metric
        )
        return {"ndcg@10": found.ndcg[10], "target_distance@1": found.target_distance[1]}
    alone = retrieval_metrics(embeddings, task.test.labels)
    judged = {"recall@1": alone.recall[1], "map@r": alone.map_at_r}
    if asks is not None:
        across = retrieval_metrics(embeddings, task.test.labels, query=asks, gallery=answers)
        judged["visits recall@1"] = across.recall[1]
    return judged


def _embed(network: Callable[[Tensor], Tensor], pixels: Pixels) -> npt.NDArray[np.float32]:
    with torch.no_grad():
        parts = [network(part).float() for part in torch.from_numpy(pixels).split(_BATCH)]
    return torch.cat(parts).numpy()


def _read_pixels(photos: PhotoSet, recipe: Recipe) -> Pixels:
    loader = PhotoLoader(photos.files(), recipe.preprocess(), augment=None, seed=0, cache_bytes=0)
    return np.concatenate(list(loader.plain(range(len(photos)), _BATCH)))


def _budget(recipe: Recipe) -> dict[str, Any]:
    """What all trainings have in common."""
    settings = recipe.to_json()
    settings["weights"] = Path(recipe.weights).name
    return {key: value for key, value in settings.items() if not key.startswith("loss")}


def _read(results: Path, budget: dict[str, Any]) -> dict[str, Any]:
    if not results.exists():
        return {"machine": machine(), "budget": budget, "rows": {}}
    content: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    # A setting that is younger than the file was at its default then.
    if _budget(Recipe.from_json(content["budget"])) != budget:
        raise UsageError(
            f"{results} is of another budget", hint="another --results, or move the file away"
        )
    return content


def _line(name: str, row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{name:<32} failed: {row['failed'].splitlines()[0]}"
    if "ndcg@10" in row:
        return f"{name:<32}{row['ndcg@10']:>9.3f}{2 ** row['target_distance@1']:>14.2f}x"
    visits = row.get("visits recall@1")
    across = f"{'-' if visits is None else format(visits, '.3f'):>8}"
    return f"{name:<32}{row['recall@1']:>9.3f}{row['map@r']:>7.3f}{across}"


# --- the peers, as losses that can be named ------------------------------------------------------


def _offer_peers() -> None:
    """Put each peer, with its miner, among the losses that ``pml:NAME`` finds."""
    for case in PEERS:
        setattr(pml, _peer_name(case).removeprefix("pml:"), _as_class(case))


def _peer_name(case: str) -> str:
    words = case.replace(":", "-").split("-")
    return f"pml:Peer{''.join(word.capitalize() for word in words)}Loss"


def _as_class(case: str) -> type[nn.Module]:
    class Peer(nn.Module):
        def __init__(self, num_classes: int, embedding_size: int) -> None:
            super().__init__()
            sized = _SIZED.get(case)
            self.inner = sized(num_classes, embedding_size) if sized else PEERS[case][1]()
            # A loss with its miner is told apart from its metric by the loss alone.
            inner = getattr(self.inner, "loss", self.inner)
            self.distance = getattr(inner, "distance", None)

        def forward(self, rows: Tensor, labels: Tensor) -> Tensor:
            value: Tensor = self.inner(rows, labels)
            return value

    return Peer


def _loss_of(case: str) -> str:
    return case.partition(":")[0]


def _case_name(case: str) -> str:
    return _named(_loss_of(case), PEERS[case][0])


def _named(loss: str, options: dict[str, Any]) -> str:
    return " ".join([loss, *(f"{name}={value}".lower() for name, value in options.items())])


# --- the photos ----------------------------------------------------------------------------------


def read_tasks(data: Path) -> dict[str, Task]:
    """The three tasks on the photos in this folder; see its README."""
    with (data / "grocery/manifest.csv").open(newline="", encoding="utf-8") as file:
        coarse = tuple(row["coarse_label"] for row in csv.DictReader(file))
    with (data / "grocery/original_split.csv").open(newline="", encoding="utf-8") as file:
        visit = {Path(row["path"]): row["original_split"] for row in csv.DictReader(file)}
    photos = dataclasses.replace(read_photos(data / "grocery/manifest.csv"), category=coarse)
    learned, test = _split(photos)
    visits = np.array([visit[path] == "test" for path in test.paths])
    products = Task(learned, test, visits)
    blind = dataclasses.replace(
        learned, labels=("",) * len(learned), triplets=draw_triplets(learned.labels, seed=0)
    )
    return {
        "products": products,
        "triplets": Task(blind, test, visits),
        "food": _read_food(data / "continuous/ecust_food"),
    }


def draw_triplets(labels: Sequence[str], *, seed: int) -> tuple[Triplet, ...]:
    """Every photo once with another of its label and an odd one of another; none for lone ones."""
    rng = np.random.default_rng(seed)
    names = np.array(labels)
    triplets = []
    for place, name in enumerate(names):
        same = np.flatnonzero(names == name)
        same = same[same != place]
        other = np.flatnonzero(names != name)
        if len(same) and len(other):
            triplets.append(Triplet(place, int(rng.choice(same)), int(rng.choice(other))))
    return tuple(triplets)


def _read_food(folder: Path) -> Task:
    """Photos from above ask, photos from the side answer: no photo finds its own burst."""
    with (folder / "manifest.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    targets = tuple((math.log2(float(row["volume_cm3"])),) for row in rows)
    photos = dataclasses.replace(read_photos(folder / "manifest.csv"), targets=targets)
    view = {Path(row["path"]): row["view"] for row in rows}
    learned, test = _split(photos)
    return Task(learned, test, np.array([view[path] == "top" for path in test.paths]))


def _split(photos: PhotoSet) -> tuple[PhotoSet, PhotoSet]:
    learned, test = (
        photos.subset([row for row, name in enumerate(photos.split) if name == split])
        for split in ("train", "test")
    )
    return learned, test


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", nargs="+", help="Names as in the table, 'peer NAME' for a peer.")
    parser.add_argument("--results", type=Path, default=_RESULTS)
    asked = parser.parse_args()
    # Idle OpenMP threads that spin would keep the cores from the threads that decode.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    data = asked.data.resolve()
    recipe = Recipe(
        backbone="mobilenet_v2",
        weights=str(data / "weights/mobilenet_v2_imagenet.pth"),
        image_size=128,
        freeze=7,
        steps=asked.steps,
        val_share=0,
    )
    cells = all_cells()
    results: Path = asked.results
    if asked.only:
        known = {cell.name: cell for cell in cells}
        unknown = [name for name in asked.only if name not in known]
        if unknown:
            parser.error(f"no {', '.join(map(repr, unknown))} among: {', '.join(known)}")
        cells = [known[name] for name in asked.only]
        _forget(results, asked.only)
    try:
        content = measure_cells(cells, read_tasks(data), recipe, results, cache=default_cache())
    except Interrupted:
        raise SystemExit("interrupted; the same command goes on") from None
    except EmbedKitError as error:
        raise SystemExit(str(error)) from None
    print(table(content))


def _forget(results: Path, names: Sequence[str]) -> None:
    if results.exists():
        content = json.loads(results.read_text(encoding="utf-8"))
        content["rows"] = {key: row for key, row in content["rows"].items() if key not in names}
        with published(results) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
