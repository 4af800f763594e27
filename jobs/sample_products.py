"""Invent the products of the sample catalog: their families, designs and words.

Families of four products of different categories share one design, so a picture's texture alone
does not tell the product: its shape and its words do. Every product is a function of (seed,
number): the same whatever the sample's size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from jobs.render import PATTERNS, Colour, Design, Look

FAMILY_PRODUCTS = 4
SHARD_PRODUCTS = 1_000
# Separate streams of random numbers under one seed; jobs/sample.py uses others.
_DESIGN, _PRODUCT, _WORDS, _SHUFFLE = 0, 1, 4, 6

# category -> (materials, typical price, what it is for)
_CATEGORIES: dict[str, tuple[tuple[str, ...], float, str]] = {
    "mug": (("ceramic", "steel", "glass"), 14, "Holds 350 ml and keeps its handle cool."),
    "t-shirt": (("cotton", "linen"), 24, "Cut straight, with a ribbed neck."),
    "cushion": (("cotton", "linen", "wool"), 29, "Soft filling, hidden zip and piped edge."),
    "backpack": (("canvas", "nylon", "leather"), 69, "Padded straps and a zipped front pocket."),
    "lamp": (("linen", "cotton", "glass"), 59, "A table light with a pull cord."),
    "vase": (("ceramic", "glass"), 39, "Stands firm with tall stems."),
    "plate": (("ceramic", "steel"), 12, "A dinner plate of 27 cm."),
    "sneaker": (("canvas", "leather"), 79, "A light sole and cotton laces."),
    "hat": (("cotton", "wool", "canvas"), 32, "A wide brim against the sun."),
    "umbrella": (("nylon", "cotton"), 35, "Opens with one hand and stands a gale."),
    "bottle": (("steel", "glass"), 22, "Holds 750 ml behind a tight cap."),
    "rug": (("wool", "jute", "cotton"), 119, "Woven flat, with a fringe on two sides."),
}
CATEGORIES = tuple(_CATEGORIES)

COLOURS: dict[str, Colour] = {
    "red": (205, 38, 44),
    "orange": (238, 126, 34),
    "yellow": (246, 208, 56),
    "green": (52, 140, 70),
    "teal": (30, 148, 150),
    "blue": (52, 108, 214),
    "navy": (28, 40, 92),
    "purple": (124, 62, 160),
    "pink": (244, 148, 178),
    "brown": (116, 74, 44),
    "beige": (222, 202, 164),
    "grey": (142, 146, 150),
    "black": (34, 34, 38),
    "white": (246, 245, 241),
}

# pattern -> (as an adjective, as a noun)
_PATTERN_WORDS = {
    "plain": ("plain", "trim"),
    "stripes": ("striped", "stripes"),
    "checks": ("checked", "checks"),
    "dots": ("dotted", "dots"),
    "zigzag": ("zigzag", "zigzags"),
    "floral": ("floral", "flowers"),
    "gradient": ("gradient", "fading colour"),
    "triangles": ("triangle", "triangles"),
    "diamonds": ("diamond", "diamonds"),
    "waves": ("wavy", "waves"),
}
_SYLLABLES = (
    "ar", "bel", "cor", "dun", "el", "fen", "gar", "hol", "in", "jor",
    "kel", "lin", "mar", "nor", "os", "per", "quin", "ros", "sol", "tam",
)  # fmt: skip

_COMBINATIONS = tuple(
    (pattern, first, second)
    for pattern in PATTERNS
    for first in COLOURS
    for second in COLOURS
    if first != second
)

Row = Mapping[str, str | int | float]


@dataclass(frozen=True, kw_only=True)
class SampleProduct:
    """One product: what it looks like and what its catalog row says."""

    number: int
    look: Look
    color: str
    second_color: str
    row: Row


@lru_cache(maxsize=4)
def _shuffle_combinations(seed: int) -> tuple[int, ...]:
    """Return the seed's order of the (pattern, colour, second colour) combinations."""
    rng = np.random.default_rng((seed, _SHUFFLE))
    return tuple(rng.permutation(len(_COMBINATIONS)).tolist())


@lru_cache(maxsize=64)
def _describe_family(seed: int, family: int) -> tuple[Design, str, str, tuple[str, ...], str]:
    """Return a family's design, two colour names, its categories and its collection's name."""
    round_number, position = divmod(family, len(_COMBINATIONS))
    combination = _shuffle_combinations(seed)[position]
    pattern, first, second = _COMBINATIONS[combination]
    # A combination keeps one order of categories: rounds take it four by four, so no
    # (category, combination) comes twice before every one was used.
    order = np.random.default_rng((seed, _SHUFFLE, combination)).permutation(len(CATEGORIES))
    rounds = len(CATEGORIES) // FAMILY_PRODUCTS
    start = round_number % rounds * FAMILY_PRODUCTS
    rng = np.random.default_rng((seed, _DESIGN, family))

    def vary(name: str) -> Colour:
        red, green, blue = np.clip(np.array(COLOURS[name]) + rng.uniform(-9, 9, 3), 0, 250)
        return float(red), float(green), float(blue)

    design = Design(
        pattern=pattern,
        base=vary(first),
        second=vary(second),
        cycles=rng.uniform(4.5, 11),
        angle=rng.uniform(0, np.pi),
        phase=(rng.uniform(), rng.uniform()),
        duty=rng.uniform(0.26, 0.42),
    )
    name = "".join(_SYLLABLES[i] for i in rng.integers(len(_SYLLABLES), size=3)).capitalize()
    categories = tuple(CATEGORIES[i] for i in order[start : start + FAMILY_PRODUCTS])
    return design, first, second, categories, name


def describe_product(number: int, seed: int) -> SampleProduct:
    """Describe product `number` (from 1) of the seed's endless catalog."""
    family, member = divmod(number - 1, FAMILY_PRODUCTS)
    design, first, second, categories, collection = _describe_family(seed, family)
    category = categories[member]
    materials, typical_price, purpose = _CATEGORIES[category]
    rng = np.random.default_rng((seed, _PRODUCT, number))
    material = materials[rng.integers(len(materials))]
    stretch = (rng.uniform(0.88, 1.04), rng.uniform(0.88, 1.04))
    adjective, noun = _PATTERN_WORDS[design.pattern]
    scale = "fine" if design.cycles > 7.75 else "bold"
    motif = f"{second} trim" if design.pattern == "plain" else f"{scale} {second} {noun}"
    product_id = f"P{number:07d}"
    row: Row = {
        "product_id": product_id,
        "title": f"{first.capitalize()} and {second} {adjective} {material} {category}",
        "description": f"A {first} {category} in {material} with {motif}, "
        f"from the {collection} collection. {purpose}",
        "category": category,
        "color": first,
        "pattern": design.pattern,
        "material": material,
        "price": round(typical_price * float(np.exp(rng.normal(0, 0.25)))) + 0.9,
        "stock": int(rng.integers(0, 200)),
        "image_uri": f"images/shop/{shard_folder(number)}/{product_id}.jpg",
    }
    look = Look(category=category, design=design, material=material, stretch=stretch)
    return SampleProduct(number=number, look=look, color=first, second_color=second, row=row)


def shard_folder(number: int) -> str:
    """Name the folder of a product's pictures; 1,000 products share one."""
    return f"{(number - 1) // SHARD_PRODUCTS:03d}"


def word_query(product: SampleProduct, seed: int, view: int) -> str:
    """Say in a few words what a shopper would add to the view's picture."""
    category, color = product.look.category, product.color
    adjective, noun = _PATTERN_WORDS[product.look.design.pattern]
    wordings = (
        f"{color} {adjective} {category}",
        f"{category} in {color} with {product.second_color} {noun}",
        f"{adjective} {product.look.material} {category}, {color}",
        f"{color} and {product.second_color} {category}",
        f"this {adjective} design as a {color} {category}",
    )
    rng = np.random.default_rng((seed, _WORDS, product.number, view))
    return wordings[rng.integers(len(wordings))]
