"""The part of a run's page that shows the photos whose labels the training doubted."""

from __future__ import annotations

import csv

from embedkit.errors import MismatchError
from embedkit.report.page import Thumbnails, path_text, text
from embedkit.report.run_files import RunFiles

__all__ = ["suspects_section"]

_SUSPECTS = "suspects.csv"
_SHOWN = 24


def suspects_section(run: RunFiles) -> str:
    """The most doubted photos, the surest first; empty for a run that doubted nothing.

    Raises:
        MismatchError: suspects.csv is damaged.
    """
    path = run.folder / _SUSPECTS
    if not path.exists():
        return ""
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file))
        shown = [
            (row["path"], row["label"], row["suggested_label"], float(row["suggested_probability"]))
            for row in rows[:_SHOWN]
        ]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise MismatchError(
            f"{path} is damaged", facts=f"{type(error).__name__}: {error}"
        ) from error
    trained = sum(photo.split == "train" for photo in run.photos)
    said = f"The classifier would have {len(rows):,} of {trained:,} training photos in another "
    said += f"class. All are named in {_SUSPECTS}"
    said += f"; these are the {len(shown)} it is surest of." if shown else "."
    files = {photo.name: photo.path for photo in run.photos}
    thumbnails, pictures = Thumbnails(), []
    for name, label, suggested, probability in shown:
        place = files.get(name, run.folder / name)
        pictures.append(
            f'<li><figure><div class="frame">{thumbnails.image(place, label)}</div>'
            f"<figcaption>{text(label)} &rarr; <strong>{text(suggested)}</strong> "
            f'<span class="soft">{probability:.2f} {path_text(place.name)}</span></figcaption>'
            "</figure></li>"
        )
    return (
        f'<h2>Labels to look at</h2><p class="lead">{text(said)}</p>'
        f'<section class="card"><ul class="pictures">{"".join(pictures)}</ul></section>'
    )
