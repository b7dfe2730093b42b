"""The HTTP API under /v1, and the page that uses it.

Every answer that is no success is a `ProblemDocument`. Nothing is fetched from anywhere, and no
file is named by a client: pictures are asked for by their number in the catalog.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from embedkit import __version__
from embedkit.errors import EmbedKitError, ImageError, MismatchError, UsageError
from embedkit.imaging import Limits
from embedkit.index import Catalog, Hit
from embedkit.runtime import Embedder
from embedkit.serve.answers import (
    Answer,
    Embedding,
    Found,
    Health,
    IndexInfo,
    Info,
    Label,
    Labels,
    LimitsInfo,
    ModelInfo,
    Picture,
    Pictures,
    ProblemDocument,
    ThresholdsInfo,
    VectorQuery,
)
from embedkit.serve.api_page import api_page
from embedkit.serve.batching import Batcher
from embedkit.serve.finder import WHOLE, Box, Finder, Vector
from embedkit.serve.guard import Guard, Rules, problem
from embedkit.serve.metrics import Measured, Metrics
from embedkit.serve.thumbnails import LARGE, SMALL, Thumbnails

__all__ = ["MAX_K", "Settings", "create_app"]

MAX_K = 200
_MAX_ID = 2**63 - 1
_T = TypeVar("_T")


@dataclass(frozen=True)
class Settings:
    """How a catalog is served.

    Attributes:
        rules: Who may ask, and for how much.
        max_pixels: Of an uploaded picture.
        max_batch: Pictures in one run of the model.
        max_wait: Seconds the first of them waits for others that are on their way.
        thumbnails: The folder that keeps them; None: the user's cache folder.
    """

    rules: Rules = field(default_factory=Rules)
    max_pixels: int = Limits.max_pixels
    max_batch: int = 16
    max_wait: float = 0.004
    thumbnails: Path | None = None


class Size(StrEnum):
    small = "small"
    large = "large"


# --- what a request says -------------------------------------------------------------------------

_Count = Annotated[int, Query(ge=1, le=MAX_K, description="How many hits.")]
_Labels = Annotated[
    list[str] | None,
    Query(max_length=100, description="Only pictures with one of these labels."),
]
_Region = Annotated[
    str | None,
    Query(
        pattern=r"^(0|1|[01]?\.[0-9]{1,9})(,(0|1|[01]?\.[0-9]{1,9})){3}$",
        description="left,top,right,bottom of a region in shares of the upright picture, each "
        "from 0 to 1: only that is looked at.",
    ),
]
_Number = Annotated[int, InPath(ge=0, le=_MAX_ID, description="Its id, as hits carry it.")]

_UPLOAD: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "The picture's file, as it is: JPEG, PNG, WebP, AVIF, GIF, BMP, TIFF, ...",
        "content": {
            kind: {"schema": {"type": "string", "format": "binary"}}
            for kind in ("image/*", "application/octet-stream")
        },
    }
}


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """How these statuses are described."""
    return {
        status: {"model": ProblemDocument, "description": _STATUSES[status]} for status in statuses
    }


_STATUSES = {
    401: "The server asks for a token.",
    404: "There is no such picture.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is said to be something else than a picture.",
    421: "The server does not go by that name.",
    422: "It cannot be understood, or is no usable picture.",
    503: "There is as much work as it can take; ask again after `Retry-After`.",
}


def create_app(catalog: Catalog, embedder: Embedder, settings: Settings | None = None) -> ASGIApp:
    """The whole application, ready for any ASGI server.

    Its threads end with its lifespan; `catalog` and `embedder` stay open and must outlive it.

    Raises:
        MismatchError: The model's thresholds are damaged.
    """
    settings = settings or Settings()
    service = _Service(catalog, embedder, settings)
    rules = settings.rules

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    api = FastAPI(
        title="embedkit",
        version=__version__,
        summary=f"Pictures like this one, among the {len(catalog):,} of {catalog.path.name}.",
        description="Errors are documents `{error: {code, what, facts, hint}}`. With a token, send "
        "`Authorization: Bearer TOKEN`. Nothing here fetches a URL.",
        openapi_url="/v1/openapi.json",
        docs_url=None,  # these would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    api.include_router(_routes(service))
    api.include_router(_page_routes(api))
    api.add_exception_handler(EmbedKitError, _explain)
    api.add_exception_handler(RequestValidationError, _misunderstood)
    api.add_exception_handler(HTTPException, _plain)
    api.add_exception_handler(Exception, _unforeseen)
    return Measured(Guard(api, rules), service.metrics)


class _Service:
    """The work behind the routes: decoding and searching in threads, the model in batches."""

    def __init__(self, catalog: Catalog, embedder: Embedder, settings: Settings) -> None:
        self.settings = settings
        self.device = embedder.device
        limits = Limits(
            max_bytes=max(settings.rules.max_bytes, Limits.max_bytes),
            max_pixels=settings.max_pixels,
        )
        self.finder = Finder(catalog, embedder.contract, limits=limits)
        self.metrics = Metrics(inside=lambda: settings.rules.work.inside, pictures=len(catalog))
        self.thumbnails = Thumbnails(settings.thumbnails)
        self._batcher = Batcher(
            embedder.embed_pixels,
            max_batch=settings.max_batch,
            max_wait=settings.max_wait,
            coming=lambda: settings.rules.work.inside,
            on_batch=self.metrics.batches.observe,
        )
        # Small pictures have threads of their own: a page full of them must hold up no search.
        self._work = ThreadPoolExecutor(os.cpu_count() or 2, "embedkit-work")
        self._pictures = ThreadPoolExecutor(2, "embedkit-pictures")
        self._opened = _stamp(catalog.path)

    async def embed(self, source: bytes | Path, box: Box) -> Vector:
        pixels = await self.run(self.finder.pixels, source, box)
        return await asyncio.wrap_future(self._batcher.submit(pixels))

    async def run(self, work: Callable[..., _T], *arguments: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._work, work, *arguments)

    async def jpeg(self, file: Path, side: int) -> bytes:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pictures, self.thumbnails.jpeg, file, side)

    async def answer(
        self, vector: Vector, k: int, labels: list[str], *, began: float, query: int | None = None
    ) -> Answer:
        find = partial(self.finder.search, vector, k, labels=labels, without=query)
        hits = await self.run(find)
        return Answer(
            query=None if query is None else self.picture(self.finder.catalog.hit(query)),
            verdict=self.finder.verdict(hits[0].score if hits else -math.inf),
            hits=[self.found(hit) for hit in hits],
            elapsed_ms=round(1000 * (time.monotonic() - began), 1),
        )

    def found(self, hit: Hit) -> Found:
        return Found(
            rank=hit.rank,
            score=round(hit.score, 6),
            verdict=self.finder.verdict(hit.score),
            **self.picture(hit).model_dump(),
        )

    def picture(self, hit: Hit) -> Picture:
        return Picture(id=hit.id, path=self.finder.name(hit), label=self.finder.label(hit))

    def position(self, number: int) -> int:
        position = self.finder.position(number)
        if position is None:
            raise _NotFoundError(f"there is no picture {number} in this catalog")
        return position

    def changed(self) -> bool:
        return _stamp(self.finder.catalog.path) != self._opened

    def close(self) -> None:
        """End the threads; what they have begun is finished."""
        self._work.shutdown()
        self._pictures.shutdown()
        self._batcher.close()
        self.thumbnails.close()


def _routes(service: _Service) -> APIRouter:
    finder = service.finder
    # What the guard gives to any request.
    router = APIRouter(prefix="/v1", responses=_problems(401, 408, 413, 421))

    @router.post(
        "/search",
        summary="Search by an uploaded picture",
        responses=_problems(415, 422, 503),
        openapi_extra=_UPLOAD,
        tags=["search"],
    )
    async def search_upload(
        request: Request, k: _Count = 10, label: _Labels = None, box: _Region = None
    ) -> Answer:
        began = time.monotonic()
        vector = await service.embed(await _upload(request), _box(box))
        return await service.answer(vector, k, label or [], began=began)

    @router.get(
        "/search",
        summary="Search by a picture of the catalog",
        description="By its `id`, or by its `path` as hits carry it. It is not among its "
        "own hits. With `box` its file is read and embedded; without, its stored vector is used.",
        responses=_problems(404, 422, 503),
        tags=["search"],
    )
    async def search_known(
        id: Annotated[int | None, Query(ge=0, le=_MAX_ID, description="Of the picture.")] = None,
        path: Annotated[str | None, Query(max_length=4096, description="Or its path.")] = None,
        k: _Count = 10,
        label: _Labels = None,
        box: _Region = None,
    ) -> Answer:
        began = time.monotonic()
        if (id is None) == (path is None):
            raise UsageError("name a picture of the catalog by its id or by its path", hint="?id=0")
        if path is not None:
            position = await service.run(finder.position_named, path)
            if position is None:
                raise _NotFoundError("there is no picture of that path in this catalog")
        else:
            position = service.position(id or 0)
        region = _box(box)
        if region == WHOLE:
            vector = await service.run(finder.vector, position)
        else:
            try:
                vector = await service.embed(finder.file(position), region)
            except ImageError as error:
                raise _NotFoundError("the picture cannot be read", facts=error.reason) from error
        return await service.answer(vector, k, label or [], began=began, query=position)

    @router.post(
        "/search/vector",
        summary="Search by a vector",
        responses=_problems(422, 503),
        tags=["search"],
    )
    async def search_vector(query: VectorQuery, k: _Count = 10, label: _Labels = None) -> Answer:
        began = time.monotonic()
        return await service.answer(finder.usable(query.vector), k, label or [], began=began)

    @router.post(
        "/embed",
        summary="The vector of an uploaded picture",
        responses=_problems(415, 422, 503),
        openapi_extra=_UPLOAD,
        tags=["search"],
    )
    async def embed(request: Request, box: _Region = None) -> Embedding:
        vector = await service.embed(await _upload(request), _box(box))
        return Embedding(
            vector=vector.tolist(),
            metric=finder.contract.metric,
            fingerprint=finder.contract.fingerprint,
        )

    @router.get(
        "/pictures",
        summary="Some pictures, evenly spread over the catalog",
        responses=_problems(422),
        tags=["catalog"],
    )
    async def pictures(
        count: Annotated[int, Query(ge=1, le=MAX_K, description="How many pictures.")] = 24,
    ) -> Pictures:
        total = len(finder.catalog)
        places = [at * total // count for at in range(count)] if total > count else range(total)
        chosen = [service.picture(finder.catalog.hit(at)) for at in places]
        return Pictures(total=total, pictures=chosen)

    @router.get(
        "/pictures/{id}",
        summary="Who a picture is",
        responses=_problems(404, 422, 503),
        tags=["catalog"],
    )
    async def picture(id: _Number) -> Picture:
        return service.picture(finder.catalog.hit(service.position(id)))

    @router.get(
        "/pictures/{id}/image",
        summary="A picture, made smaller",
        description=f"A JPEG whose longer side has at most {SMALL} (small) or {LARGE} (large) "
        "pixels, upright, without metadata. The file itself is never sent.",
        response_class=Response,
        responses={
            200: {
                "description": "The picture.",
                "content": {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}},
            },
            **_problems(404, 422, 503),
        },
        tags=["catalog"],
    )
    async def image(id: _Number, size: Size = Size.small) -> Response:
        position = service.position(id)
        try:
            data = await service.jpeg(finder.file(position), SMALL if size is Size.small else LARGE)
        except ImageError as error:
            raise _NotFoundError(f"picture {id} cannot be shown", facts=error.reason) from error
        headers = {"cache-control": "private, max-age=300"}
        return Response(data, media_type="image/jpeg", headers=headers)

    @router.get(
        "/labels",
        summary="The labels, and how many pictures have each",
        responses=_problems(422),
        tags=["catalog"],
    )
    async def labels(
        contains: Annotated[str, Query(max_length=200, description="Only those with it.")] = "",
        limit: Annotated[int, Query(ge=1, le=1000, description="How many labels.")] = 200,
    ) -> Labels:
        part = contains.casefold()
        found = [name for name in finder.labels if part in name.casefold()]
        shown = [Label(label=name, count=finder.labels[name]) for name in found[:limit]]
        return Labels(total=len(found), labels=shown)

    @router.get("/info", summary="What is served", tags=["server"])
    async def info() -> Info:
        return _info(service)

    @router.get("/health", summary="Whether the server answers; asks for no token", tags=["server"])
    async def health() -> Health:
        return Health(status="ok")

    @router.get(
        "/metrics",
        summary="Figures for Prometheus",
        response_class=Response,
        responses={200: {"description": "Prometheus text.", "content": {"text/plain": {}}}},
        tags=["server"],
    )
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return router


def _page_routes(api: FastAPI) -> APIRouter:
    """The page and its parts, read once, and the API's own page; no other name is known."""
    router = APIRouter(include_in_schema=False)
    folder = files("embedkit.serve") / "page"
    parts = {part.name: part.read_bytes() for part in folder.iterdir() if part.is_file()}
    fresh = {"cache-control": "no-cache"}

    @router.get("/")
    async def page() -> Response:
        return Response(parts["index.html"], media_type="text/html", headers=fresh)

    @router.get("/api")
    async def about(request: Request) -> Response:
        text = api_page(api.openapi(), str(request.base_url).rstrip("/"))
        return Response(text, media_type="text/html", headers=fresh)

    @router.get("/static/{name}")
    async def part(name: str) -> Response:
        kind = _KINDS.get(Path(name).suffix)
        if name not in parts or kind is None:
            raise HTTPException(404)
        return Response(parts[name], media_type=kind, headers=fresh)

    return router


_KINDS = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def _info(service: _Service) -> Info:
    finder, thresholds = service.finder, service.finder.thresholds
    catalog, contract = finder.catalog, finder.contract
    return Info(
        version=__version__,
        index=IndexInfo(
            name=catalog.path.name,
            count=len(catalog),
            dim=catalog.dim,
            metric=catalog.metric,
            labels=len(finder.labels),
            changed=service.changed(),
        ),
        model=ModelInfo(
            name=contract.name,
            fingerprint=contract.fingerprint,
            backbone=contract.backbone,
            precision=contract.precision,
            device=service.device,
        ),
        thresholds=None
        if thresholds is None
        else ThresholdsInfo(match=thresholds.match, unsure=thresholds.unsure),
        limits=LimitsInfo(
            max_bytes=service.settings.rules.max_bytes,
            max_pixels=service.settings.max_pixels,
            max_k=MAX_K,
        ),
    )


# --- requests and errors -------------------------------------------------------------------------


class _NotFoundError(EmbedKitError):
    """There is no such picture, or its file is gone."""


async def _upload(request: Request) -> bytes:
    """The body, which the guard has limited. What it is, its content says; but a form is none.

    A web page elsewhere can make a browser send forms and plain text here, and nothing else.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not kind.startswith("image/") and kind != "application/octet-stream":
        raise HTTPException(
            415,
            "send the picture's file itself: Content-Type image/jpeg, image/png, ... or "
            "application/octet-stream",
        )
    return await request.body()


def _box(text: str | None) -> Box:
    return Box(*map(float, text.split(","))) if text else WHOLE


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


async def _explain(_: Request, error: Exception) -> Response:
    """An error of embedkit's own."""
    known = error if isinstance(error, EmbedKitError) else EmbedKitError(str(error))
    status, code = 500, "failed"
    if isinstance(error, _NotFoundError):
        status, code = 404, "not-found"
    elif isinstance(error, ImageError):
        status, code = 422, error.code
    elif isinstance(error, UsageError | MismatchError):
        status, code = 422, "not-understood"
    return JSONResponse(
        problem(code, known.what, facts=known.facts, hint=known.hint), status_code=status
    )


async def _misunderstood(_: Request, error: Exception) -> Response:
    """The request does not fit the description."""
    found = error.errors() if isinstance(error, RequestValidationError) else []
    facts = "\n".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in found[:10])
    return JSONResponse(
        problem(
            "not-understood",
            "the request cannot be understood",
            facts=facts.encode("utf-8", "backslashreplace").decode()[:2000],
            hint="see /v1/openapi.json",
        ),
        status_code=422,
    )


async def _plain(_: Request, error: Exception) -> Response:
    """No such address, or not this way."""
    if not isinstance(error, HTTPException):
        raise error
    code = {404: "not-found", 405: "wrong-method", 415: "wrong-type"}.get(
        error.status_code, "not-understood"
    )
    return JSONResponse(
        problem(code, str(error.detail), hint="see /v1/openapi.json"),
        status_code=error.status_code,
        headers=dict(error.headers or {}),
    )


async def _unforeseen(_: Request, error: Exception) -> Response:
    """A fault of embedkit: the server's log has the trace, the client learns nothing of it."""
    return JSONResponse(
        problem("failed", "the server failed; this is a fault of embedkit"), status_code=500
    )
