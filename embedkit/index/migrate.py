"""From one model to the next without a gap: a map lets the new model search what the old one made.

While everything is embedded again, vectors of the new model are carried into the space of the old
one by a matrix that was fitted on pictures embedded by both: the orthogonal one (Schönemann, "A
generalized solution of the orthogonal Procrustes problem", 1966) or ridge regression, whichever
keeps more neighbours on pictures it was not fitted on.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedkit.atomic import published
from embedkit.errors import MismatchError, UsageError
from embedkit.imaging.preprocess import Pixels
from embedkit.index.catalog import Catalog, Indices, Vectors
from embedkit.index.choose import Building, Wanted
from embedkit.index.learned import check_kind
from embedkit.index.store import Store, store_path, writer_lock
from embedkit.index.sync import Progress, SyncReport, sync_folder
from embedkit.runtime import Embedder
from embedkit.runtime.contract import ModelContract

__all__ = ["Bridge", "Losses", "bridge_path", "bridged", "fit_bridge", "migrate"]

_SCHEMA = "embedkit.bridge/1"
LEAST_PICTURES = 100
_NEIGHBOURS = 10
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class Losses:
    """What searching over the bridge costs, on pictures the map was neither fitted nor chosen on.

    Attributes:
        queries: So many of them.
        overlap: Share of the old model's ten neighbours that the new one finds over the bridge.
        before: recall@1 by labels of the old model; NaN where no query has a second of its label.
        bridge: Of the new model over the bridge.
        after: Of the new model in its own vectors: what will be when all is embedded again.
    """

    queries: int
    overlap: float
    before: float
    bridge: float
    after: float


@dataclass(frozen=True)
class Bridge:
    """A map from a new model's vectors into a catalog's.

    Attributes:
        old: Fingerprint of the model that made the catalog.
        new: Of the model that searches it.
        matrix: ``(D_new, D_old)``.
        kind: ``orthogonal`` or ``ridge``.
        losses: As measured.
    """

    old: str
    new: str
    matrix: Vectors
    kind: str
    losses: Losses

    def carry(self, vectors: Vectors) -> Vectors:
        """Unit rows ``(N, D_new)`` -> unit rows ``(N, D_old)``."""
        carried = vectors.astype(np.float64) @ self.matrix
        lengths = np.linalg.norm(carried, axis=1, keepdims=True)
        unit: Vectors = (carried / np.maximum(lengths, 1e-12)).astype(np.float32)
        return unit

    def save(self, path: Path) -> None:
        about = {
            "schema": _SCHEMA,
            "old": self.old,
            "new": self.new,
            "kind": self.kind,
            "losses": {
                name: None if value != value else value
                for name, value in asdict(self.losses).items()
            },
        }
        content = io.BytesIO()
        np.savez(content, matrix=self.matrix, about=np.array(json.dumps(about)))
        with published(path) as temporary:
            temporary.write_bytes(content.getvalue())

    @classmethod
    def load(cls, path: Path) -> Bridge:
        """Read one.

        Raises:
            MismatchError: It is damaged, or no bridge.
        """
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
                matrix, about = content["matrix"], json.loads(str(content["about"]))
            if about["schema"] != _SCHEMA or matrix.ndim != 2 or matrix.dtype != np.float32:
                raise ValueError(f"it is {about['schema']!r}, {matrix.dtype} {matrix.shape}")
            if not np.isfinite(matrix).all():
                raise ValueError("it has numbers that are not finite")
            said = about["losses"]
            figures = [
                float("nan") if said[name] is None else float(said[name])
                for name in ("overlap", "before", "bridge", "after")
            ]
            losses = Losses(int(said["queries"]), *figures)
            return cls(about["old"], about["new"], matrix, about["kind"], losses)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise MismatchError(
                f"{path} is no bridge between two models, or damaged",
                facts=str(error),
                hint=f"remove it, and run embedkit index migrate again: rm {path.name}",
            ) from error


def bridge_path(index: Path) -> Path:
    """Where the bridge into an index stands: beside it."""
    return index.with_name(index.name + ".bridge.npz")


def fit_bridge(
    old: Vectors, new: Vectors, labels: list[str], fingerprints: tuple[str, str], *, seed: int = 0
) -> Bridge:
    """Fit on 70 % of the pictures, choose the kind on 15 %, measure on the last 15 %.

    Args:
        old: ``(N, D_old)`` unit rows of the old model, N at least `LEAST_PICTURES`.
        new: ``(N, D_new)`` unit rows of the new model for the same pictures.
        labels: N; empty ones count for no recall.
        fingerprints: Of the old and of the new model.
        seed: Of the split.

    Cost: O(N (D_new + D_old)^2), and scores of 30 % of N against N.
    """
    order = np.random.default_rng(seed).permutation(len(old))
    fit, choose, measure = np.split(order, [int(0.7 * len(old)), int(0.85 * len(old))])
    x, y = new[fit].astype(np.float64), old[fit].astype(np.float64)
    left, _, right = np.linalg.svd(x.T @ y, full_matrices=False)
    maps = [("orthogonal", left @ right)]
    gram = x.T @ x
    for ridge in _RIDGES:
        weight = ridge * np.trace(gram) / len(gram)
        maps.append(("ridge", np.linalg.solve(gram + weight * np.eye(len(gram)), x.T @ y)))
    bridges = [
        Bridge(*fingerprints, matrix.astype(np.float32), kind, Losses(0, 0, 0, 0, 0))
        for kind, matrix in maps
    ]
    # The orthogonal one stands first: it wins where the others are no better.
    best = max(bridges, key=lambda one: _measured(one, old, new, labels, choose).overlap)
    return dataclasses.replace(best, losses=_measured(best, old, new, labels, measure))


def bridged(catalog: Catalog, embedder: Embedder) -> Embedder | None:
    """The new model as one that searches this catalog; None where no bridge leads there.

    Of a model of several widths the one that the bridge was fitted for is taken.
    It gives vectors of the catalog's width and carries no thresholds: they were set on its own
    vectors.

    Raises:
        MismatchError: There is a bridge, and it is damaged.
    """
    path = bridge_path(catalog.path)
    if not catalog.has_names or not path.exists():
        return None
    bridge = Bridge.load(path)
    if bridge.matrix.shape[0] in embedder.contract.widths:
        embedder = embedder.cut(bridge.matrix.shape[0])
    if (bridge.old, bridge.new) != (catalog.fingerprint, embedder.contract.fingerprint):
        return None
    if bridge.matrix.shape != (embedder.embedding_dim, catalog.dim):
        raise MismatchError(
            f"{path.name} does not fit its index",
            facts=f"it maps {bridge.matrix.shape}, not {(embedder.embedding_dim, catalog.dim)}",
            hint=f"remove it, and run embedkit index migrate again: rm {path.name}",
        )
    return Embedder(_OverBridge(embedder, bridge))


def migrate(
    index: Path,
    embedder: Embedder,
    *,
    model: Path,
    sample: int = 2000,
    batch: int = 32,
    workers: int | None = None,
    fitted: Callable[[Bridge | None], None] | None = None,
    progress: Progress | None = None,
    building: Building | None = None,
) -> SyncReport:
    """Bring an index from its model to another; until that is done it is searched by both.

    First the bridge is fitted and saved beside the index: from then on the new model searches it
    too. Then everything is embedded into a second index beside it, as `sync_folder` does it; killed
    or interrupted, the same call goes on. Then the second takes the place of the first, store
    before catalog, each by one rename: killed between the two, the old catalog still answers, and
    the same call, or the next sync with the new model, finishes.

    Args:
        index: A catalog with names, whose folder is there.
        embedder: The new model.
        model: Its file.
        sample: Pictures that both models embed to fit the bridge.
        batch: As for `sync_folder`.
        workers: As for `sync_folder`.
        fitted: Called with the `Bridge`; with None where the readable pictures are fewer than
            `LEAST_PICTURES` or one of the models compares by distance or gives several vectors per
            picture.
        progress: Called as pictures are embedded.
        building: Called as the index is built.

    Raises:
        UsageError: The catalog has no names, its folder is gone, or the model is its own already.
        MismatchError: The index is to keep a model's codes, and this one gives none.

    The other errors are those of `sync_folder`. Cost: the sample is embedded twice.
    """
    index = Path(os.path.realpath(index))
    catalog = Catalog.open(index)
    aside = index.with_name(index.name + ".next")
    new = embedder.contract.fingerprint
    if catalog.root is None or not catalog.root.is_dir():
        raise UsageError(
            f"the pictures of {index.name} are not there to be embedded again",
            facts=f"its folder is {catalog.root}" if catalog.root else "its names are gone",
            hint="put the folder back where it was",
        )
    if catalog.fingerprint == new:
        raise UsageError(
            f"{index.name} is of this model already",
            facts=f"fingerprint {new}",
            hint="--to with the new model's file",
        )
    if store_path(index).exists():
        with Store(store_path(index), read_only=True) as store:
            check_kind(Wanted.loads(store.wanted()).type, embedder.contract)

    def sync(target: Path) -> SyncReport:
        assert catalog.root is not None
        return sync_folder(
            catalog.root,
            target,
            embedder,
            model=model,
            batch=batch,
            workers=workers,
            progress=progress,
            building=building,
        )

    if _is_of(store_path(index), new):
        # Killed after the store had taken its place: the catalog follows from it.
        report = sync(index)
    else:
        bridge = _ready(catalog, new) or _fitted(catalog, embedder, sample, batch, workers)
        if bridge is not None:
            bridge.save(bridge_path(index))
        if fitted is not None:
            fitted(bridge)
        _take_over(store_path(index), store_path(aside))
        report = sync(aside)
        with writer_lock(index):
            # What was changed meanwhile, while nobody else can change the index any more.
            _take_over(store_path(index), store_path(aside))
            report = dataclasses.replace(report, count=sync(aside).count)
            store_path(aside).replace(store_path(index))
            aside.replace(index)
    for file in (aside, bridge_path(index)):
        file.unlink(missing_ok=True)
    return report


class _OverBridge:
    """A backend: the new model, its vectors carried into the catalog's space."""

    name = "bridge"

    def __init__(self, embedder: Embedder, bridge: Bridge) -> None:
        self._embedder = embedder
        self._bridge = bridge
        self.device = embedder.device
        self.contract: ModelContract = dataclasses.replace(
            embedder.contract,
            embedding_dim=bridge.matrix.shape[1],
            thresholds={},
            self_test=None,
            codebooks=None,
        )

    def run(self, pixels: Pixels) -> Vectors:
        return self._bridge.carry(self._embedder.embed_pixels(pixels))

    def close(self) -> None:
        self._embedder.close()


def _is_of(file: Path, fingerprint: str) -> bool:
    if not file.exists():
        return False
    with Store(file, read_only=True) as store:
        run = store.run()
    return run is not None and run.fingerprint == fingerprint


def _take_over(was: Path, file: Path) -> None:
    """What the user said about single files, and the kind of index, out of the old store.

    Opening and closing it also brings SQLite's log home, so that it can be replaced.
    """
    if not was.exists():
        return
    with Store(was) as store:
        choices, wanted = store.choices(), store.wanted()
    with Store(file) as store:
        known = store.choices()
        stale = {*known.added, *known.kept_out} - {*choices.added, *choices.kept_out}
        store.choose(neither=stale)
        store.take_choices(choices)
        if wanted:
            store.want(wanted)


def _ready(catalog: Catalog, new: str) -> Bridge | None:
    """The bridge of a call before this one."""
    path = bridge_path(catalog.path)
    if not path.exists():
        return None
    bridge = Bridge.load(path)
    return bridge if (bridge.old, bridge.new) == (catalog.fingerprint, new) else None


def _fitted(
    catalog: Catalog, embedder: Embedder, sample: int, batch: int, workers: int | None
) -> Bridge | None:
    """From a sample of the pictures, embedded with the new model too; None: it is too small."""
    if "l2" in (catalog.metric, embedder.contract.metric):
        return None
    if max(catalog.parts, embedder.contract.vectors) > 1:
        return None  # a linear map leads from one vector to one vector
    drawn = np.random.default_rng(0).permutation(len(catalog))[:sample]
    chosen = [catalog.hit(int(position)) for position in np.sort(drawn)]
    files = [hit.path for hit in chosen if hit.path is not None]
    kept: list[int] = []
    rows: list[Any] = []
    for number, one in enumerate(embedder.embed_files(files, batch=batch, workers=workers)):
        if one.error is None:
            kept.append(number)
            rows.append(one.vector)
    if len(kept) < LEAST_PICTURES:
        return None
    hits = [chosen[number] for number in kept]
    old = catalog.vectors(catalog.positions(hits))
    names = (catalog.fingerprint, embedder.contract.fingerprint)
    return fit_bridge(old, np.stack(rows), [hit.label for hit in hits], names)


def _measured(
    bridge: Bridge, old: Vectors, new: Vectors, labels: list[str], rows: Indices
) -> Losses:
    """`rows` ask all the others: by the old model, over the bridge, and by the new one."""
    own = np.arange(len(rows)), rows
    found = []
    for ask, find in (
        (old[rows], old),
        (bridge.carry(new[rows]), old),
        (new[rows], new),
    ):
        scores = ask.astype(np.float64) @ find.T
        scores[own] = -np.inf
        found.append(np.argsort(-scores, axis=1, kind="stable")[:, :_NEIGHBOURS])
    before, over, after = found
    shared = [
        len(set(a) & set(b)) / len(a) for a, b in zip(before.tolist(), over.tolist(), strict=True)
    ]
    names = np.array(labels)
    counts = {name: labels.count(name) for name in set(labels)}
    mated = np.array([labels[row] != "" and counts[labels[row]] > 1 for row in rows])

    def recall(found: Indices) -> float:
        right = names[found[:, 0]] == names[rows]
        return float(right[mated].mean()) if mated.any() else float("nan")

    return Losses(len(rows), float(np.mean(shared)), recall(before), recall(over), recall(after))
