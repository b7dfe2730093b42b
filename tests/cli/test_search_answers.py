"""`search`, `dedupe`, `cluster` and `verify` as typed: verdicts, filters, groups, exit codes."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from embedkit.export.precision import with_contract
from embedkit.imaging import read_pixels
from embedkit.runtime import read_contract
from tests.tiny_model import tiny_vectors, write_tiny_model

MATCH, UNSURE = 0.95, 0.5
THRESHOLDS = {
    **{"match": MATCH, "unsure": UNSURE, "match_false": 0.01, "unsure_false": 0.1},
    **{"pair_match": 0.9, "pair_unsure": 0.4, "pair_match_false": 0.001},
    **{"pair_unsure_false": 0.01, "queries": 200.0},
}


def picture(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(small).resize((40, 32)).save(path)
    return path


def calibrate(model: Path) -> None:
    """The same model, with thresholds in its contract."""
    contract = dataclasses.replace(read_contract(model), thresholds=THRESHOLDS)
    model.write_bytes(with_contract(onnx.load(model), contract))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any) -> Path:
    """An index of twelve pictures in three classes by a model without thresholds; we are there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    write_tiny_model(tmp_path / "model.onnx")
    for n in range(12):
        picture(tmp_path / f"photos/class{n % 3}/{n}.png", n)
    for n in (0, 5):
        shutil.copy(tmp_path / f"photos/class{n % 3}/{n}.png", tmp_path / f"query{n}.png")
    assert run("index", "photos", "-o", "c.faiss").code == 0
    return tmp_path


def scores(place: Path, query: str) -> dict[str, float]:
    """Every picture's score by the model written in numpy."""
    side = read_contract(place / "model.onnx").preprocess
    files = [place / query, *sorted(place.glob("photos/*/*.png"))]
    ask, *found = tiny_vectors(np.stack([read_pixels(file, side) for file in files]))
    names = [file.relative_to(place).as_posix() for file in files[1:]]
    return {name: float(row @ ask) for name, row in zip(names, found, strict=True)}


def paths(result: dict[str, Any]) -> list[str]:
    return [hit["path"] for hit in result["hits"]]


def ordered(given: dict[str, float]) -> list[str]:
    return sorted(given, key=lambda name: -given[name])


# Verdicts and thresholds


def test_each_hit_has_the_verdict_of_its_score(place: Path, run: Any) -> None:
    calibrate(place / "model.onnx")
    document = run("search", "query0.png", "-k", 12, "--json").json()
    (result,) = document["results"]
    for hit in result["hits"]:
        wanted = (
            "match" if hit["score"] >= MATCH else "unsure" if hit["score"] >= UNSURE else "none"
        )
        assert hit["verdict"] == wanted
    assert {hit["verdict"] for hit in result["hits"]} == {"match", "unsure", "none"}
    assert result["verdict"] == "match"
    assert document["thresholds"] == {"match": MATCH, "unsure": UNSURE}
    done = run("search", "query0.png", "-k", 12)
    head, first, *_ = done.out.splitlines()
    assert head == "query0.png  match"
    assert first.split() == ["1", "1.0000", "match", "class0", "photos/class0/0.png"]
    assert max(map(len, done.out.splitlines())) <= 80


def test_a_model_without_thresholds_gives_no_verdict_and_says_how_to_get_one(
    place: Path, run: Any
) -> None:
    (result,) = run("search", "query0.png", "--json").json()["results"]
    assert result["verdict"] is None
    assert {hit["verdict"] for hit in result["hits"]} == {None}
    done = run("search", "query0.png", "--min-score", "auto")
    assert done.code == 2
    assert "carries no thresholds" in done.err
    assert "try: embedkit export" in done.err


def test_auto_leaves_out_what_is_none_and_a_number_what_is_lower(place: Path, run: Any) -> None:
    calibrate(place / "model.onnx")
    known = scores(place, "query0.png")
    for given, least in (("auto", UNSURE), ("0.2", 0.2), ("-2", -2.0)):
        document = run("search", "query0.png", "-k", 12, f"--min-score={given}", "--json").json()
        wanted = [name for name in ordered(known) if known[name] >= least]
        assert paths(document["results"][0]) == wanted
        assert document["min_score"] == least


def test_nothing_found_is_exit_0_and_exit_1_where_asked(place: Path, run: Any) -> None:
    done = run("search", "query0.png", "--min-score", "1.5")
    assert done.code == 0
    assert done.out.splitlines()[1].strip() == "nothing scores 1.5000 or more"
    assert run("search", "query0.png", "--min-score", "1.5", "--fail-if-none").code == 1
    assert run("search", "query0.png", "--fail-if-none").code == 0
    # With thresholds, hits that are all called none are nothing found.
    calibrate(place / "model.onnx")
    picture(place / "stranger.png", 999)
    known = scores(place, "stranger.png")
    wanted = 0 if max(known.values()) >= UNSURE else 1
    assert run("search", "stranger.png", "--fail-if-none").code == wanted
    assert run("search", "stranger.png", "query0.png", "--fail-if-none").code == 0


def test_an_index_much_larger_than_what_was_calibrated_on_is_told(
    place: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrate(place / "model.onnx")
    assert "strangers" not in run("search", "query0.png").err
    monkeypatch.setattr("embedkit.cli.search._MUCH_LARGER", 0.05)
    assert "set among 200 pictures; strangers come nearer among 12" in (
        run("search", "query0.png").err
    )


# Which pictures


def test_a_filter_and_groups_choose_by_label(place: Path, run: Any) -> None:
    known = scores(place, "query0.png")
    done = run("search", "query0.png", "--filter", "label=class1", "-k", 9, "--json").json()
    assert paths(done["results"][0]) == [n for n in ordered(known) if "/class1/" in n]
    done = run(
        *("search", "query0.png", "--filter", "label=class1", "--filter", "label=class2"),
        *("-k", 3, "--json"),
    ).json()
    assert paths(done["results"][0]) == [n for n in ordered(known) if "/class0/" not in n][:3]
    done = run("search", "query0.png", "--group-by", "label", "-k", 2, "--json").json()
    best = {}
    for name in ordered(known):
        best.setdefault(name.split("/")[1], name)
    assert paths(done["results"][0]) == list(best.values())[:2]
    done = run("search", "query0.png", "--group-by", "label", "-k", 9, "--json").json()
    assert len(done["results"][0]["hits"]) == 3


def test_the_sheets_show_every_hit_with_its_verdict(place: Path, run: Any) -> None:
    calibrate(place / "model.onnx")
    done = run("search", "query0.png", "-k", 7, "--html", "out/h.html", "--png", "out/h.png")
    assert done.code == 0
    assert [line.split() for line in done.err.splitlines()] == [
        ["page", "out/h.html"],
        ["picture", "out/h.png"],
    ]
    listed = [line.split()[2] for line in done.out.splitlines()[1:]]
    page = (place / "out/h.html").read_text(encoding="utf-8")
    shown = re.findall(r'class="worth (\w+)">\1<', page)
    assert shown == ["match", *listed]  # the query's own, then the hits'
    with Image.open(place / "out/h.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.width > sheet.height > 400
    assert sorted(one.name for one in (place / "out").iterdir()) == ["h.html", "h.png"]


def test_a_picture_of_another_kind_is_refused_before_anything_is_searched(
    place: Path, run: Any
) -> None:
    done = run("search", "query0.png", "--png", "hits.jpg")
    assert done.code == 2
    assert "--png takes a file that ends in .png" in done.err
    assert done.out == ""


def test_several_queries_are_one_by_their_mean_or_the_best_of_any(place: Path, run: Any) -> None:
    a, b = scores(place, "query0.png"), scores(place, "query5.png")
    done = run("search", "query0.png", "query5.png", "--combine", "any", "-k", 4, "--json").json()
    (result,) = done["results"]
    best = {name: max(a[name], b[name]) for name in a}
    assert sorted(paths(result)) == sorted(ordered(best)[:4])
    assert [hit["score"] for hit in result["hits"]] == pytest.approx(
        sorted(best.values(), reverse=True)[:4], abs=1e-5
    )
    assert result["queries"] == ["query0.png", "query5.png"]
    done = run("search", "query0.png", "query5.png", "--combine", "mean", "-k", 4, "--json").json()
    (result,) = done["results"]
    assert sorted(paths(result)) == sorted(ordered({name: a[name] + b[name] for name in a})[:4])
    out = run("search", "query0.png", "query5.png", "--combine", "mean", "--html", "h.html").out
    assert out.startswith("the mean of 2 queries\n")


@pytest.mark.parametrize("end", [b"\n", b"\0"])
def test_paths_come_from_stdin(
    place: Path, run: Any, monkeypatch: pytest.MonkeyPatch, end: bytes
) -> None:
    given = end.join([b"query0.png", b"photos/class1", b""])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    done = run("search", "-", "query5.png", "-k", 1, "--json").json()
    assert [result["query"] for result in done["results"]] == [
        "query0.png",
        *(f"photos/class1/{n}.png" for n in (1, 10, 4, 7)),
        "query5.png",
    ]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    done = run("search", "-")
    assert done.code == 2
    assert "no paths on stdin" in done.err


# Re-ranking and fusion


def test_reranking_keeps_the_scores_and_says_what_it_ordered_by(place: Path, run: Any) -> None:
    known = scores(place, "query0.png")
    for how in ("aqe", "aqe:k=3,alpha=1", "kreciprocal", "kreciprocal:k1=4,k2=2,lambda=0.5"):
        document = run("search", "query0.png", "-k", 12, "--rerank", how, "--json").json()
        hits = document["results"][0]["hits"]
        assert sorted(paths(document["results"][0])) == sorted(known)
        for hit in hits:
            assert hit["score"] == pytest.approx(known[hit["path"]], abs=1e-5)
        values = [hit["rerank_value"] for hit in hits]
        assert values == sorted(values, reverse=True)
        assert document["rerank"] == how
    done = run("search", "query0.png", "--rerank", "aqe", "--group-by", "label", "--json").json()
    assert len(done["results"][0]["hits"]) == 3


def test_several_indexes_give_the_mean_of_their_scores(place: Path, run: Any) -> None:
    write_tiny_model(place / "other.onnx", dim=6, seed=5)
    run("index", "photos", "--model", "other.onnx", "-o", "d.faiss")
    first = scores(place, "query0.png")
    lists = [
        run("search", "query0.png", "--index", index, "-k", 12, "--json").json()["results"][0]
        for index in ("c.faiss", "d.faiss")
    ]
    second = {hit["path"]: hit["score"] for hit in lists[1]["hits"]}
    done = run(
        *("search", "query0.png", "--index", "c.faiss", "--index", "d.faiss", "-k", 5, "--json")
    ).json()
    (result,) = done["results"]
    assert paths(result) == ordered({name: first[name] + second[name] for name in first})[:5]
    assert done["indexes"] == ["c.faiss", "d.faiss"]
    for hit in result["hits"]:
        mean = (first[hit["path"]] + second[hit["path"]]) / 2
        assert hit["score"] == pytest.approx(mean, abs=1e-5)
        assert hit["verdict"] is None


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--min-score", "high"], "--min-score takes a number or auto"),
        (["--filter", "shoe"], "--filter takes label=NAME"),
        (["--filter", "label=clas1"], "--filter label=class1"),
        (["--group-by", "folder"], "--group-by takes label"),
        (["--rerank", "kreciprocl"], "did you mean 'kreciprocal'"),
        (["--rerank", "aqe:k1=3"], "known: alpha, k"),
        (["--rerank", "aqe:k=many"], "k takes a number"),
        (["--rerank", "kreciprocal:k1=0"], "k1 and k2 from 1 up"),
        (["--rerank", "aqe", "--combine", "any"], "--combine mean"),
        (["--index", "c.faiss", "--index", "c.faiss", "--filter", "label=class1"], "one index"),
        (["--index", "c.faiss", "--index", "c.faiss", "--min-score", "auto"], "one index"),
        (["--index", "c.faiss", "--model", "model.onnx", "--model", "x.onnx"], "its own model"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_a_sentence(
    place: Path, run: Any, arguments: list[str], text: str
) -> None:
    done = run("search", "query0.png", *arguments)
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert text in done.err
    assert done.out == ""


# dedupe


def test_dedupe_lists_copies_and_near_ones_and_deletes_nothing(place: Path, run: Any) -> None:
    shutil.copy(place / "photos/class0/0.png", place / "photos/class2/copy.png")
    Image.open(place / "photos/class1/4.png").save(place / "photos/class1/again.jpg", quality=97)
    run("index", "photos", "-o", "c.faiss")
    before = sorted(place.rglob("*"))
    done = run("dedupe", "c.faiss", "--min-score", "0.9995", "--json")
    assert done.code == 0
    document = done.json()
    groups = [sorted(one["path"] for one in group) for group in document["groups"]]
    assert sorted(groups) == [
        ["photos/class0/0.png", "photos/class2/copy.png"],
        ["photos/class1/4.png", "photos/class1/again.jpg"],
    ]
    marks = {one["path"]: one["same_content"] for group in document["groups"] for one in group}
    assert marks["photos/class2/copy.png"]
    assert not (marks["photos/class1/4.png"] and marks["photos/class1/again.jpg"])
    assert (document["pictures"], document["to_spare"]) == (14, 2)
    text = run("dedupe", "--min-score", "0.9995").out.splitlines()
    assert text[0] == "group 1  2 pictures"
    assert text[-1].startswith("14 pictures: 2 groups with 2 to spare (the same content, or score")
    assert sorted(place.rglob("*")) == before


def test_dedupe_of_a_folder_equals_that_of_its_index(place: Path, run: Any) -> None:
    shutil.copy(place / "photos/class0/0.png", place / "photos/class2/copy.png")
    (place / "photos/broken.png").write_bytes(b"no picture")
    run("index", "photos", "-o", "c.faiss")
    index = run("dedupe", "c.faiss", "--min-score", "0.9", "--json").json()["groups"]
    done = run("dedupe", "photos", "--model", "model.onnx", "--min-score", "0.9", "--json")
    assert done.code == 3
    document = done.json()

    def named(groups: Any) -> list[list[str]]:
        return sorted(sorted(one["path"] for one in group) for group in groups)

    assert named(document["groups"]) == named(index)
    assert [one["path"] for one in document["failed"]] == ["photos/broken.png"]
    document = run("dedupe", "photos", "--exact", "--json").json()
    assert named(document["groups"]) == [["photos/class0/0.png", "photos/class2/copy.png"]]
    assert document["min_score"] is None
    done = run("dedupe", "photos")
    assert done.code == 2
    assert "--exact" in done.err


def test_dedupe_compares_vectors_where_the_photos_are_gone(place: Path, run: Any) -> None:
    shutil.copy(place / "photos/class0/0.png", place / "photos/class2/copy.png")
    run("index", "photos", "-o", "c.faiss")
    shutil.rmtree(place / "photos")
    document = run("dedupe", "c.faiss", "--min-score", "0.9999", "--json").json()
    assert len(document["gone"]) == 13
    ((first, second),) = document["groups"]
    assert (first["same_content"], second["same_content"]) == (True, False)
    assert second["score"] == pytest.approx(1, abs=1e-5)


# cluster


def test_cluster_writes_every_picture_once(place: Path, run: Any) -> None:
    done = run("cluster", "--clusters", 3, "--json")
    assert done.code == 0
    document = done.json()
    with (place / "c.faiss.clusters.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["path"] for row in rows) == sorted(scores(place, "query0.png"))
    numbers = [int(row["cluster"]) for row in rows]
    assert document["sizes"] == [numbers.count(n) for n in range(document["clusters"])]
    assert sum(document["sizes"]) + document["alone"] == document["pictures"] == 12
    done = run("cluster", "--min-score", "0.99999", "-o", "lone.csv")
    assert done.out.startswith("0 clusters  0 of 12 pictures, 12 in none")


def test_cluster_by_links_takes_the_models_match(place: Path, run: Any) -> None:
    done = run("cluster", "c.faiss")
    assert done.code == 2
    assert "carries no thresholds" in done.err
    assert "--min-score 0.8, or --clusters 50" in done.err
    calibrate(place / "model.onnx")
    assert run("cluster", "c.faiss", "--json").json()["min_score"] == MATCH
    assert run("cluster", "c.faiss", "--method", "kmeans").code == 2
    assert run("cluster", "c.faiss", "--clusters", 99).code == 2


# verify


def test_verify_tells_scripts_whether_two_show_the_same(place: Path, run: Any) -> None:
    calibrate(place / "model.onnx")
    done = run("verify", "query0.png", "photos/class0/0.png", "--model", "model.onnx", "--json")
    assert done.code == 0
    document = done.json()
    assert (document["same"], document["verdict"]) == (True, "match")
    assert document["score"] == pytest.approx(1, abs=1e-5)
    known = scores(place, "query0.png")
    for name, score in known.items():
        done = run("verify", "query0.png", name)
        verdict = "match" if score >= 0.9 else "unsure" if score >= 0.4 else "none"
        assert done.out.startswith(f"{verdict}  {score:.4f}"[: len(verdict) + 6])
        assert done.code == (0 if verdict == "match" else 1)
    done = run("verify", "query0.png", "query5.png", "--index", "c.faiss", "--min-score=-1")
    assert done.code == 0


def test_verify_never_answers_no_where_it_cannot_know(place: Path, run: Any) -> None:
    done = run("verify", "query0.png", "query5.png")
    assert done.code == 2
    assert "carries no thresholds" in done.err
    (place / "broken.png").write_bytes(b"no picture")
    done = run("verify", "query0.png", "broken.png", "--min-score", "0.5")
    assert done.code == 2
    assert "broken.png is no picture to compare" in done.err
    (place / "c.faiss").unlink()
    done = run("verify", "query0.png", "query5.png")
    assert done.code == 2
    assert "which model?" in done.err


# index migrate


def test_migrate_prints_the_loss_and_search_says_it_goes_over_the_bridge(
    place: Path, run: Any
) -> None:
    for n in range(100, 200):
        picture(place / f"photos/class{n % 3}/{n}.png", n)
    run("index", "photos", "-o", "c.faiss")
    write_tiny_model(place / "new.onnx", dim=6, seed=4, name="new")
    done = run("search", "query0.png", "--model", "new.onnx")
    assert done.code == 5
    assert "embedkit index migrate c.faiss --to FILE" in done.err
    (place / "photos/broken.png").write_bytes(b"no picture")
    done = run("index", "migrate", "c.faiss", "--to", "new.onnx")
    assert done.code == 3
    assert "broken.png" in done.err
    lines = done.out.splitlines()
    assert lines[0] == "measured on 17 pictures the bridge was not fitted on"
    assert "found over the bridge" in lines[1]
    assert [line.split(",")[0].strip() for line in lines[2:5]] == ["recall@1"] * 3
    assert lines[5] == "index     c.faiss: 112 pictures by new"
    assert max(map(len, lines)) <= 80
    assert run("search", "query0.png", "--json").json()["model"]["name"] == "new"
    assert run("index", "migrate", "c.faiss", "--to", "new.onnx").code == 2


def test_a_search_over_a_bridge_says_so(place: Path, run: Any) -> None:
    from embedkit.index import Catalog
    from embedkit.index.migrate import bridge_path, fit_bridge

    write_tiny_model(place / "new.onnx", dim=6, seed=4)
    catalog = Catalog.open("c.faiss")
    rng = np.random.default_rng(0)
    old, new = (rng.standard_normal((100, d)).astype(np.float32) for d in (catalog.dim, 6))
    prints = catalog.fingerprint, read_contract(place / "new.onnx").fingerprint
    fit_bridge(old, new, [""] * 100, prints).save(bridge_path(catalog.path))
    done = run("search", "query0.png", "--model", "new.onnx", "--json")
    assert done.code == 0
    assert "c.faiss is still of another model: searched over the bridge" in done.err
    assert len(done.json()["results"][0]["hits"]) == 10
