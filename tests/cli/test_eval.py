"""`embedkit eval` and `embedkit data` as typed: one document whoever made the vectors."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedkit.data import draw_products, read_photos
from embedkit.evaluate import retrieval_metrics
from embedkit.imaging import Preprocess, read_pixels
from tests.cli.command import Done
from tests.tiny_model import tiny_vectors, write_tiny_model

KEYS = {
    *("schema", "model", "data", "metric", "images", "classes", "metrics", "intervals"),
    *("open_set", "clustering", "worst_classes", "skipped", "compared", "per_query", "reranked"),
}


class EvalDone(Done):
    def json(self) -> dict[str, Any]:
        """stdout, which must be exactly one document."""
        document = super().json()
        assert document["schema"] == "embedkit.eval/1"
        assert set(document) == KEYS
        return document


@pytest.fixture
def run(run: Callable[..., Done]) -> Callable[..., EvalDone]:
    return lambda *arguments: EvalDone(*run(*arguments))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "photos"
    return draw_products(folder, classes=9, images_per_class=4, size=40)


@pytest.fixture
def place(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """We are in a folder with photos and a model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "photos").symlink_to(pictures, target_is_directory=True)
    write_tiny_model(tmp_path / "model.onnx")
    return tmp_path


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run, and its model.onnx."""
    from embedkit.data import read_photos as read
    from embedkit.export import export_onnx
    from embedkit.train import Recipe, train

    folder = tmp_path_factory.mktemp("runs") / "one"
    recipe = Recipe.from_json(
        Recipe().to_json()
        | {"backbone": "squeezenet1_1", "weights": "none", "image_size": 32, "dim": 8}
        | {"classes_per_batch": 3, "images_per_class": 2, "steps": 1, "epochs": None}
        | {"val_share": 0.3, "freeze": 6}
    )
    done = train(recipe, read(pictures), folder, device="cpu")
    export_onnx(done.network(), done.contract(), folder / "model.onnx")
    return folder


def expected(place: Path, photos: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """The tiny model's vectors by numpy, and their figures."""
    preprocess = Preprocess(height=16, width=16, crop_ratio=1.0)
    pixels = np.stack([read_pixels(path, preprocess) for path in photos.files()])
    vectors = tiny_vectors(pixels)
    return vectors, retrieval_metrics(vectors, photos.labels, ks=(1, 2, 4, 8, 10)).to_json()


def test_an_onnx_file_is_measured_as_numpy_would(place: Path, run: Any) -> None:
    done = run("eval", "model.onnx", "photos", "--json")
    assert done.code == 0
    document = done.json()
    _, figures = expected(place, read_photos(place / "photos"))
    got = {name: value for name, value in document["metrics"].items() if name != "p@1"}
    assert got == pytest.approx(figures)
    assert document["model"]["kind"] == "onnx"
    assert (document["images"], document["classes"]) == (36, 9)
    assert document["clustering"]["n_init"] == 1
    assert "36 images, 9 classes" in done.err


def test_people_see_figures_with_intervals_then_the_worst_classes(place: Path, run: Any) -> None:
    done = run("eval", "model.onnx", "photos", "--ks", "1,3")
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 80
    shown = [line.split()[0] for line in lines]
    for name in ("recall@1", "recall@3", "MAP@R", "R-precision", "MRR"):
        assert lines[shown.index(name)].count("[") == 1
    assert "recall@2" not in shown
    assert lines.index("the worst classes") > shown.index("MRR")
    assert "\x1b" not in done.out


def test_saved_vectors_give_the_same_document_as_the_model(place: Path, run: Any) -> None:
    first = run("eval", "model.onnx", "photos", "--save-vectors", "v.npz", "--json").json()
    for again in (
        run("eval", "v.npz", "--json").json(),
        run("eval", "v.npz", "photos", "--json").json(),
    ):
        assert {**again, "model": 0} == {**first, "model": 0}
        assert again["model"]["kind"] == "vectors"


def test_a_plain_array_takes_its_labels_from_a_csv(place: Path, run: Any) -> None:
    photos = read_photos(place / "photos")
    vectors, figures = expected(place, photos)
    np.save("v.npy", vectors)
    with (place / "list.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label"])
        writer.writerows(zip(photos.files(), photos.labels, strict=True))
    document = run("eval", "v.npy", "list.csv", "--json").json()
    assert document["metrics"]["map@r"] == pytest.approx(figures["map@r"])
    np.save("short.npy", vectors[:5])
    done = run("eval", "short.npy", "list.csv")
    assert done.code == 5
    assert "5 vectors for 36 photos" in done.err


def test_a_run_is_measured_on_what_it_held_out_like_its_own_file(
    trained: Path, place: Path, run: Any
) -> None:
    documents, vectors = [], []
    for model in (trained, trained / "best.safetensors", trained / "model.onnx"):
        documents.append(run("eval", model, "--save-vectors", "v.npz", "--json").json())
        vectors.append(np.load("v.npz")["vectors"])
    ran, checkpoint, exported = documents
    record = json.loads((trained / "run.json").read_text())
    assert ran["data"]["split"] == "val"
    assert ran["metrics"]["map@r"] == pytest.approx(record["best"]["val"]["map@r"])
    assert [one["model"]["kind"] for one in documents] == ["checkpoint", "checkpoint", "onnx"]
    assert {**checkpoint, "model": 0} == {**ran, "model": 0}
    # One step does not separate much: the order of near vectors is a matter of rounding.
    np.testing.assert_allclose(vectors[2], vectors[0], atol=1e-4)
    for name in ("data", "images", "classes"):
        assert exported[name] == ran[name]
    assert exported["model"]["fingerprint"] == ran["model"]["fingerprint"]


def test_without_a_model_it_is_the_last_run(
    trained: Path, place: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("eval").code == 2
    (place / "runs").mkdir()
    (place / "runs/last").symlink_to(trained, target_is_directory=True)
    assert run("eval", "--json", "-q").json()["images"] == 12


def test_the_onnx_path_needs_no_torch(place: Path) -> None:
    blocked = ["torch", "torchvision", "onnx", "onnxscript", "safetensors", "sklearn", "scipy"]
    code = (
        f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
        "from embedkit.cli.main import main\n"
        "main(['eval', 'model.onnx', 'photos', '--json', '-q'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == 36
    done = subprocess.run(
        [sys.executable, "-c", code.replace("'model.onnx', 'photos', ", "")],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 6
    assert "embedkit[train]" in done.stderr


def test_unreadable_photos_are_named_and_the_exit_code_is_3(
    place: Path, pictures: Path, run: Any
) -> None:
    good = read_photos(pictures).files()
    with (place / "list.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label"])
        writer.writerows([[path, path.parent.name] for path in good])
        writer.writerow(["bad.jpg", "bad"])
    (place / "bad.jpg").write_bytes(b"no picture")
    done = run("eval", "model.onnx", "list.csv", "--json")
    assert done.code == 3
    document = done.json()
    assert [row["code"] for row in document["skipped"]] == ["not-an-image"]
    assert document["images"] == 36
    assert "bad.jpg" in done.err


def test_two_models_are_compared_query_by_query(place: Path, run: Any) -> None:
    write_tiny_model(place / "other.onnx", seed=1)
    a = run("eval", "model.onnx", "photos", "--json", "--per-query")
    (place / "a.json").write_text(a.out)
    b = run("eval", "other.onnx", "photos", "--json", "--compare", "a.json").json()
    one = b["compared"]["map@r"]
    assert one["before"] == pytest.approx(a.json()["metrics"]["map@r"])
    assert one["after"] == pytest.approx(b["metrics"]["map@r"])
    assert one["interval"][0] <= one["difference"] <= one["interval"][1]
    shown = run("eval", "model.onnx", "photos", "--compare", "a.json").out
    assert "+0.0000 [+0.0000, +0.0000]  in noise" in shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        ("{}", 5, "no evaluation"),
        ('{"schema": "embedkit.eval/1", "per_query": null}', 5, "--per-query"),
        ('{"schema": "embedkit.eval/1", "per_query": {"name": []}}', 5, "cannot be read"),
        (None, 2, "cannot be read"),
    ],
)
def test_what_cannot_be_compared_says_why(
    content: str | None, code: int, words: str, place: Path, run: Any
) -> None:
    if content is not None:
        (place / "a.json").write_text(content)
    done = run("eval", "model.onnx", "photos", "--compare", "a.json")
    assert done.code == code
    assert words in done.err


def test_other_queries_cannot_be_compared(place: Path, run: Any) -> None:
    document = json.loads(run("eval", "model.onnx", "photos", "--json", "--per-query").out)
    document["per_query"]["name"][0] = "another.jpg"
    (place / "a.json").write_text(json.dumps(document))
    done = run("eval", "model.onnx", "photos", "--compare", "a.json")
    assert done.code == 5
    assert "same queries" in done.err


def test_splits_are_chosen_and_training_photos_warned_of(
    place: Path, pictures: Path, run: Any
) -> None:
    rows = [(path, path.parent.name) for path in read_photos(pictures).files()]
    with (place / "list.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        writer.writerows(
            [*path_label, "train" if n < 20 else "test"] for n, path_label in enumerate(rows)
        )
    assert run("eval", "model.onnx", "list.csv", "--json").json()["images"] == 16
    assert (
        run("eval", "model.onnx", "list.csv", "--json", "--split", "train").json()["images"] == 20
    )
    assert run("eval", "model.onnx", "list.csv", "--json", "--split", "all").json()["images"] == 36
    done = run("eval", "model.onnx", "list.csv", "--split", "val")
    assert done.code == 2
    assert "20 train, 16 test" in done.err


def test_query_and_gallery_folders_are_kept_apart(place: Path, pictures: Path, run: Any) -> None:
    for number, path in enumerate(read_photos(pictures).files()):
        side = "query" if number % 4 == 0 else "gallery"
        target = place / "apart" / side / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
    done = run("eval", "model.onnx", "apart", "--protocol", "query-gallery", "--json")
    document = done.json()
    assert document["metrics"]["queries"] == 9
    assert document["open_set"]["same_pairs"] == 27
    assert "9 queries, 27 in the gallery" in done.err


def test_a_protocol_says_where_its_counts_are_not_the_papers(
    place: Path, pictures: Path, run: Any
) -> None:
    root = place / "Stanford_Online_Products"
    root.mkdir()
    head, lines = "image_id class_id super_class_id path\n", []
    for number, path in enumerate(read_photos(pictures).files()):
        (root / f"{number}.JPG").symlink_to(path)
        lines.append(f"{number} {number // 4} 1 {number}.JPG\n")
    (root / "Ebay_train.txt").write_text(head + "".join(lines[:12]))
    (root / "Ebay_test.txt").write_text(head + "".join(lines[12:]))
    done = run("eval", "model.onnx", ".", "--protocol", "sop", "--json", "--no-nmi")
    document = done.json()
    assert "the papers have 60,502" in done.err
    assert len(document["data"]["differences"]) == 2
    assert (document["images"], document["clustering"]) == (24, None)
    assert "recall@1000" in document["metrics"]
    done = run("eval", "model.onnx", ".", "--protocol", "sop", "--strict-counts")
    assert done.code == 2


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["model.onnx"], 2, "which photos?"),
        (["missing.onnx", "photos"], 2, "no file"),
        (["missing", "photos"], 2, "no run"),
        (["photos", "photos"], 5, "no run of embedkit"),
        (["model.onnx", "photos", "--ks", "1,x"], 2, "--ks"),
        (["model.onnx", "photos", "--ks", "0"], 2, "--ks"),
        (["model.onnx", "photos", "--split", "tset"], 2, "tset"),
        (["model.onnx", "photos", "--metric", "dot"], 2, "cosine or l2"),
        (["model.onnx", "photos", "--protocol", "cup"], 2, "did you mean 'cub'"),
        (["model.onnx", "photos", "--protocol", "cub"], 2, "embedkit data prepare cub"),
        (["model.onnx", "photos", "--save-vectors", "v.csv"], 2, ".npz"),
        (["model.onnx", "nothing"], 2, "no folder or CSV"),
        (["text.npy", "photos"], 5, "no file of vectors"),
        (["pickled.npy", "photos"], 5, "no file of vectors"),
        (["flat.npy", "photos"], 5, "holds no vectors"),
        (["bare.npz"], 2, "without labels"),
    ],
)
def test_every_mistake_is_one_clear_answer(
    arguments: list[str], code: int, words: str, place: Path, run: Any
) -> None:
    Path("text.npy").write_text("no")
    np.save("pickled.npy", np.array([{}], dtype=object))
    np.save("flat.npy", np.ones(3))
    np.savez("bare.npz", vectors=np.ones((2, 2)))
    done = run("eval", *arguments)
    assert done.code == code, done.err
    assert done.err.splitlines()[-1] or words in done.err
    assert words in done.err
    assert done.out == ""


def test_l2_is_asked_for_by_name(place: Path, run: Any) -> None:
    photos = read_photos(place / "photos")
    vectors, _ = expected(place, photos)
    vectors *= np.random.default_rng(0).uniform(0.5, 2, size=(len(vectors), 1)).astype(np.float32)
    np.save("v.npy", vectors)
    document = run("eval", "v.npy", "photos", "--metric", "l2", "--json").json()
    figures = retrieval_metrics(vectors, photos.labels, metric="l2")
    assert document["metric"] == "l2"
    assert document["metrics"]["map@r"] == pytest.approx(figures.map_at_r)


def test_re_ranking_stands_beside_the_plain_figures(place: Path, run: Any) -> None:
    photos = read_photos(place / "photos")
    vectors, _ = expected(place, photos)
    np.save("v.npy", vectors)
    plain = run("eval", "v.npy", "photos", "--json").json()
    for how, wanted in (
        ("aqe:k=2", {"k": 2, "alpha": 3.0}),
        ("kreciprocal:depth=9,k1=4", {"depth": 9, "k1": 4, "k2": 6, "lambda": 0.3}),
    ):
        both = run("eval", "v.npy", "photos", "--rerank", how, "--json").json()
        again = both.pop("reranked")
        assert {**both, "reranked": None} == plain
        assert (again["method"], again["settings"]) == (how.partition(":")[0], wanted)
        gained = again["metrics"]["map@r"] - plain["metrics"]["map@r"]
        assert again["differences"]["map@r"]["difference"] == pytest.approx(gained)
        assert (
            f"re-ranked by {again['method']}" in run("eval", "v.npy", "photos", "--rerank", how).out
        )
    assert run("eval", "v.npy", "photos", "--rerank", "qe").code == 2
    done = run("eval", "v.npy", "photos", "--rerank", "aqe", "--metric", "l2")
    assert (done.code, "cosine" in done.err) == (2, True)


def test_data_prepare_offline_names_the_address_and_the_place(place: Path, run: Any) -> None:
    done = run("data", "prepare", "inshop", "shop")
    assert done.code == 6
    assert "mmlab.ie.cuhk.edu.hk" in done.err
    assert str(Path("shop/list_eval_partition.txt")) in done.err
    assert run("data", "prepare", "cubs").code == 2
    assert run("data", "prepair", "cub").code == 2
