"""Where an evaluation went wrong, as a page: the worst queries, and what beat the right answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from embedkit.evaluate import Evaluation
from embedkit.evaluate.ranking import Space, rankings
from embedkit.report.page import Thumbnails, page, path_text, table, text

__all__ = ["Failure", "failures_page", "worst_failures"]

Indices = npt.NDArray[np.int64]

_SHOWN = 40
_WINNERS = 3
_CONFUSIONS = 12
_AT_ONCE = 64


@dataclass(frozen=True)
class Failure:
    """One query whose nearest is of another class.

    Attributes:
        query: Its row.
        winners: Rows of the first wrong ones, nearest first, at most three.
        winner_scores: Of them: the cosine (higher is nearer), or the distance (lower is nearer).
        right: Row of the nearest of its own class.
        right_score: Likewise.
        rank: Of `right`, at least 2.
    """

    query: int
    winners: tuple[int, ...]
    winner_scores: tuple[float, ...]
    right: int
    right_score: float
    rank: int


def worst_failures(
    figures: Evaluation,
    embeddings: npt.ArrayLike,
    *,
    gallery: npt.ArrayLike | None = None,
    most: int = _SHOWN,
) -> list[Failure]:
    """The queries whose first right answer stands last, the worst first; none: an empty list.

    Equal ranks stand by average precision, then by row. Queries without a match cannot fail.

    Args:
        figures: What `evaluate` said about these embeddings and this gallery.
        embeddings: ``(N, D)``.
        gallery: ``(N,)`` bool, the rows that can be found; None is all.
        most: How many, at least 1.

    Cost: O(most N D) time; the order is that of `query_results`, equal scores by gallery row.
    """
    results = figures.results
    failed = _failed(figures)
    order = np.lexsort((failed, results.average_precision[failed], -results.first[failed]))
    chosen = failed[order][:most]
    if not len(chosen):
        return []
    codes = np.unique(np.array(figures.labels, dtype=str), return_inverse=True)[1]
    space = Space(embeddings, _mask(gallery), figures.metric)
    found: list[Failure] = []
    for start in range(0, len(chosen), _AT_ONCE):
        rows = results.rows[chosen[start : start + _AT_ONCE]]
        for query, costs in zip(rows.tolist(), space.costs(rows), strict=True):
            ranked = np.argsort(costs, kind="stable")
            right = int(np.flatnonzero(codes[space.gallery[ranked]] == codes[query])[0])
            shown = ranked[[*range(min(right, _WINNERS)), right]]
            *winners, best = space.gallery[shown].tolist()
            *winner_scores, best_score = _scores(costs[shown], space)
            found.append(
                Failure(query, tuple(winners), tuple(winner_scores), best, best_score, right + 1)
            )
    return found


def failures_page(
    figures: Evaluation,
    embeddings: npt.ArrayLike,
    *,
    files: Sequence[Path],
    names: Sequence[str],
    gallery: npt.ArrayLike | None = None,
    title: str,
) -> str:
    """The page, as text to be written in UTF-8: which classes are confused, and the worst queries.

    Args:
        figures: What `evaluate` said about these embeddings and this gallery.
        embeddings: ``(N, D)``.
        files: ``(N,)`` the pictures; one that is gone becomes a placeholder.
        names: ``(N,)`` what to write under them.
        gallery: ``(N,)`` bool, the rows that can be found; None is all.
        title: Of the page.

    Cost: one search for the failed queries; up to 200 scaled decodes, about 6 KB a picture.
    """
    metrics = figures.metrics
    failed = _failed(figures)
    asked = metrics.queries - metrics.lone_queries
    lone = f"; {metrics.lone_queries:,} more have no match to find" if metrics.lone_queries else ""
    subtitle = (
        f"{asked:,} queries{lone}. The nearest is right for {asked - len(failed):,}, "
        f"wrong for {len(failed):,}."
    )
    if not len(failed):
        said = "No query failed." if asked else "No query has a match to find."
        return page(title, subtitle, f'<p class="lead">{said}</p>')
    worst = worst_failures(figures, embeddings, gallery=gallery)
    thumbnails = Thumbnails()
    cards = "".join(_card(one, figures, files, names, thumbnails) for one in worst)
    score = "distance (lower is nearer)" if figures.metric == "l2" else "cosine (higher is nearer)"
    shown = "All" if len(worst) == len(failed) else f"{len(worst):,} of {len(failed):,}"
    lead = (
        f"{shown}, the worst first: by the rank of the nearest right answer. Beside a query, in "
        f"red, what came first; in green, the nearest of its own class. Numbers: rank and {score}."
    )
    body = (
        f"{_confusions(figures, embeddings, gallery, failed)}<h2>Worst queries</h2>"
        f'<p class="lead">{lead}</p><div class="stack">{cards}</div>'
    )
    return page(title, subtitle, body)


def _failed(figures: Evaluation) -> Indices:
    """Places among the queries of those that have a match, and it is not first."""
    results = figures.results
    return np.flatnonzero((results.matches > 0) & (results.first > 1))


def _mask(gallery: npt.ArrayLike | None) -> npt.NDArray[np.bool_] | None:
    return None if gallery is None else np.asarray(gallery, np.bool_)


def _scores(costs: npt.NDArray[np.floating], space: Space) -> list[float]:
    if space.metric == "l2":
        return [float(cost) ** 0.5 * space.unit for cost in np.maximum(costs, 0)]
    return [-float(cost) for cost in costs]


def _confusions(
    figures: Evaluation,
    embeddings: npt.ArrayLike,
    gallery: npt.ArrayLike | None,
    failed: Indices,
) -> str:
    """Which class is taken for which, the most frequent first."""
    space = Space(embeddings, _mask(gallery), figures.metric)
    rows = figures.results.rows[failed]
    pairs: Counter[tuple[str, str]] = Counter()
    for ranked in rankings(space, rows, 1, 1024):
        asked = rows[ranked.start : ranked.start + len(ranked.order)]
        for query, winner in zip(asked, space.gallery[ranked.order[:, 0]], strict=True):
            pairs[figures.labels[query], figures.labels[winner]] += 1
    common = sorted(pairs.items(), key=lambda pair: (-pair[1], pair[0]))
    shown = [(label, other, f"{count:,}") for (label, other), count in common[:_CONFUSIONS]]
    said = f"{len(pairs):,} pairs of classes"
    if len(pairs) > _CONFUSIONS:
        of_them = sum(count for _, count in common[:_CONFUSIONS])
        said += f"; these {_CONFUSIONS} are {of_them:,} of the answers"
    numbers = table(("class", "taken for", "queries"), shown)
    return (
        f'<h2>What is taken for what</h2><p class="lead">{len(rows):,} wrong answers, '
        f'{said}.</p><section class="card">{numbers}</section>'
    )


def _card(
    one: Failure,
    figures: Evaluation,
    files: Sequence[Path],
    names: Sequence[str],
    thumbnails: Thumbnails,
) -> str:
    def hit(row: int, rank: int, score: float, verdict: str) -> str:
        sign, said = ("&#10003;", "same class") if verdict == "right" else ("&#10007;", "wrong")
        label = figures.labels[row]
        return (
            f'<li class="{verdict}"><figure><div class="frame">'
            f"{thumbnails.image(files[row], label)}"
            f'<span class="mark" role="img" aria-label="{said}">{sign}</span></div>'
            f"<figcaption>{rank:,}. {text(label)} "
            f'<span class="soft">{score:.4f} {path_text(names[row])}</span></figcaption>'
            "</figure></li>"
        )

    label = figures.labels[one.query]
    hits = [
        hit(row, rank, score, "wrong")
        for rank, (row, score) in enumerate(
            zip(one.winners, one.winner_scores, strict=True), start=1
        )
    ]
    hits.append(hit(one.right, one.rank, one.right_score, "right"))
    return (
        '<section class="card row"><figure><div class="frame">'
        f"{thumbnails.image(files[one.query], f'Query: {label}')}</div>"
        f'<figcaption class="small"><h3>{text(label)}</h3>'
        f'<span class="soft">{path_text(names[one.query])}</span></figcaption></figure>'
        f'<ol class="pictures" aria-label="Nearest first">{"".join(hits)}</ol></section>'
    )
