"""`embedkit export --trt`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedkit.cli.display import AsJson, Display, Quiet, Verbose
from embedkit.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from embedkit.export import GateReport

__all__ = ["export"]

_ENGINE, _GATE, _OUTPUT = "TensorRT", "Gate", "Output"
_NAMED = 5


def export(
    run: Annotated[
        Path | None,
        typer.Argument(metavar="RUN", help="A run's folder or one of its checkpoints (runs/last)."),
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
    min_cosine: Annotated[
        float,
        typer.Option(
            metavar="COSINE",
            min=0,
            max=1,
            show_default=False,
            rich_help_panel=_GATE,
            help="Least of any vector with torch's (0.9999).",
        ),
    ] = 0.9999,
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
    """Write a run as one ONNX file, proven equal on photos it was not trained on.

    Example: embedkit export --trt --gpu sm89
    """
    if not trt and (gpu or batch):
        raise UsageError("--gpu and --batch belong to --trt", hint="embedkit export --trt")
    sizes = _batch(batch or "1:8:32")
    from embedkit.export import Thresholds, build_engine, export_checked, sample
    from embedkit.train import Run, latest_run

    display = Display(as_json=as_json, quiet=quiet)
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
    with display.progress("check", len(rows)) as advance:
        contract, report = export_checked(
            trained.network(),
            contract,
            model,
            [paths[row] for row in rows],
            [labels[row] for row in rows],
            thresholds=Thresholds(min_cosine=min_cosine, max_drop=max_drop),
            progress=advance,
        )
    for path, reason in report.skipped[:_NAMED]:
        display.warn(f"{path}: {reason}")
    if len(report.skipped) > _NAMED:
        display.warn(f"and {len(report.skipped) - _NAMED} more photos that could not be read")
    display.answer(_table(report))
    display.note("onnx", f"{_near(model)} ({_megabytes(model.stat().st_size)}), equal to torch")

    document: dict[str, Any] = {
        "run": str(trained.path),
        "model": str(model),
        "size": model.stat().st_size,
        "fingerprint": contract.fingerprint,
        "gate": report.to_json(),
        "engine": None,
    }
    _write_report(folder, document)
    if trt:
        info = build_engine(model, folder / "model.engine", gpu=gpu, batch=sizes)
        document["engine"] = info.to_json()
        _write_report(folder, document)
        display.note(
            "engine",
            f"{_near(info.path)} ({_megabytes(info.size)}), {info.flavour} {info.version} for "
            f"compute capability {info.compute_capability}, batch {':'.join(map(str, sizes))}; "
            "built, not run",
        )
    display.note("saved", str(_near(folder)))
    display.note("next", _next(model))
    display.document("export", document)
    if report.skipped:
        raise typer.Exit(3)


def _table(report: GateReport) -> Table:
    """The file beside the network, one line per batch size, then what a search would notice."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("onnx against torch", "photos", "cosine min", "mean", "largest difference"):
        table.add_column(name, justify="left" if name == "onnx against torch" else "right")
    for row in report.batches:
        table.add_row(
            f"batch {row.batch}",
            f"{row.images:,}",
            f"{row.min_cosine:.7f}",
            f"{row.mean_cosine:.7f}",
            f"{row.max_difference:.1e}",
        )
    if report.neighbour_overlap is not None:
        table.add_row("10 neighbours kept", "", f"{report.neighbour_overlap:.1%}", "", "")
    for name, pair in (("recall@1", report.recall_at_1), ("MAP@R", report.map_at_r)):
        if pair is not None:
            table.add_row(name, "", f"{pair[1]:.4f}", f"was {pair[0]:.4f}", "")
    return table


def _write_report(folder: Path, document: dict[str, Any]) -> None:
    from embedkit.atomic import published

    text = json.dumps({"schema": "embedkit.export/1", **document}, indent=1)
    with published(folder / "export-report.json") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _next(model: Path) -> str:
    """`embedkit index` finds the latest run's model by itself."""
    usual = Path("runs/last/model.onnx")
    found = usual.exists() and usual.samefile(model)
    return "embedkit index ./catalog" + ("" if found else f" --model {_near(model)}")


def _near(path: Path) -> Path:
    """The path as one would type it here."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _batch(text: str) -> tuple[int, int, int]:
    parts = text.split(":")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise UsageError(f"--batch takes least:usual:largest, got {text!r}", hint="--batch 1:8:32")
    least, usual, largest = map(int, parts)
    return least, usual, largest


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
