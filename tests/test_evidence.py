"""The table of evidence in its shortest form: two losses and two peers, two steps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pytorch_metric_learning")

from benchmarks import evidence
from benchmarks.evidence import Cell, Task, all_cells, draw_triplets, measure_cells, table
from benchmarks.losses import PEERS
from embedkit.data import draw_products, hold_out_classes, read_photos
from embedkit.errors import Interrupted, UsageError
from embedkit.train import Recipe

CELLS = [
    Cell("products"),
    Cell("products", "rll"),
    Cell("products", "triplet", {"mining": "semi-hard"}),
    Cell("products", peer="triplet:semi-hard"),
    Cell("products", peer="proxy-anchor"),
]
RECIPE = Recipe(
    backbone="mobilenet_v3_small",
    weights="none",
    dim=8,
    image_size=32,
    classes_per_batch=3,
    images_per_class=2,
    steps=2,
    val_share=0,
)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Task]:
    folder = tmp_path_factory.mktemp("data") / "products"
    photos = read_photos(draw_products(folder, classes=8, images_per_class=4, size=40))
    held_out = hold_out_classes(photos, share=0.4)
    learned, test = (
        photos.subset([row for row, name in enumerate(held_out.split) if (name == "val") == out])
        for out in (False, True)
    )
    return {"products": Task(learned, test, np.arange(len(test)) % 2 == 0)}


def test_every_cell_gets_one_row_and_an_interrupted_run_goes_on(
    tasks: dict[str, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "evidence.json"
    measured: list[str] = []
    measure = evidence._measure

    def stopped_at_the_third(cell: Cell, *rest: object) -> dict[str, object]:
        if len(measured) == 2:
            raise Interrupted("interrupted")
        measured.append(cell.name)
        return measure(cell, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(evidence, "_measure", stopped_at_the_third)
    with pytest.raises(Interrupted):
        measure_cells(CELLS, tasks, RECIPE, results)
    assert list(json.loads(results.read_text())["rows"]) == [cell.name for cell in CELLS[:2]]
    monkeypatch.setattr(evidence, "_measure", measure)
    content = measure_cells(CELLS, tasks, RECIPE, results)
    assert list(content["rows"]) == [cell.name for cell in CELLS]
    assert content == json.loads(results.read_text())
    for row in content["rows"].values():
        assert 0 <= row["map@r"] <= row["recall@1"] <= 1
        assert 0 <= row["visits recall@1"] <= 1
    shown = table(content).splitlines()
    (line,) = [line for line in shown if line.startswith("triplet mining=semi-hard")]
    assert line.endswith(f"{content['rows']['peer triplet mining=semi-hard']['map@r']:.3f}")
    assert not any(line.startswith("peer ") for line in shown)
    assert max(map(len, shown)) <= 80


def test_a_training_that_fails_is_a_row_and_is_tried_again(
    tasks: dict[str, Task], tmp_path: Path
) -> None:
    results = tmp_path / "evidence.json"
    cells = [Cell("products", "log-ratio")]  # learns from numbers, and these photos have none
    content = measure_cells(cells, tasks, RECIPE, results)
    assert "have none" in content["rows"]["log-ratio"]["failed"]
    assert "log-ratio" in table(content)
    again = measure_cells([Cell("products", "log-ratio")], tasks, RECIPE, results)
    assert list(again["rows"]) == ["log-ratio"]


def test_rows_of_two_budgets_do_not_mix(tasks: dict[str, Task], tmp_path: Path) -> None:
    results = tmp_path / "evidence.json"
    budget = {"dim": 8, "steps": 2, "val_share": 0.0, "weights": "none", "image_size": 32}
    budget |= {"backbone": "mobilenet_v3_small", "classes_per_batch": 3, "images_per_class": 2}
    results.write_text(json.dumps({"budget": budget, "rows": {}}))
    measure_cells([], tasks, RECIPE, results)  # what it does not name is as it always was
    results.write_text(json.dumps({"budget": {**budget, "steps": 7}, "rows": {}}))
    with pytest.raises(UsageError, match="another budget"):
        measure_cells([], tasks, RECIPE, results)


def test_each_loss_and_each_peer_has_one_cell() -> None:
    names = [cell.name for cell in all_cells()]
    assert len(names) == len(set(names))
    assert {"rll", "multi-similarity", "fastap", "log-ratio", "expression-triplet"} <= set(names)
    peers = [name.removeprefix("peer ") for name in names if name.startswith("peer ")]
    assert len(peers) == len(PEERS)
    assert set(peers) <= set(names)


def test_triplets_have_two_of_a_label_and_an_odd_one() -> None:
    labels = ["a", "a", "b", "b", "b", "lone"]
    triplets = draw_triplets(labels, seed=0)
    assert [one.a for one in triplets] == [0, 1, 2, 3, 4]
    for one in triplets:
        assert one.a != one.b
        assert labels[one.a] == labels[one.b] != labels[one.odd]
    assert draw_triplets(["a", "a"], seed=0) == ()
