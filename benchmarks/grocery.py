"""embedkit against pytorch-metric-learning on real photos: one data set, network and budget.

    python -m benchmarks.grocery --data ../shared/data [--seeds 0 1 2] [--steps 200]

Both train MobileNetV2 from the same ImageNet weights with Ranked List Loss: 128-pixel crops,
BatchNorm and the first 7 blocks frozen, 128-d, 200 steps of 16 products x 4 photos, AdamW 1e-4 /
head 1e-3, warm-up over a tenth and a cosine, random-resized crop 0.3-1 and flip. Judged on the 40
products that neither has seen. The peer is the script `baseline_pml.py` that lies beside the
photos, run as it is; both measure their own vectors, and embedkit's metrics are tested equal to
the peer's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.figures import machine, save

__all__ = ["ours", "peer"]


def ours(data: Path, work: Path, seed: int, steps: int) -> dict[str, float]:
    """Train with embedkit; metrics on the unseen products."""
    command = [
        sys.executable,
        "-m",
        "embedkit.cli.main",
        "train",
        str(data / "grocery/manifest.csv"),
    ]
    command += ["--loss", "rll", "--backbone", "mobilenet_v2", "--image-size", "128"]
    command += ["--weights", str(data / "weights/mobilenet_v2_imagenet.pth"), "--dim", "128"]
    command += ["--freeze", "7", "--batch", "16x4", "--steps", str(steps), "--val-share", "0"]
    command += ["--seed", str(seed), "--name", f"grocery-{seed}", "--json"]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=work, stdout=subprocess.PIPE, check=True)
    said = json.loads(done.stdout)
    return {**pick(said["test"]), "seconds": time.perf_counter() - start, **baseline(said)}


def peer(data: Path, work: Path, seed: int, steps: int, loss: str) -> dict[str, float]:
    """Train with pytorch-metric-learning, or measure the untrained network (`loss` none)."""
    command = [sys.executable, str(data / "baseline_pml.py"), "--data", str(data / "grocery")]
    command += ["--loss", loss, "--seed", str(seed), "--steps", str(steps), "--threads", "2"]
    command += ["--cache", str(work / "cache")]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=work, stdout=subprocess.PIPE, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    return {
        "recall@1": said["R@1"],
        "map@r": said["MAP@R"],
        "seconds": time.perf_counter() - start,
    }


def pick(metrics: dict[str, Any]) -> dict[str, float]:
    """The two figures compared."""
    return {name: metrics[name] for name in ("recall@1", "map@r")}


def baseline(said: dict[str, Any]) -> dict[str, float]:
    """The untrained network's figures on the same photos."""
    return {f"untrained {name}": value for name, value in pick(said["baseline"]["test"]).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    # For both: on a busy machine OpenMP threads that spin make either several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    data = options.data.resolve()
    rows: dict[str, list[dict[str, float]]] = {"embedkit": [], "pytorch-metric-learning": []}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        untrained = peer(data, work, 0, 0, "none")
        for seed in options.seeds:
            rows["embedkit"].append(ours(data, work, seed, options.steps))
            rows["pytorch-metric-learning"].append(peer(data, work, seed, options.steps, "rll"))
            print(seed, {name: values[-1] for name, values in rows.items()}, flush=True)
    for name, values in rows.items():
        for figure in ("recall@1", "map@r", "seconds"):
            found = [value[figure] for value in values]
            spread = statistics.stdev(found) if len(found) > 1 else 0.0
            print(f"{name:<24} {figure:<9} {statistics.mean(found):8.4f} +- {spread:.4f}")
    save(
        "grocery",
        {
            "machine": machine(),
            "loss": "rll",
            "steps": options.steps,
            "seeds": options.seeds,
            "untrained (peer's script)": untrained,
            **rows,
        },
    )


if __name__ == "__main__":
    main()
