"""`embedkit bench model.onnx model.int8.onnx --html bench.html`"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedkit.cli.display import AsJson, Display, Quiet, Verbose
from embedkit.errors import ImageError, MissingError, UnknownNameError, UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from embedkit.runtime import Embedder
    from embedkit.runtime.latency import Cell

__all__ = ["bench"]

_CELLS, _OUTPUT = "What is measured", "Output"
_LAST = Path("runs/last/model.onnx")
_DRAWN = 32
_TONES = 4


@dataclass(frozen=True)
class _Row:
    """One line of the answer: where it ran, and what was measured there."""

    device: str
    threads: int
    cell: Cell

    def to_json(self) -> dict[str, Any]:
        timing = self.cell.timing
        values = dict.fromkeys(("runs", "p50_ms", "p95_ms", "images_per_second"))
        if timing is not None:
            values = {name: round(value, 4) for name, value in dataclasses.asdict(timing).items()}
        return {
            "model": self.cell.model,
            "device": self.device,
            "threads": self.threads or None,
            "batch": self.cell.batch,
            "from": "files" if self.cell.decode else "pixels",
            **values,
            "ratio": None if self.cell.ratio is None else round(self.cell.ratio, 4),
            "error": self.cell.error or None,
        }


def bench(
    models: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="MODEL...", help="Exported models, compared with the first (runs/last)."
        ),
    ] = None,
    batch: Annotated[
        str, typer.Option(metavar="N,N", rich_help_panel=_CELLS, help="Pictures at once.")
    ] = "1,8,32",
    threads: Annotated[
        str | None,
        typer.Option(metavar="N,N", rich_help_panel=_CELLS, help="Of the CPU (one per core)."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME,NAME", rich_help_panel=_CELLS, help="cpu, cuda (all there)."),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME",
            rich_help_panel=_CELLS,
            help="onnxruntime, tensorrt (where there is an engine), onnxruntime-tensorrt.",
        ),
    ] = None,
    photos: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            exists=True,
            file_okay=False,
            rich_help_panel=_CELLS,
            help="Your photos to decode, instead of drawn ones.",
        ),
    ] = None,
    photo_size: Annotated[
        str, typer.Option(metavar="WxH", rich_help_panel=_CELLS, help="Of the drawn JPEGs.")
    ] = "1600x1200",
    seconds: Annotated[
        float,
        typer.Option(
            metavar="S", min=0.01, rich_help_panel=_CELLS, help="For each model and line."
        ),
    ] = 2.0,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=_OUTPUT, help="Also draw it, on one page."),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure latency and images a second of exported models here.

    Models take turns, so that a busy machine favours none. Each is timed on
    pixels (the model alone) and on JPEG files (decoding and the model).

    Example: embedkit bench runs/last/model.onnx runs/last/model.int8.onnx
    """
    batches, counts = _numbers("--batch", batch), _numbers("--threads", threads or "0", least=0)
    size = _size(photo_size)
    files = _models(models)
    places = _places(files, device, backend)
    from embedkit.runtime.latency import measure
    from embedkit.runtime.machine import describe_machine

    display = Display(as_json=as_json, quiet=quiet)
    machine = describe_machine()
    display.note("machine", f"{machine['processor']}, {machine['cores']} cores")
    rows: list[_Row] = []
    with tempfile.TemporaryDirectory(prefix="embedkit-") as scratch:
        pictures, told = _pictures(photos, size, max(batches), Path(scratch), display)
        display.note("files", told)
        total = len(places) * len(counts) * len(batches) * len(files) * 2
        left_out: dict[tuple[str, str], str] = {}
        with display.progress("timing", total) as advance:
            for place, count in itertools.product(places, counts):
                with contextlib.ExitStack() as opened:
                    ready = _load(files, place, count, opened)
                    left_out |= {(name, place.name): why for name, why in ready.absent.items()}
                    if not ready.embedders:
                        continue
                    cells = measure(
                        ready.embedders,
                        batches,
                        photos=pictures,
                        streaming=ready.streaming,
                        workers=count or None,
                        seconds=seconds,
                    )
                    for cell in cells:
                        rows.append(_Row(ready.where, count, cell))
                        advance(1, int(bool(cell.error)))
    if not rows:
        raise MissingError(
            "no model could be run here",
            facts="\n".join(f"{name} on {where}: {why}" for (name, where), why in left_out.items()),
            hint="embedkit doctor",
        )
    for where, why in dict.fromkeys((where, why) for (_, where), why in left_out.items()):
        display.note(where, f"left out: {why}")
    failed = [row for row in rows if row.cell.error]
    for row in failed:
        display.warn(f"{row.cell.model} on {row.device}, batch {row.cell.batch}: {row.cell.error}")
    display.answer(_table(rows))
    if html is not None:
        _draw(html, rows, machine, told)
        display.note("page", str(html))
    display.document(
        "bench",
        {
            "machine": machine,
            "seconds": seconds,
            "photos": told,
            "rows": [row.to_json() for row in rows],
            "left_out": [
                {"model": name, "device": where, "reason": why}
                for (name, where), why in left_out.items()
            ],
            "page": str(html) if html else None,
        },
    )
    if failed:
        raise typer.Exit(3)


# --- what to measure -----------------------------------------------------------------------------


def _numbers(option: str, text: str, *, least: int = 1) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and least <= int(part) <= 1 << 20 for part in parts):
        raise UsageError(
            f"{option} takes whole numbers from {least} with commas between, got {text!r}",
            hint=f"{option} 1,8,32" if option == "--batch" else f"{option} 1,2",
        )
    return list(dict.fromkeys(map(int, parts)))


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise UsageError(
            f"--photo-size takes width x height, got {text!r}", hint="--photo-size 1600x1200"
        )
    if int(width) * int(height) > 64_000_000:
        raise UsageError(f"a photo of {text} is larger than embedkit reads", facts="64 megapixels")
    return int(width), int(height)


def _models(given: list[Path] | None) -> dict[str, Path]:
    """The files by the shortest name that tells them apart; refused before anything is drawn."""
    from embedkit.runtime import read_contract

    paths = list(dict.fromkeys(given or [_LAST]))
    for path in paths:
        if not path.is_file():
            raise UsageError(
                f"there is no model {path}",
                hint="embedkit export, or name one: embedkit bench MODEL",
            )
        read_contract(path)
    short = [path.name for path in paths]
    return {
        name if short.count(name) == 1 else str(path): path
        for name, path in zip(short, paths, strict=True)
    }


@dataclass(frozen=True)
class _Place:
    """Where and by what a model is to be run; whether the user asked for it."""

    device: str
    backend: str
    asked: bool

    @property
    def name(self) -> str:
        return self.device if self.backend == "onnxruntime" else f"{self.device} {self.backend}"

    def suits(self, path: Path) -> bool:
        """An engine runs in TensorRT only, and TensorRT needs an engine."""
        if path.suffix == ".engine":
            return self.backend == "tensorrt"
        return self.backend != "tensorrt" or self.asked or path.with_suffix(".engine").is_file()


def _places(files: dict[str, Path], device: str | None, backend: str | None) -> list[_Place]:
    """All that there may be, or what was asked for."""
    from embedkit.runtime.embedder import BACKENDS

    backends = backend.split(",") if backend else ["onnxruntime", "tensorrt"]
    for name in backends:
        if name not in BACKENDS[1:]:
            raise UnknownNameError("backend", name, BACKENDS[1:])
    places = []
    for one in device.split(",") if device else ["cpu", "cuda"]:
        for name in backends:
            asked = backend is not None or (device is not None and name == "onnxruntime")
            place = _Place(one, name, asked)
            possible = one != "cpu" or name == "onnxruntime"
            if possible and any(place.suits(path) for path in files.values()):
                places.append(place)
    if not places:
        raise UsageError(
            "nothing can be measured that way",
            facts="engines and TensorRT run on a GPU only, ONNX files everywhere",
            hint="embedkit bench, without --device and --backend",
        )
    return places


def _pictures(
    folder: Path | None, size: tuple[int, int], most: int, scratch: Path, display: Display
) -> tuple[list[Path], str]:
    """Photos that can be read, and what they are, in words."""
    from itertools import islice

    from embedkit.imaging import decode, find_images
    from embedkit.runtime.latency import draw_photos

    if folder is None:
        drawn = draw_photos(scratch, min(most, _DRAWN), size)
        weight = sum(path.stat().st_size for path in drawn) / len(drawn)
        return drawn, f"drawn JPEGs of {size[0]} x {size[1]}, {weight / 1e3:,.0f} kB each"
    found, good = list(islice(find_images(folder), 4 * most)), []
    for path in found:
        try:
            decode(path)
            good.append(path)
        except ImageError as error:
            display.warn(f"{path}: {error.reason}")
        if len(good) == most:
            break
    if not good:
        raise UsageError(
            f"{folder} holds no picture that can be read", facts=f"{len(found)} files were tried"
        )
    weight = sum(path.stat().st_size for path in good) / len(good)
    return good, f"{len(good)} photos of {folder}, {weight / 1e3:,.0f} kB each"


@dataclass(frozen=True)
class _Ready:
    """Models that run in one place, for answers and for streams, and why others do not."""

    where: str
    embedders: dict[str, Embedder]
    streaming: dict[str, Embedder]
    absent: dict[str, str]


def _load(
    files: dict[str, Path], place: _Place, threads: int, opened: contextlib.ExitStack
) -> _Ready:
    from embedkit.runtime import Embedder

    embedders: dict[str, Embedder] = {}
    streaming: dict[str, Embedder] = {}
    absent: dict[str, str] = {}
    for name, path in files.items():
        if not place.suits(path):
            continue
        try:
            embedder = Embedder.load(
                path, device=place.device, backend=place.backend, threads=threads
            )
        except MissingError as error:
            if place.asked:
                raise
            absent[name] = error.what
            continue
        embedders[name] = streaming[name] = opened.enter_context(embedder)
        if embedder.device == "cpu" and threads != 1:
            # As `embed` and `index` load it: a core for a run, and the runs side by side.
            streaming[name] = opened.enter_context(
                Embedder.load(path, device="cpu", backend=place.backend, threads=1, check=False)
            )
    device = next(iter(embedders.values())).device if embedders else place.device
    return _Ready(dataclasses.replace(place, device=device).name, embedders, streaming, absent)


# --- how it is shown -----------------------------------------------------------------------------


def _table(rows: Sequence[_Row]) -> Table:
    """A line per cell; what is the same in all lines stands above it instead."""
    from rich import box
    from rich.table import Table

    columns: dict[str, list[str]] = {
        "model": [row.cell.model for row in rows],
        "on": [row.device for row in rows],
        "threads": [str(row.threads or "all") for row in rows],
        "batch": [f"{row.cell.batch:,}" for row in rows],
        "from": ["files" if row.cell.decode else "pixels" for row in rows],
        "p50 ms": [_number(row, "p50_ms") for row in rows],
        "p95 ms": [_number(row, "p95_ms") for row in rows],
        "images/s": [_number(row, "images_per_second") for row in rows],
        "ratio": ["" if row.cell.ratio is None else f"{row.cell.ratio:.2f}" for row in rows],
    }
    same = [name for name in ("model", "on", "threads") if len(set(columns[name])) == 1]
    told = [columns["model"][0]] if "model" in same else []
    told += [f"on {columns['on'][0]}"] if "on" in same else []
    threads = rows[0].threads
    if "threads" in same and threads:
        told.append(f"with {threads} thread{'s' if threads > 1 else ''}")
    table = Table(
        title=" ".join(told) or None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    shown = [
        name for name in columns if name not in same and (name != "ratio" or "model" not in same)
    ]
    for name in shown:
        left = name in ("model", "on", "from")
        fold = name in ("model", "on")
        table.add_column(
            name,
            justify="left" if left else "right",
            overflow="fold" if fold else "ellipsis",
            no_wrap=not fold,
        )
    for cells in zip(*(columns[name] for name in shown), strict=True):
        table.add_row(*cells)
    return table


def _number(row: _Row, name: str) -> str:
    if row.cell.timing is None:
        return "failed" if name == "p50_ms" else ""
    value: float = getattr(row.cell.timing, name)
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.1f}" if value >= 10 else f"{value:.2f}"


def _draw(path: Path, rows: list[_Row], machine: dict[str, Any], photos: str) -> None:
    """A page with a chart of images a second and one of latency for each device and source."""
    from embedkit.atomic import published
    from embedkit.report.charts import Line, line_chart
    from embedkit.report.page import page, table

    by_threads = len({row.cell.batch for row in rows}) == 1 and len({r.threads for r in rows}) > 1
    charts: list[str] = []
    for device, decode in dict.fromkeys((row.device, row.cell.decode) for row in rows):
        own = [row for row in rows if (row.device, row.cell.decode) == (device, decode)]
        x = sorted({row.threads if by_threads else row.cell.batch for row in own})
        source = photos if decode else "the model alone"
        for what, name in (
            ("images_per_second", "Images a second"),
            ("p50_ms", "Milliseconds a call"),
        ):
            series: dict[str, dict[int, float]] = {}
            for row in own:
                if row.cell.timing is not None:
                    along = row.threads if by_threads else row.cell.batch
                    values = series.setdefault(_series(row, own, by_threads=by_threads), {})
                    values[along] = getattr(row.cell.timing, what)
            lines = [
                Line(title, [values.get(at) for at in x], tone=number % _TONES)
                for number, (title, values) in enumerate(series.items())
            ]
            charts.append(
                line_chart(
                    f"{name} from {'files' if decode else 'pixels'}, {device}",
                    x,
                    lines,
                    key=f"chart-{len(charts)}",
                    x_label="threads" if by_threads else "pictures at once",
                    low=0,
                    note=source if what == "images_per_second" else f"median; {source}",
                )
            )
    shown = _table(rows)
    cells = [[str(cell) for cell in column.cells] for column in shown.columns]
    numbers = table([str(column.header) for column in shown.columns], zip(*cells, strict=True))
    body = (
        f'<div class="grid charts">{"".join(charts)}</div>'
        f'<h2>All numbers</h2><div class="card">{numbers}</div>'
    )
    models = ", ".join(dict.fromkeys(row.cell.model for row in rows))
    packages = ", ".join(f"{name} {known}" for name, known in machine["packages"].items())
    subtitle = f"{machine['processor']}, {machine['cores']} cores  ·  {packages}"
    with published(path) as temporary:
        text = page(f"Speed of {models}", subtitle, body)
        temporary.write_text(text, encoding="utf-8")


def _series(row: _Row, rows: Sequence[_Row], *, by_threads: bool) -> str:
    """What a curve is called: the model, and its threads where they differ."""
    if by_threads or len({other.threads for other in rows}) == 1:
        return row.cell.model
    alone = len({other.cell.model for other in rows}) == 1
    count = f"{row.threads} thread{'s' if row.threads != 1 else ''}" if row.threads else "all cores"
    return count if alone else f"{row.cell.model}, {count}"
