"""Embed on a Ray cluster: the same sources, journal and file, other machines' cores.

Ray Data carries pictures to actors that each hold one `Embedder`, and vectors back. Counting,
resuming and writing stay where they were, in the process that asked. Below some hundred thousand
pictures, or on one machine, starting Ray costs more than it brings; `--shard` needs none of it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import EmbedKitError, ImageError, MissingExtraError
from embedkit.runtime import Embedder
from embedkit.runtime.pipeline import Row
from embedkit.scale.embed import Engine, local_engine
from embedkit.scale.find import find_sources
from embedkit.scale.remote import is_address
from embedkit.scale.source import Source

__all__ = ["ray_engine"]

# Handed to Ray together: it lists what it is given in this process, and ends each with a barrier.
_CHUNK = 8192


def ray_engine(
    address: str,
    model: Path,
    *,
    device: str = "auto",
    backend: str = "auto",
    dim: int | None = None,
    batch: int = 32,
    workers: int | None = None,
) -> Engine:
    """An engine for `embed_sources` that works on a Ray cluster.

    Every machine reads the pictures and the model by the same paths or addresses. A picture in a
    tar is sent along.

    Args:
        address: Of the cluster; ``auto`` takes the one this machine belongs to, else ``local``,
            which starts one here.
        model: As every machine sees it.
        device: As for `Embedder.load`; with ``cuda`` each actor takes one GPU.
        backend: As for `Embedder.load`.
        dim: As for `Embedder.load`.
        batch: Pictures per run of the model.
        workers: Actors; None: one per CPU of the cluster, or per GPU.

    Raises:
        MissingExtraError: Ray is not installed.
        EmbedKitError: There is no cluster at the address.
    """
    ray = _connected(address)
    gpus = int(device.startswith("cuda"))
    resources = ray.cluster_resources()
    actors = workers or max(1, int(resources.get("GPU" if gpus else "CPU", 1)))

    def engine(sources: Iterable[Source]) -> Generator[tuple[Source, Row | ImageError], None, None]:
        waiting = iter(sources)
        while chunk := list(islice(waiting, _CHUNK)):
            for source in chunk:
                if isinstance(source.content, ImageError):
                    yield source, source.content
            chunk = [one for one in chunk if not isinstance(one.content, ImageError)]
            rows = [_sent(number, source) for number, source in enumerate(chunk)]
            dataset = ray.data.from_items(rows).map_batches(
                _Actor,
                fn_constructor_args=(str(model.absolute()), device, backend, dim, batch),
                batch_size=batch,
                compute=ray.data.ActorPoolStrategy(size=actors),
                num_cpus=1,
                num_gpus=gpus,
            )
            missing = set(range(len(chunk)))
            for row in dataset.iter_rows():
                missing.discard(row["number"])
                yield chunk[row["number"]], _received(row)
            if missing:
                raise EmbedKitError(
                    f"Ray lost {len(missing):,} of {len(chunk):,} pictures",
                    hint="run the same command again to go on",
                )

    return engine


class _Actor:
    """One model on one core or GPU of the cluster."""

    def __init__(self, model: str, device: str, backend: str, dim: int | None, batch: int) -> None:
        self._embedder = Embedder.load(model, device=device, backend=backend, threads=1, dim=dim)
        self._engine = local_engine(self._embedder, batch=batch, workers=1)

    def __call__(self, rows: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        columns = (rows["where"], rows["data"], rows["held"])
        sources = [_source(*row) for row in zip(*columns, strict=True)]
        vectors = np.zeros((len(sources), self._embedder.embedding_dim), np.float32)
        codes, reasons = [""] * len(sources), [""] * len(sources)
        for at, (_, result) in enumerate(self._engine(sources)):
            if isinstance(result, ImageError):
                codes[at], reasons[at] = result.code, result.reason
            else:
                vectors[at] = result
        return {
            "number": rows["number"],
            "vector": vectors,
            "code": np.array(codes, object),
            "reason": np.array(reasons, object),
        }


def _sent(number: int, source: Source) -> dict[str, Any]:
    """A source as a row that another machine can read."""
    content = source.content
    where = os.fsencode(content.absolute() if isinstance(content, Path) else source.path)
    data = content if isinstance(content, bytes) else b""
    return {"number": number, "where": where, "data": data, "held": isinstance(content, bytes)}


def _source(where: bytes, data: bytes, held: bool) -> Source:
    """What `_sent` meant, on the machine that got it."""
    path = os.fsdecode(where)
    if held:
        return Source(path, "", "", bytes(data))
    if is_address(path):
        # What may be fetched was decided where the address was given.
        return next(find_sources(["-"], listed=[path], web=True))
    return Source(path, "", "", Path(path))


def _received(row: dict[str, Any]) -> Row | ImageError:
    if row["code"]:
        return ImageError(row["code"], row["reason"])
    return np.asarray(row["vector"], np.float32)


def _connected(address: str) -> Any:
    """Ray, connected and quiet: no dashboard, no statistics sent anywhere."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise MissingExtraError("--ray", package="ray", extra="ray") from error
    quiet = {"log_to_driver": False, "logging_level": "error", "include_dashboard": False}
    if not ray.is_initialized():
        try:
            _init(ray, address, quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise EmbedKitError(
                f"there is no Ray cluster at {address!r}",
                facts=str(error).splitlines()[0],
                hint="--ray local starts one on this machine",
            ) from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # this program has a voice of its own
    return ray


def _init(ray: Any, address: str, quiet: dict[str, Any]) -> None:
    # Only a cluster that is started here takes a wish about its dashboard.
    joining = {name: value for name, value in quiet.items() if name != "include_dashboard"}
    if address == "local":
        ray.init(address="local", **quiet)
        return
    try:
        ray.init(address=address, **joining)
    except ConnectionError:
        if address != "auto":
            raise
        ray.init(address="local", **quiet)
