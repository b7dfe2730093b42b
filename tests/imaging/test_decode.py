"""Any bytes become an upright RGB picture or an `ImageError`, and nothing else happens."""

from __future__ import annotations

import io
import os
import struct
import threading
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageFile

from embedkit.errors import ImageError
from embedkit.imaging import Limits, Preprocess, decode, read_pixels

_CODES = {
    *("unreadable", "not-an-image", "truncated", "too-large", "too-many-scans"),
    *("empty", "not-a-file", "unsupported"),
}


def _photo(width: int = 24, height: int = 20, seed: int = 0) -> Image.Image:
    """Smooth colours, so that JPEG keeps them."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def _bytes(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _code(source: Path | bytes | Image.Image, limits: Limits | None = None) -> str:
    with pytest.raises(ImageError) as caught:
        decode(source, limits=limits or Limits())
    assert caught.value.code in _CODES
    assert caught.value.reason.isprintable()
    return caught.value.code


# --- what comes out -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "ICO", "PPM", "AVIF"]
)
def test_every_listed_format_is_read_from_bytes_and_from_a_file(
    format: str, tmp_path: Path
) -> None:
    photo = _photo(32, 32)
    data = _bytes(photo, format, **({"sizes": [(32, 32)]} if format == "ICO" else {}))
    (tmp_path / "picture").write_bytes(data)
    image = decode(data)
    assert (image.mode, image.size) == ("RGB", (32, 32))
    assert np.abs(np.asarray(image).astype(int) - np.asarray(photo)).mean() < 8
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "picture")), np.asarray(image))


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"]
)
def test_a_picture_of_any_8_bit_mode_becomes_rgb(mode: str) -> None:
    image = decode(_photo().convert("RGB").convert(mode))
    assert (image.mode, image.size) == ("RGB", (24, 20))


def test_a_picture_that_was_handed_in_keeps_its_mode_and_metadata() -> None:
    given = _photo().convert("RGBA")
    given.info["transparency"] = (1000, 2000, 3000)
    before = given.tobytes()
    decode(given)
    assert (given.mode, given.tobytes()) == ("RGBA", before)
    assert given.info["transparency"] == (1000, 2000, 3000)


def test_half_transparent_colours_are_mixed_with_white() -> None:
    pixels = np.zeros((2, 4, 4), np.uint8)
    pixels[..., 0] = 200
    pixels[..., 3] = [0, 51, 128, 255]
    wanted = [[255, 255, 255], [244, 204, 204], [227, 127, 127], [200, 0, 0]]
    for data in (_bytes(Image.fromarray(pixels), "PNG"), _bytes(Image.fromarray(pixels), "TIFF")):
        np.testing.assert_allclose(np.asarray(decode(data))[0], wanted, atol=1)


@pytest.mark.parametrize("transparency", [0, b"\x00\xff"])
def test_a_transparent_palette_entry_is_white(transparency: int | bytes) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 200, 0])
    image.putdata([0, 1])
    data = _bytes(image, "PNG", transparency=transparency)
    assert np.asarray(decode(data)).tolist() == [[[255, 255, 255], [0, 200, 0]]]


def test_the_colour_key_of_a_16_bit_png_is_white() -> None:
    # As Pillow hands it over: the key in 16 bits, the pixels in 8.
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.info["transparency"] = (257, 514, 771)
    assert np.asarray(decode(image)).tolist() == [[[255, 255, 255]] * 2]


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    values = np.array([[0, 128, 257, 25700, 65278, 65535]], np.uint16)
    wanted = np.rint(values / 257).astype(int)
    image = Image.fromarray(values)
    pgm = b"P5 6 1 65535 " + values.astype(">u2").tobytes()
    for source in (_bytes(image, "PNG"), _bytes(image, "TIFF"), pgm, image):
        assert np.asarray(decode(source))[..., 1].tolist() == wanted.tolist()


def test_a_12_bit_tiff_is_scaled_by_its_own_white() -> None:
    # Two pixels of 12 bits: 4095 and 2048, packed in three bytes.
    entries = [
        (256, 2),
        (257, 1),
        (258, 12),
        (259, 1),
        (262, 1),
        (273, 200),
        (277, 1),
        (278, 1),
        (279, 3),
    ]
    ifd = struct.pack("<H", len(entries))
    ifd += b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in entries)
    data = (b"II*\0" + struct.pack("<I", 8) + ifd).ljust(200, b"\0") + b"\xff\xf8\x00"
    assert np.asarray(decode(data))[0, :, 0].tolist() == [255, 128]


def test_a_16_bit_tiff_whose_zero_is_white_is_turned_round() -> None:
    values = np.array([[0, 65535]], np.uint16)
    data = _bytes(Image.fromarray(values), "TIFF", tiffinfo={262: 0})
    assert np.asarray(decode(data))[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_an_agreed_white_are_refused(dtype: type) -> None:
    image = Image.fromarray(np.ones((3, 3), dtype))
    assert _code(_bytes(image, "TIFF")) == "unsupported"
    assert _code(image) == "unsupported"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_as_the_exif_table_says(format: str, orientation: int) -> None:
    stored = np.zeros((16, 24, 3), np.uint8)
    stored[:8, :8] = (250, 0, 0)  # the corner where row 0 meets column 0
    stored[:8, 16:] = (0, 0, 250)  # the far end of row 0
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = _bytes(Image.fromarray(stored), format, exif=exif, quality=100)
    shown = np.asarray(decode(data)).astype(int)
    # EXIF: where row 0 and column 0 of what is stored are seen.
    row, column = {
        1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
        5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom"),
    }[orientation]  # fmt: skip
    opposite = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}

    def corner(*sides: str) -> np.ndarray:
        y = 2 if "top" in sides else shown.shape[0] - 3
        x = 2 if "left" in sides else shown.shape[1] - 3
        return shown[y, x]

    assert np.abs(corner(row, column) - (250, 0, 0)).max() < 40
    assert np.abs(corner(row, opposite[column]) - (0, 0, 250)).max() < 40


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_a_nonsense_orientation_is_passed_over(orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    assert decode(_bytes(_photo(), "JPEG", exif=exif)).size == (24, 20)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage"]
)
def test_damaged_exif_does_not_spoil_the_pixels(exif: bytes) -> None:
    photo = _photo()
    image = decode(_bytes(photo, "JPEG", exif=exif, quality=95))
    assert np.abs(np.asarray(image).astype(int) - np.asarray(photo)).mean() < 8


def test_the_first_of_several_frames_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    for format in ("GIF", "PNG", "WEBP", "TIFF", "MPO"):
        data = _bytes(frames[0], format, save_all=True, append_images=frames[1:])
        red, green, _ = np.asarray(decode(data)).mean((0, 1))
        assert red > 240, format
        assert green < 15, format


# --- scaled decoding ----------------------------------------------------------------------------


@given(width=st.integers(1, 400), height=st.integers(1, 400), side=st.integers(1, 500))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_scaled_decode_leaves_the_asked_side(width: int, height: int, side: int) -> None:
    data = _bytes(Image.new("RGB", (width, height)), "JPEG")
    image = decode(data, shortest_side=side)
    assert min(image.size) >= min(side, width, height)
    # The greatest of 1/8, 1/4, 1/2 that leaves it, found by trial.
    for divisor in (8, 4, 2, 1):
        if divisor == 1 or min(width, height) // divisor >= side:
            assert image.size == (-(-width // divisor), -(-height // divisor))
            break


def test_a_scaled_decode_is_close_to_the_full_one_and_only_jpegs_are_scaled() -> None:
    photo = _photo(640, 480)
    scaled, full = (Preprocess(height=48, width=48, scaled_decode=factor) for factor in (2, 0))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = _bytes(photo, "JPEG", quality=95, exif=exif)
    assert decode(data, shortest_side=110).size == (120, 160)
    error = read_pixels(data, scaled).astype(float) - read_pixels(data, full)
    assert 20 * np.log10(255 / np.sqrt((error**2).mean())) > 45
    assert decode(_bytes(photo, "PNG"), shortest_side=10).size == (640, 480)
    with pytest.raises(ValueError, match="at least 1"):
        decode(data, shortest_side=0)


# --- limits -------------------------------------------------------------------------------------


def _repeated_scans(times: int) -> bytes:
    """A progressive JPEG whose last scan is there `times` more."""
    data = _bytes(_photo(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * times + data[-2:]


def test_a_jpeg_of_too_many_scans_is_refused_and_an_ordinary_progressive_one_is_read() -> None:
    assert decode(_repeated_scans(0)).size == (24, 20)
    assert decode(_repeated_scans(50)).size == (24, 20)
    assert _code(_repeated_scans(64)) == "too-many-scans"
    assert decode(_repeated_scans(64), limits=Limits(max_scans=100)).size == (24, 20)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
def test_pixels_are_counted_before_any_is_decoded(
    format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = _bytes(_photo(30, 20), format)
    assert decode(data, limits=Limits(max_pixels=600)).size == (30, 20)

    def load(self: ImageFile.ImageFile) -> None:
        raise AssertionError("a pixel was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert _code(data, Limits(max_pixels=599)) == "too-large"


def test_the_limit_holds_for_a_picture_inside_an_icon() -> None:
    data = bytearray(_bytes(_photo(64, 64), "ICO", sizes=[(64, 64)]))
    assert decode(bytes(data)).size == (64, 64)
    start = data.index(b"\x89PNG")
    data[start + 16 : start + 24] = struct.pack(">II", 9000, 9000)
    assert _code(bytes(data)) == "too-large"
    bitmap = bytearray(_bytes(_photo(64, 64), "ICO", sizes=[(64, 64)], bitmap_format="bmp"))
    assert decode(bytes(bitmap)).size == (64, 64)
    bitmap[22 + 4 : 22 + 12] = struct.pack("<Ii", 9000, -9000)
    assert _code(bytes(bitmap)) == "too-large"
    assert _code(bytes(data[:30])) == "unreadable"


def test_a_picture_that_was_handed_in_keeps_to_the_limit() -> None:
    assert _code(Image.new("RGB", (30, 20)), Limits(max_pixels=599)) == "too-large"
    assert _code(Image.new("RGB", (0, 20))) == "empty"


def test_a_huge_claim_is_refused_without_a_warning_and_without_memory() -> None:
    # 100 million pixels: more than Pillow warns at, less than it refuses.
    header = (
        b"\x89PNG\r\n\x1a\n"
        + b"\0\0\0\rIHDR"
        + struct.pack(">IIBBBBB", 10000, 10000, 8, 2, 0, 0, 0)
    )
    header += struct.pack(">I", zlib.crc32(header[12:]))
    data = header + b"\0\0\0\x04IDAT" + b"abcd" + struct.pack(">I", zlib.crc32(b"IDATabcd"))
    start = time.process_time()
    assert _code(data) == "too-large"
    assert time.process_time() - start < 0.5


def test_a_file_of_too_many_bytes_is_refused(tmp_path: Path) -> None:
    data = _bytes(_photo(), "JPEG")
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    limits = Limits(max_bytes=len(data))
    assert decode(path, limits=limits).size == decode(data, limits=limits).size == (24, 20)
    limits = Limits(max_bytes=len(data) - 1)
    assert _code(path, limits) == _code(data, limits) == "too-large"


# --- what is no picture -------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_a_file_cut_short_is_told_as_truncated(format: str) -> None:
    data = _bytes(_photo(200, 200), format)
    for share in (0.5, 0.8, 0.95):
        assert _code(data[: int(len(data) * share)]) == "truncated"


@pytest.mark.parametrize("format", ["WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
def test_a_file_of_another_format_cut_short_is_an_error_too(format: str) -> None:
    data = _bytes(_photo(200, 200), format)
    assert _code(data[: len(data) // 2]) in ("truncated", "unreadable")


@pytest.mark.parametrize(
    ("data", "code", "word"),
    [
        (b"", "empty", "empty"),
        (b"hello", "not-an-image", "no picture"),
        (b"<html></html>", "not-an-image", "no picture"),
        (b"\xff\xd8\xff\xe0", "unreadable", "JPEG"),
        (b"\x89PNG\r\n\x1a\n", "unreadable", "PNG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "unsupported", "HEIC"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "unsupported", "PostScript"),
        (b"%PDF-1.7\n", "unsupported", "PDF"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported", "SVG"),
        (b"SIMPLE  =                    T", "not-an-image", "no picture"),
    ],
)
def test_what_is_no_picture_is_named(data: bytes, code: str, word: str) -> None:
    with pytest.raises(ImageError, match=word) as caught:
        decode(data)
    assert caught.value.code == code


def test_paths_that_lead_to_no_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nothing")
    (tmp_path / "itself.jpg").symlink_to(tmp_path / "itself.jpg")
    assert _code(tmp_path / "folder.jpg") == "not-a-file"
    assert _code(tmp_path / "itself.jpg") == "unreadable"
    assert _code(tmp_path / "a\0b.jpg") == "unreadable"
    assert _code(tmp_path / ("x" * 5000)) == "unreadable"
    with pytest.raises(ImageError, match="link to nothing"):
        decode(tmp_path / "dangling.jpg")
    with pytest.raises(ImageError, match="no such file"):
        decode(tmp_path / "absent.jpg")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.timeout(20)
def test_a_pipe_or_a_device_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    assert _code(tmp_path / "pipe.jpg") == "not-a-file"
    if Path("/dev/zero").exists():
        assert _code(Path("/dev/zero")) == "not-a-file"


def test_a_closed_picture_is_an_image_error() -> None:
    image = Image.open(io.BytesIO(_bytes(_photo(), "PNG")))
    image.close()
    assert _code(image) == "unreadable"


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (MemoryError(), "too-large"),
        (OSError("broken data stream"), "unreadable"),
        (OSError("line\none \x1b[31mred"), "unreadable"),
        (EOFError(), "truncated"),
        (RecursionError("deep"), "unreadable"),
        (SystemError("tile cannot extend outside image"), "unreadable"),
        (Image.DecompressionBombError("Image size (9 pixels) exceeds limit"), "too-large"),
    ],
)
def test_whatever_a_decoder_raises_becomes_an_image_error(
    raised: Exception, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: ImageFile.ImageFile) -> None:
        raise raised

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert _code(_bytes(_photo(), "PNG")) == code


def test_ctrl_c_is_no_image_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: ImageFile.ImageFile) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(KeyboardInterrupt):
        decode(_bytes(_photo(), "PNG"))


def _seeds() -> list[bytes]:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "camera"
    photo = _photo()
    keyed = photo.quantize(16)
    return [
        _bytes(photo, "JPEG", exif=exif),
        _bytes(photo, "JPEG", progressive=True),
        _bytes(photo.convert("CMYK"), "JPEG"),
        _bytes(photo, "MPO", save_all=True, append_images=[photo]),
        _bytes(photo.convert("RGBA"), "PNG", exif=exif),
        _bytes(keyed, "PNG", transparency=b"\0\x80"),
        _bytes(Image.fromarray(np.arange(480, dtype=np.uint16).reshape(20, 24)), "PNG"),
        _bytes(photo, "PNG", save_all=True, append_images=[photo.rotate(90)]),
        _bytes(photo, "GIF", save_all=True, append_images=[photo.rotate(90)]),
        _bytes(photo, "WEBP", exif=exif),
        _bytes(photo, "BMP"),
        _bytes(photo, "TIFF", exif=exif),
        _bytes(photo, "TIFF", compression="tiff_lzw"),
        _bytes(photo.convert("LAB"), "TIFF"),
        _bytes(photo, "ICO", sizes=[(16, 16)]),
        _bytes(photo, "ICO", sizes=[(16, 16)], bitmap_format="bmp"),
        _bytes(photo, "PPM"),
        _bytes(photo, "AVIF"),
    ]


_SEEDS = _seeds()


@given(
    seed=st.sampled_from(range(len(_SEEDS))),
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
    early=st.booleans(),
    cut=st.floats(0, 1),
    tail=st.binary(max_size=8),
)
@settings(max_examples=1500, deadline=None, derandomize=True)
def test_any_damage_gives_a_picture_or_an_image_error(
    seed: int, changes: list[tuple[float, int]], early: bool, cut: float, tail: bytes
) -> None:
    data = bytearray(_SEEDS[seed])
    for place, value in changes:
        # Headers are where damage is most inventive.
        reach = min(len(data), 96) if early else len(data)
        data[int(place * (reach - 1))] = value
    if cut > 0.5:
        data = data[: int(len(data) * cut)] + tail
    _check_outcome(bytes(data))


@given(data=st.binary(max_size=64))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_random_bytes_give_an_image_error_or_a_picture(data: bytes) -> None:
    for magic in (b"", b"P6 ", b"\0\0\1\0", b"GIF89a", b"BM", b"II*\0", b"\xff\xd8\xff"):
        _check_outcome(magic + data)


def _check_outcome(data: bytes) -> None:
    try:
        found = decode(data, shortest_side=8, limits=Limits(max_pixels=1_000_000))
    except ImageError as error:
        found = error
    if isinstance(found, ImageError):
        assert found.code in _CODES
        assert found.reason
        assert found.reason.isprintable()
    else:
        assert found.mode == "RGB"
        assert Preprocess(height=4, width=4)(found).shape == (4, 4, 3)


# --- warnings -----------------------------------------------------------------------------------


def test_warnings_of_the_decoder_are_silenced_on_its_own_thread_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoding, go_on = threading.Event(), threading.Event()

    def load(self: Image.Image) -> None:
        warnings.warn("from the decoder", stacklevel=1)
        decoding.set()
        assert go_on.wait(20)

    monkeypatch.setattr(Image.Image, "load", load)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        thread = threading.Thread(target=decode, args=(Image.new("RGB", (2, 2)),))
        thread.start()
        assert decoding.wait(20)
        warnings.warn("from elsewhere", stacklevel=1)
        go_on.set()
        thread.join()
        warnings.warn("afterwards", stacklevel=1)
    assert [str(one.message) for one in heard] == ["from elsewhere", "afterwards"]


def test_a_warning_made_an_error_does_not_spoil_a_picture(shared_data: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(shared_data / "odd" / "bad_exif.jpg").size == (500, 500)
        with pytest.raises(UserWarning, match="mine"):
            warnings.warn("mine", stacklevel=1)


def test_pillows_settings_and_the_filters_do_not_grow() -> None:
    data = _bytes(_photo(), "PNG")
    decode(data)
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, len(warnings.filters))
    for _ in range(20):
        decode(data)
    after = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, len(warnings.filters))
    assert after == before
