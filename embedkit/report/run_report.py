"""A training as one page: did it help, how it went, what is still hard, how to go on.

Reads nothing but the run's folder (and the photos it names): run.json, metrics.jsonl, config.toml,
split.csv and, where the trainer kept it, report.npz with the embeddings of held-out photos before
and after. Without the embeddings the page has no distances and no pictures, and says so.
"""

from __future__ import annotations

import math
import os
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.atomic import published
from embedkit.evaluate import greatest_cosines
from embedkit.report.charts import Bars, Line, histogram, line_chart, short
from embedkit.report.page import Thumbnails, page, path_text, table, text
from embedkit.report.run_files import HeldOutPhoto, KeptEmbeddings, RunFiles, read_run
from embedkit.report.suspects_section import suspects_section

__all__ = ["write_run_report"]

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

_QUERIES_AT_ONCE = 256
_BINS = 50
_HITS = 6
_SAMPLE_QUERIES, _HARD_CLASSES, _CLASS_PICTURES = 8, 6, 9


def write_run_report(run_dir: Path) -> Path:
    """Write report.html into a run's folder and return its path.

    Works for a run that was interrupted, and without report.npz. Photos that are gone are shown as
    placeholders. One file, under 5 MB, that needs nothing else.

    Raises:
        MismatchError: It is no run of embedkit, or a file of it is damaged.
        EmbedKitError: The page cannot be written.

    Cost: all pairs of the kept embeddings, 3 s for 5,000; about 100 thumbnails.
    """
    run = read_run(run_dir)
    name = run.record["name"]
    body = "\n".join(
        [
            _banner(run),
            _headline(run),
            _curves(run),
            _distances(run),
            _pictures(run),
            suspects_section(run),
            _next_steps(run),
            _settings(run),
            _data(run),
        ]
    )
    path = run_dir / "report.html"
    with published(path) as temporary:
        temporary.write_text(page(name, _subtitle(run), body), encoding="utf-8")
    return path


# --- did it help? --------------------------------------------------------------------------------


def _subtitle(run: RunFiles) -> str:
    recipe, data = run.recipe, run.record["data"]
    return (
        f"{recipe['loss']} on {recipe['backbone']}, {recipe['dim']} dimensions, "
        f"{recipe['image_size']} px  ·  {data['images']:,} photos  ·  {run.record['device']}, "
        f"{_duration(run.record['elapsed'])}"
    )


def _banner(run: RunFiles) -> str:
    if run.record["status"] == "finished":
        return ""
    again = f"embedkit train --resume {shlex.quote(os.fspath(run.folder))}"
    return (
        '<p class="banner" role="status"><strong>This run is not finished.</strong> It goes on '
        f"with <code>{text(again)}</code></p>"
    )


def _headline(run: RunFiles) -> str:
    before, after = run.result()
    if after is None:
        why = "no photos were held out, or no epoch is finished"
        return f'<p class="lead">Nothing has been measured: {why}.</p>'
    split = run.measured_split()
    classes = {photo.label for photo in run.photos if photo.split == split}
    known = classes & {photo.label for photo in run.photos if photo.split == "train"}
    whose = f"{len(classes):,} classes it has never seen"
    if known:
        whose = f"{len(classes):,} classes, {len(known):,} of which it was trained on"
    images = sum(photo.split == split for photo in run.photos)
    tiles = [
        ("recall@1", "recall@1", "the nearest photo is of the same class"),
        ("map@r", "MAP@R", "all photos of the class come first"),
        ("r_precision", "R-precision", "share of the class among its R nearest"),
    ]
    lead = f"Measured on {images:,} photos of {whose} ({split})"
    lead += "; before is the untrained network's pooled features." if before else "."
    return (
        f'<p class="lead">{text(lead)}</p><div class="grid tiles">'
        + "".join(_tile(name, meaning, key, before, after) for key, name, meaning in tiles)
        + "</div>"
    )


def _tile(
    name: str, meaning: str, key: str, before: dict[str, Any] | None, after: dict[str, Any]
) -> str:
    now, then = after.get(key), (before or {}).get(key)
    change = ""
    if now is not None and then is not None:
        gain = now - then
        kind = "up" if gain > 0 else "down" if gain < 0 else "soft"
        change = f'before {then:.3f} <span class="{kind}">{gain:+.3f}</span>'
    value = "-" if now is None else f"{now:.3f}"
    return (
        f'<div class="card tile"><div class="name">{name}</div><div class="value">{value}</div>'
        f'<div class="was">{change}</div><div class="small soft">{meaning}</div></div>'
    )


# --- how it went ---------------------------------------------------------------------------------


def _curves(run: RunFiles) -> str:
    rows = run.epochs
    if not rows:
        return '<h2>How it went</h2><p class="lead">No epoch is finished yet.</p>'
    x = [row["epoch"] for row in rows]
    best = (run.record["best"] or {}).get("epoch")
    baseline = (run.record["baseline"] or {}).get("val") or {}
    charts = [
        line_chart(
            "Loss",
            x,
            [Line("training loss", [row["loss"] for row in rows])],
            key="loss",
            x_label="epoch",
            low=0 if all((row["loss"] or 0) >= 0 for row in rows) else None,
            mark=best,
            note="mean over the steps of an epoch",
        )
    ]
    for key, title, tone in (("recall@1", "recall@1", 2), ("map@r", "MAP@R", 2)):
        lines = [Line("val", [(row["val"] or {}).get(key) for row in rows], tone=tone)]
        if baseline.get(key) is not None:
            level = Line("before training", [baseline[key]] * len(rows), tone=1, dashed=True)
            lines.append(level)
        if any(value is not None for value in lines[0].values):
            said = f"the thin line is epoch {best}, whose weights count" if best else ""
            charts.append(
                line_chart(
                    title,
                    x,
                    lines,
                    key=key.replace("@", "-"),
                    x_label="epoch",
                    low=0,
                    high=1,
                    mark=best,
                    note=said,
                )
            )
    charts += _tell_tales(rows, x, best)
    charts += _rates(run)
    return f'<h2>How it went</h2><div class="grid charts">{"".join(charts)}</div>'


def _tell_tales(rows: list[dict[str, Any]], x: list[int], best: int | None) -> list[str]:
    """What the loss says about itself: distances together, active shares together, the rest."""
    names = list(dict.fromkeys(name for row in rows for name in row["stats"]))
    distances = [name for name in names if name.endswith("distance")]
    active = [name for name in names if name.startswith("active")]
    groups = [
        ("Distances in training", distances, "of pairs of one class and of two, in a batch"),
        ("Active pairs", active, "share of pairs that still move the network"),
        *((_words(name), [name], "") for name in names if name not in distances + active),
    ]
    charts = []
    for place, (title, members, note) in enumerate(groups):
        if not members:
            continue
        lines = [
            Line(_words(name), [row["stats"].get(name) for row in rows], tone=tone % 4)
            for tone, name in enumerate(members)
        ]
        positive = all((value or 0) >= 0 for line in lines for value in line.values)
        charts.append(
            line_chart(
                title[:1].upper() + title[1:],
                x,
                lines,
                key=f"stats-{place}",
                x_label="epoch",
                low=0 if positive else None,
                mark=best,
                note=note,
            )
        )
    return charts


def _rates(run: RunFiles) -> list[str]:
    """The test of learning rates, where there was one."""
    found = run.record.get("rate_test")
    if not found or not found["losses"]:
        return []
    taken = found["reason"] or f"the thin line is {found['factor']:.2g}, which was taken"
    return [
        line_chart(
            "Learning rates tried",
            [math.log10(factor) for factor in found["factors"]],
            [Line("loss of a batch", found["losses"])],
            key="rates",
            x_label="times the recipe's, as a power of 10",
            mark=None if found["reason"] else math.log10(found["factor"]),
            note=f"one step at each; {taken}",
        )
    ]


def _words(name: str) -> str:
    return name.replace("_", " ")


# --- distances -----------------------------------------------------------------------------------


def _distances(run: RunFiles) -> str:
    title = "<h2>Distances between held-out photos</h2>"
    if run.vectors is None:
        return f'{title}<p class="lead">The embeddings of this run were not kept.</p>'
    labels = _codes([photo.label for photo in run.vectors.photos])
    edges = np.linspace(0, 2, _BINS + 1)
    measured = [
        (name, *_pair_histogram(vectors, labels))
        for name, vectors in (("before", run.vectors.before), ("after", run.vectors.after))
        if vectors is not None
    ]
    shares = [
        (name, _share(positive), _share(negative), _ordered(positive, negative))
        for name, positive, negative in measured
    ]
    high = max((float(max(p.max(), n.max())) for _, p, n, _ in shares), default=0.0)
    titles = {"before": "Before training", "after": "After training"}
    charts = [
        histogram(
            titles[name],
            edges.tolist(),
            [
                Bars("pairs of one class", positive.tolist(), tone=0),
                Bars("pairs of two classes", negative.tolist(), tone=1),
            ],
            key=f"distances-{name}",
            x_label="distance of unit embeddings",
            high=high,
            note=f"a pair of one class is nearer than a pair of two in {ordered:.1%} of cases"
            if ordered is not None
            else "there are no pairs of both kinds",
        )
        for name, positive, negative, ordered in shares
    ]
    lead = "Share of pairs by distance. The less the two overlap, the better a threshold works."
    return (
        f'{title}<p class="lead">{lead}{text(_sample_note(run.vectors))}</p>'
        f'<div class="grid charts">{"".join(charts)}</div>'
    )


def _sample_note(vectors: KeptEmbeddings) -> str:
    kept = len(vectors.photos)
    if kept == vectors.held_out:
        return ""
    return f" A sample: {kept:,} of {vectors.held_out:,} held-out photos, whole classes."


def _pair_histogram(vectors: Floats, labels: Indices) -> tuple[Indices, Indices]:
    """``(50,)`` counts of pairs of one class and of two, by distance 0 to 2; each pair once."""
    positive, negative = np.zeros(_BINS, np.int64), np.zeros(_BINS, np.int64)
    for start in range(0, len(vectors), _QUERIES_AT_ONCE):
        part = slice(start, start + _QUERIES_AT_ONCE)
        cosine = _cosines(vectors[part], vectors)
        distance = np.sqrt(np.maximum(2 - 2 * cosine, 0))
        bins = np.minimum((distance * (_BINS / 2)).astype(np.int64), _BINS - 1)
        once = np.arange(len(vectors)) > np.arange(start, start + len(cosine))[:, None]
        same = labels[part, None] == labels
        positive += np.bincount(bins[once & same], minlength=_BINS)
        negative += np.bincount(bins[once & ~same], minlength=_BINS)
    return positive, negative


def _cosines(asking: Floats, found: Floats) -> Floats:
    """Of unit rows; of several vectors per photo the greatest."""
    if asking.ndim == 3:
        return greatest_cosines(asking, found).astype(np.float32)
    return np.asarray(asking @ found.T)


def _share(counts: Indices) -> npt.NDArray[np.float64]:
    return np.asarray(counts / max(counts.sum(), 1))


def _ordered(positive: Indices, negative: Indices) -> float | None:
    """Chance that a pair of one class is nearer than a pair of two; equal bins count half."""
    total = float(positive.sum()) * float(negative.sum())
    if total == 0:
        return None
    farther = negative[::-1].cumsum()[::-1] - negative
    return float((positive * (farther + negative / 2)).sum() / total)


def _codes(labels: Sequence[str]) -> Indices:
    return np.asarray(np.unique(np.array(labels, dtype=str), return_inverse=True)[1], np.int64)


# --- pictures ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Answer:
    """What one held-out photo finds among the others.

    Attributes:
        query: Place among the kept photos.
        hits: Places of the nearest, nearest first.
        distances: Of them, 0 to 2.
        quality: Average precision over the first R, as in MAP@R.
    """

    query: int
    hits: list[int]
    distances: list[float]
    quality: float


def _pictures(run: RunFiles) -> str:
    if run.vectors is None or run.vectors.after is None:
        return ""
    photos = run.vectors.photos
    answers = _search(run.vectors.after, photos)
    if not answers:
        said = "No held-out photo has another of its class to find."
        return f'<h2>What it finds</h2><p class="lead">{said}</p>'
    thumbnails = Thumbnails()
    return _hard_classes(answers, photos, thumbnails) + _samples(answers, photos, thumbnails)


def _search(vectors: Floats, photos: list[HeldOutPhoto]) -> list[_Answer]:
    """Every query that has a match, against the gallery without itself."""
    labels = _codes([photo.label for photo in photos])
    gallery = np.flatnonzero([photo.found for photo in photos])
    queries = np.flatnonzero([photo.asks for photo in photos])
    answers = []
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        part = queries[start : start + _QUERIES_AT_ONCE]
        cosine = _cosines(vectors[part], vectors[gallery])
        cosine[part[:, None] == gallery] = -np.inf
        order = np.argsort(-cosine, axis=1, kind="stable")
        for place, query in enumerate(part.tolist()):
            ranked = gallery[order[place]]
            ranked = ranked[ranked != query]
            match = labels[ranked] == labels[query]
            r = int(match.sum())
            if r == 0:
                continue
            first = match[:r]
            precision = first.cumsum() / np.arange(1, r + 1)
            scores = cosine[place][order[place][:_HITS]]
            answers.append(
                _Answer(
                    query=query,
                    hits=ranked[:_HITS].tolist(),
                    distances=np.sqrt(np.maximum(2 - 2 * scores, 0)).tolist(),
                    quality=float((precision * first).sum() / r),
                )
            )
    return answers


def _hard_classes(
    answers: list[_Answer], photos: list[HeldOutPhoto], thumbnails: Thumbnails
) -> str:
    by_class: dict[str, list[_Answer]] = {}
    for answer in answers:
        by_class.setdefault(photos[answer.query].label, []).append(answer)
    quality = {
        label: float(np.mean([answer.quality for answer in own])) for label, own in by_class.items()
    }
    worst = sorted(quality, key=lambda label: (quality[label], label))[:_HARD_CLASSES]
    cards = []
    for label in worst:
        own = sorted(by_class[label], key=lambda answer: answer.quality)
        wrong = Counter(
            photos[answer.hits[0]].label for answer in own if photos[answer.hits[0]].label != label
        )
        taken_for = "".join(
            f" Taken for <strong>{text(other)}</strong> {count:,} times out of {len(own):,}."
            for other, count in wrong.most_common(1)
        )
        pictures = "".join(
            f'<li><div class="frame">{picture}</div></li>'
            for picture in (
                thumbnails.image(photos[answer.query].path, label)
                for answer in own[:_CLASS_PICTURES]
            )
        )
        cards.append(
            f'<section class="card"><div class="name-line"><h3>{text(label)}</h3>'
            f'<span class="soft">MAP@R {quality[label]:.3f}, {len(own):,} photos.{taken_for}</span>'
            f'</div><ul class="pictures small">{pictures}</ul></section>'
        )
    return (
        "<h2>Hardest classes</h2>"
        '<p class="lead">Held-out classes whose photos find each other worst, '
        "their worst photos first.</p>"
        f'<div class="stack">{"".join(cards)}</div>'
    )


def _samples(answers: list[_Answer], photos: list[HeldOutPhoto], thumbnails: Thumbnails) -> str:
    cards = []
    for answer in _even_choice(answers, photos):
        query = photos[answer.query]
        hits = "".join(
            _hit(photos[place], distance, query.label, thumbnails)
            for place, distance in zip(answer.hits, answer.distances, strict=True)
        )
        cards.append(
            '<section class="card row"><figure><div class="frame">'
            f"{thumbnails.image(query.path, f'Query: {query.label}')}</div>"
            f'<figcaption class="small"><h3>{text(query.label)}</h3>'
            f'<span class="soft">{path_text(Path(query.name).name)}</span></figcaption></figure>'
            f'<ol class="pictures" aria-label="Nearest first">{hits}</ol></section>'
        )
    right = sum(photos[answer.hits[0]].label == photos[answer.query].label for answer in answers)
    return (
        "<h2>Sample queries</h2>"
        f'<p class="lead">The nearest photo is right for {right:,} of {len(answers):,}. Shown are '
        f"{len(cards)}, taken evenly from the best answered to the worst; a green frame is the "
        "same class, a red one another.</p>"
        f'<div class="stack">{"".join(cards)}</div>'
    )


def _even_choice(answers: list[_Answer], photos: list[HeldOutPhoto]) -> list[_Answer]:
    """One of each eighth, from the best answered to the worst; a class once where that can be."""
    ranked = sorted(answers, key=lambda answer: (-answer.quality, answer.query))
    ends = np.linspace(0, len(ranked), min(_SAMPLE_QUERIES, len(ranked)) + 1).round().astype(int)
    chosen: list[_Answer] = []
    for begin, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        shown = {photos[answer.query].label for answer in chosen}
        fresh = [answer for answer in ranked[begin:end] if photos[answer.query].label not in shown]
        chosen.append(fresh[-1] if fresh else ranked[end - 1])
    return chosen


def _hit(photo: HeldOutPhoto, distance: float, wanted: str, thumbnails: Thumbnails) -> str:
    verdict, sign, said = ("right", "&#10003;", "same class")
    if photo.label != wanted:
        verdict, sign, said = ("wrong", "&#10007;", "another class")
    return (
        f'<li class="{verdict}"><figure><div class="frame">'
        f"{thumbnails.image(photo.path, photo.label)}"
        f'<span class="mark" role="img" aria-label="{said}">{sign}</span></div>'
        f'<figcaption>{text(photo.label)} <span class="soft">{distance:.2f}</span></figcaption>'
        "</figure></li>"
    )


# --- how to go on, settings, data ----------------------------------------------------------------


def _next_steps(run: RunFiles) -> str:
    folder = shlex.quote(os.fspath(run.folder))
    steps = []
    if run.record["status"] != "finished":
        steps.append(("Finish the training", f"embedkit train --resume {folder}"))
    if run.record["best"]:
        if _still_improving(run):
            twice = 2 * run.record["steps"]
            longer = f"embedkit train {_photos(run)} --config {folder}/config.toml --steps {twice}"
            steps.append(("The last epochs were still the best: train longer", longer))
        steps += [
            ("Make one file of it that runs without PyTorch", f"embedkit export {folder}"),
            (
                "Make your photos searchable, and search",
                "embedkit index ./catalog\nembedkit search ./query.jpg --index catalog.faiss",
            ),
        ]
    items = "".join(f"<li>{text(why)}<code>{_lines(line)}</code></li>" for why, line in steps)
    return f'<h2>How to go on</h2><ul class="commands card">{items}</ul>' if items else ""


def _photos(run: RunFiles) -> str:
    return shlex.quote(run.record["photos_root"])


def _lines(command: str) -> str:
    return "\n".join(text(line) for line in command.split("\n"))


def _still_improving(run: RunFiles) -> bool:
    """The best epoch is among the last tenth, and the training did not end by its patience."""
    measured = [row["epoch"] for row in run.epochs if row["val"]]
    best = (run.record["best"] or {}).get("epoch")
    return len(measured) >= 3 and best is not None and best >= 0.9 * measured[-1]


def _settings(run: RunFiles) -> str:
    recipe = dict(run.recipe)
    options = {**run.record["loss_options"], **recipe.pop("loss_options", {})}
    rows = [(_words(name), _value(value)) for name, value in recipe.items()]
    rows += [(f"{recipe['loss']}: {_words(name)}", _value(v)) for name, v in options.items()]
    ran = [
        ("device", run.record["device"]),
        ("arithmetic", run.record["amp"]),
        ("threads", str(run.record["threads"])),
        ("steps", f"{run.record['steps']:,}"),
        ("time", _duration(run.record["elapsed"])),
        ("ended because", run.record["stopped_because"] or "not ended"),
        *run.record["versions"].items(),
    ]
    return (
        "<h2>Settings</h2>"
        '<p class="lead">What is not listed was left to embedkit; '
        "<code>--config config.toml</code> trains by it again.</p>"
        f'<div class="grid charts"><div class="card">{table((), rows, caption="Recipe")}</div>'
        f'<div class="card">{table((), ran, caption="Where it ran")}</div></div>'
    )


def _data(run: RunFiles) -> str:
    data = run.record["data"]
    rows = [
        (split, f"{count['images']:,}", f"{count['classes']:,}")
        for split, count in data["splits"].items()
        if count["images"]
    ]
    facts = [
        ("folder", run.record["photos_root"]),
        ("unreadable files", f"{data['unreadable']:,}"),
        ("classes of one photo, left out", f"{data['lone_classes']:,}"),
        ("manifest", data["hash"][:16]),
    ]
    return (
        '<h2>Data</h2><div class="grid charts">'
        f'<div class="card">{table(("split", "photos", "classes"), rows)}</div>'
        f'<div class="card">{table((), facts)}</div></div>'
    )


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return short(value) if abs(value) >= 1e-3 or value == 0 else f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(_value(item) for item in value)
    return "none" if value is None else str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
