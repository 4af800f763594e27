"""Draw the products of the sample catalog: a clean shop picture and hard street pictures.

A product is a `Look`: a silhouette of its category filled with a `Design`. Designs know nothing of
categories, so one design drawn on several silhouettes gives products that only shape tells apart.
Everything drawn is a pure function of the look and of the numpy Generator that is passed in.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

Float32Array = npt.NDArray[np.float32]
Colour = tuple[float, float, float]
Mark = tuple[str, str, tuple[float, ...]]

_SUPERSAMPLE = 2
_INK: Colour = (58.0, 52.0, 50.0)
# What a mark paints, as (body, trim, ink) coverage; a later mark covers an earlier one.
_PAINTS = {
    "body": (255, 0, 0),
    "trim": (0, 255, 0),
    "ink": (0, 0, 255),
    "fold": (165, 0, 90),
    "cut": (0, 0, 0),
}

# Each silhouette: marks (paint, kind, numbers) in units of the picture's side, y downwards.
SILHOUETTES: dict[str, tuple[Mark, ...]] = {
    "mug": (
        ("trim", "ellipse", (0.56, 0.32, 0.92, 0.74)),
        ("cut", "ellipse", (0.63, 0.41, 0.83, 0.65)),
        ("body", "poly", (0.14, 0.2, 0.7, 0.2, 0.67, 0.84, 0.62, 0.89, 0.22, 0.89, 0.17, 0.84)),
        ("trim", "ellipse", (0.14, 0.12, 0.7, 0.28)),
        ("ink", "ellipse", (0.17, 0.145, 0.67, 0.255)),
    ),
    "t-shirt": (
        ("body", "poly", (0.36, 0.13, 0.64, 0.13, 0.76, 0.18, 0.97, 0.4, 0.83, 0.53, 0.74, 0.44,
                          0.75, 0.9, 0.25, 0.9, 0.26, 0.44, 0.17, 0.53, 0.03, 0.4, 0.24, 0.18)),
        ("trim", "ellipse", (0.35, 0.03, 0.65, 0.27)),
        ("cut", "ellipse", (0.39, 0.02, 0.61, 0.22)),
        ("cut", "rect", (0.3, 0.0, 0.7, 0.128, 0.0)),
        ("fold", "line", (0.26, 0.44, 0.27, 0.3, 0.012)),
        ("fold", "line", (0.74, 0.44, 0.73, 0.3, 0.012)),
        ("trim", "line", (0.83, 0.53, 0.97, 0.4, 0.03)),
        ("trim", "line", (0.17, 0.53, 0.03, 0.4, 0.03)),
    ),
    "cushion": (
        ("trim", "blob", (0.04, 0.06, 0.2, 0.08, 0.5, 0.14, 0.8, 0.08, 0.96, 0.06, 0.93, 0.2, 0.87,
                          0.5, 0.93, 0.8, 0.96, 0.94, 0.8, 0.92, 0.5, 0.86, 0.2, 0.92, 0.04, 0.94,
                          0.07, 0.8, 0.13, 0.5, 0.07, 0.2)),
        ("body", "blob", (0.08, 0.1, 0.2, 0.11, 0.5, 0.17, 0.8, 0.11, 0.92, 0.1, 0.9, 0.2, 0.84,
                          0.5, 0.9, 0.8, 0.92, 0.9, 0.8, 0.89, 0.5, 0.83, 0.2, 0.89, 0.08, 0.9,
                          0.1, 0.8, 0.16, 0.5, 0.1, 0.2)),
        ("fold", "line", (0.14, 0.16, 0.24, 0.25, 0.012)),
        ("fold", "line", (0.86, 0.16, 0.76, 0.25, 0.012)),
        ("fold", "line", (0.14, 0.84, 0.24, 0.75, 0.012)),
        ("fold", "line", (0.86, 0.84, 0.76, 0.75, 0.012)),
    ),
    "backpack": (
        ("trim", "ellipse", (0.38, 0.02, 0.62, 0.26)),
        ("cut", "ellipse", (0.43, 0.065, 0.57, 0.22)),
        ("trim", "rect", (0.11, 0.34, 0.3, 0.84, 0.08)),
        ("trim", "rect", (0.7, 0.34, 0.89, 0.84, 0.08)),
        ("body", "rect", (0.19, 0.11, 0.81, 0.95, 0.22)),
        ("ink", "line", (0.24, 0.38, 0.76, 0.38, 0.018)),
        ("ink", "rect", (0.27, 0.53, 0.73, 0.88, 0.07)),
        ("body", "rect", (0.285, 0.545, 0.715, 0.865, 0.06)),
        ("trim", "line", (0.29, 0.63, 0.71, 0.63, 0.03)),
        ("trim", "rect", (0.69, 0.37, 0.72, 0.47, 0.01)),
    ),
    "lamp": (
        ("trim", "rect", (0.465, 0.5, 0.535, 0.88, 0.01)),
        ("trim", "ellipse", (0.43, 0.6, 0.57, 0.74)),
        ("trim", "ellipse", (0.28, 0.83, 0.72, 0.96)),
        ("body", "poly", (0.34, 0.05, 0.66, 0.05, 0.88, 0.54, 0.12, 0.54)),
        ("trim", "line", (0.12, 0.535, 0.88, 0.535, 0.03)),
        ("trim", "line", (0.34, 0.06, 0.66, 0.06, 0.022)),
        ("ink", "line", (0.78, 0.55, 0.78, 0.68, 0.01)),
    ),
    "vase": (
        ("body", "blob", (0.36, 0.05, 0.64, 0.05, 0.58, 0.16, 0.57, 0.27, 0.7, 0.38, 0.82, 0.55,
                          0.76, 0.78, 0.64, 0.96, 0.36, 0.96, 0.24, 0.78, 0.18, 0.55, 0.3, 0.38,
                          0.43, 0.27, 0.42, 0.16)),
        ("trim", "ellipse", (0.36, 0.03, 0.64, 0.11)),
        ("ink", "ellipse", (0.39, 0.045, 0.61, 0.095)),
        ("trim", "line", (0.425, 0.26, 0.575, 0.26, 0.025)),
    ),
    "plate": (
        ("trim", "ellipse", (0.04, 0.04, 0.96, 0.96)),
        ("body", "ellipse", (0.075, 0.075, 0.925, 0.925)),
        ("fold", "ellipse", (0.23, 0.23, 0.77, 0.77)),
        ("body", "ellipse", (0.245, 0.245, 0.755, 0.755)),
    ),
    "sneaker": (
        ("body", "poly", (0.05, 0.34, 0.1, 0.27, 0.3, 0.25, 0.36, 0.29, 0.56, 0.45, 0.74, 0.52,
                          0.9, 0.57, 0.96, 0.66, 0.96, 0.72, 0.05, 0.72)),
        ("trim", "rect", (0.03, 0.7, 0.98, 0.82, 0.05)),
        ("ink", "line", (0.03, 0.795, 0.97, 0.795, 0.018)),
        ("trim", "poly", (0.78, 0.535, 0.9, 0.57, 0.965, 0.66, 0.965, 0.72, 0.74, 0.72)),
        ("ink", "ellipse", (0.1, 0.255, 0.32, 0.315)),
        ("ink", "line", (0.38, 0.4, 0.46, 0.34, 0.02)),
        ("ink", "line", (0.45, 0.46, 0.53, 0.4, 0.02)),
        ("ink", "line", (0.53, 0.51, 0.61, 0.45, 0.02)),
        ("trim", "line", (0.06, 0.36, 0.12, 0.7, 0.045)),
    ),
    "hat": (
        ("body", "ellipse", (0.02, 0.56, 0.98, 0.86)),
        ("fold", "ellipse", (0.2, 0.58, 0.8, 0.76)),
        ("body", "rect", (0.25, 0.15, 0.75, 0.68, 0.2)),
        ("body", "ellipse", (0.25, 0.6, 0.75, 0.74)),
        ("trim", "poly", (0.245, 0.54, 0.36, 0.58, 0.5, 0.595, 0.64, 0.58, 0.755, 0.54, 0.755,
                          0.66, 0.64, 0.715, 0.5, 0.73, 0.36, 0.715, 0.245, 0.66)),
    ),
    "umbrella": (
        ("ink", "line", (0.5, 0.03, 0.5, 0.84, 0.022)),
        ("trim", "ellipse", (0.48, 0.76, 0.68, 0.97)),
        ("cut", "ellipse", (0.525, 0.79, 0.635, 0.925)),
        ("cut", "rect", (0.522, 0.7, 0.7, 0.85, 0.0)),
        ("body", "half", (0.03, 0.08, 0.97, 1.0)),
        ("cut", "ellipse", (0.03, 0.475, 0.27, 0.63)),
        ("cut", "ellipse", (0.27, 0.475, 0.498, 0.63)),
        ("cut", "ellipse", (0.502, 0.475, 0.73, 0.63)),
        ("cut", "ellipse", (0.73, 0.475, 0.97, 0.63)),
        ("ink", "line", (0.5, 0.45, 0.5, 0.7, 0.022)),
        ("fold", "line", (0.5, 0.08, 0.27, 0.52, 0.012)),
        ("fold", "line", (0.5, 0.08, 0.73, 0.52, 0.012)),
        ("fold", "line", (0.5, 0.08, 0.5, 0.52, 0.012)),
    ),
    "bottle": (
        ("trim", "rect", (0.405, 0.03, 0.595, 0.15, 0.03)),
        ("body", "poly", (0.425, 0.15, 0.575, 0.15, 0.58, 0.24, 0.68, 0.36, 0.7, 0.42, 0.7, 0.92,
                          0.66, 0.97, 0.34, 0.97, 0.3, 0.92, 0.3, 0.42, 0.32, 0.36, 0.42, 0.24)),
        ("ink", "line", (0.42, 0.155, 0.58, 0.155, 0.016)),
        ("trim", "line", (0.3, 0.86, 0.7, 0.86, 0.04)),
    ),
    "rug": (
        *(("ink", "line", (x / 40, 0.17, x / 40 - 0.01 + x / 2000, 0.83, 0.008))
          for x in range(3, 38)),
        ("trim", "rect", (0.05, 0.21, 0.95, 0.79, 0.0)),
        ("body", "rect", (0.09, 0.25, 0.91, 0.75, 0.0)),
    ),
}  # fmt: skip

PATTERNS = (
    "plain", "stripes", "checks", "dots", "zigzag",
    "floral", "gradient", "triangles", "diamonds", "waves",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Design:
    """A surface that products of several categories share.

    Attributes:
        pattern: One of `PATTERNS`.
        base: Ground colour, RGB in 0..255.
        second: Colour of the motif and of the trim, RGB in 0..255.
        cycles: Repeats of the motif across the picture.
        angle: Rotation of the motif, radians.
        phase: Shift of the motif along both axes, in repeats.
        duty: Share of a repeat that the motif takes, below 0.5 so that swapped colours differ.
    """

    pattern: str
    base: Colour
    second: Colour
    cycles: float
    angle: float
    phase: tuple[float, float]
    duty: float


@dataclass(frozen=True, kw_only=True)
class Look:
    """All that a picture of a product shows: category, design, material, (x, y) proportions."""

    category: str
    design: Design
    material: str
    stretch: tuple[float, float]


def _soften(distance: Float32Array, sharpness: float) -> Float32Array:
    """Turn a signed distance into coverage: 0.5 on the edge, 1 inside; (H, W) in 0..1."""
    coverage = distance * np.float32(sharpness) + np.float32(0.5)
    return np.clip(coverage, 0, 1, out=coverage, dtype=np.float32)


def _band(t: Float32Array, duty: float, sharpness: float) -> Float32Array:
    """Return stripes of width `duty` across t, (H, W) in 0..1 with soft edges."""
    half = np.float32(duty / 2)
    return _soften(half - np.abs(t - np.floor(t) - np.float32(0.5)), sharpness)


def draw_pattern(design: Design, px: int) -> Float32Array:
    """Return how much of the second colour each pixel takes: (px, px) float32 in 0..1.

    Raises:
        ValueError: The design names an unknown pattern.
    """
    edge = 0.5 - 0.5 / px
    axis: Float32Array = np.linspace(-edge, edge, px, dtype=np.float32)
    cos, sin = np.float32(math.cos(design.angle)), np.float32(math.sin(design.angle))
    x, y = axis[None, :] * cos - axis[:, None] * sin, axis[None, :] * sin + axis[:, None] * cos
    u = x * np.float32(design.cycles) + np.float32(design.phase[0])
    v = y * np.float32(design.cycles) + np.float32(design.phase[1])
    sharp, duty = px / design.cycles, design.duty
    match design.pattern:
        case "plain":
            return np.zeros((px, px), np.float32)
        case "stripes":
            return _band(u, duty, sharp)
        case "checks":
            return (_band(u, duty + 0.1, sharp) + _band(v, duty + 0.1, sharp)) * np.float32(0.5)
        case "zigzag":
            return _band(v + np.abs(u - np.floor(u) - np.float32(0.5)), duty, sharp)
        case "waves":
            return _band(v + np.float32(0.22) * np.sin(np.float32(2 * np.pi) * u), duty, sharp)
        case "gradient":
            return _soften(x + np.float32(0.46 * duty - 0.23), 1.3)
        case "dots" | "floral" | "triangles" | "diamonds":
            return _cell_motif(design.pattern, u, v, duty, sharp)
        case _:
            raise ValueError(f"unknown pattern {design.pattern!r}; expected one of {PATTERNS}")


def _cell_motif(
    pattern: str, u: Float32Array, v: Float32Array, duty: float, sharp: float
) -> Float32Array:
    """Return one motif a cell, odd rows shifted by half a cell: (H, W) in 0..1."""
    row = np.floor(v)
    shifted = u + np.float32(0.5) * (row % np.float32(2))
    a, b = shifted - np.floor(shifted) - np.float32(0.5), v - row - np.float32(0.5)
    if pattern == "triangles":
        distance = np.minimum(
            np.float32(0.25) + np.float32(0.7) * b - np.float32(1.22) * np.abs(a),
            np.float32(0.25) - np.float32(0.7) * b,
        )
    elif pattern == "diamonds":
        distance = np.float32(0.26 + 0.55 * duty) - np.abs(a) - np.abs(b)
    else:
        radius = np.sqrt(a * a + b * b)
        distance = np.float32(0.14 + 0.4 * duty) - radius
        if pattern == "floral":
            lobes = np.cos(np.float32(5) * np.arctan2(b, a))
            petals = np.float32(0.31) + np.float32(0.14) * lobes - radius
            distance = np.minimum(petals, radius - np.float32(0.1))
    return _soften(distance, sharp)


def draw_masks(category: str, stretch: tuple[float, float], px: int) -> Float32Array:
    """Return the coverage by body, trim and ink: (px, px, 3) float32 in 0..1.

    Raises:
        KeyError: The category has no silhouette.
    """
    side = px * _SUPERSAMPLE
    canvas = Image.new("RGB", (side, side))
    pen = ImageDraw.Draw(canvas)
    factor = np.array(stretch, np.float64) * 0.9
    for paint, kind, numbers in SILHOUETTES[category]:
        count = len(numbers) // 2 * 2
        points = ((np.reshape(numbers[:count], (-1, 2)) - 0.5) * factor + 0.5) * side
        _draw_mark(pen, kind, points, numbers[-1] * side, _PAINTS[paint])
    small = canvas.reduce(_SUPERSAMPLE)
    return np.asarray(small, np.float32) / np.float32(255)


def _draw_mark(
    pen: ImageDraw.ImageDraw,
    kind: str,
    points: npt.NDArray[np.float64],
    last: float,
    fill: tuple[int, int, int],
) -> None:
    """Draw one mark; `last` is its closing number: a line's width or a rectangle's radius, px."""
    if kind == "blob":
        for _ in range(3):  # Chaikin's corner cutting
            following = np.roll(points, -1, axis=0)
            pair = np.stack([0.75 * points + 0.25 * following, 0.25 * points + 0.75 * following], 1)
            points = pair.reshape(-1, 2)
    flat: list[Any] = points.ravel().tolist()
    match kind:
        case "poly" | "blob":
            pen.polygon(flat, fill=fill)
        case "ellipse":
            pen.ellipse(flat, fill=fill)
        case "half":
            pen.pieslice(flat, 180, 360, fill=fill)
        case "rect":
            pen.rounded_rectangle(flat, last, fill=fill)
        case _:
            pen.line(flat, fill=fill, width=max(1, round(last)))


def _draw_sheen(material: str, px: int, rng: np.random.Generator) -> Float32Array:
    """Return the material's light, added to the surface: (px, px) float32, grey levels."""
    axis = np.arange(px, dtype=np.float32) / px
    if material in {"ceramic", "glass", "steel", "nylon"}:
        width, strength = {"steel": (0.12, 70), "nylon": (0.3, 25)}.get(material, (0.07, 60))
        line = strength * np.exp(-(((axis - rng.uniform(0.3, 0.45)) / width) ** 2))
        return np.broadcast_to(line[None, :], (px, px)).astype(np.float32)
    coarse = {"wool": 3, "leather": 5, "jute": 3}.get(material, 1)
    noise = rng.standard_normal((px // coarse + 1, px // coarse + 1), np.float32)
    grain = noise.repeat(coarse, 0).repeat(coarse, 1)[:px, :px] * np.float32(5)
    if material in {"linen", "canvas", "jute"}:
        thread = np.sin(axis * np.float32(np.pi * 80)) * np.float32(7)
        grain = grain + thread[None, :] + thread[:, None]
    return grain


def draw_cutout(look: Look, px: int, rng: np.random.Generator) -> Float32Array:
    """Draw the product on nothing: (px, px, 4) float32 in 0..255, RGB premultiplied by alpha.

    Raises:
        KeyError, ValueError: The look names an unknown category or pattern.
    """
    masks = draw_masks(look.category, look.stretch, px)
    alpha = np.minimum(masks.sum(2), 1)
    soft = Image.fromarray((alpha * 255).astype(np.uint8)).filter(ImageFilter.BoxBlur(px / 32))
    rim = np.asarray(soft, np.float32) / np.float32(255)
    weight = draw_pattern(look.design, px)[..., None]
    base, second, ink = (
        np.array(c, np.float32) for c in (look.design.base, look.design.second, _INK)
    )
    surface = (second - base) * weight
    surface += base
    surface += _draw_sheen(look.material, px, rng)[..., None]
    surface *= masks[..., :1]
    surface += masks.reshape(-1, 3)[:, 1:].dot(np.stack([second, ink])).reshape(px, px, 3)
    surface *= (0.58 + 0.42 * np.minimum(rim * 1.1, 1))[..., None]
    cutout = np.empty((px, px, 4), np.float32)
    cutout[..., 3] = 255 * alpha
    np.clip(surface, 0, cutout[..., 3:], out=cutout[..., :3])
    return cutout


def compose_shop(cutout: Float32Array) -> Image.Image:
    """Lay a (H, W, 4) cutout on pure white and return the RGB picture."""
    return Image.fromarray((cutout[..., :3] + (255 - cutout[..., 3:]) + 0.5).astype(np.uint8))
