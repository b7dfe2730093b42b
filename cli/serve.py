"""`embedkit serve --index catalog.faiss`"""

from __future__ import annotations

import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote

import typer

from embedkit.cli.display import AsJson, Display, Quiet, Verbose
from embedkit.cli.index import from_here
from embedkit.cli.search import default_index
from embedkit.cli.work import Backend, Device
from embedkit.errors import MissingExtraError, UsageError

if TYPE_CHECKING:
    from embedkit.serve import Rules

__all__ = ["serve"]

_ACCESS, _LIMITS, _WORK = "Who may ask", "Limits", "Work"
_PACKAGES = ("fastapi", "prometheus_client", "pydantic", "starlette", "uvicorn")
_MEGABYTE = 1_000_000


def serve(
    index: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Made by `embedkit index` (the only .faiss file here)."),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The index's model (found beside it, or where it was)."),
    ] = None,
    port: Annotated[
        int, typer.Option(metavar="NUMBER", min=0, max=65535, help="0 takes a free one.")
    ] = 8000,
    open: Annotated[bool, typer.Option("--open", help="Also open the page in a browser.")] = False,
    host: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            rich_help_panel=_ACCESS,
            help="Beyond this machine (0.0.0.0) only with a token.",
        ),
    ] = "127.0.0.1",
    token: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            envvar="EMBEDKIT_TOKEN",
            show_envvar=False,
            rich_help_panel=_ACCESS,
            help="What every request must carry (or in EMBEDKIT_TOKEN).",
        ),
    ] = None,
    max_upload: Annotated[
        int,
        typer.Option(metavar="MB", min=1, max=100, rich_help_panel=_LIMITS, help="Of a picture."),
    ] = 20,
    max_pixels: Annotated[
        int,
        typer.Option(
            metavar="MILLIONS", min=1, max=178, rich_help_panel=_LIMITS, help="Of a picture."
        ),
    ] = 64,
    queue: Annotated[
        int,
        typer.Option(
            metavar="COUNT",
            min=1,
            rich_help_panel=_LIMITS,
            help="Searches under way at once; more are told to come back.",
        ),
    ] = 64,
    batch: Annotated[
        int,
        typer.Option(
            metavar="COUNT", min=1, rich_help_panel=_WORK, help="Pictures in one run of the model."
        ),
    ] = 16,
    thumbnails: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            rich_help_panel=_WORK,
            help="Where small pictures are kept (the user's cache).",
        ),
    ] = None,
    device: Device = "auto",
    backend: Backend = "auto",
    mmap: Annotated[
        bool,
        typer.Option(
            "--mmap",
            rich_help_panel=_WORK,
            help="Map a large index instead of reading and verifying all of it.",
        ),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Serve an index: a page to search with, and an HTTP API.

    Ctrl-C finishes what has begun and ends with 0.

    Example: embedkit serve --index catalog.faiss --open
    """
    try:
        import embedkit.serve as server
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _PACKAGES:
            raise
        raise MissingExtraError("embedkit serve", package=package, extra="serve") from error
    from embedkit.index import Catalog

    display = Display(as_json=as_json, quiet=quiet)
    rules = _rules(host, token, max_upload, queue)
    if host not in server.LOOPBACK:
        display.warn(
            "the token and the pictures travel unencrypted: beyond your own network, put a proxy "
            "with TLS before it"
        )
    file = index or default_index()
    with server.listen(host, port) as listener:
        catalog = Catalog.open(file, mmap=mmap, verify=not mmap)
        if not catalog.has_names:
            display.warn(
                f"{catalog.path.name} was rewritten by another program: hits are numbers "
                "without names or pictures"
            )
        with catalog.embedder(model, device=device, backend=backend) as embedder:
            settings = server.Settings(
                rules=rules,
                max_pixels=max_pixels * 1_000_000,
                max_batch=batch,
                thumbnails=thumbnails,
            )
            app = server.create_app(catalog, embedder, settings)
            url = server.address(listener)
            page = f"{url}/?token={quote(token, safe='')}" if token else f"{url}/"

            def ready() -> None:
                display.note(
                    "index", f"{from_here(catalog.path)}: {len(catalog):,} pictures, by "
                    f"{embedder.contract.name} on {embedder.device}"
                )  # fmt: skip
                display.note("API", f"{url}/v1/openapi.json")
                display.note("stop", "Ctrl-C")
                display.answer(page)
                display.document(
                    "serve",
                    {
                        "url": url,
                        "page": page,
                        "index": from_here(catalog.path),
                        "count": len(catalog),
                        "model": embedder.contract.name,
                        "device": embedder.device,
                    },
                )
                sys.stdout.flush()
                if open:
                    webbrowser.open(page)

            def stopping() -> None:
                count = rules.work.inside
                noun = "request is" if count == 1 else "requests are"
                display.note("stopping", f"{count} {noun} being finished")

            server.serve(app, listener, on_ready=ready, on_stopping=stopping)


def _rules(host: str, token: str | None, megabytes: int, queue: int) -> Rules:
    """A server that others can reach asks for a token; one that asks for none has known names."""
    from embedkit.serve import LOOPBACK, Rules
    from embedkit.serve.batching import Gate

    if token is not None and (len(token) < 8 or not token.isascii() or not token.isprintable()):
        raise UsageError(
            "the token is too short to keep anyone out, or a header cannot carry it",
            facts="8 letters at least, of ASCII",
        )
    if token is None and host not in LOOPBACK:
        raise UsageError(
            f"without a token {host} is not served",
            facts="everyone who can reach this machine could look at the pictures",
            hint="EMBEDKIT_TOKEN=... embedkit serve --host " + host,
        )
    return Rules(
        token=token,
        hosts=LOOPBACK if token is None else None,
        max_bytes=megabytes * _MEGABYTE,
        work=Gate(queue),
    )
