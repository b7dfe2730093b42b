"""Generated product pictures, a folder per class, to try everything on before your own photos.

A class is a product: a silhouette with its own proportions, three colours and a pattern or emblem.
Its pictures differ in pose (turn, tilt, place), scale, light (gain, slope, cast), background, blur
and noise. All classes share eight colours and ten silhouettes, so neither alone tells a class.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw, ImageFilter

__all__ = ["draw_products"]

Color = tuple[int, int, int]
Points = list[tuple[float, float]]
Floats = npt.NDArray[np.float64]

_COLORS: dict[str, Color] = {
    "red": (206, 58, 52),
    "orange": (236, 138, 44),
    "yellow": (244, 202, 72),
    "green": (74, 148, 84),
    "teal": (38, 138, 146),
    "blue": (54, 98, 186),
    "plum": (132, 70, 140),
    "cream": (242, 232, 208),
}


def draw_products(
    folder: Path,
    *,
    classes: int = 36,
    images_per_class: int = 24,
    size: int = 128,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Draw ``folder/<product>/<number>.jpg`` and return `folder`.

    The same arguments give the same pictures; more classes or images leave the earlier ones as
    they were. Files of the same name are replaced, other files are left alone.

    Args:
        folder: Made when absent.
        classes: 1 to 1200; names like ``mug-teal-stars``.
        images_per_class: 1 or more.
        size: Side of the square pictures in pixels, 16 or more.
        seed: 0 or more; another seed is another range of products.
        progress: Called as ``progress(done, failed)`` after each class, with the pictures just
            drawn.

    Cost: about 6 ms a picture of 128 pixels on one core.
    """
    names = list(itertools.product(_SILHOUETTES, _COLORS, _PATTERNS))
    if not 1 <= classes <= len(names):
        raise ValueError(f"classes must lie in 1..{len(names)}, got {classes}")
    if images_per_class < 1:
        raise ValueError(f"images_per_class must be at least 1, got {images_per_class}")
    if size < 16:
        raise ValueError(f"size must be at least 16 pixels, got {size}")
    for number, product in enumerate(_choose_products(classes, seed)):
        home = folder / product.name
        home.mkdir(parents=True, exist_ok=True)
        sprite = _draw_sprite(product, 2 * size)
        for shot in range(images_per_class):
            picture = _photograph(sprite, size, np.random.default_rng([seed, 1, number, shot]))
            picture.save(home / f"{shot:03d}.jpg", quality=90)
        if progress is not None:
            progress(images_per_class, 0)
    return folder


@dataclass(frozen=True)
class _Product:
    """What all pictures of one class share; four numbers in 0..1 set its proportions."""

    silhouette: str
    pattern: str
    body: str
    mark: Color
    accent: Color
    shape: tuple[float, ...]

    @property
    def name(self) -> str:
        return f"{self.silhouette}-{self.body}-{self.pattern}"


def _choose_products(classes: int, seed: int) -> list[_Product]:
    """Products of distinct names; each run of ten has every silhouette once."""
    products: list[_Product] = []
    taken: set[str] = set()
    order = np.random.default_rng([seed, 0])
    for number in range(classes):
        position = number % len(_SILHOUETTES)
        if position == 0:
            silhouettes = order.permutation(list(_SILHOUETTES))
        rng = np.random.default_rng([seed, 2, number])
        while True:
            body, mark, accent = rng.choice(list(_COLORS), size=3, replace=False)
            product = _Product(
                silhouette=str(silhouettes[position]),
                pattern=str(rng.choice(list(_PATTERNS))),
                body=str(body),
                mark=_COLORS[str(mark)],
                accent=_COLORS[str(accent)],
                shape=tuple(rng.uniform(size=4)),
            )
            if product.name not in taken:
                break
        taken.add(product.name)
        products.append(product)
    return products


# --- the product: a sprite in the unit square, drawn once per class ------------------------------


class _Canvas:
    """Draws in unit coordinates, origin top left, on a ``side x side`` mask."""

    def __init__(self, side: int) -> None:
        self.side = side
        self.mask = Image.new("L", (side, side), 0)
        self._draw = ImageDraw.Draw(self.mask)

    def polygon(self, points: Points, fill: int = 255) -> None:
        self._draw.polygon([(x * self.side, y * self.side) for x, y in points], fill=fill)

    def box(self, left: float, top: float, right: float, bottom: float, radius: float = 0) -> None:
        corners = [value * self.side for value in (left, top, right, bottom)]
        self._draw.rounded_rectangle(corners, radius=radius * self.side, fill=255)

    def ellipse(self, x: float, y: float, across: float, down: float, fill: int = 255) -> None:
        """Centre and half axes."""
        corners = [value * self.side for value in (x - across, y - down, x + across, y + down)]
        self._draw.ellipse(corners, fill=fill)

    def ring(self, x: float, y: float, across: float, down: float, width: float) -> None:
        self.ellipse(x, y, across, down)
        self.ellipse(x, y, across - width, down - width, fill=0)

    def turned(self, profile: Points) -> None:
        """A body of revolution about x = 0.5: ``(y, half width)`` joined by smooth steps."""
        heights, widths = np.array(profile).T
        y = np.linspace(heights[0], heights[-1], 48)
        after = np.clip(np.searchsorted(heights, y, side="right"), 1, len(heights) - 1)
        step = (y - heights[after - 1]) / (heights[after] - heights[after - 1])
        smooth = step * step * (3 - 2 * step)
        half = widths[after - 1] + (widths[after] - widths[after - 1]) * smooth
        right = [(0.5 + w, v) for w, v in zip(half, y, strict=True)]
        left = [(0.5 - w, v) for w, v in zip(half, y, strict=True)]
        self.polygon(right + left[::-1])


@dataclass(frozen=True)
class _Parts:
    """Masks of a product, and where its label sits: centre and half side."""

    body: _Canvas
    accent: _Canvas
    label: tuple[float, float, float]


def _mix(low: float, high: float, share: float) -> float:
    return low + (high - low) * share


def _bottle(body: _Canvas, accent: _Canvas, shape: tuple[float, ...]) -> tuple[float, float, float]:
    wide, neck = _mix(0.13, 0.21, shape[0]), _mix(0.045, 0.07, shape[1])
    shoulder = _mix(0.26, 0.42, shape[2])
    body.turned(
        [
            (0.13, neck),
            (shoulder - 0.1, neck),
            (shoulder + 0.06, wide),
            (0.9, wide),
            (0.94, wide * 0.9),
        ]
    )
    accent.box(0.5 - neck * 1.25, 0.05, 0.5 + neck * 1.25, 0.14, 0.012)
    return 0.5, (shoulder + 0.98) / 2, wide * 0.8


def _jar(body: _Canvas, accent: _Canvas, shape: tuple[float, ...]) -> tuple[float, float, float]:
    wide, top = _mix(0.22, 0.31, shape[0]), _mix(0.2, 0.36, shape[1])
    body.turned([(top, wide * 0.8), (top + 0.1, wide), (0.82, wide), (0.9, wide * 0.84)])
    accent.box(0.5 - wide * 0.86, top - 0.1, 0.5 + wide * 0.86, top + 0.02, 0.02)
    return 0.5, (top + 0.96) / 2, min(wide * 0.75, 0.2)


def _can(body: _Canvas, accent: _Canvas, shape: tuple[float, ...]) -> tuple[float, float, float]:
    wide, top = _mix(0.16, 0.3, shape[0]), _mix(0.14, 0.34, shape[1])
    body.box(0.5 - wide, top, 0.5 + wide, 0.86)
    body.ellipse(0.5, 0.86, wide, wide * 0.22)
    accent.ellipse(0.5, top, wide, wide * 0.24)
    return 0.5, (top + 0.95) / 2, wide * 0.8


def _mug(body: _Canvas, accent: _Canvas, shape: tuple[float, ...]) -> tuple[float, float, float]:
    wide, top = _mix(0.2, 0.27, shape[0]), _mix(0.2, 0.34, shape[1])
    foot = wide * _mix(0.7, 1.05, shape[2])
    accent.ring(0.43 + wide, (top + 0.84) / 2, 0.17, _mix(0.15, 0.22, shape[3]), 0.055)
    body.polygon([(0.43 - wide, top), (0.43 + wide, top), (0.43 + foot, 0.84), (0.43 - foot, 0.84)])
    body.ellipse(0.43, 0.84, foot, 0.05)
    body.ellipse(0.43, top, wide, 0.055)
    return 0.43, (top + 0.88) / 2, min(wide, foot) * 0.8


def _lamp(body: _Canvas, accent: _Canvas, shape: tuple[float, ...]) -> tuple[float, float, float]:
    narrow, wide = _mix(0.1, 0.24, shape[0]), _mix(0.27, 0.38, shape[1])
    rim = _mix(0.46, 0.58, shape[2])
    foot = _mix(0.13, 0.24, shape[3])
    accent.box(0.475, rim - 0.02, 0.525, 0.9)
    accent.turned([(0.84, 0.04), (0.9, foot), (0.94, foot)])
    body.polygon([(0.5 - narrow, 0.08), (0.5 + narrow, 0.08), (0.5 + wide, rim), (0.5 - wide, rim)])
    return 0.5, (rim + 0.14) / 2, min((narrow + wide) * 0.4, 0.19)


def _box(body: _Canvas, accent: _Canvas, shape: tuple[float, ...]) -> tuple[float, float, float]:
    wide, top = _mix(0.19, 0.3, shape[0]), _mix(0.14, 0.4, shape[1])
    deep = _mix(0.08, 0.16, shape[2])
    left, right = 0.46 - wide, 0.46 + wide
    lifted = top - deep * 0.6
    body.box(left, top, right, 0.9)
    accent.polygon([(left, top), (left + deep, lifted), (right + deep, lifted), (right, top)])
    accent.polygon([(right, top), (right + deep, lifted), (right + deep, 0.9 - deep), (right, 0.9)])
    return 0.46, (top + 0.9) / 2, min(wide, (0.9 - top) / 2) * 0.82


def _shoe(body: _Canvas, accent: _Canvas, shape: tuple[float, ...]) -> tuple[float, float, float]:
    high, toe = _mix(0.24, 0.46, shape[0]), _mix(0.52, 0.62, shape[1])
    sole = _mix(0.05, 0.1, shape[2])
    body.polygon(
        [(0.1, high), (0.38, high), (0.52, toe), (0.76, toe + 0.06), (0.86, 0.76), (0.1, 0.76)]
    )
    body.ellipse(0.76, 0.74, 0.15, 0.74 - toe - 0.06)
    body.ellipse(0.24, high, 0.14, 0.04)
    accent.box(0.07, 0.74, 0.93, 0.74 + sole, 0.025)
    accent.box(0.07, 0.74, 0.07 + _mix(0.14, 0.3, shape[3]), 0.8 + sole, 0.02)
    return 0.3, (high + 0.78) / 2, 0.17


def _bag(body: _Canvas, accent: _Canvas, shape: tuple[float, ...]) -> tuple[float, float, float]:
    top, low = _mix(0.22, 0.34, shape[0]), _mix(0.3, 0.38, shape[1])
    rim = _mix(0.38, 0.5, shape[2])
    accent.ring(0.5, rim, _mix(0.12, 0.2, shape[3]), rim - 0.08, 0.045)
    body.polygon([(0.5 - top, rim), (0.5 + top, rim), (0.5 + low, 0.88), (0.5 - low, 0.88)])
    body.box(0.5 - low, 0.8, 0.5 + low, 0.92, 0.04)
    return 0.5, (rim + 0.93) / 2, min(top * 0.85, 0.2)


def _clock(body: _Canvas, accent: _Canvas, shape: tuple[float, ...]) -> tuple[float, float, float]:
    wide, rim = _mix(0.29, 0.35, shape[0]), _mix(0.03, 0.07, shape[1])
    spread = _mix(0.14, 0.26, shape[2])
    for side in (-1, 1):
        accent.ellipse(0.5 + side * spread, 0.2, 0.09, 0.07)
        accent.polygon([(0.5, 0.6), (0.5 + side * 0.2, 0.6), (0.5 + side * 0.3, 0.94)])
    accent.ellipse(0.5, 0.53, wide + rim, wide + rim)
    body.ellipse(0.5, 0.53, wide, wide)
    return 0.5, 0.53, wide * 0.68


def _teapot(body: _Canvas, accent: _Canvas, shape: tuple[float, ...]) -> tuple[float, float, float]:
    wide, top = _mix(0.22, 0.27, shape[0]), _mix(0.3, 0.4, shape[1])
    middle = (top + 0.86) / 2
    accent.ring(0.5 - wide, middle - 0.03, 0.15, _mix(0.13, 0.2, shape[2]), 0.045)
    accent.polygon(
        [(0.5, middle - 0.06), (0.92, top), (0.97, top + 0.05), (0.5 + wide * 0.8, middle + 0.16)]
    )
    body.ellipse(0.5, middle, wide, (0.86 - top) / 2)
    body.box(0.5 - wide * 0.6, 0.8, 0.5 + wide * 0.6, 0.88, 0.01)
    accent.turned(
        [(top - 0.1, 0.03), (top - 0.04, 0.03), (top, wide * 0.5), (top + 0.05, wide * 0.62)]
    )
    return 0.5, middle + 0.03, wide * 0.7


_Silhouette = Callable[[_Canvas, _Canvas, tuple[float, ...]], tuple[float, float, float]]
_SILHOUETTES: dict[str, _Silhouette] = {
    "bottle": _bottle,
    "jar": _jar,
    "can": _can,
    "mug": _mug,
    "lamp": _lamp,
    "box": _box,
    "shoe": _shoe,
    "bag": _bag,
    "clock": _clock,
    "teapot": _teapot,
}


def _bars(canvas: _Canvas, count: int, turn: float) -> None:
    """`count` parallel bars across the unit square, turned by `turn` radians about its centre."""
    pitch = 1 / count
    cos, sin = np.cos(turn), np.sin(turn)
    for start in np.arange(-0.3, 1.3, pitch):
        corners = [(-0.5, start), (1.5, start), (1.5, start + pitch / 2), (-0.5, start + pitch / 2)]
        canvas.polygon(
            [
                (0.5 + cos * (x - 0.5) - sin * (y - 0.5), 0.5 + sin * (x - 0.5) + cos * (y - 0.5))
                for x, y in corners
            ]
        )


def _checks(canvas: _Canvas) -> None:
    for row, column in itertools.product(range(9), repeat=2):
        if (row + column) % 2:
            canvas.box(column / 9, row / 9, (column + 1) / 9, (row + 1) / 9)


def _spots(canvas: _Canvas) -> None:
    for row, column in itertools.product(range(-1, 9), repeat=2):
        canvas.ellipse((column + 0.5 * (row % 2)) / 7.5, row / 8, 0.036, 0.036)


def _zigzag(canvas: _Canvas) -> None:
    x = np.linspace(0, 1, 15)
    for row in range(7):
        y = row / 6 - 0.02 + 0.055 * (np.arange(15) % 2)
        upper = list(zip(x, y, strict=True))
        canvas.polygon(upper + [(a, b + 0.06) for a, b in upper[::-1]])


def _star(x: float, y: float, radius: float, *, arms: int = 5, waist: float = 0.42) -> Points:
    angle = np.pi * np.arange(2 * arms) / arms - np.pi / 2
    reach = radius * np.where(np.arange(2 * arms) % 2, waist, 1)
    return [(x + r * np.cos(a), y + r * np.sin(a)) for r, a in zip(reach, angle, strict=True)]


def _heart(x: float, y: float, radius: float) -> Points:
    t = np.linspace(0, 2 * np.pi, 40)
    across = 16 * np.sin(t) ** 3
    up = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [(x + radius * a / 17, y - radius * b / 17) for a, b in zip(across, up, strict=True)]


def _leaf(x: float, y: float, radius: float) -> Points:
    along = np.linspace(-1, 1, 24)
    half = 0.5 * (1 - along**2)
    edge = [(a, b) for a, b in zip(along, half, strict=True)]
    edge += [(a, -b) for a, b in edge[::-1]]
    return [(x + radius * 0.75 * (a - b), y - radius * 0.75 * (a + b)) for a, b in edge]


def _polygon(x: float, y: float, radius: float, corners: int) -> Points:
    return _star(x, y, radius, arms=corners, waist=float(np.cos(np.pi / corners)))


def _cross(x: float, y: float, radius: float) -> Points:
    arm = radius * 0.34
    quarter = [(arm, -radius), (arm, -arm), (radius, -arm)]
    points: Points = []
    for _ in range(4):
        points += quarter
        quarter = [(-b, a) for a, b in quarter]
    return [(x + a, y + b) for a, b in points]


_ALL_OVER: dict[str, Callable[[_Canvas], None]] = {
    "hoops": lambda canvas: _bars(canvas, 7, 0),
    "stripes": lambda canvas: _bars(canvas, 8, np.pi / 2),
    "slants": lambda canvas: _bars(canvas, 7, np.pi / 4),
    "band": lambda canvas: _bars(canvas, 2, 0),
    "checks": _checks,
    "spots": _spots,
    "zigzag": _zigzag,
}
_EMBLEMS: dict[str, Callable[[float, float, float], Points]] = {
    "star": _star,
    "sun": lambda x, y, radius: _star(x, y, radius, arms=12, waist=0.62),
    "heart": _heart,
    "cross": _cross,
    "triangle": lambda x, y, radius: _polygon(x, y, radius, 3),
    "diamond": lambda x, y, radius: _polygon(x, y, radius, 4),
    "leaf": _leaf,
    "disc": lambda x, y, radius: _polygon(x, y, radius * 0.85, 24),
}
_PATTERNS = (*_ALL_OVER, *_EMBLEMS)


def _draw_sprite(product: _Product, side: int) -> Image.Image:
    """The product alone, upright, ``side x side`` RGBA with soft cylinder shading."""
    body, accent = _Canvas(side), _Canvas(side)
    x, y, reach = _SILHOUETTES[product.silhouette](body, accent, product.shape)
    sprite = Image.new("RGB", (side, side), product.accent)
    sprite.paste(_COLORS[product.body], mask=body.mask)
    if product.pattern in _ALL_OVER:
        pattern = _Canvas(side)
        _ALL_OVER[product.pattern](pattern)
        sprite.paste(product.mark, mask=ImageChops.multiply(pattern.mask, body.mask))
    else:
        label, emblem = _Canvas(side), _Canvas(side)
        label.box(x - reach, y - reach, x + reach, y + reach, reach * 0.3)
        emblem.polygon(_EMBLEMS[product.pattern](x, y, reach * 0.8))
        sprite.paste(product.mark, mask=ImageChops.multiply(label.mask, body.mask))
        sprite.paste(product.accent, mask=ImageChops.multiply(emblem.mask, body.mask))
    across = np.linspace(0, 1, side)
    shade = (
        1.06 - 0.42 * np.abs(across - 0.4) ** 1.5 + 0.16 * np.exp(-(((across - 0.36) / 0.05) ** 2))
    )
    down = np.linspace(1.03, 0.93, side)[:, None]
    pixels = np.asarray(sprite) * (shade * down)[:, :, None]
    # A thin dark line where the accent parts meet the body keeps same-coloured parts apart.
    edge = np.asarray(body.mask.filter(ImageFilter.FIND_EDGES)) > 0
    pixels[edge] *= 0.72
    shaded = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    shaded.putalpha(ImageChops.lighter(body.mask, accent.mask))
    return shaded


# --- the picture: pose, background, shadow, light, lens ------------------------------------------


def _photograph(sprite: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    posed = _pose(sprite, rng).reduce(2)
    picture = _background(size, rng)
    shadow = posed.getchannel("A").filter(ImageFilter.GaussianBlur(size / 24))
    shadow = shadow.point(lambda value: value * 0.55)
    offset = rng.uniform(-0.05, 0.05), rng.uniform(0.01, 0.05)
    shadow = ImageChops.offset(shadow, round(offset[0] * size), round(offset[1] * size))
    picture.paste((28, 24, 30), mask=shadow)
    picture.paste(posed.convert("RGB"), mask=posed.getchannel("A"))
    if rng.uniform() < 0.5:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.9) * size / 128))
    return _light(picture, rng)


def _pose(sprite: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Turn, scale, shift and tilt in one projective map."""
    side = sprite.width
    turn = np.deg2rad(rng.uniform(-28, 28))
    scale = rng.uniform(0.55, 0.95) * side
    corners = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
    tilted = corners + rng.uniform(-0.07, 0.07, size=(4, 2))
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    room = 0.5 * max(side - scale * 0.9, 0)
    seen = tilted @ rotation * scale + side / 2 + rng.uniform(-0.6, 0.6, size=2) * room
    return sprite.transform(
        (side, side),
        Image.Transform.PERSPECTIVE,
        _homography(seen, (corners + 0.5) * side),
        Image.Resampling.BILINEAR,
    )


def _homography(source: Floats, destination: Floats) -> list[float]:
    """Pillow's eight PERSPECTIVE numbers that take the four `source` points to `destination`."""
    rows, values = [], []
    for (x, y), (u, v) in zip(source, destination, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return [float(value) for value in np.linalg.solve(np.array(rows), np.array(values))]


def _light(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Gain, a slope across the picture, a colour cast and sensor noise."""
    size = picture.width
    angle = rng.uniform(0, 2 * np.pi)
    ramp = np.linspace(-1, 1, size)
    slope = rng.uniform(0, 0.3) * (np.cos(angle) * ramp[None, :] + np.sin(angle) * ramp[:, None])
    gain = rng.uniform(0.6, 1.2) * (1 + slope)
    cast = rng.uniform(0.86, 1.14, size=3)
    noise = rng.normal(0, rng.uniform(1, 6), size=(size, size, 3))
    pixels = np.asarray(picture) * gain[:, :, None] * cast + noise
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def _background(size: int, rng: np.random.Generator) -> Image.Image:
    back, front = _tone(rng), _tone(rng)
    kind = int(rng.integers(5))
    if kind == 0:
        picture = _room(size, back, front, rng)
    elif kind == 1:
        picture = _cloud(size, back, front, rng)
    elif kind == 2:
        picture = _lights(size, back, rng)
    elif kind == 3:
        picture = _planks(size, back, rng)
    else:
        picture = _clutter(size, back, rng)
    return picture


def _tone(rng: np.random.Generator) -> Floats:
    """A shelf colour: one of the products' own, greyed by a random amount."""
    color = np.array(list(_COLORS.values()))[rng.integers(len(_COLORS))]
    grey = rng.uniform(90, 235)
    share = rng.uniform(0.15, 0.75)
    tone: Floats = color * share + grey * (1 - share)
    return tone


def _ramp(size: int, top: Floats, bottom: Floats) -> Floats:
    share = np.linspace(0, 1, size)[:, None, None]
    return np.broadcast_to(top * (1 - share) + bottom * share, (size, size, 3))


def _picture(pixels: Floats) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _room(size: int, wall: Floats, floor: Floats, rng: np.random.Generator) -> Image.Image:
    """A wall that darkens towards a table."""
    pixels = _ramp(size, wall * 1.1, wall * 0.85).copy()
    horizon = int(size * rng.uniform(0.45, 0.85))
    pixels[horizon:] = _ramp(size, floor * 0.75, floor * 1.1)[horizon:]
    return _picture(pixels)


def _cloud(size: int, low: Floats, high: Floats, rng: np.random.Generator) -> Image.Image:
    """Marble: smooth noise of two scales between two colours."""
    field = np.zeros((size, size))
    for cells, weight in ((4, 0.65), (11, 0.35)):
        coarse = Image.fromarray(rng.uniform(size=(cells, cells)).astype(np.float32))
        field += weight * np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    return _picture(low + (high - low) * np.clip(field * 2 - 0.5, 0, 1)[:, :, None])


def _lights(size: int, tone: Floats, rng: np.random.Generator) -> Image.Image:
    """Out-of-focus lamps on a dark ramp."""
    picture = _picture(_ramp(size, tone * 0.75, tone * 0.4))
    for _ in range(int(rng.integers(6, 14))):
        disc = Image.new("L", (size, size), 0)
        x, y, r = rng.uniform(0, size), rng.uniform(0, size), rng.uniform(0.04, 0.13) * size
        ImageDraw.Draw(disc).ellipse([x - r, y - r, x + r, y + r], fill=int(rng.integers(70, 170)))
        picture.paste(_rgb(_tone(rng) * 1.15), mask=disc)
    return picture.filter(ImageFilter.GaussianBlur(size / 80))


def _planks(size: int, tone: Floats, rng: np.random.Generator) -> Image.Image:
    """Boards with a grain, upright or lying."""
    boards = int(rng.integers(3, 8))
    board = np.arange(size) * boards // size
    bright = rng.uniform(0.8, 1.15, size=boards)[board]
    bright[np.flatnonzero(np.diff(board))] *= 0.6
    grain = 1 + 0.07 * rng.normal(size=(size, 1)) + 0.02 * rng.normal(size=(size, size))
    light = bright[:, None] * grain
    return _picture(tone * (light.T if rng.uniform() < 0.5 else light)[:, :, None])


def _clutter(size: int, tone: Floats, rng: np.random.Generator) -> Image.Image:
    """Other things behind the product, out of focus."""
    picture = _picture(_ramp(size, tone * 1.05, tone * 0.8))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(5, 12))):
        x, y = rng.uniform(-0.1, 1.1, size=2) * size
        half = rng.uniform(0.06, 0.25, size=2) * size
        corners = [x - half[0], y - half[1], x + half[0], y + half[1]]
        if rng.uniform() < 0.5:
            draw.ellipse(corners, fill=_rgb(_tone(rng)))
        else:
            draw.rounded_rectangle(corners, radius=0.2 * min(half), fill=_rgb(_tone(rng)))
    return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.01, 0.03) * size))


def _rgb(color: Floats) -> Color:
    red, green, blue = (int(value) for value in np.clip(color, 0, 255))
    return red, green, blue
