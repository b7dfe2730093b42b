"""MODEL_CARD.md beside an exported model: what it is, how good and fast, its use and its limits.

Written from the files themselves and the export's report, so that every number in it was measured.
Each export writes it again; the licence that a person filled in stays.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from embedkit import __version__
from embedkit.atomic import published
from embedkit.errors import EmbedKitError, MissingError
from embedkit.runtime import Embedder, ModelContract, read_contract
from embedkit.runtime.latency import measure
from embedkit.runtime.machine import describe_machine
from embedkit.runtime.words import (
    METRICS,
    megabytes,
    network_in_words,
    preprocess_in_words,
    scores_in_words,
    trained_on,
)

__all__ = ["BARE_HEADING", "CARD_NAME", "plain_lines", "write_card"]

CARD_NAME = "MODEL_CARD.md"
BARE_HEADING = "### With onnxruntime alone"

_BATCHES = (1, 8)
_SECONDS = 0.2
_UNKNOWN = "unknown"


def write_card(report: dict[str, Any], *, seconds: float = _SECONDS) -> Path:
    """Write the card of an export and return its path.

    Args:
        report: The content of export-report.json.
        seconds: Spent on each model at each batch size, on each device, to measure latency.

    Raises:
        MismatchError: The model is not what the report says it is.
        EmbedKitError: The card cannot be written.

    Cost: one or two seconds of measuring, and the hash of each file.
    """
    model = Path(report["model"])
    path = model.with_name(CARD_NAME)
    text = _card(report, model, seconds, _kept_licence(path))
    with published(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def plain_lines(contract: ModelContract, model: str) -> str:
    """Python that embeds ``photo.jpg`` with numpy, Pillow and onnxruntime, as `Embedder` does."""
    side = contract.preprocess
    smallest = side.decode_size()
    draft = (
        f"photo.draft(None, ({smallest}, {smallest}))  # a large JPEG is decoded smaller\n"
        if smallest is not None
        else ""
    )
    return f"""\
import numpy as np
import onnxruntime as ort
from PIL import Image, ImageOps

photo = Image.open("photo.jpg")
{draft}photo = ImageOps.exif_transpose(photo)
if photo.has_transparency_data:
    layer, photo = photo.convert("RGBA"), Image.new("RGB", photo.size, "white")
    photo.paste(layer, mask=layer)
photo = photo.convert("RGB")
scale = min(photo.width / {side.width}, photo.height / {side.height}) * {side.crop_ratio!r}
w, h = min({side.width} * scale, photo.width), min({side.height} * scale, photo.height)
left, top = (photo.width - w) / 2, (photo.height - h) / 2
box = (left, top, min(left + w, photo.width), min(top + h, photo.height))
photo = photo.resize(({side.width}, {side.height}), Image.Resampling.{side.filter.upper()}, box)
session = ort.InferenceSession({json.dumps(model)}, providers=["CPUExecutionProvider"])
pixels = np.asarray(photo)[None]  # (1, {side.height}, {side.width}, 3) uint8
vector = session.run(None, {{{json.dumps(contract.input_name)}: pixels}})[0][0]
"""


def _card(report: dict[str, Any], model: Path, seconds: float, licence: str) -> str:
    contract = read_contract(model)
    quant = report.get("quant") or {}
    rungs = list(quant.get("rungs") or [_only_rung(report)])
    # What an engine is built from is a file like the others, and nothing to run on a CPU.
    for_cpu = _published(rungs, model)
    if quant.get("engine_graph"):
        rungs.append(quant["engine_graph"])
    deployed = Path(quant.get("file") or model).name
    parts = [
        _front_matter(contract, licence),
        _what(contract),
        _files(_published(rungs, model), report.get("engine")),
        _training(contract),
        _quality(contract, _baseline(report)),
        _parity(rungs, quant),
        _speed(list(for_cpu), seconds),
        _usage(contract, deployed, report.get("engine")),
        _limits(contract, rungs, report.get("engine")),
        _licence(contract, licence),
    ]
    return "\n\n".join(parts) + "\n"


# --- what it is ----------------------------------------------------------------------------------


def _front_matter(contract: ModelContract, licence: str) -> str:
    tags = ["image-embedding", "image-retrieval", "metric-learning", "onnx"]
    tags += [name for name in (contract.backbone, contract.loss) if name]
    return "\n".join(
        [
            "---",
            f"license: {licence}",
            "library_name: embedkit",
            "pipeline_tag: image-feature-extraction",
            f"tags: [{', '.join(json.dumps(tag) for tag in tags)}]",
            "---",
        ]
    )


def _what(contract: ModelContract) -> str:
    maker = contract.versions.get("embedkit", __version__)
    near = "cosine" if contract.metric == "cosine" else "Euclidean distance"
    side = contract.preprocess
    steps = "\n".join(f"{n}. {step}" for n, step in enumerate(preprocess_in_words(side), 1))
    what = _filled(
        f"A model that turns a photo into {contract.embedding_dim:,} numbers, so that photos of "
        f"the same class lie near each other by {near}. It is made for finding photos like a given "
        "one, also of classes that it was not trained on. Trained and exported with embedkit "
        f"{maker}."
    )
    return f"""\
# {contract.name}

{what}

- Network: {network_in_words(contract)}
- Input `{contract.input_name}`: uint8 (N, {side.height}, {side.width}, 3), RGB, any N
- Output `{contract.output_name}`: float32 (N, {contract.embedding_dim})
- Fingerprint: `{contract.fingerprint}`; its vectors compare with those of the same one only

How a photo becomes its input:

{steps}"""


def _files(models: dict[Path, str], engine: dict[str, Any] | None) -> str:
    rows = [(path.name, path, precision) for path, precision in models.items()]
    if engine:
        path = Path(engine["path"])
        rows.append((path.name, path, f"engine, compute capability {engine['compute_capability']}"))
    lines = [
        [f"`{name}`", what, megabytes(path.stat().st_size), f"`{_sha256(path)}`"]
        for name, path, what in rows
    ]
    table = _table(["file", "precision", "size", "sha256"], lines)
    return f"## Files\n\n{table}"


def _published(rungs: Sequence[dict[str, Any]], model: Path) -> dict[Path, str]:
    """The ONNX files there are, fp32 first, with their precision; each once."""
    found = {model: "fp32"}
    for rung in rungs:
        if rung.get("file"):
            path = model.with_name(Path(rung["file"]).name)
            kept = len(rung.get("kept_float") or ())
            more = f", {kept} layers in float" if kept else ""
            if path.is_file():
                found.setdefault(path, f"{rung['precision']}{more}")
    return found


def _only_rung(report: dict[str, Any]) -> dict[str, Any]:
    """An export that was asked for nothing but fp32."""
    return {
        "name": "fp32",
        "precision": "fp32",
        "file": report["model"],
        "gate": report["gate"],
        "verdict": "taken",
    }


# --- how good it is ------------------------------------------------------------------------------


def _training(contract: ModelContract) -> str:
    lines = [f"- {told}" for told in trained_on(contract.data)]
    if contract.data.get("hash"):
        lines.append(f"- Hash of their names, labels and splits: `{contract.data['hash']}`")
    recipe = contract.recipe
    if contract.loss:
        options = ", ".join(f"{name} {value}" for name, value in contract.loss_options.items())
        lines.append(f"- Loss: {contract.loss}" + (f" ({options})" if options else ""))
    weights = recipe.get("weights")
    if weights:
        start = {"none": "random numbers", "imagenet": "torchvision's ImageNet weights"}
        lines.append(f"- Weights it began with: {start.get(weights, f'the file {weights}')}")
    if "seed" in recipe:
        lines.append(f"- Seed: {recipe['seed']}")
    if contract.versions:
        told = ", ".join(f"{name} {known}" for name, known in sorted(contract.versions.items()))
        lines.append(f"- Made by: {told}")
    return "## Trained on\n\n" + ("\n".join(lines) or "The model does not say.")


def _baseline(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Metrics of the untrained network by split, where the run's folder is still there."""
    try:
        record = json.loads((Path(report["run"]) / "run.json").read_text(encoding="utf-8"))
        return dict(record["baseline"] or {})
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # the model alone was handed over: it does not know what came before it


def _quality(contract: ModelContract, baseline: dict[str, dict[str, Any]]) -> str:
    metrics = contract.quality.get("fp32")
    split = contract.data.get("held_out")
    if not metrics or not split:
        return "## How good it is\n\nNo photos were held out, so nothing was measured."
    counts = contract.data.get("splits", {}).get(split, {})
    before = baseline.get(split) or {}
    head = ["metric", "this model"] + (["before training"] if before else [])
    rows = [
        [name, f"{metrics[key]:.4f}"]
        + ([f"{before[key]:.4f}" if before.get(key) is not None else ""] if before else [])
        for key, name in METRICS.items()
        if key in metrics
    ]
    photos, classes = counts.get("images"), counts.get("classes")
    whose = f": {photos:,} photos of {classes:,} classes" if photos and classes else ""
    words = [
        f"Measured at fp32 on the split `{split}`{whose}, on which no weight was trained. recall@1 "
        "is the share of photos whose nearest one is of their class; 1 is the best of each metric."
    ]
    if split == "val":
        words.append(
            "The same photos chose the checkpoint, so a test on others may come out lower."
        )
    text = f"## How good it is\n\n{_filled(' '.join(words))}\n\n{_table(head, rows)}"
    return text + _widths(contract, metrics)


def _widths(contract: ModelContract, whole: dict[str, float]) -> str:
    """What the first numbers alone reach; nothing where only the whole was trained."""
    if not contract.prefixes:
        return ""
    words = (
        "Its first numbers alone are an embedding too, once scaled to unit length again: "
        "`--dim` of `embedkit index`, `embed` and `eval`, or `Embedder.load(..., dim=...)`. "
        if contract.normalizes
        else "Its first numbers alone are an embedding too: `--dim` of `embedkit index`, `embed` "
        "and `eval`, or `Embedder.load(..., dim=...)`. "
    ) + "Vectors of two widths cannot be compared."
    names = [name for name in ("recall@1", "map@r") if name in whole]
    figures = [(one.dim, one.quality) for one in contract.prefixes]
    rows = [
        [str(dim), *(f"{known[name]:.4f}" if name in known else "" for name in names)]
        for dim, known in (*figures, (contract.embedding_dim, whole))
    ]
    head = ["numbers", *(METRICS[name] for name in names)]
    return f"\n\n{_filled(words)}\n\n{_table(head, rows)}"


def _parity(rungs: Sequence[dict[str, Any]], quant: dict[str, Any]) -> str:
    rows = [row for rung in rungs if (row := _parity_row(rung))]
    gate = next(rung["gate"] for rung in rungs if rung.get("gate"))
    words = (
        "Each file was compared with the trained network in PyTorch on "
        f"{gate['images']:,} held-out photos: the cosine of each pair of vectors, the ten nearest "
        "neighbours that both agree on, and what retrieval loses in points (hundredths)."
    )
    pairs = [(rung.get("gate") or {}).get("recall@1") or {} for rung in rungs]
    if any(pair.get("low") is not None for pair in pairs):
        words += " In brackets: 95 % intervals."
    head = ["precision", "least cosine", "mean", "10 neighbours", "recall@1", "MAP@R", "verdict"]
    text = f"## Equal to the trained network\n\n{_filled(words)}\n\n{_table(head, rows)}"
    if quant.get("asked", "none") != "none" and quant.get("reason"):
        reason = f"It {quant['reason']}" if quant["reason"][:1].islower() else quant["reason"]
        text += f"\n\n`--quant {quant['asked']}` took {quant['taken']}. {reason.rstrip('.')}."
    return text


def _parity_row(rung: dict[str, Any]) -> list[str] | None:
    gate = rung.get("gate")
    if not gate:
        return None
    batches = gate["batches"]
    least = [row["min_cosine"] for row in batches]
    mean = batches[-1]["mean_cosine"] if batches else None
    overlap = gate.get("neighbour_overlap@10")
    return [
        rung["name"],
        "not finite" if not least or None in least else f"{min(least):.7f}",
        "" if mean is None else f"{mean:.7f}",
        "" if overlap is None else f"{overlap:.1%}",
        _change(gate.get("recall@1")),
        _change(gate.get("map@r")),
        rung.get("verdict", ""),
    ]


def _change(pair: dict[str, float] | None) -> str:
    """``0.9208, 0.0 points [-0.4, +0.4]``."""
    if pair is None:
        return ""
    text = f"{pair['file']:.4f}, {_points(pair['file'] - pair['torch'])} points"
    if pair.get("low") is not None and pair.get("high") is not None:
        text += f" [{_points(pair['low'])}, {_points(pair['high'])}]"
    return text


def _points(share: float) -> str:
    """``+0.4``; a nought has no sign."""
    points = round(100 * share, 1)
    return f"{points:+.1f}" if points else "0.0"


# --- how fast it is ------------------------------------------------------------------------------


def _speed(models: Sequence[Path], seconds: float) -> str:
    machine = describe_machine()
    rows = list(_speed_rows(models, seconds))
    packages = ", ".join(
        f"{name} {known}" for name, known in machine["packages"].items() if "onnx" in name
    )
    words = (
        f"Measured at export, in {seconds:g} s each, on {machine['processor']} with "
        f"{machine['cores']} cores ({packages}): the model alone, without reading photos. "
        "`embedkit bench` measures it on yours, longer and with decoding."
    )
    head = ["file", "on", "batch", "p50 ms", "p95 ms", "images/s"]
    return f"## How fast it is\n\n{_filled(words)}\n\n{_table(head, rows)}"


def _speed_rows(models: Sequence[Path], seconds: float) -> Iterator[list[str]]:
    for device in ("cpu", "cuda"):
        with contextlib.ExitStack() as opened:
            try:
                ready = {
                    path.name: opened.enter_context(Embedder.load(path, device=device))
                    for path in models
                }
            except MissingError:
                continue  # no GPU that works: then the CPU's figures are what there is
            where = next(iter(ready.values())).device
            for cell in measure(ready, _BATCHES, seconds=seconds):
                if cell.timing is None:
                    raise EmbedKitError(f"{cell.model} failed while it was timed", facts=cell.error)
                timing = cell.timing
                yield [
                    f"`{cell.model}`",
                    where,
                    str(cell.batch),
                    f"{timing.p50_ms:.2f}",
                    f"{timing.p95_ms:.2f}",
                    f"{timing.images_per_second:,.0f}",
                ]


# --- how to use it -------------------------------------------------------------------------------


def _usage(contract: ModelContract, deployed: str, engine: dict[str, Any] | None) -> str:
    unit = ", unit length" if contract.normalizes else ""
    if contract.vectors > 1:
        unit = f", {contract.vectors} vectors side by side"
    other = ""
    if engine:
        other = f" On a GPU, `{Path(engine['path']).name}` is loaded in the same way."
    return f"""\
## How to use it

No PyTorch is needed: `pip install "embedkit[cpu]"`.{other}

### From Python

```python
from embedkit import Embedder

with Embedder.load("{deployed}") as embedder:
    vectors = embedder.embed(["photo.jpg"])  # (1, {contract.embedding_dim}) float32{unit}
```

### From the command line

```sh
embedkit index ./catalog --model {deployed}
embedkit search ./query.jpg --index catalog.faiss
embedkit info {deployed} --self-test
```

{BARE_HEADING}

```python
{plain_lines(contract, deployed)}```"""


# --- what it is not ------------------------------------------------------------------------------


def _limits(
    contract: ModelContract, rungs: Sequence[dict[str, Any]], engine: dict[str, Any] | None
) -> str:
    counts = contract.data.get("splits", {}).get("train", {})
    limits = []
    if counts.get("classes"):
        limits.append(
            f"It was trained on {counts['classes']:,} classes of one collection. How good it is on "
            "other kinds of photos was not measured; on yours: "
            "`embedkit eval MODEL ./photos-in-a-folder-per-class`."
        )
    cut = contract.preprocess.crop_ratio
    side = contract.preprocess
    limits.append(
        "It sees the centre only: what lies outside the largest centred box of shape "
        f"{side.width} x {side.height}"
        + (f", or in its outer {1 - cut:.1%}," if cut < 1 else "")
        + " has no part in the vector."
    )
    if scores := scores_in_words(contract.thresholds):
        limits.append(
            f"A score is a similarity and no probability. Search calls a hit: {scores}. In a much "
            "larger catalog strangers come nearer."
        )
    else:
        limits.append(
            "A score is a similarity and no probability, and none was set above which two photos "
            "count as the same: the nearest photo is found, also where nothing is alike."
        )
    limits.append("Vectors of another model, also of the same width, cannot be compared with its.")
    if any(rung.get("file") and rung["precision"] == "int8" for rung in rungs):
        limits.append(
            "The int8 file was checked on this processor's arithmetic; on another, run "
            "`embedkit info FILE --self-test`."
        )
    if engine:
        limits.append(
            f"The engine runs on compute capability {engine['compute_capability']} with "
            f"{engine['flavour']} {engine['version']} only; elsewhere build it again from the ONNX "
            "file. Load no engine that you did not build."
        )
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def _licence(contract: ModelContract, licence: str) -> str:
    if licence != _UNKNOWN:
        return f"## Licence\n\n{licence}"
    start = contract.recipe.get("weights")
    weights = "" if start in (None, "none") else ", and of the weights it began with,"
    return _filled(
        "## Licence\n\nNot filled in yet: put it into the `license:` line at the top; the next "
        f"export keeps it. The licence of the photos it was trained on{weights} may bind it."
    )


def _kept_licence(path: Path) -> str:
    """What a person wrote into the card that stands there."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return _UNKNOWN
    if lines[:1] != ["---"]:
        return _UNKNOWN
    for line in lines[1:]:
        key, _, value = line.partition(":")
        if key == "license" and value.strip():
            return value.strip()
        if line == "---":
            break
    return _UNKNOWN


# --- Markdown ------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is on the left, numbers on the right."""
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join([' --- ', *[' ---: '] * (len(head) - 1)])}|"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join(lines)


def _filled(text: str) -> str:
    """One paragraph per line of `text`, wrapped as people write Markdown."""
    return "\n".join(
        textwrap.fill(line, 100, break_long_words=False, break_on_hyphens=False)
        for line in text.split("\n")
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
