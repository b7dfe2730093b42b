"""`embedkit train`: the story, the JSON, the exit codes, and going on after a stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from embedkit.data import draw_products
from embedkit.train import Recipe, Run
from tests.cli.command import embedkit
from tests.tiny_model import write_tiny_model

TINY = [
    *("--backbone", "mobilenet_v3_small", "--weights", "none", "--image-size", "32", "--dim", "8"),
    *("--batch", "3x2", "--freeze", "6", "--val-share", "0.3", "--device", "cpu"),
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "products"
    return draw_products(folder, classes=9, images_per_class=4, size=40)


def run(*arguments: object) -> int:
    """The exit code of ``embedkit train ...`` in this process."""
    return embedkit("train", *arguments)


def test_it_tells_the_story_and_answers_with_the_run(
    pictures: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(pictures, *TINY, "--steps", 2, "--loss", "rll", "-s", "alpha=1.4") == 0
    out, err = capsys.readouterr()
    path = here / out.strip()
    assert path.name.endswith("-rll-mobilenet_v3_small")
    assert (here / "runs" / "last").resolve() == path.resolve()
    for said in (
        "36 images, 9 classes",
        "train 24 images of 6 classes; val 12 images of 3 classes",
        "mobilenet_v3_small",
        "alpha=1.4 margin=0.4",
        "cpu (float32)",
        "baseline  val: recall@1",
        "epoch     1/1",
        "MAP@R",
        "active ",
        "untrained: recall@1",
        f"saved     {out.strip()}",
        f"next      embedkit export {out.strip()}",
    ):
        assert said in err
    assert "\x1b" not in err


def test_json_is_one_document_and_quiet_is_quiet(
    pictures: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(pictures, *TINY, "--steps", 2, "--json", "-q", "--name", "mine") == 0
    out, err = capsys.readouterr()
    assert err == ""
    document = json.loads(out)
    assert document["schema"] == "embedkit.train/1"
    assert document["run"] == "runs/mine"
    assert document["data"]["splits"]["val"] == {"images": 12, "classes": 3}
    assert 0 <= document["best"]["val"]["map@r"] <= 1
    assert document["baseline"]["val"]["queries"] == 12
    assert document["steps"] == 2


def test_the_automatic_name_is_never_used_twice(pictures: Path, here: Path) -> None:
    for _ in range(2):
        assert run(pictures, *TINY, "--steps", 1, "-q") == 0
    names = sorted(path.name for path in (here / "runs").iterdir() if path.name != "last")
    assert names[1] == f"{names[0]}-2"


def test_a_dry_run_refuses_the_weights_that_a_real_run_refuses(
    pictures: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"other": torch.zeros(1)}, here / "other.pth")
    for wrong in ("gone.pth", "other.pth"):
        weights = (*TINY, "--weights", wrong, "--steps", 1, "-q")
        said = []
        for dry in ([], ["--dry-run"]):
            code = run(pictures, *weights, *dry)
            said.append((code, capsys.readouterr().err))
        assert said[0] == said[1]
        assert said[0][0] == (2 if wrong == "gone.pth" else 5)
        assert wrong in said[0][1]


def test_a_dry_run_shows_the_plan_and_writes_nothing(
    pictures: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(pictures, *TINY, "--dry-run") == 0
    out, err = capsys.readouterr()
    assert Recipe.from_toml(out).dim == 8
    assert "train 24 images" in err
    assert run(pictures, *TINY, "--dry-run", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["dry_run"] is True
    assert document["epochs"] * document["epoch_steps"] == document["steps"]
    assert not list(here.iterdir())


def test_options_win_over_the_recipe_file(
    pictures: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Recipe(loss="triplet", loss_options={"margin": 0.3}, epochs=7, dim=5, weights="none")
    (here / "mine.toml").write_text(base.to_toml())

    def resolved(*arguments: object) -> dict[str, Any]:
        assert run(pictures, "--config", "mine.toml", "--dry-run", "--json", "-q", *arguments) == 0
        recipe: dict[str, Any] = json.loads(capsys.readouterr().out)["recipe"]
        return recipe

    assert resolved()["dim"] == 5
    recipe = resolved("--dim", 6, "-s", "mining=semi-hard")
    assert recipe["dim"] == 6
    assert recipe["loss_options"] == {"margin": 0.3, "mining": "semi-hard"}
    assert resolved("--loss", "rll")["loss_options"] == {}
    recipe = resolved("--steps", 9)
    assert (recipe["epochs"], recipe["steps"]) == (None, 9)
    assert resolved("--max-time", "2h")["max_time"] == 7200


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--loss", "rlll"], 2, "did you mean 'rll'"),
        (["--loss", "rlll", "--weights", "imagenet"], 2, "did you mean 'rll'"),
        (["--backbone", "resnet51"], 2, "did you mean 'resnet50'"),
        (["-s", "alfa=1"], 2, "did you mean 'alpha'"),
        (["-s", "alpha"], 2, "-s takes NAME=VALUE"),
        (["-s", "=1"], 2, "-s takes NAME=VALUE"),
        (["-s", "alpha=9"], 2, "alpha must be"),
        (["--batch", "16"], 2, "--batch takes classes x images"),
        (["--batch", "1x4"], 2, "classes_per_batch must be 2 or more"),
        (["--max-time", "soon"], 2, "--max-time takes a time"),
        (["--epochs", "1", "--steps", "1"], 2, "both say how long"),
        (["--device", "gpu"], 2, "there is no device 'gpu'"),
        (["--device", "cuda:97"], 6, "try: --device cpu"),
        (["--weights", "absent.pth"], 2, "there is no weights file"),
        (["--config", "absent.toml"], 2, "cannot be read"),
        (["--resume", "runs/absent"], 2, "there is no run"),
        (["--resume", "runs/absent", "--name", "x"], 2, "leave --name out"),
        (["--name", "a/b"], 2, "cannot name a run"),
        (["--dim", "x"], 2, "--dim"),
        (["--frobnicate"], 2, "No such option"),
    ],
)
def test_what_is_wrong_is_said_in_three_lines_with_its_exit_code(
    pictures: Path,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    says: str,
) -> None:
    assert run(pictures, "--weights", "none", *arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert "Traceback" not in err
    assert not list(here.iterdir())


def test_absent_and_unusable_data_is_exit_code_2(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("absent", "--weights", "none") == 2
    assert "there is no folder or CSV" in capsys.readouterr().err
    assert run("--weights", "none") == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none_is_exit_code_6(
    pictures: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(pictures, "--weights", "none", "--device", "cuda") == 6
    err = capsys.readouterr().err
    assert "the device cuda is not here" in err
    assert "try: --device cpu" in err


def test_skipped_files_are_named_and_end_in_exit_code_3(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = draw_products(here / "photos", classes=9, images_per_class=4, size=40)
    broken = sorted(photos.glob("*/*.jpg"))[0]
    broken.write_bytes(b"no picture")
    assert run(photos, *TINY, "--steps", 1, "--json", "--name", "one") == 3
    out, err = capsys.readouterr()
    assert json.loads(out)["data"]["unreadable"] == 1
    assert "1 files are no usable pictures" in err
    (line,) = (here / "runs" / "one" / "failed.jsonl").read_text().splitlines()
    assert photos / json.loads(line)["path"] == broken


def test_a_teacher_is_loaded_by_the_runtime_and_resumed_with(
    pictures: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contract = write_tiny_model(here / "teacher.onnx", dim=5, size=16)
    taught = [*TINY, "--teacher", "teacher.onnx", "--distill", "both"]
    assert run(pictures, *taught, "--steps", 4, "--max-time", "0s", "--name", "taught") == 0
    err = capsys.readouterr().err
    assert f"teacher   {contract.name}, 5-d, cpu" in err
    assert "(both, weight 1, augmented photos)" in err
    assert run("--resume", "runs/last", "--max-time", "1h", "-q") == 0
    assert Run.load(here / "runs" / "taught").record["steps"] == 4
    write_tiny_model(here / "teacher.onnx", dim=5, size=16, seed=1)
    assert run("--resume", "runs/last", "--max-time", "1h") == 5
    assert "not the one" in capsys.readouterr().err
    (here / "foreign.onnx").write_bytes(b"no model")
    for file, code in (("foreign.onnx", 5), ("absent.onnx", 2)):
        assert run(pictures, *TINY, "--teacher", file, "--name", "never") == code
        assert file in capsys.readouterr().err
    assert not (here / "runs" / "never").exists()


def test_doubted_labels_are_a_file_in_the_run(
    pictures: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    doubted = ["--noise", "dm", "--noise-option", "emphasis=2", "--name", "doubted"]
    assert run(pictures, *TINY, "--steps", 2, *doubted) == 0
    err = capsys.readouterr().err
    assert "noise     dm  power=0.5 emphasis=2" in err
    assert "of 24 labels of train are doubted: runs/doubted/suspects.csv" in err
    assert (here / "runs/doubted/suspects.csv").is_file()
    assert run(pictures, *TINY, "--noise", "dm", "--noise-option", "emphasis") == 2
    assert "--noise-option takes NAME=VALUE" in capsys.readouterr().err


def test_a_run_is_resumed_by_its_link_with_its_own_settings_and_photos(
    pictures: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [*TINY, "--steps", 4]
    assert run(pictures, *steps, "--max-time", "0s", "--name", "short", "-q") == 0
    assert Run.load(here / "runs" / "short").record["steps"] == 1
    capsys.readouterr()
    assert run("--resume", "runs/last", "--dim", 16) == 2
    assert "dim: 16, not 8" in capsys.readouterr().err
    assert run("--resume", "runs/last", "--max-time", "1h", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert Path(document["run"]).name == "short"
    assert document["steps"] == 4


def test_ctrl_c_saves_says_how_to_go_on_and_exits_130(pictures: Path, here: Path) -> None:
    command = [sys.executable, "-m", "embedkit.cli.main", "train", str(pictures), *TINY]
    process = subprocess.Popen(
        [*command, "--epoch-steps", "1", "--epochs", "9999", "--patience", "0", "--name", "long"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not (here / "runs" / "long" / "metrics.jsonl").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130, err
    assert err.splitlines()[-3].startswith("error: interrupted after step ")
    assert err.splitlines()[-1] == "  try: embedkit train --resume runs/long"
    assert run("--resume", "runs/long", "--max-time", "0s", "-q") == 0


def test_the_whole_line_runs_on_real_photos_with_real_weights(
    shared_data: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = shared_data / "weights" / "mobilenet_v2_imagenet.pth"
    code = run(
        shared_data / "tiny" / "manifest.csv",
        *("--backbone", "mobilenet_v2", "--weights", weights, "--freeze", 15, "--image-size", 64),
        *("--batch", "4x4", "--steps", 6, "--val-share", 0, "--device", "cpu", "--json", "-q"),
    )
    assert code == 0
    document = json.loads(capsys.readouterr().out)
    assert document["baseline"]["test"]["map@r"] > 0.25
    assert document["test"]["map@r"] > 0.25
    # A deployed model tells no place on the machine it was trained on.
    assert Run.load(here / "runs" / "last").contract().recipe["weights"] == weights.name
