"""A training that was done: its folder, its weights, and what an exported model says about it.

runs/<name>/  config.toml       the recipe
              run.json          what it was trained on, where, how far, how good
              metrics.jsonl     one line per epoch
              best.safetensors  the weights that count
              last.safetensors  where to go on
              split.csv         path,label,split,is_query,is_gallery and, where the data has
                                them, category,target_0,target_1,...
              triplets.csv      image_a,image_b,image_c,margin; c is the odd one; where there are
              suspects.csv      photos whose labels look wrong, where labels were doubted
              failed.jsonl      files that are no usable pictures, when there are any
runs/last     a relative link to the newest (a text file last.txt where links are impossible)
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from embedkit import __version__, methods
from embedkit.atomic import published
from embedkit.data import PhotoSet, Triplet
from embedkit.errors import DataError, MismatchError, UsageError
from embedkit.models import EmbeddingNet, weights_hash
from embedkit.models.quantized import QuantizedNet
from embedkit.runtime.contract import ModelContract, Prefix
from embedkit.train.checkpoint import read_checkpoint, unpack
from embedkit.train.recipe import Recipe

__all__ = ["Run", "latest_run", "new_run_dir", "point_last", "versions", "write_split"]

SCHEMA = "embedkit.run/1"
_TRIPLETS = "triplets.csv"


@dataclass(frozen=True)
class Run:
    """One training, read from its folder.

    Attributes:
        path: The folder.
        checkpoint: The file the weights come from: ``best.safetensors``, or the one asked for.
        recipe: By which it was trained.
        record: The content of run.json.
    """

    path: Path
    checkpoint: Path
    recipe: Recipe
    record: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> Run:
        """The run in a folder, or the one a checkpoint file lies in.

        Raises:
            UsageError: There is nothing of that name.
            MismatchError: It is no run of embedkit, or a damaged one.
        """
        path = _follow(path)
        if not path.exists():
            raise UsageError(f"there is no run {path}", hint="embedkit train ./photos")
        folder = path if path.is_dir() else path.parent
        try:
            text = (folder / "run.json").read_text(encoding="utf-8")
            record = json.loads(text)
            known = record["schema"] == SCHEMA
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MismatchError(
                f"{folder} is no run of embedkit", facts=f"run.json: {error}"
            ) from error
        if not known:
            raise MismatchError(
                f"the run {folder} was written by another embedkit",
                facts=f"it is {record['schema']!r}, this embedkit reads {SCHEMA!r}",
            )
        checkpoint = folder / "best.safetensors" if path.is_dir() else path
        return cls(folder, checkpoint, Recipe.load(folder / "config.toml"), record)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    def network(self) -> EmbeddingNet:
        """The trained network on the CPU, in evaluation mode.

        Raises:
            MismatchError: No epoch was finished yet, or the checkpoint is damaged or foreign.
        """
        if not self.checkpoint.exists():
            raise MismatchError(
                f"the run {self.path} has no finished epoch yet",
                facts=f"there is no {self.checkpoint.name}",
                hint=f"embedkit train --resume {self.path}",
            )
        network = create_untrained(self.recipe, weights="none")
        unpack(read_checkpoint(self.checkpoint).tensors, network, None, None)
        return network.eval()

    def contract(self) -> ModelContract:
        """Everything an exported model says about itself, but for the self-test.

        ``quality["fp32"]`` are the retrieval metrics of the split named in ``data["held_out"]``.
        """
        network = self.network()
        data = dict(self.record["data"])
        quality: dict[str, dict[str, float]] = {}
        measured = self.metrics()
        if measured is not None:
            data["held_out"] = self.held_out_split
            quality["fp32"] = _numbers_of(measured)
        normalizes = bool(self.record["normalizes"])
        # A deployed model does not tell where things lie on the machine it was trained on.
        recipe = {**self.recipe.to_json(), "weights": Path(self.recipe.weights).name}
        if self.recipe.teacher is not None:
            recipe["teacher"] = Path(self.recipe.teacher).name
        return ModelContract(
            name=self.name,
            embedding_dim=network.embedding_dim,
            vectors=network.vectors,
            prefixes=tuple(
                Prefix(width, _numbers_of(self.record.get("nested", {}).get(str(width), {})))
                for width in self.recipe.widths[:-1]
            ),
            normalizes=normalizes,
            metric="cosine" if normalizes else "l2",
            preprocess=self.recipe.preprocess(),
            weights_hash=weights_hash(network),
            backbone=self.recipe.backbone,
            pooling=self.recipe.pooling,
            loss=self.recipe.loss,
            loss_options=self.record["loss_options"],
            recipe=recipe,
            data=data,
            versions=self.record["versions"],
            quality=quality,
            codebooks=network.codebooks() if isinstance(network, QuantizedNet) else None,
        )

    @property
    def held_out_split(self) -> str:
        """``test`` where the data has one, else ``val``, else an empty text."""
        counts = self.record["data"]["splits"]
        return next((name for name in ("test", "val") if counts[name]["images"]), "")

    def metrics(self) -> dict[str, Any] | None:
        """Retrieval metrics of the best weights on `held_out_split`; None where there is none.

        A run that was not finished has not been tested yet: then those of ``val``.
        """
        return self.record["test"] or (self.record["best"] or {}).get("val")

    def held_out(self) -> tuple[list[Path], list[str]]:
        """Paths and labels of `held_out_split`: photos no weight was trained on.

        Raises:
            DataError: The run held nothing out.
        """
        if not self.held_out_split:
            raise DataError(
                f"the run {self.path} held no photos out", facts="it was trained with val_share = 0"
            )
        photos = self._of(self.held_out_split)
        return photos.files(), list(photos.labels)

    def val_photos(self) -> PhotoSet:
        """Those that chose the checkpoint; may be empty."""
        return self._of("val")

    def test_photos(self) -> PhotoSet:
        """Those that were looked at once, at the end; may be empty."""
        return self._of("test")

    def photos(self) -> PhotoSet:
        """All photos in use, every one with its split.

        Raises:
            MismatchError: split.csv is missing or damaged.
        """
        path = self.path / "split.csv"
        try:
            with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
                rows = list(csv.DictReader(file))
            columns = list(rows[0]) if rows else []
            targets = [name for name in columns if name.startswith("target_")]
            photos = PhotoSet(
                root=Path(self.record["photos_root"]),
                paths=tuple(Path(row["path"]) for row in rows),
                labels=tuple(row["label"] for row in rows),
                split=tuple(row["split"] for row in rows),
                category=tuple(row["category"] for row in rows) if "category" in columns else None,
                is_query=_flags([row["is_query"] for row in rows]),
                is_gallery=_flags([row["is_gallery"] for row in rows]),
                targets=tuple(tuple(float(row[name]) for name in targets) for row in rows)
                if targets
                else None,
            )
            return dataclasses.replace(photos, triplets=_read_triplets(path, photos))
        except (OSError, KeyError, ValueError, csv.Error) as error:
            raise MismatchError(
                f"the run {self.path} has no readable split.csv",
                facts=f"{type(error).__name__}: {error}",
            ) from error

    def _of(self, split: str) -> PhotoSet:
        photos = self.photos()
        return photos.subset([row for row, name in enumerate(photos.split) if name == split])


def _numbers_of(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if value is not None}


def create_untrained(recipe: Recipe, *, weights: str) -> EmbeddingNet:
    """The recipe's network before training; random weights come from torch's global generator."""
    method = methods.create(recipe.loss, **recipe.loss_options)
    return method.create_network(recipe, weights=weights)


def latest_run(root: Path = Path("runs")) -> Path:
    """The folder ``runs/last`` leads to.

    Raises:
        UsageError: There is none yet.
    """
    last = _follow(root / "last")
    if not last.is_dir():
        raise UsageError(f"there is no run in {root} yet", hint="embedkit train ./photos")
    return last


def new_run_dir(root: Path, recipe: Recipe, *, name: str | None = None) -> Path:
    """A folder that does not exist yet: `name`, or date-loss-backbone, then ``-2``, ``-3``.

    Raises:
        UsageError: `name` exists, or is no plain folder name.
    """
    if name is None:
        today = datetime.date.today().isoformat()
        stem = f"{today}-{recipe.loss}-{recipe.backbone}".replace(":", "-").replace("/", "-")
        numbered = (root / f"{stem}-{number}" for number in itertools.count(2))
        return next(path for path in itertools.chain([root / stem], numbered) if not path.exists())
    if Path(name).name != name or name in ("", ".", "..", "last"):
        raise UsageError(f"{name!r} cannot name a run", hint="a plain folder name, not 'last'")
    if (root / name).exists():
        raise UsageError(
            f"the run {root / name} exists",
            hint=f"another --name, or: embedkit train --resume {root / name}",
        )
    return root / name


def point_last(run_dir: Path) -> None:
    """Let ``last`` beside the run lead to it, at once or not at all."""
    link = run_dir.parent / "last"
    temporary = run_dir.parent / f".last.{os.getpid()}.tmp"
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(run_dir.name, target_is_directory=True)
        temporary.replace(link)
    except OSError:
        # No links on this file system, or something that is no link stands there.
        temporary.unlink(missing_ok=True)
        note = run_dir.parent / "last.txt"
        with published(note) as text:
            text.write_text(run_dir.name, encoding="utf-8")


def write_split(path: Path, photos: PhotoSet) -> None:
    """The photos in use as CSV, and triplets.csv beside it where there are triplets.

    The two flags are empty where the data has none.
    """

    def flags(values: Sequence[bool] | None) -> Sequence[str]:
        return [""] * len(photos.paths) if values is None else [str(int(v)) for v in values]

    names = [one.as_posix() for one in photos.paths]
    columns: dict[str, Sequence[str]] = {
        "path": names,
        "label": photos.labels,
        "split": photos.split,
        "is_query": flags(photos.is_query),
        "is_gallery": flags(photos.is_gallery),
    }
    if photos.category is not None:
        columns["category"] = photos.category
    for place in range(len(photos.targets[0]) if photos.targets else 0):
        columns[f"target_{place}"] = [repr(row[place]) for row in photos.targets or ()]
    _write_csv(path, list(columns), zip(*columns.values(), strict=True))
    if photos.triplets is not None:
        _write_csv(
            path.with_name(_TRIPLETS),
            ["image_a", "image_b", "image_c", "margin"],
            (
                (
                    *(names[row] for row in (one.a, one.b, one.odd)),
                    "" if one.margin is None else repr(one.margin),
                )
                for one in photos.triplets
            ),
        )


def _write_csv(path: Path, header: list[str], rows: Iterable[Sequence[str]]) -> None:
    with (
        published(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def _read_triplets(split: Path, photos: PhotoSet) -> tuple[Triplet, ...] | None:
    path = split.with_name(_TRIPLETS)
    if not path.exists():
        return None
    place = {one.as_posix(): row for row, one in enumerate(photos.paths)}
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return tuple(
            Triplet(
                a=place[row["image_a"]],
                b=place[row["image_b"]],
                odd=place[row["image_c"]],
                margin=float(row["margin"]) if row["margin"] else None,
            )
            for row in csv.DictReader(file)
        )


def versions() -> dict[str, str]:
    """Of what takes part in a training."""
    packages = ("numpy", "pillow", "safetensors", "torchvision")
    found = {name: version(name) for name in packages}
    return {"embedkit": __version__, "torch": torch.__version__, **found}


def _flags(cells: list[str]) -> tuple[bool, ...] | None:
    return tuple(cell == "1" for cell in cells) if any(cells) else None


def _follow(path: Path) -> Path:
    """`path`, or where the text file that stands in for a link leads."""
    note = path.with_name(f"{path.name}.txt")
    if path.name == "last" and not path.exists() and note.is_file():
        return path.parent / note.read_text(encoding="utf-8").strip()
    return path.resolve() if path.is_symlink() else path
