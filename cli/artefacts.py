"""Any file embedkit writes, read without PyTorch: what it is, what made it, what to do with it."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import math
import shlex
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedkit.cli.index import from_here
from embedkit.errors import MismatchError, UsageError
from embedkit.runtime.words import (
    METRICS,
    megabytes,
    network_in_words,
    preprocess_in_words,
    scores_in_words,
    trained_on,
)

if TYPE_CHECKING:
    from embedkit.runtime import ModelContract

__all__ = ["Artefact", "read_artefact"]

_LARGEST_JSON = 256_000_000
_MOST_SCALARS = 12
_STORE = 0x656D6B69  # application_id of an index's store


@dataclass(frozen=True)
class Artefact:
    """What is known of one file or folder.

    Attributes:
        kind: ``model``, ``engine``, ``run``, ``checkpoint``, ``catalog``, ``store``, or the name in
            a document's schema.
        title: What it is, in one line.
        lines: Label and text, in reading order; several lines may share a label.
        content: The same for programs.
        next: What to type with it; empty where there is nothing.
    """

    kind: str
    title: str
    lines: list[tuple[str, str]]
    content: dict[str, Any] = field(default_factory=dict)
    next: str = ""


def read_artefact(path: Path) -> Artefact:
    """Tell by content what `path` is, and read it.

    Raises:
        UsageError: There is nothing of that name, or it cannot be read.
        MismatchError: Damaged, or not of embedkit.
        MissingExtraError: No package is installed that can read it.
    """
    if path.is_dir():
        return _run(path)
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise UsageError(f"{path} cannot be read", facts=error.strerror) from error
    if path.suffix == ".engine" or head[:4] in (b"ftrt", b"vtrt"):
        return _engine(path)
    if path.suffix == ".safetensors":
        return _checkpoint(path)
    if head.startswith(b"SQLite format 3\0"):
        return _store(path)
    if path.suffix == ".faiss" or head[:2] == b"Ix":
        return _catalog(path)
    if head.lstrip()[:1] == b"{":
        return _document(path)
    if path.suffix == ".onnx":
        return _model(path)
    raise MismatchError(
        f"embedkit does not know what {path} is",
        facts="known: a run's folder, .onnx, .engine, .safetensors, .faiss and its .store, and the "
        "JSON documents of embedkit",
        hint="embedkit info runs/last",
    )


# --- models --------------------------------------------------------------------------------------


def _model(path: Path) -> Artefact:
    from embedkit.runtime import read_contract

    contract = read_contract(path)
    lines, content = _contract(contract)
    size = path.stat().st_size
    content |= {"size": size, "sha256": _sha256(path)}
    lines.insert(0, ("file", f"{megabytes(size)}, sha256 {content['sha256']}"))
    return Artefact(
        "model",
        f"an exported model (ONNX, {contract.precision}), stands alone",
        lines,
        content,
        f"embedkit index ./catalog --model {_typed(path)}",
    )


def _engine(path: Path) -> Artefact:
    from embedkit.runtime.engine_file import FLAVOURS, open_engine

    engine = open_engine(path)
    info = engine.info
    lines, content = _contract(engine.contract)
    sizes = ", ".join(
        f"{name} {':'.join(str(shapes[kind][0]) for kind in ('min', 'opt', 'max'))}"
        for name, shapes in info.profile.items()
    )
    lines = [
        ("file", f"{megabytes(info.size)}, sha256 {info.engine_sha256}"),
        ("built", f"from {info.onnx} by {FLAVOURS[info.flavour]} {info.version}"),
        ("runs on", f"compute capability {info.compute_capability}, batch {sizes}"),
        *lines,
    ]
    return Artefact(
        "engine",
        "a TensorRT engine; a cache of its ONNX file",
        lines,
        {"engine": info.to_json(), **content},
        f"embedkit index ./catalog --model {_typed(path)}",
    )


def _contract(contract: ModelContract) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    lines = [("model", contract.name), ("gives", network_in_words(contract))]
    lines += [("pixels", step) for step in preprocess_in_words(contract.preprocess)]
    if contract.loss:
        lines.append(("trained", f"with {contract.loss}{_options(contract.loss_options)}"))
    lines += [("data", told) for told in (*trained_on(contract.data), *_list_hash(contract.data))]
    held_out = contract.data.get("held_out")
    on = f" on {held_out}" if held_out else ""
    for precision, metrics in contract.quality.items():
        of = f"{precision}{on}" if precision == "fp32" else precision
        lines.append(("quality", f"{_metrics(metrics)} ({of})"))
    for prefix in contract.prefixes:
        measured = f"{_metrics(prefix.quality)} (fp32{on})" if prefix.quality else "not measured"
        lines.append(("--dim", f"{prefix.dim}: {measured}, the first {prefix.dim} numbers alone"))
    if books := contract.codebooks:
        lines.append(("codes", f"{books.parts} a picture, each one of {books.words} words"))
    if contract.precision != "fp32":
        kept = f"; {len(contract.kept_float)} layers kept in float" if contract.kept_float else ""
        lines.append(("precision", contract.precision + kept))
    if scores := scores_in_words(contract.thresholds):
        lines.append(("scores", scores))
    if contract.versions:
        lines.append(("made by", _versions(contract.versions)))
    lines.append(("weights", f"sha256 {contract.weights_hash[:16]}"))
    lines.append(("fingerprint", f"{contract.fingerprint}, what an index remembers of its model"))
    document = json.loads(contract.dumps())
    test = document.pop("self_test")
    if test is not None:
        test["vector"] = f"{len(test['vector'])} numbers"
    if books := contract.codebooks:
        document["codebooks"]["numbers"] = f"{books.dim * books.words} numbers"
    return lines, {"contract": {**document, "self_test": test}}


# --- trainings -----------------------------------------------------------------------------------


def _run(folder: Path) -> Artefact:
    if not (folder / "run.json").is_file():
        raise MismatchError(
            f"the folder {folder} is no run of embedkit",
            facts="it has no run.json",
            hint="embedkit info runs/last, or name a file",
        )
    from embedkit.report.run_files import read_run

    run = read_run(folder)
    try:
        record, recipe, data = run.record, run.recipe, run.record["data"]
        before, after = run.result()
        status = record["status"]
        lines = [
            ("run", f"{record['name']}, {status}"),
            ("network", f"{recipe['backbone']}, {recipe['pooling']} pooling, {recipe['dim']} wide"),
            ("trained", f"with {recipe['loss']}{_options(record['loss_options'])}"),
            ("", f"{record['steps']:,} steps on {record['device']}, {_time(record['elapsed'])}"),
            *(("data", told) for told in (*trained_on(data), *_list_hash(data))),
        ]
        split = run.measured_split()
        for name, metrics in (("before", before), ("after", after)):
            if metrics:
                lines.append((name, f"{_metrics(metrics)} ({split})"))
        lines.append(("made by", _versions(record["versions"])))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MismatchError(
            f"the run.json of {folder} is damaged", facts=f"{type(error).__name__}: {error}"
        ) from error
    files = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    lines.append(("files", ", ".join(files)))
    model = folder / "model.onnx"
    if status != "finished":
        advice = f"embedkit train --resume {_typed(folder)}"
    elif model.is_file():
        advice = f"embedkit index ./catalog --model {_typed(model)}"
    else:
        advice = f"embedkit export {_typed(folder)}"
    content = {"run": record, "recipe": recipe, "epochs": len(run.epochs), "files": files}
    return Artefact("run", "a training's folder", lines, content, advice)


def _checkpoint(path: Path) -> Artefact:
    from embedkit.report.checkpoint_file import read_checkpoint_file

    checkpoint = read_checkpoint_file(path)
    state = checkpoint.state
    recipe, data = state.get("recipe"), state.get("data")
    # best.safetensors holds an epoch's row, last.safetensors the progress so far.
    best, progress = state.get("best"), state.get("progress")
    if not (isinstance(recipe, dict) and isinstance(data, dict)):
        raise MismatchError(
            f"the checkpoint {path} is damaged", facts="it does not name its recipe"
        )
    lines = [
        ("file", f"{megabytes(path.stat().st_size)}, whole: its digest is right"),
        ("network", f"{recipe.get('backbone')}, {recipe.get('pooling')} pooling, "
                    f"{recipe.get('dim')} wide, {recipe.get('image_size')} px"),
        ("trained", f"with {recipe.get('loss')} on {data.get('images', 0):,} photos"),
        *(("data", told) for told in _list_hash(data)),
        *(("numbers", f"{count:,} of the {part}") for part, count in checkpoint.numbers.items()),
    ]  # fmt: skip
    if isinstance(best, dict):
        lines.append(("epoch", f"{best.get('epoch')}, step {best.get('step')}"))
        if isinstance(best.get("val"), dict):
            lines.append(("quality", f"{_metrics(best['val'])} (val)"))
        advice, title = f"embedkit export {_typed(path)}", "a checkpoint: the weights that count"
    else:
        where = progress if isinstance(progress, dict) else {}
        lines.append(("epoch", f"{where.get('epoch')}, step {where.get('step')}"))
        title = "a checkpoint: where a training goes on"
        advice = f"embedkit train --resume {_typed(path.parent)}"
    content = {"state": state, "numbers": checkpoint.numbers}
    return Artefact("checkpoint", title, lines, content, advice)


# --- indexes -------------------------------------------------------------------------------------


def _catalog(path: Path) -> Artefact:
    from embedkit.index import Catalog

    catalog = Catalog.open(path, mmap=True)
    index = catalog.manifest.get("index", {})
    kind = index.get("factory", "Flat") if isinstance(index, dict) else "Flat"
    size = path.stat().st_size
    several = f"{catalog.parts} vectors each, " if catalog.parts > 1 else ""
    lines = [
        ("file", f"{megabytes(size)}; {len(catalog):,} pictures, {catalog.dim} wide, "
                 f"{several}{catalog.metric}, {kind}"),
    ]  # fmt: skip
    if catalog.has_names:
        summary = catalog.contract_summary
        lines.append(("model", f"{summary.get('name')}: {summary.get('backbone')}, "
                      f"{summary.get('loss')}, {summary.get('precision')}"))  # fmt: skip
        lines.append(("fingerprint", f"{catalog.fingerprint}, of the one model it belongs to"))
        found = catalog.find_model()
        lines.append(("", from_here(found) if found else f"not found; was {catalog.model_path}"))
        gone = "" if catalog.root and catalog.root.is_dir() else ", which is not there"
        lines.append(("pictures", f"in {catalog.root}{gone}"))
        lines.append(("made by", _versions(catalog.manifest.get("versions", {}))))
    else:
        lines.append(("names", "gone: another program rewrote the file; hits are numbers only"))
    store = path.with_name(f"{path.name}.store")
    content: dict[str, Any] = {
        "size": size,
        "count": len(catalog),
        "dim": catalog.dim,
        "vectors": catalog.parts,
        "metric": catalog.metric,
        "manifest": catalog.manifest,
        "store": None,
    }
    if store.is_file():
        kept = _store(store)
        lines += [("store", text) for _, text in kept.lines]
        content["store"] = kept.content
    advice = f"embedkit search ./query.jpg --index {_typed(path)}"
    return Artefact("catalog", "an index of pictures", lines, content, advice)


def _store(path: Path) -> Artefact:
    """The file that remembers what was embedded, opened without writing."""
    uri = f"{path.absolute().as_uri()}?mode=ro"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as base:
            (mark,) = base.execute("PRAGMA application_id").fetchone()
            if mark != _STORE:
                raise MismatchError(
                    f"{path} is a database, but no store of an index",
                    facts=f"its application id is {mark:#x}",
                )
            query = "SELECT error, count(*) FROM item GROUP BY error ORDER BY 2 DESC"
            counts = {str(error or ""): int(count) for error, count in base.execute(query)}
            row = base.execute("SELECT fingerprint FROM run").fetchone()
    except sqlite3.Error as error:
        raise MismatchError(f"the store {path} cannot be read", facts=str(error)) from error
    embedded = counts.pop("", 0)
    failed = ", ".join(f"{count:,} {error}" for error, count in counts.items())
    lines = [("holds", f"{embedded:,} pictures embedded, {failed or 'none'} failed")]
    content = {
        "embedded": embedded,
        "failed": counts,
        "fingerprint": str(row[0]) if row else None,
    }
    catalog = path.with_name(path.name.removesuffix(".store"))
    return Artefact(
        "store", "what an index remembers of its folder", lines, content,
        f"embedkit info {_typed(catalog)}",
    )  # fmt: skip


# --- documents -----------------------------------------------------------------------------------


def _document(path: Path) -> Artefact:
    if path.stat().st_size > _LARGEST_JSON:
        raise MismatchError(
            f"{path} is too large for a document of embedkit",
            facts=f"{megabytes(path.stat().st_size)}, at most {megabytes(_LARGEST_JSON)}",
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        schema = document["schema"]
        family, _, rest = schema.partition(".")
        name, _, version = rest.partition("/")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MismatchError(
            f"{path} is no JSON document of embedkit", facts=f"{type(error).__name__}: {error}"
        ) from error
    if family != "embedkit" or not name or not version:
        raise MismatchError(f"{path} is no JSON document of embedkit", facts=f"it is {schema!r}")
    if name == "run":
        return _run(path.parent)
    if name == "engine" and path.name.endswith(".engine.json"):
        return _engine(path.with_name(path.name.removesuffix(".json")))
    lines = [("schema", schema), *_scalars(document)]
    advice = ""
    if name == "export":
        model = path.parent / Path(str(document.get("model"))).name
        advice = f"embedkit info {_typed(model)}" if model.is_file() else ""
    titles = {
        "export": "the report of an export",
        "eval": "an evaluation",
        "compare": "a comparison of trainings",
        "bench": "measured speed",
        "train": "the answer of a training",
    }
    title = titles.get(name, f"the answer of `embedkit {name}`")
    return Artefact(name, title, lines, {"document": document}, advice)


def _scalars(document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What stands plainly in a document, one level deep, and its metrics."""
    shown = 0
    for name, value in document.items():
        if name == "schema" or value is None or shown == _MOST_SCALARS:
            continue
        if isinstance(value, str | int | float):
            yield name, _plain(value)
        elif name == "metrics" and isinstance(value, dict):
            yield name, _metrics(value)
        elif isinstance(value, dict):
            inner = [
                f"{key} {_plain(one)}"
                for key, one in value.items()
                if isinstance(one, str | int | float)
            ]
            if not inner:
                continue
            yield name, ", ".join(inner)
        elif isinstance(value, list):
            yield name, f"{len(value):,} entries"
        shown += 1


# --- words ---------------------------------------------------------------------------------------


def _metrics(metrics: dict[str, Any]) -> str:
    told = [
        f"{name} {metrics[key]:.4f}"
        for key, name in METRICS.items()
        if isinstance(metrics.get(key), int | float)
    ]
    return ", ".join(told) or "nothing measured"


def _list_hash(data: dict[str, Any]) -> list[str]:
    return [f"their list has the hash {str(data['hash'])[:16]}"] if data.get("hash") else []


def _plain(value: str | int | float) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _options(options: Any) -> str:
    if not isinstance(options, dict) or not options:
        return ""
    told = (
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in options.items()
    )
    return f" ({', '.join(told)})"


def _versions(versions: Any) -> str:
    known = versions.items() if isinstance(versions, dict) else ()
    return ", ".join(f"{name} {version}" for name, version in known)


def _time(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "an unknown time"
    return str(datetime.timedelta(seconds=round(seconds)))


def _typed(path: Path) -> str:
    return shlex.quote(from_here(path))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
