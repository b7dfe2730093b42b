"""A whole comparison: what is measured, on what, and the same again after any kill."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from embedkit.compare import cell, compare, divide, plan_comparison, quick_protocol
from embedkit.data import PhotoSet
from embedkit.errors import Interrupted, MismatchError, UnknownNameError, UsageError
from embedkit.imaging import read_pixels
from embedkit.train import Recipe, train
from tests.compare.small import LOSSES, protocol, recipe

RESULTS = ("compare.json", "compare.csv", "compare.html")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def table(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = read(folder / "compare.json")
    return content


def assert_same(one: Path, other: Path) -> None:
    for name in RESULTS:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def no_training(*_: Any, **__: Any) -> None:
    raise AssertionError("there was nothing left to train")


# --- what is measured ----------------------------------------------------------------------------


def embed_by_hand(network: Any, photos: PhotoSet, made_by: Recipe) -> npt.NDArray[np.float64]:
    """One photo after the other."""
    preprocess = made_by.preprocess()
    rows = []
    with torch.no_grad():
        for path in photos.files():
            pixels = torch.from_numpy(read_pixels(path, preprocess).copy())[None]
            rows.append(network(pixels).double().numpy()[0])
    return np.array([row / np.linalg.norm(row) for row in rows])


def figures_by_loops(rows: npt.NDArray[np.float64], labels: tuple[str, ...]) -> dict[str, float]:
    """recall@1, R-precision and MAP@R as their papers write them."""
    recall, precision, average = [], [], []
    for query, label in enumerate(labels):
        others = [place for place in range(len(labels)) if place != query]
        others.sort(key=lambda place: -float(rows[query] @ rows[place]))
        relevant = [labels[place] == label for place in others]
        count = sum(relevant)
        recall.append(float(relevant[0]))
        precision.append(sum(relevant[:count]) / count)
        shares = [sum(relevant[: i + 1]) / (i + 1) for i in range(count) if relevant[i]]
        average.append(sum(shares) / count)
    names = ("recall@1", "r_precision", "map@r")
    return dict(zip(names, map(np.mean, (recall, precision, average)), strict=True))


def test_a_repeat_is_the_folds_networks_alone_and_side_by_side(
    finished: Path, photos: PhotoSet, tmp_path: Path
) -> None:
    division = divide(photos, folds=2, seed=0)
    folder = finished / "rows" / "triplet" / "repeats" / "01"
    parts = []
    for number, fold in enumerate(division.folds):
        made_by = Recipe.load(folder / f"fold-{number + 1}" / "run" / "config.toml")
        assert made_by.seed == 2
        run = train(made_by, fold, tmp_path / str(number), device="cpu")
        parts.append(embed_by_hand(run.network(), division.test, made_by))
    labels = division.test.labels
    alone = [figures_by_loops(part, labels) for part in parts]
    together = figures_by_loops(np.hstack(parts) / 2**0.5, labels)
    content = read(folder / "repeat.json")
    for name in together:
        assert content["single"][name] == pytest.approx((alone[0][name] + alone[1][name]) / 2)
        assert content["concatenated"][name] == pytest.approx(together[name])
    (row,) = (row for row in table(finished)["rows"] if row["row"] == "triplet")
    assert row["single"]["map@r"]["values"][1] == content["single"]["map@r"]


def test_no_training_has_seen_a_test_photo(finished: Path, photos: PhotoSet) -> None:
    test = {path.as_posix() for path in divide(photos, folds=2, seed=0).test.paths}
    splits = list(finished.rglob("split.csv"))
    assert len(splits) == 2 * (2 + 2) * 2
    for split in splits:
        lines = [line.split(",") for line in split.read_text().splitlines()[1:]]
        assert {line[2] for line in lines} == {"train", "val"}
        assert test.isdisjoint(line[0] for line in lines)


def test_all_rows_have_the_same_settings_budget_and_seeds(finished: Path) -> None:
    fixed = protocol().fixed("", "cpu")
    seen: dict[str, list[Any]] = {}
    for config in sorted(finished.rglob("config.toml")):
        row, kind, number, fold = config.relative_to(finished / "rows").parts[:4]
        made_by = Recipe.load(config)
        searched = {"learning_rate", "head_learning_rate", "proxy_learning_rate"}
        for name, value in made_by.to_json().items():
            if name in fixed and name not in searched:
                assert fixed[name] == value, name
        seen.setdefault(row, []).append((kind, number, fold, made_by.seed))
    assert seen["triplet"] == seen["softmax"]
    assert {seed for kind, *_, seed in seen["triplet"] if kind == "trials"} == {0}
    assert {seed for kind, *_, seed in seen["triplet"] if kind == "repeats"} == {1, 2}
    for row in table(finished)["rows"]:
        assert len(row["search"]) == 2
        best = max(row["search"], key=lambda trial: trial["map@r"])
        assert row["settings"] == best["settings"]


def test_the_search_judges_by_the_mean_of_the_folds_validations(finished: Path) -> None:
    for row in table(finished)["rows"]:
        for number, trial in enumerate(row["search"]):
            place = finished / "rows" / row["row"] / "trials" / f"{number:03d}"
            best = [read(run)["best"]["val"]["map@r"] for run in place.rglob("run.json")]
            assert trial["map@r"] == pytest.approx(sum(best) / 2)


def test_weights_and_vectors_do_not_fill_the_disk(finished: Path) -> None:
    assert not list(finished.rglob("*.safetensors"))
    assert not list(finished.rglob("*.np[yz]"))
    content = table(finished)
    assert content["comparable"] is True
    assert content["baseline"]["dim"] == 512
    assert {row["row"] for row in content["rows"]} == set(LOSSES)


# --- the same again ------------------------------------------------------------------------------


def test_what_is_finished_is_not_done_again(
    finished: Path, photos: PhotoSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder, symlinks=True)
    for name in RESULTS:
        (folder / name).unlink()
    for record in folder.rglob("row.json"):
        record.unlink()
    monkeypatch.setattr(cell, "train", no_training)
    compare(LOSSES, photos, folder, protocol(), device="cpu")
    assert_same(folder, finished)


@pytest.mark.parametrize(
    "awaited",
    [
        "repeats/*/fold-2/run/last.safetensors",  # within a training, after the search
        pytest.param("trials/*/fold-2/run/last.safetensors", marks=pytest.mark.slow),
        pytest.param("trials/001/settings.json", marks=pytest.mark.slow),
        pytest.param("repeats/*/fold-1/vectors.npy", marks=pytest.mark.slow),
        pytest.param("repeats/00/repeat.json", marks=pytest.mark.slow),
    ],
)
def test_killed_anywhere_and_run_again_it_is_the_same(
    awaited: str, finished: Path, photos: PhotoSet, pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    # One row to make is enough; the other is there.
    shutil.copytree(finished / "rows" / "softmax", folder / "rows" / "softmax", symlinks=True)
    shutil.copy(finished / "protocol.json", folder)
    code = (
        "import sys; from pathlib import Path; from embedkit.compare import compare;"
        "from embedkit.data import read_photos; from tests.compare.small import *;"
        "compare(LOSSES, read_photos(Path(sys.argv[1])), Path(sys.argv[2]), protocol(),"
        " device='cpu')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(pictures), str(folder)],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    deadline = time.monotonic() + 200
    while not list((folder / "rows" / "triplet").glob(awaited)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "compare.json").exists()
    compare(LOSSES, photos, folder, protocol(), device="cpu")
    assert_same(folder, finished)


def test_ctrl_c_says_how_to_go_on(
    photos: PhotoSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise Interrupted("stopped", hint="embedkit train --resume somewhere")

    monkeypatch.setattr(cell, "train", stop)
    with pytest.raises(Interrupted, match="16 of 16 trainings to come") as left:
        compare(LOSSES, photos, tmp_path / "new", protocol(), device="cpu")
    assert left.value.hint == "the same command again: it goes on from here"


# --- rows that belong together -------------------------------------------------------------------


def refused(folder: Path, photos: PhotoSet, **changes: Any) -> str:
    with pytest.raises(MismatchError) as error:
        compare(LOSSES, photos, folder, protocol(**changes), device="cpu")
    return str(error.value.facts)


def test_a_row_by_other_fixed_fields_is_refused_and_the_fields_are_listed(
    finished: Path, photos: PhotoSet
) -> None:
    facts = refused(finished, photos, recipe=recipe(dim=16, augment_flip=False), repeats=3)
    assert facts.splitlines() == [
        "dim: 8 there, 16 here",
        "augment_flip: True there, False here",
        "repeats: 2 there, 3 here",
    ]
    renamed = dataclasses.replace(photos, labels=tuple(f"{name}!" for name in photos.labels))
    assert refused(finished, renamed).startswith("photos: ")
    assert "quick: False there, True here" in refused(finished, photos, quick=True)


def test_rows_of_another_comparison_are_taken_over_when_they_belong_here(
    finished: Path, photos: PhotoSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "half"
    shutil.copytree(finished, folder, symlinks=True)
    shutil.rmtree(folder / "rows" / "softmax")
    monkeypatch.setattr(cell, "train", no_training)
    compare(["triplet"], photos, folder, protocol(), device="cpu", add=[finished])
    assert_same(folder, finished)
    foreign = tmp_path / "foreign"
    shutil.copytree(folder, foreign, symlinks=True)
    record = foreign / "rows" / "softmax" / "row.json"
    record.write_text(record.read_text().replace('"dim": 8', '"dim": 9'))
    with pytest.raises(MismatchError, match="another row softmax"):
        compare(["triplet"], photos, folder, protocol(), device="cpu", add=[foreign])
    with pytest.raises(MismatchError, match="folds: 2 there, 3 here"):
        compare(LOSSES, photos, tmp_path / "x", protocol(folds=3), device="cpu", add=[finished])


def test_a_single_training_is_no_row(finished: Path, photos: PhotoSet, tmp_path: Path) -> None:
    run = train(recipe(loss="rll", epochs=1, steps=None), photos, tmp_path / "run", device="cpu")
    with pytest.raises(MismatchError, match="cannot be compared") as error:
        compare(LOSSES, photos, tmp_path / "new", protocol(), device="cpu", add=[run.path])
    facts = str(error.value.facts)
    assert "folds: none there, 2 here" in facts
    assert "epochs: 1 there, none here" in facts
    assert "dim:" not in facts
    (tmp_path / "empty").mkdir()
    with pytest.raises(MismatchError, match="is no comparison"):
        compare(
            LOSSES, photos, tmp_path / "new2", protocol(), device="cpu", add=[tmp_path / "empty"]
        )


def test_a_folder_in_use_is_refused(photos: PhotoSet, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is in use"):
        compare(LOSSES, photos, tmp_path, protocol(), device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_damaged_record_is_one_clear_error(
    finished: Path, photos: PhotoSet, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder, symlinks=True)
    (folder / "protocol.json").write_text("{")
    with pytest.raises(MismatchError, match=r"protocol\.json is damaged"):
        compare(LOSSES, photos, folder, protocol(), device="cpu")


# --- what goes wrong, and what is planned --------------------------------------------------------


def test_a_loss_that_diverges_is_a_row_without_a_result(photos: PhotoSet, tmp_path: Path) -> None:
    wild = protocol(recipe=recipe(learning_rate=1e30, steps=4, epoch_steps=4), trials=1)
    content = compare(["triplet"], photos, tmp_path / "new", wild, device="cpu")
    (row,) = content["rows"]
    assert "no longer finite" in row["failed"]
    assert row["single"] is None
    assert content["lead"] is None
    assert content["baseline_beaten"] is False
    assert "untrained" in (tmp_path / "new" / "compare.csv").read_text()
    assert "no longer finite" in (tmp_path / "new" / "compare.html").read_text()


def test_a_full_disk_is_no_result(
    photos: PhotoSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedkit.errors import EmbedKitError

    def full(*_: Any, **__: Any) -> None:
        raise EmbedKitError("last.safetensors could not be written") from OSError(28, "finite")

    monkeypatch.setattr(cell, "train", full)
    with pytest.raises(EmbedKitError, match="could not be written"):
        compare(LOSSES, photos, tmp_path / "new", protocol(), device="cpu")
    assert not list((tmp_path / "new").rglob("cell.json"))


def test_a_plan_counts_what_would_be_done_and_writes_nothing(
    photos: PhotoSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = plan_comparison(LOSSES, photos, protocol(dims=(4, 8)), device="cpu")
    assert [row.name for row in plan.rows] == ["triplet-4", "triplet-8", "softmax-4", "softmax-8"]
    assert plan.cells == 4 * (2 + 2) * 2
    assert plan.steps == 2
    quick = plan_comparison(["cross-entropy"], photos, quick_protocol(protocol()), device="cpu")
    assert quick.cells == 2 * 2
    assert quick.unsearched == ("cross-entropy",)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("losses", "error", "says"),
    [
        (["tripplet"], UnknownNameError, "did you mean 'triplet'"),
        (["triplet", "triplet"], UsageError, "named twice"),
        ([], UsageError, "no loss is named"),
    ],
)
def test_wrong_names_are_found_before_anything_is_written(
    photos: PhotoSet, tmp_path: Path, losses: list[str], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        compare(losses, photos, tmp_path / "new", protocol(), device="cpu")
    assert not (tmp_path / "new").exists()
