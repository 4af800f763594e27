"""Draw street pictures of the sample catalog: the product as a shopper's camera meets it.

Cluttered ground, perspective, shadow, something in front, uneven coloured light, blur and noise:
all drawn from the numpy Generator that is passed in, so a view is a function of its seed.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from jobs.render import PATTERNS, Colour, Design, Float32Array, draw_pattern

_MAX_TURN_RAD = 0.45
_SCALE = (0.62, 0.92)  # side of the product's square in the picture, as a share of its side


def _draw_colour(rng: np.random.Generator) -> Colour:
    """Draw an RGB colour in 20..235, muted more often than not."""
    grey = rng.uniform(40, 215)
    red, green, blue = grey + (rng.uniform(20, 235, 3) - grey) * rng.uniform(0.1, 0.9)
    return float(red), float(green), float(blue)


def _round_colour(colour: Colour) -> tuple[int, int, int]:
    red, green, blue = colour
    return round(red), round(green), round(blue)


def _draw_ground(px: int, rng: np.random.Generator) -> Image.Image:
    """Draw a two-coloured ground, shaded or patterned like cloth."""
    design = Design(
        pattern=PATTERNS[rng.integers(len(PATTERNS))],
        base=_draw_colour(rng),
        second=_draw_colour(rng),
        cycles=rng.uniform(2, 9),
        angle=rng.uniform(0, np.pi),
        phase=(rng.uniform(), rng.uniform()),
        duty=rng.uniform(0.2, 0.5),
    )
    if rng.uniform() < 0.5:
        design = replace(design, pattern="gradient")
    weight = draw_pattern(design, px) * np.float32(255 * rng.uniform(0.3, 1))
    return Image.composite(
        Image.new("RGB", (px, px), _round_colour(design.second)),
        Image.new("RGB", (px, px), _round_colour(design.base)),
        Image.fromarray(weight.astype(np.uint8)),
    )


def _scatter_clutter(ground: Image.Image, rng: np.random.Generator) -> None:
    """Draw 6 to 18 random shapes over the ground."""
    px = ground.width
    pen = ImageDraw.Draw(ground)
    for _ in range(rng.integers(6, 19)):
        x, y = rng.uniform(-0.1, 1.1, 2) * px
        width, height = rng.uniform(0.04, 0.4, 2) * px
        fill = _round_colour(_draw_colour(rng))
        match rng.integers(4):
            case 0:
                pen.ellipse((x, y, x + width, y + height), fill=fill)
            case 1:
                pen.rounded_rectangle((x, y, x + width, y + height), width / 6, fill=fill)
            case 2:
                pen.polygon((x, y, x + width, y + height / 3, x + width / 4, y + height), fill=fill)
            case _:
                end = rng.uniform(0, px, 2)
                pen.line((x, y, end[0], end[1]), fill=fill, width=1 + round(width / 10))


def _draw_quad(px: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return where the product's four corners land: (4, 2) float64 pixels, clockwise."""
    angle, scale = rng.uniform(-_MAX_TURN_RAD, _MAX_TURN_RAD), rng.uniform(*_SCALE)
    corners = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
    corners += rng.uniform(-0.09, 0.09, (4, 2))
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    slack = (1 - scale) / 2
    placed: npt.NDArray[np.float64] = corners @ turn * scale + rng.uniform(-slack, slack, 2)
    return (placed + 0.5) * px


def _warp(cutout: Float32Array, quad: npt.NDArray[np.float64]) -> tuple[Image.Image, Image.Image]:
    """Warp an (H, W, 4) cutout onto `quad`: its premultiplied RGB picture and its alpha."""
    px = cutout.shape[0]
    source = np.array([[0, 0], [px, 0], [px, px], [0, px]], np.float64)
    rows = []
    for (x, y), (u, v) in zip(quad, source, strict=True):
        rows.append([x, y, 1, 0, 0, 0, -u * x, -u * y])
        rows.append([0, 0, 0, x, y, 1, -v * x, -v * y])
    plane = np.linalg.solve(np.array(rows), source.ravel())
    # CMYK: four independent bytes a pixel, for Pillow would unpremultiply RGBA.
    picture = Image.frombuffer("CMYK", (px, px), cutout.astype(np.uint8).tobytes())
    warped = picture.transform(
        (px, px),
        Image.Transform.PERSPECTIVE,
        [round(float(c), 9) for c in plane],
        Image.Resampling.BILINEAR,
        fillcolor=(0, 0, 0, 0),
    )
    red, green, blue, alpha = warped.split()
    return Image.merge("RGB", (red, green, blue)), alpha


def _cast_shadow(alpha: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return how dark the product's shadow makes the ground: a grey picture, 255 is black."""
    px = alpha.width
    dx, dy = (int(d) for d in rng.integers(px // 60, px // 12, 2))
    moved = ImageChops.offset(alpha, dx if rng.uniform() < 0.5 else -dx, dy)
    depth = rng.uniform(0.25, 0.6)
    soft = moved.reduce(2).filter(ImageFilter.BoxBlur(px / 60))
    shadow = soft.point((np.arange(256) * depth).astype(np.uint8).tolist())
    return shadow.resize(alpha.size, Image.Resampling.BILINEAR)


def _occlude(scene: Image.Image, quad: npt.NDArray[np.float64], rng: np.random.Generator) -> None:
    """Put one or two things before the product's edge; its middle stays in sight."""
    pen = ImageDraw.Draw(scene)
    px = scene.width
    centre = quad.mean(0)
    for _ in range(rng.integers(0, 3)):
        edge = rng.integers(4)
        along = rng.uniform(0.2, 0.8)
        x, y = quad[edge] * along + quad[(edge + 1) % 4] * (1 - along)
        x, y = np.array([x, y]) * 0.82 + centre * 0.18
        half_width, half_height = rng.uniform(0.05, 0.14, 2) * px
        fill = _round_colour(_draw_colour(rng))
        box = (x - half_width, y - half_height, x + half_width, y + half_height)
        if rng.uniform() < 0.5:
            pen.ellipse(box, fill=fill)
        else:
            pen.polygon(
                (box[0], y, x, box[1], box[2], y - half_height / 3, x + half_width / 3, box[3]),
                fill=fill,
            )


def _light(scene: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Put a coloured, slanted light on the scene, and sensor noise over it."""
    px = scene.width
    axis = np.linspace(-1, 1, px, dtype=np.float32)
    slope_x, slope_y = rng.uniform(-0.22, 0.22, 2).astype(np.float32)
    slant = 1 + slope_x * axis[None, :] + slope_y * axis[:, None]
    gains = rng.uniform(0.72, 1.12) * rng.uniform(0.9, 1.1, 3)
    table = np.minimum(np.outer(gains, np.arange(256)), 255).astype(np.uint8)
    cast = scene.point(table.ravel().tolist())
    noise = rng.standard_normal((px, px), np.float32) * np.float32(rng.uniform(1, 9))
    lit = np.asarray(cast) * slant[..., None]
    lit += noise[..., None]
    np.clip(lit, 0, 255, out=lit)
    return Image.fromarray(lit.astype(np.uint8))


def draw_street(cutout: Float32Array, rng: np.random.Generator) -> Image.Image:
    """Photograph a product as a shopper would.

    Args:
        cutout: (H, W, 4) float32 in 0..255, H == W, RGB premultiplied by alpha.
        rng: Decides the whole scene.

    Returns:
        An RGB picture of the cutout's size.
    """
    px = cutout.shape[0]
    # Drawn at half the size: the ground is out of focus.
    ground = _draw_ground(px // 2, rng)
    _scatter_clutter(ground, rng)
    ground = ground.resize((px, px), Image.Resampling.BILINEAR)
    quad = _draw_quad(px, rng)
    product, alpha = _warp(cutout, quad)
    ground.paste((0, 0, 0), mask=_cast_shadow(alpha, rng))
    ground.paste((0, 0, 0), mask=alpha)
    scene = ImageChops.add(ground, product)
    _occlude(scene, quad, rng)
    if rng.uniform() < 0.6:
        scene = scene.filter(ImageFilter.BoxBlur(rng.uniform(0.2, 1.3) * px / 224))
    return _light(scene, rng)
