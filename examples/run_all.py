"""Run every example, one after the other, on one model that the second of them trains.

    python examples/run_all.py [--data ../shared/data] [--light-python PYTHON]

CI runs this; about 90 s of CPU time, nothing downloaded. `--light-python` names the interpreter of
an installation without PyTorch for the examples that need none.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PLUGIN = HERE / "06_plugin"


def main() -> None:
    """All examples; the first that fails ends it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--light-python", type=Path, default=Path(sys.executable))
    options = parser.parse_args()
    light = options.light_python.absolute()  # not resolved: a venv's python is a link
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        run("02_train_on_a_folder.py", "--out", work)
        model, catalog = work / "runs" / "first" / "model.onnx", work / "catalog"
        index, photos = work / "catalog.faiss", sorted(work.glob("queries/*/*.jpg"))
        run("03_bare_onnxruntime.py", model, *photos[:4], "--check", python=light)
        (work / "queries.txt").write_text("\n".join(map(str, photos)), encoding="utf-8")
        run(
            *("04_batch_job.py", "--catalog", catalog, "--index", index, "--model", model),
            *("--queries", work / "queries.txt", "--out", work / "hits.csv"),
            python=light,
        )
        run("05_server_client.py", index, photos[0])
        train_with_the_plugin(work)
        run("01_grocery.py", "--data", options.data, "--short", "--light-python", light)
    print(f"all examples: {time.monotonic() - began:.0f} s")


def run(example: str, *arguments: str | Path, python: str | Path = sys.executable) -> None:
    """One example, and its time."""
    print(f"\n-- {example}", flush=True)
    began = time.monotonic()
    # Idle threads that spin would keep the cores from each other on a busy machine.
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    subprocess.run([python, HERE / example, *arguments], check=True, env=env)
    print(f"   {time.monotonic() - began:.0f} s", flush=True)


def train_with_the_plugin(work: Path) -> None:
    """Two steps with a loss that embedkit does not have, from a package that pip installed."""
    print(f"\n-- {PLUGIN.name}", flush=True)
    began = time.monotonic()
    # A copy, so that building leaves nothing in the source; a folder of its own, so that the
    # environment stays as it is.
    source, site = work / "plugin", work / "site"
    shutil.copytree(PLUGIN, source)
    pip = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--target", site, source]
    subprocess.run([sys.executable, "-m", "pip", *pip], check=True)
    subprocess.run(
        [
            *(sys.executable, "-m", "embedkit.cli.main", "train", work / "photos"),
            *("--loss", "circle", "-s", "margin=0.25", "--steps", "2", "--batch", "4x2"),
            *("--backbone", "resnet10", "--weights", "none", "--image-size", "32"),
            *("--runs", work / "plugin-runs"),
        ],
        check=True,
        env={**os.environ, "PYTHONPATH": str(site)},
    )
    print(f"   {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
