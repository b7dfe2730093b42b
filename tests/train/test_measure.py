"""Each kind of data is held out, measured and told in its own way, and read back as it was."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from embedkit.data import PhotoSet, Triplet, read_photos
from embedkit.errors import DataError
from embedkit.train import Recipe, Run, make_plan, train
from embedkit.train.measure import brief, quality, quality_name
from tests.tiny_recipe import tiny_recipe
from tests.train.listener import Listener

_CPU = torch.device("cpu")


def _recipe(loss: str) -> Recipe:
    return tiny_recipe(loss=loss, freeze=12, epochs=2, epoch_steps=1)


def test_numbers_choose_by_ndcg_and_keep_a_label_on_one_side(
    photos: PhotoSet, tmp_path: Path
) -> None:
    targets = tuple((row / 7, -1 / 3) for row in range(len(photos)))
    given = dataclasses.replace(photos, targets=targets)
    listener = Listener()
    run = train(_recipe("log-ratio"), given, tmp_path / "run", device="cpu", reporter=listener)
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    best = max(rows, key=lambda row: (row["val"]["ndcg@10"], -row["epoch"]))
    assert run.record["best"]["epoch"] == best["epoch"]
    assert run.record["baseline"]["val"]["chance_target_distance"] > 0
    assert run.contract().metric == "l2"
    assert run.contract().quality["fp32"]["ndcg@10"] == best["val"]["ndcg@10"]
    back = run.photos()
    place = {path: row for row, path in enumerate(photos.paths)}
    assert back.targets == tuple(targets[place[path]] for path in back.paths)
    sides = {
        split: {name for name, s in zip(back.labels, back.split, strict=True) if s == split}
        for split in ("train", "val")
    }
    assert sides["val"]
    assert not sides["train"] & sides["val"]
    told = [text for label, text in listener.notes if label == "epoch"]
    assert all("nDCG@10" in text and len(text) <= 70 for text in told)


def test_numbers_without_labels_hold_out_targets(photos: PhotoSet) -> None:
    targets = tuple((float(row // 3),) for row in range(len(photos)))
    given = dataclasses.replace(photos, labels=("",) * len(photos), targets=targets)
    plan = make_plan(_recipe("dense-triplet"), given, device=_CPU)
    sides = [
        {plan.photos.targets[row] for row in plan.rows(split)}  # type: ignore[index]
        for split in ("train", "val")
    ]
    assert len(plan.photos) == 45
    assert not sides[0] & sides[1]
    assert len(plan.rows("val")) == 12


def test_triplets_are_held_out_with_all_that_hangs_together_and_lost_ones_are_counted(
    photos: PhotoSet, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    three = [tuple((rng.permutation(15)[:3] + 15 * (n % 3)).tolist()) for n in range(30)]
    triplets = tuple(Triplet(*one, 0.1 if n % 4 else None) for n, one in enumerate(three))
    given = dataclasses.replace(photos, labels=("",) * len(photos), triplets=triplets)
    run = train(_recipe("expression-triplet"), given, tmp_path / "run", device="cpu")
    back = run.photos()
    assert back.triplets is not None
    sides = [{back.split[row] for row in one[:3]} for one in back.triplets]
    assert all(len(side) == 1 for side in sides)
    assert len(back.triplets) == 30
    assert run.record["best"]["val"]["triplets"] == sum(side == {"val"} for side in sides) > 0
    assert [one.margin for one in back.triplets] == [one.margin for one in triplets]
    # A file that is no picture takes its triplets with it.
    plan = make_plan(
        _recipe("expression-triplet"),
        given,
        device=_CPU,
        failures=[(given.paths[triplets[0].odd], DataError("x"))],  # type: ignore[list-item]
    )
    lost = sum(triplets[0].odd in one[:3] for one in triplets)
    assert plan.lost_triplets == lost > 0
    assert len(plan.photos.triplets or ()) == 30 - lost
    everything = dataclasses.replace(
        given, triplets=tuple(Triplet(row, row + 1, row + 2) for row in range(43))
    )
    with pytest.raises(DataError, match="hang together"):
        make_plan(_recipe("expression-triplet"), everything, device=_CPU)


def test_photos_without_labels_train_and_have_some_to_check_an_export_with(
    photos: PhotoSet, tmp_path: Path
) -> None:
    folder = tmp_path / "flat"
    folder.mkdir()
    for row, file in enumerate(photos.files()):
        (folder / f"{row}.jpg").write_bytes(file.read_bytes())
    listener = Listener()
    given = read_photos(folder, labels=False)
    run = train(_recipe("isif"), given, tmp_path / "run", device="cpu", reporter=listener)
    assert run.record["best"]["val"] is None
    assert run.record["best"]["epoch"] == 2
    assert run.record["baseline"] == {}
    assert len(run.held_out()[0]) == 13
    assert run.metrics() is None
    assert ("", "val has no labels: no epoch is measured, and the last weights count") in (
        listener.notes
    )


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        ("log-ratio", r"(?s)learns from numbers.*they have classes.*path,target.*--loss rll"),
        ("expression-triplet", r"(?s)learns from triplets.*image_a,image_b,image_c"),
    ],
)
def test_photos_without_what_the_loss_learns_from_are_refused_at_once(
    photos: PhotoSet, tmp_path: Path, loss: str, says: str
) -> None:
    listener = Listener()
    with pytest.raises(DataError, match=says):
        train(_recipe(loss), photos, tmp_path / "run", device="cpu", reporter=listener)
    assert not listener.notes
    unlabelled = dataclasses.replace(photos, labels=("",) * len(photos))
    with pytest.raises(DataError, match=r"(?s)learns from classes.*no labels of any kind.*isif"):
        train(_recipe("rll"), unlabelled, tmp_path / "run", device="cpu")
    assert not list(tmp_path.iterdir())


def test_categories_come_back_from_a_run(photos: PhotoSet, tmp_path: Path) -> None:
    category = tuple("ab"[row % 2] for row in range(len(photos)))
    given = dataclasses.replace(photos, category=category, group=category)
    run = train(_recipe("fastap"), given, tmp_path / "run", device="cpu")
    with (run.path / "split.csv").open(newline="") as file:
        assert [row["category"] for row in csv.DictReader(file)] == list(category)
    assert Run.load(run.path).photos().category == category
    assert train(run.recipe, given, run.path, device="cpu", resume=True).record["steps"] == 2


def test_the_number_that_chooses_and_the_line_that_tells() -> None:
    of = {"recall@1": 0.5, "map@r": 0.25, "tie_share": 0.0}
    assert (quality(of), quality_name(of)) == (0.25, "MAP@R")
    assert brief(of, 3) == "recall@1 0.500  MAP@R 0.250"
    near = {"ndcg@10": 0.75, "target_distance@1": None, "chance_target_distance": None}
    assert (quality(near), quality_name(near)) == (0.75, "nDCG@10")
    assert brief(near) == "nDCG@10 0.7500  target distance -"
    odd = {"triplet_accuracy": None, "triplets": 0}
    assert (quality(odd), quality_name(odd)) == (0.0, "triplet accuracy")
    assert brief(odd) == "triplet accuracy -"
