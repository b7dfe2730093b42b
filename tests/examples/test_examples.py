"""The examples do what they say, on a model small enough for a test; CI also runs them whole."""

from __future__ import annotations

import ast
import csv
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image, ImageFilter

from embedkit import Embedder
from embedkit.imaging import Preprocess, read_pixels
from embedkit.index import sync_folder
from tests.tiny_model import write_tiny_model

EXAMPLES = Path(__file__).parents[2] / "examples"
NUMBERED = sorted(EXAMPLES.glob("[0-9]*"))


def load(file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        Path(file).stem.lstrip("0123456789_"), EXAMPLES / file
    )
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(example: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, EXAMPLES / example, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """Smooth, so that a JPEG of it keeps what it shows."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).filter(ImageFilter.GaussianBlur(3))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A model, a catalog of three products, and its index."""
    write_tiny_model(tmp_path / "model.onnx")
    for seed, name in enumerate(("bag/1.jpg", "bag/2.jpg", "cup/1.jpg", "mug/1.jpg")):
        file = tmp_path / "catalog" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(seed=seed).save(file)
    return tmp_path


@pytest.fixture
def index(work: Path) -> Path:
    with Embedder.load(work / "model.onnx", device="cpu") as embedder:
        sync_folder(work / "catalog", work / "c.faiss", embedder, model=work / "model.onnx")
    return work / "c.faiss"


def job(work: Path, index: Path, *queries: str | Path) -> subprocess.CompletedProcess[str]:
    (work / "list.txt").write_text("\n".join(map(str, queries)))
    return run(
        *("04_batch_job.py", "--catalog", work / "catalog", "--index", index),
        *("--model", work / "model.onnx", "--queries", work / "list.txt"),
        *("--out", work / "hits.csv"),
    )


# --- all of them ---------------------------------------------------------------------------------


def test_ci_runs_every_example() -> None:
    script = (EXAMPLES / "run_all.py").read_text()
    assert len(NUMBERED) >= 6
    assert [path.name for path in NUMBERED if f'"{path.name}"' not in script] == []


@pytest.mark.parametrize("file", [path.name for path in NUMBERED if path.suffix == ".py"])
def test_an_example_opens_with_what_it_shows_and_its_command(file: str) -> None:
    tree = ast.parse((EXAMPLES / file).read_text(encoding="utf-8"))
    first, blank, command, *_ = (ast.get_docstring(tree, clean=False) or "").splitlines()
    assert first.endswith(".")
    assert not blank
    assert command.startswith(f"    python examples/{file} ")


# --- 03: without embedkit ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        Preprocess(height=16, width=16),
        Preprocess(height=24, width=10, crop_ratio=1.0, filter="bilinear", scaled_decode=0),
        Preprocess(height=7, width=31, crop_ratio=0.3, scaled_decode=1),
    ],
    ids=["square", "tall", "wide"],
)
def test_a_photo_becomes_the_same_pixels_with_pillow_and_numpy_alone(
    tmp_path: Path, spec: Preprocess
) -> None:
    bare = load("03_bare_onnxruntime.py").read_pixels
    turned = Image.Exif()
    turned[0x0112] = 6
    clear = picture().convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    files = {
        "plain.jpg": picture(),
        "large.jpg": picture(1200, 803),
        "thin.jpg": picture(500, 3),
        "one.png": picture(1, 1),
        "grey.png": picture().convert("L"),
        "palette.png": picture().quantize(8),
        "clear.png": clear,
        "clear.webp": clear,
        "cmyk.jpg": picture().convert("CMYK"),
    }
    for name, image in files.items():
        image.save(tmp_path / name, lossless=True) if name.endswith("webp") else image.save(
            tmp_path / name
        )
    picture(90, 60).save(tmp_path / "turned.jpg", exif=turned)
    for name in [*files, "turned.jpg"]:
        ours = read_pixels(tmp_path / name, spec)
        assert np.array_equal(bare(tmp_path / name, spec.to_json()), ours), name


def test_the_bare_vectors_are_the_embedders(work: Path) -> None:
    photos = sorted(work.glob("catalog/*/*.jpg"))
    vectors = load("03_bare_onnxruntime.py").embed(work / "model.onnx", photos)
    with Embedder.load(work / "model.onnx", device="cpu") as embedder:
        assert np.array_equal(vectors, embedder.embed(photos))


def test_the_bare_example_loads_nothing_of_embedkit(work: Path) -> None:
    code = (
        "import runpy, sys; sys.modules['embedkit'] = sys.modules['torch'] = None;"
        f"sys.argv = ['x', {str(work / 'model.onnx')!r}, {str(work / 'catalog/bag/1.jpg')!r}];"
        f"runpy.run_path({str(EXAMPLES / '03_bare_onnxruntime.py')!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "1.000"


# --- 04: the nightly job -------------------------------------------------------------------------


def test_the_nightly_job_answers_every_line_and_tells_what_it_skipped(work: Path) -> None:
    (work / "catalog" / "torn.jpg").write_bytes(b"\xff\xd8\xff torn")
    good, torn, gone = work / "catalog/bag/2.jpg", work / "catalog/torn.jpg", work / "gone.jpg"
    done = job(work, work / "new.faiss", good, torn, gone, good)
    assert done.returncode == 3, done.stderr
    assert "5 found, 4 embedded, 0 unchanged, 0 moved, 1 failed" in done.stdout
    with (work / "hits.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["query"] for row in rows] == list(map(str, (good, torn, gone, good)))
    assert [row["label"] for row in rows] == ["bag", "", "", "bag"]
    assert [bool(row["problem"]) for row in rows] == [False, True, True, False]
    assert float(rows[0]["score"]) == pytest.approx(1, abs=1e-4)
    assert "torn.jpg" in done.stderr


def test_a_night_that_fails_leaves_the_csv_and_gives_embedkits_own_code(
    work: Path, index: Path
) -> None:
    (work / "hits.csv").write_text("the night before")
    write_tiny_model(work / "model.onnx", seed=1)
    done = job(work, index, work / "catalog/bag/1.jpg")
    assert done.returncode == 5, done.stderr
    assert (work / "hits.csv").read_text() == "the night before"
    assert "try: " in done.stderr
    assert "Traceback" not in done.stderr


# --- 05: the server's client ---------------------------------------------------------------------


def test_the_client_finds_a_photo_over_http_and_stops_the_server(work: Path, index: Path) -> None:
    done = run("05_server_client.py", index, work / "catalog/mug/1.jpg")
    assert done.returncode == 0, done.stderr
    served, _, first, *rest = done.stdout.splitlines()
    assert "serves 4 pictures" in served
    assert first.split() == ["1", "1.0000", "mug", "mug/1.jpg"]
    # The second search is by that picture, which is not among its own hits.
    assert "mug/1.jpg" not in " ".join(line for line in rest if line.startswith("  1"))


def test_the_client_tells_what_the_server_says(work: Path, index: Path) -> None:
    done = run("05_server_client.py", work / "gone.faiss", work / "catalog/mug/1.jpg")
    assert done.returncode == 1 or done.returncode == 2
    assert "gone.faiss" in done.stderr
    (work / "note.jpg").write_text("no picture")
    done = run("05_server_client.py", index, work / "note.jpg")
    assert done.returncode == 1
    assert "/v1/search" in done.stderr
    assert "Traceback" not in done.stderr


# --- 06: the plug-in -----------------------------------------------------------------------------


def test_the_plug_in_names_its_loss_by_an_entry_point() -> None:
    settings = tomllib.loads((EXAMPLES / "06_plugin" / "pyproject.toml").read_text())
    (target,) = settings["project"]["entry-points"]["embedkit.losses"].values()
    module, _, name = target.partition(":")
    assert settings["tool"]["setuptools"]["py-modules"] == [module]
    assert name in load(f"06_plugin/{module}.py").__all__


def test_the_plug_ins_loss_is_pytorch_metric_learnings() -> None:
    torch = pytest.importorskip("torch")
    peers = pytest.importorskip("pytorch_metric_learning.losses")
    circle = load("06_plugin/embedkit_circle.py").CircleLoss
    torch.manual_seed(0)
    rows = torch.randn(12, 5, dtype=torch.float64)
    ours, theirs = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    labels = torch.arange(12) // 3
    value = circle(margin=0.25, scale=64)(ours, labels)
    expected = peers.CircleLoss(m=0.25, gamma=64)(theirs, labels)
    value.backward()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)


def test_the_plug_ins_loss_is_still_where_nothing_can_be_learned() -> None:
    torch = pytest.importorskip("torch")
    circle = load("06_plugin/embedkit_circle.py").CircleLoss
    for labels in ([], [0], [0, 0, 0], [0, 1, 2]):
        rows = torch.randn(len(labels), 4, requires_grad=True)
        value = circle()(rows, torch.tensor(labels, dtype=torch.long))
        value.backward()
        assert value.item() == 0
        assert not rows.grad.any()
    for options in ({"margin": -0.1}, {"margin": 1.1}, {"scale": 0.0}):
        with pytest.raises(ValueError, match="must be a number"):
            circle(**options)
