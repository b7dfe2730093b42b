"""A folder of photos becomes a model and a searchable index, from Python: no command line.

    python examples/02_train_on_a_folder.py [--out FOLDER] [--steps 40]

1. draws generated products, a folder for each, and puts some aside that training never sees;
2. trains on the others, with whole classes held out;
3. exports the result to ONNX, published only if it equals the trained network on held-out photos;
4. indexes the products put aside, without PyTorch from here on, and searches for them.

Your own photos, a folder for each class, go where `draw` puts the generated ones. `--out` keeps
what was made: the examples after this one use its model and index.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from embedkit import Catalog, Embedder
from embedkit.data import draw_products, hold_out_classes, read_photos
from embedkit.export import export_checked
from embedkit.imaging import find_images
from embedkit.index import sync_folder
from embedkit.train import Recipe, train

PRODUCTS, PICTURES, QUERIES = 30, 16, 2


def main() -> None:
    """All four parts, with a line about each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="an empty folder (default: a temporary one)")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or Path(scratch)
        draw(folder)
        model = train_and_export(folder, options.steps)
        index_and_search(folder, model)


def draw(folder: Path) -> None:
    """``photos/`` to learn from; of every sixth product ``catalog/`` and ``queries/`` instead."""
    photos = draw_products(
        folder / "photos", classes=PRODUCTS, images_per_class=PICTURES, size=96, seed=0
    )
    for product in sorted(photos.iterdir())[::6]:
        for place, picture in enumerate(sorted(product.iterdir())):
            side = folder / ("queries" if place < QUERIES else "catalog") / product.name
            side.mkdir(parents=True, exist_ok=True)
            picture.rename(side / picture.name)
        product.rmdir()


def train_and_export(folder: Path, steps: int) -> Path:
    """The ONNX file of a network trained on ``photos/``."""
    photos = hold_out_classes(read_photos(folder / "photos"), share=0.2, seed=0)
    recipe = Recipe(
        loss="rll",
        loss_options={"margin": 0.4},
        backbone="resnet10",
        weights="none",  # nothing is downloaded; "imagenet" learns real photos much faster
        image_size=64,
        dim=64,
        classes_per_batch=12,
        images_per_class=4,
        steps=steps,
        augment_scale=(0.5, 1.0),
    )
    run = train(recipe, photos, folder / "runs" / "first", device="cpu")
    before, after = run.record["baseline"]["val"], run.metrics() or {}
    for name in ("recall@1", "map@r"):
        print(f"held-out classes, {name}: untrained {before[name]:.3f}, trained {after[name]:.3f}")

    model = run.path / "model.onnx"
    contract, report = export_checked(run.network(), run.contract(), model, *run.held_out())
    print(f"{model.name}: {contract.embedding_dim} numbers, cosine {report.min_cosine:.6f} or more")
    return model


def index_and_search(folder: Path, model: Path) -> None:
    """How many pictures of products never seen find their own product first."""
    index = folder / "catalog.faiss"
    with Embedder.load(model, device="cpu") as embedder:
        report = sync_folder(folder / "catalog", index, embedder, model=model)
        print(f"{index.name}: {report.found} found, {report.failed} failed")
        queries = list(find_images(folder / "queries"))
        answers = Catalog.open(index).search(embedder.embed(queries), k=3)
    right = sum(
        hits[0].label == query.parent.name for query, hits in zip(queries, answers, strict=True)
    )
    print(f"{right} of {len(queries)} pictures of products never seen find their own first")


if __name__ == "__main__":
    main()
