"""`embedkit export --trt`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedkit.cli import engine
from embedkit.cli.display import AsJson, Display, Quiet, Verbose
from embedkit.cli.index import from_here
from embedkit.cli.rungs import rungs_table
from embedkit.errors import UnknownNameError, UsageError

if TYPE_CHECKING:
    from embedkit.train import Run

__all__ = ["export"]

_PRECISION, _ENGINE, _GATE, _OUTPUT = "Precision", "TensorRT", "Gate", "Output"


def export(
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN",
            help="A run, a checkpoint, or an .onnx to build an engine of (runs/last).",
        ),
    ] = None,
    quant: Annotated[
        str,
        typer.Option(
            metavar="PRECISION",
            show_default=False,
            rich_help_panel=_PRECISION,
            help="Also fp16 or int8; auto: the fastest here that passes (none).",
        ),
    ] = "none",
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            rich_help_panel=_PRECISION,
            help="Photos for the ranges of activations (the training photos).",
        ),
    ] = None,
    trt: Annotated[
        bool,
        typer.Option("--trt", rich_help_panel=_ENGINE, help="Also build a TensorRT engine."),
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="SM",
            rich_help_panel=_ENGINE,
            help="GPU to build for, as sm89 (the one here).",
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="MIN:OPT:MAX",
            rich_help_panel=_ENGINE,
            help="Pictures at once (1:8:32).",
        ),
    ] = None,
    workspace: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", rich_help_panel=_ENGINE, help="Most GPU memory for scratch (1G)."
        ),
    ] = None,
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible",
            rich_help_panel=_ENGINE,
            help="Also for newer TensorRT of its major.",
        ),
    ] = False,
    hardware_compatible: Annotated[
        bool,
        typer.Option(
            "--hardware-compatible",
            rich_help_panel=_ENGINE,
            help="For every GPU since Ampere.",
        ),
    ] = False,
    min_cosine: Annotated[
        float | None,
        typer.Option(
            metavar="COSINE",
            min=0,
            max=1,
            show_default=False,
            rich_help_panel=_GATE,
            help="Least of any vector with torch's (fp32 0.9999, fp16 0.99, int8 0.9).",
        ),
    ] = None,
    max_drop: Annotated[
        float,
        typer.Option(
            metavar="POINTS",
            min=0,
            show_default=False,
            rich_help_panel=_GATE,
            help="Of recall@1 and of MAP@R (0.5).",
        ),
    ] = 0.5,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            rich_help_panel=_OUTPUT,
            help="Where the files go (the run's folder).",
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a run as one ONNX file, proven equal on held-out photos.

    Example: embedkit export --trt --gpu sm89
    """
    asked = engine.wish(trt, gpu, batch, workspace, version_compatible, hardware_compatible)
    display = Display(as_json=as_json, quiet=quiet)
    if run is not None and run.suffix.lower() == ".onnx":
        engine.export_engine(run, output, asked, display)
        return
    from embedkit.export import (
        QUANT,
        Thresholds,
        calibrate,
        only_fp32,
        publish_checked,
        read_held_out,
        reduce_precision,
        remove_leftovers,
        sample,
    )
    from embedkit.export.card import write_card
    from embedkit.runtime.words import megabytes
    from embedkit.train import Run, latest_run

    if quant not in QUANT:
        raise UnknownNameError("precision", quant, QUANT)
    if calibration is not None and quant == "none":
        raise UsageError("--calibration belongs to --quant", hint="embedkit export --quant auto")
    trained = Run.load(run if run is not None else latest_run())
    contract = trained.contract()
    folder = output if output is not None else trained.path
    model = folder / "model.onnx"
    display.note(
        "model",
        f"{contract.name}: {contract.backbone}, {contract.pooling}, {contract.loss}, "
        f"{contract.embedding_dim} numbers",
    )
    paths, labels = trained.held_out()
    rows = sample(labels)
    of = f" of {len(paths):,}" if len(rows) < len(paths) else ""
    display.note(
        "check",
        f"{len(rows):,}{of} held-out photos ({trained.held_out_split}), "
        f"{len({labels[row] for row in rows})} classes",
    )
    network = trained.network()
    with display.progress("read", len(rows)) as advance:
        held_out = read_held_out(
            network,
            contract,
            [paths[row] for row in rows],
            [labels[row] for row in rows],
            progress=advance,
        )
    display.warn_of(
        [f"{path}: {reason}" for path, reason in held_out.skipped], "photos that could not be read"
    )
    with display.progress("fp32", len(held_out.pixels)) as advance:
        contract, report = publish_checked(
            network,
            contract,
            model,
            held_out,
            thresholds=Thresholds.of("fp32", min_cosine=min_cosine, max_drop=max_drop),
            progress=advance,
        )
    removed = remove_leftovers(folder)
    for path in removed:
        display.warn(f"{from_here(path)} belonged to another model and was removed")
    document: dict[str, Any] = {
        "run": str(trained.path),
        "model": str(model),
        "size": model.stat().st_size,
        "fingerprint": contract.fingerprint,
        "gate": report.to_json(),
        "quant": only_fp32(model, report).to_json(),
        "removed": [str(path) for path in removed],
        "engine": None,
    }
    _write_report(folder, document)
    ladder = only_fp32(model, report)
    if quant != "none":
        photos, names = _calibration_photos(trained, calibration, {paths[row] for row in rows})
        with display.progress("calibrate") as advance:
            ranges = calibrate(model, photos, names, cache=folder / "calibration", progress=advance)
        display.note(
            "ranges",
            f"from {len(ranges.paths)} photos of {ranges.classes} classes"
            + (", as kept from last time" if ranges.reused else f" among {ranges.chosen_from}"),
        )
        ladder = reduce_precision(
            model,
            report,
            held_out,
            ranges,
            asked=quant,
            min_cosine=min_cosine,
            max_drop=max_drop,
            for_engine=asked is not None,
            stage=display.progress,
        )
        document["quant"] = ladder.to_json()
        document["quant"]["calibration"]["source"] = str(calibration or "training photos")
        _write_report(folder, document)
    display.answer(rungs_table(ladder))
    deployed = ladder.taken.path or model
    display.note("onnx", f"{from_here(model)} ({megabytes(model.stat().st_size)}), equal to torch")
    if deployed != model:
        size = megabytes(deployed.stat().st_size)
        display.note(ladder.taken.precision, f"{from_here(deployed)} ({size}), for the same index")
    source = ladder.engine.path if ladder.engine and ladder.engine.path else model

    card = write_card(document)
    if asked is not None:
        document["engine"] = engine.build(source, folder, asked, display)
        _write_report(folder, document)
        write_card(document)
    display.note("card", from_here(card))
    display.note("saved", from_here(folder))
    display.note("next", _next(deployed))
    display.document("export", document)
    if held_out.skipped:
        raise typer.Exit(3)


def _calibration_photos(
    trained: Run, folder: Path | None, judged: set[Path]
) -> tuple[list[Path], list[str]]:
    """Photos and labels to calibrate with, none of them among those the result is judged on."""
    from embedkit.data import read_photos

    photos = trained.photos() if folder is None else read_photos(folder)
    apart = {path.resolve() for path in judged}
    rows = [
        row
        for row, path in enumerate(photos.files())
        if (folder is not None or photos.split[row] == "train") and path.resolve() not in apart
    ]
    return photos.subset(rows).files(), list(photos.subset(rows).labels)


def _write_report(folder: Path, document: dict[str, Any]) -> None:
    from embedkit.atomic import published

    text = json.dumps({"schema": "embedkit.export/1", **document}, indent=1)
    with published(folder / "export-report.json") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _next(model: Path) -> str:
    """`embedkit index` finds the latest run's model by itself."""
    usual = Path("runs/last/model.onnx")
    found = usual.exists() and usual.samefile(model)
    return "embedkit index ./catalog" + ("" if found else f" --model {from_here(model)}")
