"""A run's report: whole in one file, with and without embeddings, for every state of a run."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from embedkit.errors import MismatchError
from embedkit.evaluate import retrieval_metrics
from embedkit.report import keep_embeddings, run_files, write_run_report
from embedkit.report.run_files import read_run
from embedkit.report.run_report import _ordered, _pair_histogram, _search
from tests.report.pages import ReadPage

METRICS = {"recall@1": 0.5, "map@r": 0.25, "r_precision": 0.3}
BETTER = {"recall@1": 0.9, "map@r": 0.75, "r_precision": 0.8}


def epoch(number: int, **changes: Any) -> dict[str, Any]:
    stats = {
        "positive_distance": 0.8,
        "negative_distance": 1.2,
        "active_positives": 0.5,
        "active_negatives": 0.1,
        "spread": 0.9,
    }
    row = {"epoch": number, "step": 10 * number, "loss": 1 / number, "stats": stats, "val": BETTER}
    return row | changes


def make_run(tmp_path: Path, **changes: Any) -> Path:
    """A run's folder with 4 held-out classes of 5 noisy photos, and one class trained on."""
    folder, photos = tmp_path / "runs" / "a <run> & more", tmp_path / "photos"
    folder.mkdir(parents=True)
    lines = ["path,label,split,is_query,is_gallery"]
    generator = np.random.default_rng(0)
    for label, photo in itertools.product(["known", "a", "b", "c <d>", "e"], range(5)):
        path = Path(label.split()[0]) / f"{photo}.jpg"
        (photos / path).parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 255, (140, 140, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / path)
        lines.append(f"{path},{label},{'train' if label == 'known' else 'val'},,")
    (folder / "split.csv").write_text("\n".join(lines) + "\n")
    (folder / "config.toml").write_text(
        'loss = "rll"\nbackbone = "resnet10"\ndim = 8\nimage_size = 64\n'
        "augment_flip = true\naugment_scale = [0.5, 1.0]\nlearning_rate = 1e-05\n[loss_options]\n"
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(epoch(n)) + "\n" for n in range(1, 6)))
    record = {
        "schema": "embedkit.run/1",
        "name": folder.name,
        "status": "finished",
        "stopped_because": "all 50 steps are done",
        "device": "cpu",
        "amp": "float32",
        "threads": 1,
        "photos_root": str(photos),
        "data": {
            "hash": "0" * 64,
            "images": 25,
            "splits": {
                "train": {"images": 5, "classes": 1},
                "val": {"images": 20, "classes": 4},
                "test": {"images": 0, "classes": 0},
            },
            "unreadable": 0,
            "lone_classes": 0,
        },
        "loss_options": {"alpha": 1.2, "margin": 0.4},
        "steps": 50,
        "elapsed": 3725.0,
        "baseline": {"val": METRICS},
        "best": epoch(5),
        "test": None,
        "versions": {"torch": "2"},
    }
    (folder / "run.json").write_text(json.dumps(record | changes))
    return folder


def vectors(seed: int, noise: float, labels: list[str]) -> npt.NDArray[np.float32]:
    generator = np.random.default_rng(seed)
    centres = {label: generator.normal(size=8) for label in sorted(set(labels))}
    rows = [centres[label] + noise * generator.normal(size=8) for label in labels]
    return np.array(rows, np.float32)


def with_embeddings(folder: Path) -> list[str]:
    labels = [label for label in ("a", "b", "c <d>", "e") for _ in range(5)]
    rows = list(range(5, 25))
    for stage, noise in (("before", 3.0), ("after", 0.6)):
        embeddings = vectors(1, noise, labels)
        keep_embeddings(folder, stage, rows=rows, labels=labels, embeddings=embeddings)  # type: ignore[arg-type]
    return labels


def read(path: Path) -> tuple[str, ReadPage]:
    source = path.read_text(encoding="utf-8")
    return source, ReadPage(source)


def test_the_page_is_whole_offline_small_and_says_what_was_gained(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    with_embeddings(folder)
    path = write_run_report(folder)
    assert path == folder / "report.html"
    assert path.stat().st_size < 5_000_000
    source, page = read(path)
    assert source.startswith("<!doctype html>")
    assert "prefers-color-scheme: dark" in source
    assert 'name="viewport"' in source
    for said in ("0.750", "before 0.250", "+0.500", "4 classes it has never seen", "1 h 2 min"):
        assert said in page.text, said
    for title in ("Loss", "recall@1", "MAP@R", "Distances in training", "Active pairs", "Spread"):
        assert title in page.text
    for heading in ("Hardest classes", "Sample queries", "How to go on", "Settings", "Data"):
        assert heading in page.text
    assert page.images
    assert "right" in page.classes
    assert page.tags.count("h1") == 1
    assert "learning rate" in page.text
    assert "1e-05" in page.text
    # Both distributions and six curves, each with its numbers as a table.
    assert page.tags.count("details") == 8


def test_without_embeddings_there_are_curves_and_no_pictures(tmp_path: Path) -> None:
    source, page = read(write_run_report(make_run(tmp_path)))
    assert "embeddings of this run were not kept" in page.text
    assert page.images == []
    assert "Sample queries" not in source


def test_one_stage_alone_is_shown_and_the_other_one_added_later(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    labels = ["a"] * 5 + ["b"] * 5
    keep_embeddings(folder, "before", rows=range(5, 15), labels=labels, embeddings=np.eye(10))
    _, page = read(write_run_report(folder))
    assert "Before training" in page.text
    assert "After training" not in page.text
    keep_embeddings(folder, "after", rows=range(5, 15), labels=labels, embeddings=np.eye(10))
    arrays = np.load(folder / "report.npz")
    assert set(arrays.files) == {"rows", "before", "after", "held_out"}
    # Of other photos: what was kept of those before no longer counts.
    keep_embeddings(folder, "after", rows=range(6, 16), labels=labels, embeddings=np.eye(10))
    assert "before" not in np.load(folder / "report.npz").files


def test_an_unfinished_run_says_how_to_go_on_and_a_half_written_line_is_no_harm(
    tmp_path: Path,
) -> None:
    folder = make_run(tmp_path, status="unfinished", best=None, baseline=None, stopped_because=None)
    (folder / "metrics.jsonl").write_text(json.dumps(epoch(1, val=None)) + '\n{"epoch": 2, "st')
    _, page = read(write_run_report(folder))
    assert "This run is not finished" in page.text
    assert "embedkit train --resume" in page.text
    assert "Nothing has been measured" in page.text
    (folder / "metrics.jsonl").unlink()
    _, page = read(write_run_report(folder))
    assert "No epoch is finished yet" in page.text


def test_a_test_split_is_what_counts_where_there_is_one(tmp_path: Path) -> None:
    tested = {"recall@1": 0.61, "map@r": 0.33, "r_precision": None}
    folder = make_run(tmp_path, test=tested, baseline={"val": METRICS, "test": METRICS})
    _, page = read(write_run_report(folder))
    assert "0.330" in page.text
    assert "+0.080" in page.text
    assert "(test)" in page.text


def test_photos_that_are_gone_become_placeholders(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    with_embeddings(folder)
    shutil.rmtree(tmp_path / "photos")
    _, page = read(write_run_report(folder))
    assert page.images == []
    assert "the picture is gone" in page.text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", "{"),
        ("run.json", '{"schema": 9}'),
        ("run.json", "[]"),
        ("split.csv", "a,b\n1,2\n"),
        ("config.toml", "= ="),
        ("metrics.jsonl", "{\n{}\n"),
        ("report.npz", "no archive"),
        ("report.npz", ""),
    ],
)
def test_a_damaged_run_is_refused_by_name(tmp_path: Path, name: str, content: str) -> None:
    folder = make_run(tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(
        MismatchError, match=re.escape(name) if content != '{"schema": 9}' else "another embedkit"
    ):
        write_run_report(folder)
    assert not (folder / "report.html").exists()


def test_embeddings_of_other_photos_are_refused(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    keep_embeddings(folder, "after", rows=[99], labels=["a"], embeddings=[[1.0]])
    with pytest.raises(MismatchError, match=r"split\.csv"):
        write_run_report(folder)
    with pytest.raises(ValueError, match="2 rows, 1 labels"):
        keep_embeddings(folder, "after", rows=[1, 2], labels=["a"], embeddings=[[1.0]])


def test_no_more_than_5000_photos_are_kept_and_whole_classes(tmp_path: Path) -> None:
    labels = [f"c{n // 30}" for n in range(9000)] + ["huge"] * 900
    embeddings = np.ones((len(labels), 2))
    keep_embeddings(tmp_path, "after", rows=range(9900), labels=labels, embeddings=embeddings)
    arrays = np.load(tmp_path / "report.npz")
    kept = [labels[row] for row in arrays["rows"].tolist()]
    sizes = {label: kept.count(label) for label in set(kept)}
    assert 4900 < len(kept) <= 5000
    assert set(sizes.values()) <= {30, 200}
    assert int(arrays["held_out"]) == 9900
    assert (tmp_path / "report.npz").stat().st_size < 5000 * (2 * 2 + 8) + 2000


def test_the_distances_are_those_of_all_pairs(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(300, 5)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    labels = generator.integers(0, 6, 300)
    positive, negative = _pair_histogram(rows, labels)
    same, other = [], []
    for i, j in itertools.combinations(range(300), 2):
        distance = float(np.linalg.norm(rows[i].astype(float) - rows[j]))
        (same if labels[i] == labels[j] else other).append(distance)
    edges = np.linspace(0, 2, 51)
    assert abs(positive - np.histogram(same, edges)[0]).sum() <= 4  # rounding at the edges
    assert abs(negative - np.histogram(other, edges)[0]).sum() <= 4
    wins = np.mean([(a < b) for a, b in itertools.product(same[:400], other[:400])])
    assert _ordered(positive, negative) == pytest.approx(float(wins), abs=0.05)
    assert _ordered(positive, np.zeros(50, np.int64)) is None


def test_what_it_finds_is_what_the_evaluation_measures(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    labels = with_embeddings(folder)
    run = read_run(folder)
    assert run.vectors is not None
    assert run.vectors.after is not None
    answers = _search(run.vectors.after, run.vectors.photos)
    metrics = retrieval_metrics(run.vectors.after, labels)
    assert np.mean([answer.quality for answer in answers]) == pytest.approx(metrics.map_at_r)
    right = [labels[answer.hits[0]] == labels[answer.query] for answer in answers]
    assert np.mean(right) == pytest.approx(metrics.recall[1])
    assert all(answer.query not in answer.hits for answer in answers)
    assert all(answer.distances == sorted(answer.distances) for answer in answers)


def test_queries_and_gallery_are_kept_apart_where_the_data_says_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    rows = (folder / "split.csv").read_text().splitlines()
    marked = [
        line.replace(",,", ",1,0" if n % 5 == 0 else ",0,1") if ",val" in line else line
        for n, line in enumerate(rows)
    ]
    (folder / "split.csv").write_text("\n".join(marked) + "\n")
    with_embeddings(folder)
    run = read_run(folder)
    assert run.vectors is not None
    assert run.vectors.after is not None
    answers = _search(run.vectors.after, run.vectors.photos)
    asked = {answer.query for answer in answers}
    assert len(asked) == 4
    assert not asked & {hit for answer in answers for hit in answer.hits}
    # The class that is trained on has no flags in its split: all of it asks and is found.
    assert all(photo.asks and photo.found for photo in run.photos if photo.split == "train")
    assert run_files.read_run(folder).record["name"] == folder.name
