"""Photos whose labels look wrong, the most suspicious first: a list for somebody to look at."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from embedkit.atomic import published

__all__ = ["SUSPECTS_FILE", "Suspect", "find_suspects", "write_suspects"]

SUSPECTS_FILE = "suspects.csv"
"""Its name in a run's folder."""


@dataclass(frozen=True)
class Suspect:
    """A training photo that the classifier would have in another class.

    Attributes:
        path: As the data names it.
        label: As given.
        suggested_label: The likeliest.
        suggested_probability: Of that, 0 to 1.
        label_probability: Of the given one.
    """

    path: Path
    label: str
    suggested_label: str
    suggested_probability: float
    label_probability: float


def find_suspects(
    paths: Sequence[Path],
    labels: npt.NDArray[np.int64],
    classes: Sequence[str],
    beliefs: npt.NDArray[np.float32],
) -> list[Suspect]:
    """Photos whose likeliest class is not their label, by how much likelier it is.

    Args:
        paths: N of them.
        labels: ``(N,)`` places in `classes`.
        classes: C names.
        beliefs: ``(N, C)`` probabilities.
    """
    best = beliefs.argmax(1)
    places = np.arange(len(labels))
    ahead = beliefs[places, best] - beliefs[places, labels]
    order = np.argsort(-ahead, kind="stable")
    return [
        Suspect(
            path=paths[row],
            label=classes[labels[row]],
            suggested_label=classes[best[row]],
            suggested_probability=float(beliefs[row, best[row]]),
            label_probability=float(beliefs[row, labels[row]]),
        )
        for row in order.tolist()
        if best[row] != labels[row]
    ]


def write_suspects(path: Path, suspects: Sequence[Suspect]) -> None:
    """Write them as CSV, probabilities to four places; a file of a header alone for none.

    Raises:
        EmbedKitError: The file cannot be written.
    """
    with (
        published(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(
            ["path", "label", "suggested_label", "suggested_probability", "label_probability"]
        )
        for one in suspects:
            writer.writerow(
                [
                    one.path.as_posix(),
                    one.label,
                    one.suggested_label,
                    f"{one.suggested_probability:.4f}",
                    f"{one.label_probability:.4f}",
                ]
            )
