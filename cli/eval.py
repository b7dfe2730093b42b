"""`embedkit eval runs/last ./photos`"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedkit.cli.display import AsJson, Display, Quiet, Verbose, printable
from embedkit.cli.rerank_option import read_rerank
from embedkit.cli.work import Backend, Batch, Device, Dim, Workers
from embedkit.errors import (
    DataError,
    ImageError,
    MismatchError,
    MissingExtraError,
    UsageError,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from rich.console import Group

    from embedkit.data import PhotoSet
    from embedkit.evaluate import Difference, Evaluation
    from embedkit.evaluate.reranking import Reranking
    from embedkit.train import Run

    Rows = npt.NDArray[np.float32]

__all__ = ["eval"]

_PROTOCOL, _FIGURES, _WORK, _OUTPUT = "Data", "Figures", "Work", "Output"
_VECTORS = (".npy", ".npz")
_SPLITS = ("train", "val", "test", "all")
# k-means up to this many rows x classes is a matter of seconds.
_QUICK_CLUSTERS = 2_000_000
_WORST = 8


def eval(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="MODEL",
            help="A run, checkpoint, .onnx, .engine, or vectors as .npy or .npz (runs/last).",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="DATA", help="A folder per class, or a CSV (what the run held out)."
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_PROTOCOL,
            help="cub, cars, sop, inshop, inat, folder, csv or query-gallery.",
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_PROTOCOL, help="train, val, test or all (test, else val, else all)."
        ),
    ] = None,
    strict_counts: Annotated[
        bool,
        typer.Option(
            "--strict-counts",
            rich_help_panel=_PROTOCOL,
            help="Refuse counts other than the papers'.",
        ),
    ] = False,
    ks: Annotated[
        str | None,
        typer.Option(
            metavar="K,K,...",
            rich_help_panel=_FIGURES,
            help="Of recall@k (1,2,4,8,10, or the protocol's).",
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(rich_help_panel=_FIGURES, help="cosine or l2 (the model's own)."),
    ] = None,
    by_class: Annotated[
        bool,
        typer.Option(
            "--by-class", rich_help_panel=_FIGURES, help="Intervals over classes, not queries."
        ),
    ] = False,
    repeats: Annotated[
        int,
        typer.Option(min=1, rich_help_panel=_FIGURES, help="Resamples behind an interval."),
    ] = 1000,
    seed: Annotated[
        int, typer.Option(min=0, rich_help_panel=_FIGURES, help="Of resampling and pairs.")
    ] = 0,
    nmi: Annotated[
        bool | None,
        typer.Option(
            "--nmi/--no-nmi",
            rich_help_panel=_FIGURES,
            help="NMI and AMI of k-means (where it takes seconds).",
        ),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_FIGURES,
            help="Difference to an evaluation saved with --json --per-query.",
        ),
    ] = None,
    rerank: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            rich_help_panel=_FIGURES,
            help="Also re-ranked: aqe[:k=10,alpha=3], or kreciprocal[:depth=100,...], which takes "
            "some 10 ms a query.",
        ),
    ] = None,
    device: Device = "auto",
    backend: Backend = "auto",
    dim: Dim = None,
    batch: Batch = 64,
    workers: Workers = None,
    save_vectors: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_OUTPUT,
            help="Keep the vectors, labels and paths as .npz.",
        ),
    ] = None,
    failures: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_OUTPUT,
            help="The worst queries and what beat the right answer, as a page.",
        ),
    ] = None,
    per_query: Annotated[
        bool,
        typer.Option(
            "--per-query", rich_help_panel=_OUTPUT, help="Every query's figures in the JSON too."
        ),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure how well a model finds photos of the same class.

    Example: embedkit eval runs/last/model.onnx ./photos --split test
    """
    if split is not None and split not in _SPLITS:
        raise UsageError(f"there is no split {split!r}", hint="--split train, val, test or all")
    if metric is not None and metric not in ("cosine", "l2"):
        raise UsageError(f"there is no metric {metric!r}", hint="--metric cosine or l2")
    if save_vectors is not None and save_vectors.suffix != ".npz":
        raise UsageError("--save-vectors takes a file that ends in .npz", hint="vectors.npz")
    asked_ks = None if ks is None else _numbers(ks)
    method = None if rerank is None else read_rerank(rerank)
    display = Display(as_json=as_json, quiet=quiet)
    other = None if compare is None else _read_other(compare)

    from embedkit.evaluate import evaluate, read_per_query

    source = dataclasses.replace(_open_model(model, backend), dim=dim)
    if dim is not None and source.kind == "vectors":
        raise UsageError("--dim is of a model, and these are vectors", hint="leave --dim out")
    dataset = _read_data(source, data, protocol, strict_counts)
    for sentence in dataset.differences:
        display.warn(f"other counts than in the papers: {sentence}")
    chosen = _choose(dataset.photos, split, display)
    vectors, photos, skipped, facts = _vectors(
        source, dataset.photos, chosen, device, batch, workers, display
    )
    _describe(photos, display)
    several = vectors.ndim == 3
    if several and metric == "l2":
        raise UsageError(
            "several vectors per picture are compared by their cosines", hint="leave --metric out"
        )
    beyond = _beyond_classes(vectors, photos, metric or facts.metric)
    by_query = other is not None or per_query or failures is not None or method is not None
    if not photos.labelled and (not beyond or by_query):
        if beyond:
            raise UsageError(
                "--compare, --per-query, --failures and --rerank are for photos with classes"
            )
        raise DataError(
            "these photos have no labels, so there is nothing to measure",
            hint="a folder per class, or a CSV with label, target or image_a,image_b,image_c",
        )
    figures = (
        evaluate(
            vectors,
            photos.labels,
            ks=asked_ks or dataset.ks,
            query=photos.is_query,
            gallery=photos.is_gallery,
            metric=metric or facts.metric,
            by_class=by_class,
            repeats=repeats,
            seed=seed,
            clusters=_with_clusters(nmi, photos, several, display),
        )
        if photos.labelled
        else None
    )
    names = [path.as_posix() for path in photos.paths]
    differences = None
    if other is not None and figures is not None:
        differences = _compare(read_per_query(other), figures, names)
    again = None
    if method is not None and figures is not None:
        again = _rerank(method, figures, vectors, photos, display)
    if save_vectors is not None:
        _save(save_vectors, vectors, photos)
        display.note("vectors", str(save_vectors))
    if failures is not None and figures is not None:
        _write_failures(failures, figures, vectors, photos, facts)
        display.note("failures", str(failures))
    display.warn_of(
        [f"{path}: {error.reason}; skipped" for path, error in skipped],
        "that are no usable pictures",
    )
    display.answer(_whole_page(beyond, figures, differences, again))
    display.document(
        "eval",
        {
            "model": facts.to_json(),
            "data": {
                "root": str(photos.root),
                "protocol": protocol,
                "split": chosen,
                "manifest_hash": photos.manifest_hash(),
                "differences": list(dataset.differences),
            },
            **({} if figures is None else figures.to_json()),
            "reranked": None if again is None else again.to_json(),
            **({"beyond_classes": beyond} if beyond else {}),
            "skipped": [
                {"path": str(path), "code": error.code, "reason": error.reason}
                for path, error in skipped
            ],
            "compared": None if differences is None else _differences_json(differences, compare),
            "per_query": figures.per_query(names) if per_query and figures is not None else None,
        },
    )
    if skipped:
        raise typer.Exit(3)


# --- what is measured, and on what ---------------------------------------------------------------


@dataclass(frozen=True)
class _Facts:
    """What the document says about the model."""

    kind: str
    path: str
    name: str | None
    fingerprint: str | None
    dim: int
    metric: str
    vectors: int = 1

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "path": self.path,
            "name": self.name,
            "fingerprint": self.fingerprint,
            "dim": self.dim,
            "metric": self.metric,
            "vectors": self.vectors,
        }


@dataclass(frozen=True)
class _Model:
    """A file to run or to read; `run` is the training it stands in, where that is known."""

    kind: str
    path: Path
    run: Run | None
    backend: str = "auto"
    dim: int | None = None


@dataclass(frozen=True)
class _Dataset:
    photos: PhotoSet
    ks: tuple[int, ...]
    differences: tuple[str, ...]


def _open_model(model: Path | None, backend: str) -> _Model:
    suffix = "" if model is None else model.suffix.lower()
    if backend != "auto" and suffix not in (".onnx", ".engine"):
        raise UsageError(
            "--backend is for exported models: .onnx or .engine", hint="leave --backend out"
        )
    if model is None:
        from embedkit.train import Run, latest_run

        last = latest_run()
        return _Model("checkpoint", last, Run.load(last))
    if suffix in (*_VECTORS, ".onnx", ".engine"):
        if not model.is_file():
            raise UsageError(f"there is no file {str(model)!r}")
        kind = "vectors" if suffix in _VECTORS else suffix.removeprefix(".")
        return _Model(kind, model, None, backend)
    from embedkit.train import Run

    return _Model("checkpoint", model, Run.load(model))


def _read_data(source: _Model, data: Path | None, protocol: str | None, strict: bool) -> _Dataset:
    usual = (1, 2, 4, 8, 10)
    if protocol is not None:
        from embedkit.data.protocols import read_protocol

        read = read_protocol(protocol, data if data is not None else Path(), strict=strict)
        return _Dataset(read.photos, read.ks, read.differences)
    if data is not None:
        from embedkit.data import read_photos

        return _Dataset(read_photos(data), usual, ())
    if source.run is not None:
        return _Dataset(source.run.photos(), usual, ())
    if source.path.suffix.lower() == ".npz":
        return _Dataset(_photos_of(source.path), usual, ())
    beside = source.path.parent
    if source.kind in ("onnx", "engine") and (beside / "run.json").is_file():
        try:
            from embedkit.train import Run
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                "Taking a run's own held-out photos", package=str(error.name), extra="train"
            ) from error
        return _Dataset(Run.load(beside).photos(), usual, ())
    raise UsageError(
        "which photos?",
        facts=f"{source.path} does not say what was held out when it was trained",
        hint=f"embedkit eval {source.path} ./photos",
    )


def _choose(photos: PhotoSet, split: str | None, display: Display) -> str:
    """The split that is measured; ``all`` is everything."""
    counts = {name: photos.split.count(name) for name in ("train", "val", "test")}
    if split is None:
        split = next((name for name in ("test", "val") if counts[name]), "all")
        if split == "all" and counts["train"]:
            display.warn("these photos are marked as train: a model knows what it was trained on")
    if split != "all" and not counts[split]:
        marked = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
        raise DataError(
            f"no photo is marked as {split}",
            facts=f"of {len(photos):,} photos: {marked or 'none is marked at all'}",
            hint="--split all",
        )
    return split


def _with_clusters(nmi: bool | None, photos: PhotoSet, several: bool, display: Display) -> bool:
    if nmi is not None:
        return nmi
    if several:
        display.note("nmi", "left out, it needs one vector per picture")
        return False
    if len(photos) * len(photos.classes()) > _QUICK_CLUSTERS:
        display.note("nmi", "left out, it would take long; ask for it with --nmi")
        return False
    import importlib.util

    if importlib.util.find_spec("sklearn") is None:
        display.note("nmi", 'left out, it needs scikit-learn: pip install "embedkit[train]"')
        return False
    return True


def _describe(photos: PhotoSet, display: Display) -> None:
    text = f"{len(photos):,} images"
    if photos.labelled:
        text += f", {len(photos.classes()):,} classes"
    if photos.is_query is not None and photos.is_gallery is not None:
        text += f"; {sum(photos.is_query):,} queries, {sum(photos.is_gallery):,} in the gallery"
    display.note("data", text)


# --- vectors -------------------------------------------------------------------------------------


def _vectors(
    source: _Model,
    photos: PhotoSet,
    split: str,
    device: str,
    batch: int,
    workers: int | None,
    display: Display,
) -> tuple[Rows, PhotoSet, list[tuple[Path, ImageError]], _Facts]:
    """Vectors of the photos of `split` that can be read, these photos, and the others."""
    rows = [row for row, name in enumerate(photos.split) if split in ("all", name)]
    if source.kind == "vectors":
        vectors, photos = _stored(source.path, photos, rows)
        several = vectors.shape[1] if vectors.ndim == 3 else 1
        dim = several * vectors.shape[-1]
        facts = _Facts("vectors", str(source.path), None, None, dim, "cosine", several)
        return vectors, photos, [], facts
    import numpy as np

    from embedkit.evaluate import split_rows

    photos = photos.subset(rows)
    good: list[int] = []
    found: list[Any] = []
    skipped: list[tuple[Path, ImageError]] = []
    with (
        _embedding(source, device, batch, workers, photos.files(), display) as (results, facts),
        display.progress("embedding", len(photos)) as advance,
    ):
        for row, (path, result) in enumerate(results):
            if isinstance(result, ImageError):
                skipped.append((path, result))
            else:
                good.append(row)
                found.append(result)
            advance(1, int(isinstance(result, ImageError)))
    if not good:
        first = f"{skipped[0][0]}: {skipped[0][1].reason}" if skipped else "there are none"
        raise DataError("not one of the photos can be read", facts=first)
    vectors = split_rows(np.stack(found), facts.vectors)
    return vectors, photos.subset(good), skipped, facts


@contextlib.contextmanager
def _embedding(
    source: _Model,
    device: str,
    batch: int,
    workers: int | None,
    files: list[Path],
    display: Display,
) -> Iterator[tuple[Iterator[tuple[Path, Any]], _Facts]]:
    """A stream of (file, vector or error), and the facts of what makes it."""
    if source.kind == "checkpoint":
        assert source.run is not None
        network, contract, place = _network(source.run, device)
        from embedkit.imaging import read_pixels
        from embedkit.runtime.pipeline import embed_stream
        from embedkit.runtime.prefix import cut

        contract = contract if source.dim is None else contract.cut(source.dim)

        def run(pixels: Any) -> Any:
            whole = network(pixels)
            if source.dim is None:
                return whole
            return cut(whole, source.dim, normalizes=contract.normalizes)

        stream = embed_stream(
            files,
            read=lambda path: read_pixels(path, contract.preprocess),
            run=run,
            batch=batch,
            workers=workers,
        )
        results: Any = stream
        facts = _facts(source, contract)
        display.note("model", f"{contract.name}: {source.path}, {contract.embedding_dim} numbers")
        display.note("device", place)
        with contextlib.closing(stream):
            yield results, facts
        return
    from embedkit.runtime import Embedder

    with Embedder.load(
        source.path, device=device, backend=source.backend, threads=1, dim=source.dim
    ) as embedder:
        facts = _facts(source, embedder.contract)
        display.note("model", f"{facts.name}: {source.path}, {facts.dim} numbers")
        display.note("device", embedder.device)
        embedded = embedder.embed_files(files, batch=batch, workers=workers)
        with contextlib.closing(embedded):
            yield (
                ((one.path, one.vector if one.error is None else one.error) for one in embedded),
                facts,
            )


def _facts(source: _Model, contract: Any) -> _Facts:
    return _Facts(
        source.kind,
        str(source.path),
        contract.name,
        contract.fingerprint,
        contract.embedding_dim,
        contract.metric,
        contract.vectors,
    )


def _network(run: Run, device: str) -> tuple[Any, Any, str]:
    """What makes vectors of pixels, its contract, and the device it runs on."""
    import torch

    from embedkit.train import choose_device

    place = choose_device(device)
    contract = run.contract()
    # As the trainer measures it: same memory format, same batch, so that the figures are the run's.
    network = run.network().to(place, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def vectors(pixels: Any) -> Any:
        with torch.inference_mode():
            raw = network(torch.from_numpy(pixels).to(place)).float()
            unit = torch.nn.functional.normalize(raw) if contract.normalizes else raw
        return unit.cpu().numpy()

    return vectors, contract, str(place)


def _stored(path: Path, photos: PhotoSet, rows: list[int]) -> tuple[Rows, PhotoSet]:
    """The vectors of a file that belong to these rows of the photos, and their photos."""
    import numpy as np

    content = _load(path)
    vectors = content["vectors"]
    if "paths" in content:
        place = {name: number for number, name in enumerate(content["paths"].tolist())}
        names = [photos.paths[row].as_posix() for row in rows]
        absent = [name for name in names if name not in place]
        if absent:
            raise MismatchError(
                f"{path} has no vectors for {len(absent):,} of the {len(rows):,} photos",
                facts=f"the first: {absent[0]}",
                hint="embed them again with --save-vectors, or choose their --split",
            )
        return vectors[np.array([place[name] for name in names], dtype=int)], photos.subset(rows)
    if len(vectors) == len(photos):
        return vectors[np.array(rows, dtype=int)], photos.subset(rows)
    if len(vectors) == len(rows):
        return vectors, photos.subset(rows)
    raise MismatchError(
        f"{path} does not belong to these photos",
        facts=f"{len(vectors):,} vectors for {len(photos):,} photos, {len(rows):,} of them chosen",
        hint="one vector per row of the data, in its order",
    )


def _photos_of(path: Path) -> PhotoSet:
    """Who is in a file that --save-vectors wrote."""
    from embedkit.data import PhotoSet

    content = _load(path)
    if "labels" not in content or "paths" not in content:
        raise UsageError(
            "which photos?",
            facts=f"{path} holds vectors without labels",
            hint=f"embedkit eval {path} photos.csv",
        )

    def flags(name: str) -> tuple[bool, ...] | None:
        return tuple(bool(flag) for flag in content[name]) if name in content else None

    try:
        return PhotoSet(
            root=Path(str(content["root"])) if "root" in content else path.parent.absolute(),
            paths=tuple(Path(name) for name in content["paths"].tolist()),
            labels=tuple(str(label) for label in content["labels"].tolist()),
            split=tuple(content["split"].tolist())
            if "split" in content
            else ("",) * len(content["paths"]),
            is_query=flags("is_query"),
            is_gallery=flags("is_gallery"),
        )
    except ValueError as error:
        raise MismatchError(f"{path} does not fit together", facts=str(error)) from error


def _load(path: Path) -> dict[str, Any]:
    """The arrays of a .npz, or of a .npy as ``vectors``; nothing pickled is opened."""
    import zipfile

    import numpy as np

    try:
        loaded = np.load(path, allow_pickle=False)
        content = {"vectors": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise MismatchError(f"{path} is no file of vectors", facts=str(error)) from error
    vectors = content.get("vectors")
    if (
        vectors is None
        or vectors.ndim not in (2, 3)
        or vectors.dtype.kind != "f"
        or not vectors.size
    ):
        shape = "none" if vectors is None else f"{vectors.dtype} of shape {vectors.shape}"
        raise MismatchError(
            f"{path} holds no vectors",
            facts=f"expected 'vectors', floats (N, D) or (N, K, D); found {shape}",
        )
    return content


def _save(path: Path, vectors: Rows, photos: PhotoSet) -> None:
    import numpy as np

    from embedkit.atomic import published

    columns: dict[str, Any] = {
        "vectors": vectors,
        "paths": np.array([one.as_posix() for one in photos.paths]),
        "labels": np.array(photos.labels),
        "split": np.array(photos.split),
        "root": np.array(str(photos.root)),
    }
    if photos.is_query is not None:
        columns["is_query"] = np.array(photos.is_query)
    if photos.is_gallery is not None:
        columns["is_gallery"] = np.array(photos.is_gallery)
    with published(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **columns)


def _write_failures(
    path: Path, figures: Evaluation, vectors: Rows, photos: PhotoSet, facts: _Facts
) -> None:
    from embedkit.atomic import published
    from embedkit.report.failures import failures_page

    page = failures_page(
        figures,
        vectors,
        files=photos.files(),
        names=[one.as_posix() for one in photos.paths],
        gallery=photos.is_gallery,
        title=f"Where {facts.name or Path(facts.path).name} fails",
    )
    with published(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _rerank(
    method: tuple[str, dict[str, float]],
    figures: Evaluation,
    vectors: Rows,
    photos: PhotoSet,
    display: Display,
) -> Reranking:
    from embedkit.evaluate.reranking import reranked

    with display.progress("re-ranking", figures.metrics.queries) as advance:
        return reranked(
            figures,
            vectors,
            *method,
            query=photos.is_query,
            gallery=photos.is_gallery,
            done=lambda count: advance(count, 0),
        )


# --- answers -------------------------------------------------------------------------------------


def _read_other(path: Path) -> dict[str, Any]:
    """The per-query results of a saved document."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        schema, results = document["schema"], document["per_query"]
    except OSError as error:
        raise UsageError(f"{path} cannot be read", facts=error.strerror) from error
    except (ValueError, KeyError, TypeError) as error:
        raise MismatchError(
            f"{path} is no evaluation", facts=f"{type(error).__name__}: {error}"
        ) from error
    if schema != "embedkit.eval/1" or results is None:
        raise MismatchError(
            f"{path} holds no results query by query",
            facts=f"it is {schema!r}",
            hint=f"embedkit eval ... --json --per-query > {path}",
        )
    return dict(results)


def _compare(other: Any, figures: Evaluation, names: list[str]) -> dict[str, Difference]:
    """The paired differences from the other evaluation to this one."""
    from embedkit.evaluate import paired_differences

    before_names, before_labels, before = other
    mine = [names[row] for row in figures.results.rows]
    labels = [figures.labels[row] for row in figures.results.rows]
    place = {name: number for number, name in enumerate(before_names)}
    differ = set(place) ^ set(mine)
    if differ or len(place) != len(before_names):
        raise MismatchError(
            "the two evaluations did not ask the same queries",
            facts=f"{len(mine):,} here, {len(before_names):,} there, {len(differ):,} in one of "
            "them only",
            hint="evaluate both on the same photos",
        )
    order = [place[name] for name in mine]
    if [before_labels[row] for row in order] != labels:
        raise MismatchError("the two evaluations do not have the same labels")
    return paired_differences(
        before.take(order),
        figures.results,
        figures.ks,
        by_class=figures.by_class,
        repeats=figures.repeats,
        level=figures.level,
        seed=figures.seed,
    )


def _differences_json(differences: dict[str, Difference], path: Path | None) -> dict[str, Any]:
    def finite(value: float) -> float | None:
        return value if value == value else None

    return {
        "with": str(path),
        **{
            name: {
                "before": finite(one.before),
                "after": finite(one.after),
                "difference": finite(one.after - one.before),
                "interval": [finite(one.interval.low), finite(one.interval.high)],
                "beyond_noise": one.beyond_noise,
            }
            for name, one in differences.items()
        },
    }


def _beyond_classes(vectors: Rows, photos: PhotoSet, metric: str) -> dict[str, Any]:
    """What numbers and triplets say; empty where the photos have neither."""
    from embedkit.evaluate import continuous_metrics, triplet_metrics

    told: dict[str, Any] = {}
    if photos.targets is not None:
        told |= continuous_metrics(
            vectors,
            photos.targets,
            query=photos.is_query,
            gallery=photos.is_gallery,
            metric=metric,
        ).to_json()
    if photos.triplets is not None:
        places = [(one.a, one.b, one.odd) for one in photos.triplets]
        told |= triplet_metrics(vectors, places, metric=metric).to_json()
    return told


def _whole_page(
    beyond: dict[str, Any],
    figures: Evaluation | None,
    differences: dict[str, Difference] | None,
    again: Reranking | None,
) -> Group:
    """What numbers and triplets say, then classes, then those re-ranked."""
    from rich.console import Group
    from rich.text import Text

    def show(name: str) -> str:
        return "n/a" if beyond[name] is None else f"{beyond[name]:.4g}"

    lines = []
    for k in (1, 10) if "queries" in beyond else ():
        near, ideal = show(f"target_distance@{k}"), show(f"ideal_target_distance@{k}")
        lines.append(
            f"{f'nDCG@{k}':<15} {show(f'ndcg@{k}')}  target distance of the {k} nearest {near} "
            f"(ideal {ideal})"
        )
    if lines:
        lines.append(f"{'by chance':<15} target distance {show('chance_target_distance')}")
    if "triplets" in beyond:
        text = f"{show('triplet_accuracy')} of {beyond['triplets']:,} triplets"
        lines.append(f"{'triplets':<15} accuracy {text}")
    parts: list[Any] = [Text(line) for line in lines]
    if figures is not None:
        parts.append(_page(figures, differences))
    if figures is not None and again is not None:
        parts.append(_again(figures, again))
    return Group(*parts)


def _again(figures: Evaluation, again: Reranking) -> Group:
    """The figures of the re-ranked queries, and what that changed."""
    from rich.console import Group
    from rich.text import Text

    settings = ", ".join(f"{name} {value:g}" for name, value in again.settings.items())
    metrics = again.metrics.to_json()
    names = [f"recall@{k}" for k in figures.ks] + ["map@r", "r_precision", "mrr"]
    head = Text(f"re-ranked by {again.name} ({settings}), and the change", style="bold")
    lines = [
        Text(_line(name, metrics[name], again.intervals[name], again.differences)) for name in names
    ]
    return Group(head, *lines)


def _page(figures: Evaluation, differences: dict[str, Difference] | None) -> Group:
    """The figures with their intervals, then the worst classes; 80 columns."""
    from rich.console import Group
    from rich.text import Text

    metrics = figures.metrics.to_json()
    lone = figures.metrics.lone_queries
    names = [f"recall@{k}" for k in figures.ks]
    if lone:
        names += [f"recall_all@{k}" for k in figures.ks]
    names += ["map@r", "r_precision", "mrr"]
    shown = [_line(name, metrics[name], figures.intervals[name], differences) for name in names]
    over = "classes" if figures.by_class else "queries"
    head = f"{figures.metrics.queries:,} queries, {figures.metric}; "
    head += f"{figures.level:.0%} intervals over {over}"
    parts = [Text(head, style="bold"), *map(Text, shown)]
    if lone:
        parts.append(
            Text(f"{lone:,} queries have no match: misses in recall_all, left out of the others")
        )
    if figures.metrics.tie_share > 0:
        parts.append(
            Text(f"{figures.metrics.tie_share:.1%} of the queries have ties: gallery order decides")
        )
    pairs = figures.open_set
    known = {rate: value for rate, value in pairs.tpr.items() if value == value}
    if known:
        values = ", ".join(f"{value:.4f} at {rate:g}" for rate, value in known.items())
        drawn = f"{pairs.same:,} + {pairs.different:,} pairs"
        parts.append(Text(f"open set     TPR at FPR: {values}"))
        parts.append(Text(f"             from {drawn}{', drawn' if pairs.sampled else ', all'}"))
    if figures.clusters is not None:
        one = figures.clusters
        parts.append(
            Text(
                f"clusters     NMI {one.nmi:.4f}, AMI {one.ami:.4f} (k-means, {one.clusters:,} "
                f"clusters, random_state {one.random_state})"
            )
        )
    classes = figures.classes()
    if len(classes) > 1:
        parts.append(Text("the worst classes", style="bold"))
        for row in classes[:_WORST]:
            label = printable(row.label).replace("\n", " ")
            label = label if len(label) <= 34 else label[:33] + "…"
            parts.append(
                Text(
                    f"  {label:<34} {row.queries:>6,} queries  "
                    f"recall@1 {row.recall_at_1:.2f}  MAP@R {row.map_at_r:.2f}"
                )
            )
    return Group(*parts)


_SPELLED = {"map@r": "MAP@R", "r_precision": "R-precision", "mrr": "MRR"}


def _line(
    name: str, value: float | None, interval: Any, differences: dict[str, Difference] | None
) -> str:
    label = _SPELLED.get(name, name)
    if value is None:
        return f"{label:<15}   n/a"
    text = f"{label:<15} {value:.4f}  [{interval.low:.4f}, {interval.high:.4f}]"
    if differences is not None:
        one = differences[name]
        verdict = "" if one.beyond_noise else "  in noise"
        text += (
            f"  {one.after - one.before:+.4f} "
            f"[{one.interval.low:+.4f}, {one.interval.high:+.4f}]{verdict}"
        )
    return text


def _numbers(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--ks takes numbers from 1 up, got {text!r}", hint="--ks 1,2,4,8")
    return tuple(dict.fromkeys(map(int, parts)))
