"""Many small thumbnails in few pictures, within a number of bytes: sprite sheets."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from embedkit.errors import ImageError
from embedkit.imaging import decode

__all__ = ["Sprites", "make_sprites"]

# Side of a thumbnail, and what one takes as JPEG of quality 60 in base64: generous, from photos.
_SIZES = ((96, 2600), (64, 1300), (48, 800), (32, 400))
_QUALITIES = (75, 60, 45)
_SHEET = 1024  # pixels of a sheet's side
_GROUND = (236, 236, 231)


@dataclass(frozen=True)
class Sprites:
    """Thumbnails of N pictures.

    Attributes:
        side: Pixels of a square thumbnail; 0 where there are none.
        columns: Thumbnails in a row of a sheet; a sheet has as many rows.
        sheets: JPEGs.
        places: ``(N,)`` the thumbnail of each picture, counted through the sheets row by row; -1
            has none.
        failed: Position and error of the pictures that cannot be shown.
    """

    side: int
    columns: int
    sheets: tuple[bytes, ...]
    places: npt.NDArray[np.int32]
    failed: tuple[tuple[int, ImageError], ...]


def make_sprites(
    files: Sequence[Path | None],
    budget: int,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Sprites:
    """Thumbnails as large as the budget lets them be: 96, 64, 48 or 32 pixels.

    Where even the smallest are too many, evenly chosen pictures have one.

    Args:
        files: The pictures; None has no file and gets no thumbnail.
        budget: Most bytes of all sheets in base64; 0 gives no thumbnails and reads nothing.
        progress: Called with how many more are done, and how many of them failed.

    Cost: a scaled decode per picture, in a thread per core; memory about 10 times the budget.
    """
    places = np.full(len(files), -1, np.int32)
    known = [at for at, file in enumerate(files) if file is not None]
    side, each = next((size for size in _SIZES if len(known) * size[1] <= budget), _SIZES[-1])
    count = min(len(known), budget // each)
    if not count:
        return Sprites(0, 0, (), places, ())
    chosen = [known[at] for at in np.linspace(0, len(known) - 1, count).round().astype(int)]
    columns = min(_SHEET // side, math.ceil(math.sqrt(count)))
    pages: list[Image.Image] = []
    failed: list[tuple[int, ImageError]] = []
    made = 0
    pool = ThreadPoolExecutor(os.process_cpu_count() if hasattr(os, "process_cpu_count") else None)
    try:
        for at, cell in zip(
            chosen, pool.map(lambda at: _cell(files[at], side), chosen), strict=True
        ):
            if isinstance(cell, ImageError):
                failed.append((at, cell))
            else:
                page, inside = divmod(made, columns * columns)
                if page == len(pages):
                    pages.append(Image.new("RGB", (columns * side, columns * side), _GROUND))
                row, column = divmod(inside, columns)
                pages[page].paste(cell, (column * side, row * side))
                places[at] = made
                made += 1
            if progress is not None:
                progress(1, int(isinstance(cell, ImageError)))
    finally:
        pool.shutdown(cancel_futures=True)
    sheets = _encoded(pages, budget)
    places[places >= len(sheets) * columns * columns] = -1
    return Sprites(side, columns, sheets, places, tuple(failed))


def _cell(file: Path | None, side: int) -> Image.Image | ImageError:
    """The picture, whole, in the middle of a square; or why it cannot be shown."""
    assert file is not None
    try:
        image = decode(file, shortest_side=side)
    except ImageError as error:
        return error
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    cell = Image.new("RGB", (side, side), _GROUND)
    cell.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return cell


def _encoded(pages: list[Image.Image], budget: int) -> tuple[bytes, ...]:
    """JPEGs of the best quality that fits; where none does, as many sheets as fit."""
    sheets: list[bytes] = []
    for quality in _QUALITIES:
        sheets = []
        for page in pages:
            out = io.BytesIO()
            page.save(out, "JPEG", quality=quality, optimize=True)
            sheets.append(out.getvalue())
        if _as_text(sheets) <= budget:
            return tuple(sheets)
    while sheets and _as_text(sheets) > budget:
        sheets.pop()
    return tuple(sheets)


def _as_text(sheets: list[bytes]) -> int:
    return sum(4 * math.ceil(len(sheet) / 3) for sheet in sheets)
