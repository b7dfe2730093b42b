"""The whole line on real photos: 81 grocery products, half of them never seen in training.

    python examples/01_grocery.py --data ../shared/data [--short] [--light-python PYTHON]

1. trains MobileNetV2 with Ranked List Loss on 41 products, from ImageNet weights in a file;
2. exports it to ONNX, compared with PyTorch on held-out photos;
3. indexes the photos of the other 40 products that were taken on earlier shop visits, in a process
   that cannot import torch (`--light-python` names the interpreter of a light installation);
4. searches for every photo of the later visits, and checks that the light half finds just what the
   trained network found in PyTorch: the same recall@1.

`--short` takes ten steps and six products of each side; it proves the line, not the figures.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

METRICS = ("recall@1", "map@r")

NO_TORCH = """
import sys
for name in ("torch", "torchvision", "onnx", "safetensors"):
    sys.modules[name] = None
from embedkit.cli.main import main
main()
"""


def main() -> None:
    """Run the four stages and print the figures as one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--light-python", type=Path)
    options = parser.parse_args()
    data = options.data.resolve()
    if not (data / "grocery" / "manifest.csv").is_file():
        print(f"skipped: no grocery photos at {options.data}/grocery", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as scratch:
        work = (options.out or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        figures = run(data, work, options.seed, options.short, options.light_python)
    print(json.dumps(figures, indent=1))


def run(
    data: Path, work: Path, seed: int, short: bool, light_python: Path | None
) -> dict[str, Any]:
    """All four stages below `work`; the figures of each."""
    manifest = write_manifest(data / "grocery", work / "visits.csv", 6 if short else None)
    train = embedkit(
        [
            *["train", str(manifest), "--weights", f"{data}/weights/mobilenet_v2_imagenet.pth"],
            *["--loss", "rll", "--backbone", "mobilenet_v2", "--freeze", "7", "--dim", "128"],
            *["--image-size", "128", "--batch", "16x4", "--steps", "10" if short else "200"],
            *["--val-share", "0", "--seed", str(seed), "--name", f"grocery-{seed}"],
        ],
        work,
    )
    export = embedkit(["export", "runs/last"], work)

    gallery, queries = link_photos(manifest, work)
    model = work / "runs" / "last" / "model.onnx"
    light = [str(light_python), "-m", "embedkit.cli.main"] if light_python else None
    light = light or [sys.executable, "-c", NO_TORCH]
    index = embedkit(
        ["index", str(gallery), "-o", "gallery.faiss", "--model", str(model)], work, light
    )
    search = embedkit(["search", str(queries), "--index", "gallery.faiss", "-k", "1"], work, light)
    found = [
        result["hits"][0]["label"] == Path(result["query"]).parent.name
        for result in search["results"]
    ]
    torch_recall = train["test"]["recall@1"]
    light_recall = sum(found) / len(found)
    if abs(light_recall - torch_recall) > 0.5 / len(found):
        raise SystemExit(f"the light half finds {light_recall}, PyTorch {torch_recall}")
    figures = {f"untrained {name}": train["baseline"]["test"][name] for name in METRICS}
    figures |= {f"trained {name}": train["test"][name] for name in METRICS}
    cosines = [batch["min_cosine"] for batch in export["gate"]["batches"]]
    return figures | {
        "export: least cosine": min(cosines),
        "export: neighbours kept": export["gate"]["neighbour_overlap@10"],
        "gallery photos": index["found"],
        "query photos": len(found),
        "recall@1 without torch": light_recall,
    }


def embedkit(
    arguments: list[str], folder: Path, command: list[str] | None = None
) -> dict[str, Any]:
    """Run one embedkit command in `folder`; its JSON document."""
    command = command or [sys.executable, "-m", "embedkit.cli.main"]
    print("$ embedkit", *arguments, file=sys.stderr, flush=True)
    done = subprocess.run(
        [*command, *arguments, "--json"], cwd=folder, stdout=subprocess.PIPE, check=True
    )
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def write_manifest(grocery: Path, path: Path, products: int | None) -> Path:
    """The photos with their split; of the unseen products, later shop visits ask earlier ones.

    `products` keeps only so many of each side of the split.
    """
    visits = csv.DictReader((grocery / "original_split.csv").open(encoding="utf-8"))
    later = {row["path"] for row in visits if row["original_split"] == "test"}
    kept: dict[str, dict[str, None]] = {"train": {}, "test": {}}
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split", "is_query", "is_gallery"])
        for row in csv.DictReader((grocery / "manifest.csv").open(encoding="utf-8")):
            side, label = kept[row["split"]], row["label"]
            if products is None or len(side) < products:
                side[label] = None
            if label in side:
                asks = row["path"] in later
                writer.writerow(
                    [grocery / row["path"], label, row["split"], int(asks), int(not asks)]
                )
    return path


def link_photos(manifest: Path, work: Path) -> tuple[Path, Path]:
    """Folders of links to the unseen products' photos: those to search in, those to ask with."""
    gallery, queries = work / "gallery", work / "queries"
    for row in csv.DictReader(manifest.open(encoding="utf-8")):
        if row["split"] == "test":
            folder = (queries if row["is_query"] == "1" else gallery) / row["label"]
            folder.mkdir(parents=True, exist_ok=True)
            photo = Path(row["path"])
            (folder / photo.name).unlink(missing_ok=True)
            (folder / photo.name).symlink_to(photo)
    for folder in queries.iterdir():  # a product without an earlier photo cannot be found
        if not (gallery / folder.name).is_dir():
            folder.rename(work / f"alone-{folder.name}")
    return gallery, queries


if __name__ == "__main__":
    main()
