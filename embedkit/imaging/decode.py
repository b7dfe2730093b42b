"""A file becomes an upright 8-bit RGB picture, or one `ImageError` that says why it is none.

Files come from cameras, shops and strangers. Pillow opens only the formats listed here (never EPS,
PDF, PSD or FITS, whose readers start programs or have a history of holes), limits are checked
before pixels are, and whatever goes wrong inside a decoder comes out as an `ImageError`.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
from PIL import ExifTags, Image, UnidentifiedImageError

from embedkit.errors import ImageError
from embedkit.floors import require
from embedkit.imaging.preprocess import Pixels, Preprocess

__all__ = ["Limits", "decode", "read_pixels"]

require("Pillow", PIL.__version__)

# "JPEG" brings MPO, several JPEGs in one file.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "ICO", "PPM", "AVIF")

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes it upright; 1 and nonsense are left alone."""


@dataclass(frozen=True)
class Limits:
    """How much one file may ask for.

    Attributes:
        max_bytes: Size of the file.
        max_pixels: Width times height, checked before any pixel is decoded. Pillow's own ceiling
            (twice ``PIL.Image.MAX_IMAGE_PIXELS``, 179 million) stays above it.
        max_scans: Passes of a progressive JPEG over its own picture. Encoders write 10; a file of
            400 KB with 200 of them costs 10 s of CPU, which no limit on pixels catches.
    """

    max_bytes: int = 100_000_000
    max_pixels: int = 64_000_000
    max_scans: int = 64


_DEFAULT_LIMITS = Limits()


def decode(
    source: Path | bytes | Image.Image,
    *,
    shortest_side: int | None = None,
    limits: Limits = _DEFAULT_LIMITS,
) -> Image.Image:
    """The picture, loaded, upright, mode RGB; the first one where a file holds several.

    EXIF and XMP orientation is applied; bad metadata is passed over. Transparent parts (alpha,
    palette or colour key) are shown over white. 16-bit grey is scaled, not clipped. Colour
    profiles are not applied. The format is told by content, never by the name.

    Args:
        source: A file, its bytes, or a picture that Pillow opened (which is not changed, only
            loaded, and may be returned itself).
        shortest_side: A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as its shortest
            side keeps this many pixels, at least 1. None decodes at full size.
        limits: What is refused.

    Raises:
        ImageError: It is no usable picture; nothing else comes out, whatever the bytes.

    Cost: the file's bytes and one or two copies of the decoded picture in memory. Threads may call
    this together: Pillow lets go of the interpreter while it decodes.
    """
    if shortest_side is not None and shortest_side < 1:
        raise ValueError(f"shortest_side must be at least 1, got {shortest_side}")
    if isinstance(source, Path):
        source = _read(source, limits)
    with _no_warnings():
        try:
            if isinstance(source, bytes):
                image = _open(source, shortest_side, limits)
            else:
                image = source
                _check_pixels(image.width, image.height, limits)
            image.load()
            return _to_rgb(_upright(image))
        except ImageError:
            raise
        except Exception as error:
            # Decoders answer to damage with anything: OSError, SyntaxError, struct.error,
            # SystemError, OverflowError, MemoryError...
            raise _explain(error, source) from error


def read_pixels(
    source: Path | bytes | Image.Image, preprocess: Preprocess, *, limits: Limits = _DEFAULT_LIMITS
) -> Pixels:
    """What the network sees of a file: ``(height, width, 3)`` uint8, read-only.

    Raises:
        ImageError: See `decode`.
    """
    image = decode(source, shortest_side=preprocess.decode_size(), limits=limits)
    return preprocess(image)


def _read(path: Path, limits: Limits) -> bytes:
    """A regular file's bytes; a pipe named like a picture must not block the run for ever."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ImageError("not-a-file", "it is not a regular file")
            # One byte more than allowed, because a file may grow while it is read.
            return file.read(limits.max_bytes + 1)
    except FileNotFoundError as error:
        what = "it is a link to nothing" if path.is_symlink() else "there is no such file"
        raise ImageError("unreadable", what) from error
    except IsADirectoryError as error:
        raise ImageError("not-a-file", "it is a folder") from error
    except (OSError, ValueError) as error:
        raise ImageError("unreadable", _one_line(error)) from error
    except MemoryError as error:
        raise ImageError("too-large", "there is not enough memory to read it") from error


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _open(data: bytes, shortest_side: int | None, limits: Limits) -> Image.Image:
    """The picture, opened and checked, its pixels not yet decoded."""
    if not data:
        raise ImageError("empty", "the file is empty")
    if len(data) > limits.max_bytes:
        raise ImageError("too-large", f"the file has more than {limits.max_bytes:,} bytes")
    if data.startswith(b"\xff\xd8"):
        _check_scans(data, limits)
    if data.startswith(b"\0\0\1\0"):
        _check_icon(data, limits)
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    _check_pixels(image.width, image.height, limits)
    if shortest_side is not None and image.format in ("JPEG", "MPO"):
        image.draft(None, (shortest_side, shortest_side))
    return image


def _check_pixels(width: int, height: int, limits: Limits) -> None:
    if width < 1 or height < 1:
        raise ImageError("empty", f"the picture has no pixels ({width} x {height})")
    if width * height > limits.max_pixels:
        raise ImageError(
            "too-large",
            f"{width} x {height} pixels are more than the limit of {limits.max_pixels:,}",
        )


def _check_scans(data: bytes, limits: Limits) -> None:
    # FF DA starts a scan; the 0 is the high byte of its header's length, which is at most 14.
    # Neither can stand inside coded pixels, so only a thumbnail or a second picture adds to it.
    scans = data.count(b"\xff\xda\0")
    if scans > limits.max_scans:
        raise ImageError(
            "too-many-scans", f"the JPEG has {scans} scans, the limit is {limits.max_scans}"
        )


def _check_icon(data: bytes, limits: Limits) -> None:
    """Pillow decodes an icon while it opens it, so the sizes inside are read here first."""
    (count,) = struct.unpack_from("<H", data, 4)
    for entry in range(count):
        (offset,) = struct.unpack_from("<I", data, 6 + 16 * entry + 12)
        if data.startswith(b"\x89PNG", offset):
            width, height = struct.unpack_from(">II", data, offset + 16)
        elif struct.unpack_from("<I", data, offset) == (12,):
            width, height = struct.unpack_from("<HH", data, offset + 4)
        else:
            width, height = struct.unpack_from("<Ii", data, offset + 4)
        _check_pixels(width, abs(height), limits)


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its metadata asks; TIFF files were turned by Pillow when they were loaded."""
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        # Damaged metadata says nothing about the pixels, which are fine; as in every viewer, the
        # picture is then shown as it is stored.
        return image
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return _from_16_bit(image)
    if image.mode in ("I", "F"):
        raise ImageError(
            "unsupported", "its pixels are 32-bit numbers, which do not say what is black or white"
        )
    if image.has_transparency_data:
        return _over_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 bits by a table; Pillow's own conversion clips everything above 255 to white."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(ExifTags.Base.BitsPerSample, (16,))[0]
    table = np.rint(np.arange(1 << 16) * (255 / ((1 << bits) - 1))).clip(0, 255).astype(np.uint8)
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:
        table = 255 - table  # the TIFF says that 0 is white
    values = np.asarray(image).clip(0, 65535)
    grey = table[values]
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey[values == key] = 255
    return Image.fromarray(grey).convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:
        # The key of a 16-bit PNG, whose pixels Pillow has brought to 8 bits.
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in key)
    layer = image.convert("RGBA")
    page = Image.new("RGB", image.size, "white")
    page.paste(layer, mask=layer)
    return page


_SIGNATURES = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (8, b"WEBP", "WebP"),
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"\0\0\1\0", "ICO"),
    (4, b"ftypavi", "AVIF"),
)

_REFUSED = (
    (4, b"ftyphe", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (4, b"jP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"JXL ", "JPEG XL"),
    (0, b"8BPS", "Photoshop"),
    (0, b"%PDF", "PDF"),
    (0, b"%!PS", "PostScript"),
    (0, b"<svg", "SVG"),
)


def _explain(error: Exception, source: bytes | Image.Image) -> ImageError:
    """The code and the sentence for what a decoder raised."""
    text = _one_line(error)
    if isinstance(error, MemoryError):
        return ImageError("too-large", "there is not enough memory to decode it")
    if isinstance(error, Image.DecompressionBombError):
        return ImageError("too-large", text.split(",")[0])
    if isinstance(error, UnidentifiedImageError) and isinstance(source, bytes):
        for offset, magic, name in _REFUSED:
            if source.startswith(magic, offset):
                return ImageError("unsupported", f"{name} files are not read; save it as JPEG")
        for offset, magic, name in _SIGNATURES:
            if source.startswith(magic, offset):
                return ImageError("unreadable", f"the start of the {name} file is damaged")
        return ImageError("not-an-image", "its content is no picture of a known format")
    if isinstance(error, EOFError) or any(
        sign in text.lower() for sign in ("truncated", "not enough image data")
    ):
        return ImageError("truncated", "the file ends before the picture does")
    return ImageError("unreadable", text)


def _one_line(error: Exception) -> str:
    """Its text without what a hostile file may have put into it: line ends, escapes, length."""
    text = str(getattr(error, "strerror", None) or error) or type(error).__name__
    return "".join(letter if letter.isprintable() else " " for letter in text)[:200]


# Pillow reports odd metadata by `warnings.warn`. Left alone, that is noise on stderr, and under
# ``python -W error`` a good photo fails. `warnings.catch_warnings` swaps the filters of the whole
# process and is not safe in threads. So there is one filter that is never removed and that matches
# by a flag of the thread: "is a `decode` running here?". No other thread, and nothing outside
# `decode`, is silenced, and Pillow's settings are not touched.
_thread = threading.local()


class _WhileDecoding(type):
    def __subclasscheck__(cls, subclass: type) -> bool:
        return getattr(_thread, "decoding", False)


class _DecoderWarning(Warning, metaclass=_WhileDecoding):
    """Stands for every category of warning, as long as this thread decodes."""


@contextmanager
def _no_warnings() -> Iterator[None]:
    # In front again where someone has added filters since (each test of pytest does).
    if not warnings.filters or warnings.filters[0][2] is not _DecoderWarning:
        warnings.filterwarnings("ignore", category=_DecoderWarning)
    _thread.decoding = True
    try:
        yield
    finally:
        _thread.decoding = False
