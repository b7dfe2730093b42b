"""`embedkit verify a.jpg b.jpg`"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedkit.cli.display import AsJson, Display, Quiet, Verbose
from embedkit.cli.search import default_index
from embedkit.errors import DataError, UsageError

if TYPE_CHECKING:
    from embedkit.runtime import Embedder

__all__ = ["verify"]


def verify(
    a: Annotated[Path, typer.Argument(metavar="A", help="A picture.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    model: Annotated[
        Path | None, typer.Option(metavar="FILE", help="An exported model (runs/last).")
    ] = None,
    index: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Take the model of this index.")
    ] = None,
    min_score: Annotated[
        float | None,
        typer.Option(metavar="SCORE", help="The same from here up, whatever the model says."),
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="auto, cpu, cuda or cuda:N.")
    ] = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Do A and B show the same thing? Exit 0: yes. Exit 1: no, or not sure.

    Yes: at most 1 in 1,000 pairs of different things score so high, unsure: 1 in
    100, on the classes held out when the model was made. No picture: exit 2.

    Example: embedkit verify a.jpg b.jpg --model model.onnx && echo the same
    """
    from embedkit.index.threshold import MATCH, NONE, Thresholds

    display = Display(as_json=as_json, quiet=quiet)
    with _embedder(model, index, device) as embedder:
        contract = embedder.contract
        thresholds = Thresholds.for_pairs(contract)
        if thresholds is None and min_score is None:
            raise UsageError(
                f"the model {contract.name!r} carries no thresholds",
                facts="embedkit export sets them where the held-out photos make 1,000 different "
                "pairs or more",
                hint="embedkit export RUN, or give a number: --min-score 0.6",
            )
        score = _score(embedder, a, b)
    if min_score is not None:
        verdict = MATCH if score >= min_score else NONE
        rule = f"{min_score:g} was asked"
    else:
        assert thresholds is not None
        verdict = thresholds.verdict(score)
        rule = f"match from {thresholds.match:.4f}, unsure from {thresholds.unsure:.4f}"
    display.answer(f"{verdict}  {score:.4f}  ({rule})")
    display.document(
        "verify",
        {
            "a": str(a),
            "b": str(b),
            "same": verdict == MATCH,
            "verdict": verdict,
            "score": round(score, 6),
            "min_score": min_score,
            "thresholds": None
            if thresholds is None
            else {"match": thresholds.match, "unsure": thresholds.unsure},
            "model": {"name": contract.name, "fingerprint": contract.fingerprint},
        },
    )
    if verdict != MATCH:
        raise typer.Exit(1)


def _embedder(model: Path | None, index: Path | None, device: str) -> Embedder:
    """The model that was named, that of the index, the last run's, or that of the index here."""
    from embedkit.index import Catalog
    from embedkit.runtime import Embedder

    last = Path("runs/last/model.onnx")
    if index is None and model is None and not last.is_file():
        if not list(Path().glob("*.faiss")):
            raise UsageError(
                "which model?",
                facts="there is none in runs/last, and no index here",
                hint="--model FILE, or --index FILE",
            )
        index = default_index()
    if index is not None:
        return Catalog.open(index).embedder(model, device=device)
    return Embedder.load(model or last, device=device)


def _score(embedder: Embedder, a: Path, b: Path) -> float:
    """As a search would score them: the cosine, or minus the distance."""
    import numpy as np

    rows: list[Any] = []
    with closing(embedder.embed_files([a, b])) as results:
        for one in results:
            if one.error is not None:
                raise DataError(
                    f"{one.path} is no picture to compare",
                    facts=one.error.reason,
                    hint="embedkit verify PICTURE PICTURE",
                )
            rows.append(np.asarray(one.vector, np.float64))
    if embedder.contract.metric == "l2":
        return float(np.float32(-np.linalg.norm(rows[0] - rows[1])))
    return float(np.float32(rows[0] @ rows[1]))
