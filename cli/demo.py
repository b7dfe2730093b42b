"""`embedkit demo`: the whole line on generated pictures, every command shown as it is typed."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from embedkit.cli.display import Advance, AsJson, Display, Quiet, Verbose
from embedkit.errors import UsageError

__all__ = ["demo"]

_PRODUCTS, _NEW, _PICTURES, _QUERIES = 60, 12, 24, 2
_MARK = ".embedkit-demo"
_OURS = ("photos", "catalog", "queries", "runs")

# Measured on the generated pictures: small enough for a CPU, and MAP@R no longer rises.
_TRAIN = (
    "train ./photos --loss rll --backbone resnet10 --weights none --image-size 64 --dim 64 "
    "--batch 12x4 --steps 240 --patience 0 --augment-scale 0.5 1"
)
_INDEX = "index ./catalog"
_SEARCH = "search ./queries --index catalog.faiss -k 5 --html results.html"


def demo(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to work.")] = Path(
        "embedkit-demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Of the pictures and of the training.")] = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train, export, index and search on generated pictures.

    It draws 60 products, trains on 48 of them with Ranked List Loss, and searches among the 12
    that the network has never seen. A second demo in the same FOLDER begins anew.

    Example: embedkit demo
    """
    display = Display(as_json=as_json, quiet=quiet)
    _make_room(folder)
    with display.progress("drawing", total=_PRODUCTS * _PICTURES) as advance:
        _draw(folder, seed, advance)
    display.note("photos", f"{_PRODUCTS - _NEW} products to train on: {folder}/photos")
    display.note("catalog", f"{_NEW} other products to search among: {folder}/catalog")
    stage = _Stage(display)
    with contextlib.chdir(folder):
        trained = stage(f"{_TRAIN} --seed {seed}")
        exported = stage("export")
        indexed = stage(_INDEX)
        found = stage(_SEARCH)
    first = [
        result["hits"][0]["label"] == Path(result["query"]).parent.name
        for result in found["results"]
    ]
    display.answer(_summary(trained, exported, first, folder))
    display.note("next", "your own photos, a folder for each product:")
    display.note("", "embedkit train ./photos --loss rll")
    display.document(
        "demo",
        {
            "folder": str(folder),
            "train": trained,
            "export": exported,
            "index": indexed,
            "first_hit_right": sum(first),
            "queries": len(first),
            "page": str(folder / "results.html"),
        },
    )


class _Stage:
    """Runs one command of this command line, shows it, and gives back its JSON document."""

    def __init__(self, display: Display) -> None:
        self.display = display

    def __call__(self, line: str) -> dict[str, Any]:
        from embedkit.cli.main import app

        self.display.note("", "")
        self.display.note("$", f"embedkit {line}")
        arguments = [*shlex.split(line), "--json", *(["--quiet"] if self.display.quiet else [])]
        answer = io.StringIO()
        with contextlib.redirect_stdout(answer):
            app(arguments, prog_name="embedkit", standalone_mode=False, obj={"verbose": False})
        document: dict[str, Any] = json.loads(answer.getvalue())
        return document


def _make_room(folder: Path) -> None:
    """An empty folder with our mark in it; what an earlier demo left is removed, nothing else."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file", hint="embedkit demo ANOTHER_FOLDER")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / _MARK).exists():
            raise UsageError(
                f"the folder {folder} is not empty, and no earlier demo made it",
                hint="embedkit demo ANOTHER_FOLDER",
            )
        for name in _OURS:
            if (folder / name).exists():
                shutil.rmtree(folder / name)
        for file in [*folder.glob("catalog.faiss*"), *folder.glob("results.html")]:
            file.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARK).touch()


def _draw(folder: Path, seed: int, advance: Advance) -> None:
    """Pictures of all products; the last ones in order of name are kept from training."""
    from embedkit.data import draw_products

    drawn = draw_products(
        folder / "photos",
        classes=_PRODUCTS,
        images_per_class=_PICTURES,
        size=96,
        seed=seed,
        progress=advance,
    )
    # Every fifth, so that each kind of product is on both sides.
    for product in sorted(drawn.iterdir())[:: _PRODUCTS // _NEW]:
        for place, picture in enumerate(sorted(product.iterdir())):
            side = folder / ("queries" if place < _QUERIES else "catalog") / product.name
            side.mkdir(parents=True, exist_ok=True)
            picture.rename(side / picture.name)
        product.rmdir()


def _summary(
    trained: dict[str, Any], exported: dict[str, Any], first: list[bool], folder: Path
) -> str:
    before, after = trained["baseline"]["val"], trained["best"]["val"]
    cosine = min(batch["min_cosine"] for batch in exported["gate"]["batches"])
    return "\n".join(
        [
            "",
            f"trained   recall@1 {before['recall@1']:.3f} -> {after['recall@1']:.3f}, "
            f"MAP@R {before['map@r']:.3f} -> {after['map@r']:.3f} on products held out",
            f"exported  ONNX against PyTorch on held-out pictures: cosine {cosine:.6f} or better",
            f"searched  {sum(first)} of {len(first)} pictures of never-seen products find "
            "their own product first",
            f"look at   {folder / 'results.html'}",
        ]
    )
