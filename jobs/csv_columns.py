"""Guesses what each column of a CSV is: by its name, then checked by what it holds."""

import difflib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from jobs.csv_images import split_images
from jobs.errors import JobError

ROLE_COLUMNS = {
    "product_id": "product_id",
    "title": "title",
    "description": "description",
    "image": "image_uri",
    "price": "price",
    "brand": "brand",
    "category": "category",
    "color": "color",
}
"""What a column can be, and its name in the catalog."""

# Names without case, accents and separators; the earlier wins where a file has several.
_SYNONYMS = {
    "title": "title producttitle itemtitle name productname itemname displayname label headline"
    " titel produkttitel produktname artikelname artikelbezeichnung bezeichnung titre nom"
    " nomproduit nomduproduit titulo nombre nombreproducto nome nomedoproduto nomeproduto titolo"
    " nomeprodotto naam productnaam nazwa posttitle seotitle product item",
    "product_id": "productid asin id itemid sku productsku itemsku sellersku handle urlhandle"
    " uniqid uniqueid offerid listingid externalid itemnumber ebayitemid productcode productkey"
    " productnumber itemcode articleid articlenumber articleno stylenumber styleid"
    " artikelnummer artikelnr produktnummer produktid reference referencia codigo idproducto"
    " idproduto idproduit parentasin parentsku variantsku customlabel customlabelsku code"
    " gtin ean ean13 upc barcode isbn mpn index key",
    "description": "description productdescription itemdescription longdescription"
    " fulldescription bodyhtml body details content beschreibung produktbeschreibung"
    " artikelbeschreibung langbeschreibung descripcion descricao descrizione descriptif"
    " omschrijving opis shortdescription kurzbeschreibung aboutproduct about overview summary"
    " bulletpoints features text",
    "price": "price saleprice sellingprice currentprice finalprice discountedprice actualprice"
    " variantprice regularprice retailprice unitprice listprice startprice buyitnowprice"
    " standardprice priceamount msrp amount preis verkaufspreis prix precio preco prezzo"
    " prijs cena",
    "brand": "brand brandname manufacturer vendor maker marke hersteller marque fabricant marca"
    " fabricante merk marka",
    "category": "category categories productcategory categoryname categorypath maincategory"
    " categoryandsubcategory"
    " productcategorytree producttype googleproductcategory type taxonomy breadcrumbs department"
    " kategorie kategorien produktkategorie warengruppe categorie categoria categorias kategoria",
    "color": "color colour colorname colourname basecolour basecolor farbe couleur cor kleur"
    " colore kolor",
}
# Digits are left out of these: image1, image_2_url.
_MAIN_IMAGES = (
    "imageuri imageurl imagelink imagesrc image images imageurls imagelinks imagesurl imgurl"
    " img imgs imgsrc imglink mainimageurl mainimage primaryimage primaryimageurl baseimage"
    " productimage productimages productimageurl productimageuri itemimage itemimageurl heroimage"
    " featuredimage picurl picture pictures pictureurl picturelink photo photos photourl photouri"
    " largeimage imageurlslarge highresimage hires bild bilder bildurl bildlink produktbild imagem"
    " imagens urlimagem imagen imagenes urlimagen imagenprincipal immagine immagini urlimmagine"
    " afbeelding zdjecie thumbnail thumbnailurl thumb imagepath imagefile imagename filename"
    " imageurlsmedium imageurlssmall smallimage variantimage"
)
_MORE_IMAGES = (
    "additionalimagelink additionalimagelinks additionalimageurl additionalimage"
    " additionalimages additionalimageurls otherimageurl otherimage otherimages extraimage"
    " extraimages moreimages alternateimage galleryimage galleryimages gallery swatchimageurl"
    " variantimage weiterebilder zusatzbild ptimageurl"
)
_PREFIX = re.compile(r"^(?:product|produkt|item|article|artikel|listing|amazon|ebay|shop|catalog)")
_PICTURE = re.compile(r".*\.(?i:jpe?g|png|webp|gif|bmp|tiff?|avif)")
_PATH = re.compile(rf"{_PICTURE.pattern}|[\w.%~+-]*(?:/[\w.%~+-]+)+")
_NAMESPACE = re.compile(r"^[a-z]{1,4}:(?=\w)")
_CODES = (
    "id ids sku gtin ean upc isbn asin mpn barcode code zip plz postcode postal phone handle hs"
    " serial ean13 upca nummer nr"
)
_MAX_GUESS_LISTED = 40
_CHECKED_CELLS = 500


def clean_name(name: str) -> str:
    """Return a column's name as an identifier: `g:Image Link` gives image_link, `Preço` preco."""
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.strip())
    text = _NAMESPACE.sub("", unicodedata.normalize("NFKD", text).casefold())
    text = unicodedata.normalize("NFC", re.sub(r"[\u0300-\u036f]", "", text))
    text = re.sub(r"_+", "_", re.sub(r"\W", "_", text)).strip("_")
    return text if text.isidentifier() or not text else f"column_{text}"


def is_code(name: str) -> bool:
    """Tell whether a column's name says that its digits are no number."""
    return not set(_CODES.split()).isdisjoint(clean_name(name).split("_"))


def _key(name: str) -> str:
    return clean_name(name).replace("_", "")


def guess_roles(
    header: Sequence[str], rows: Sequence[Sequence[str]], chosen: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Find the column of each role; for `image` all columns with pictures.

    Args:
        header: The columns' names.
        rows: A sample of rows, each as long as the header.
        chosen: Roles that the user decided; an empty tuple turns a role off.

    Returns:
        Role to column numbers, roles without a column left out.

    Raises:
        JobError: No column for product_id or title; the columns are listed.
    """
    roles = dict(chosen)
    columns = [[row[number].strip() for row in rows] for number in range(len(header))]
    free = {n for n in range(len(header)) if not any(n in used for used in roles.values())}

    def take(role: str, fits: Callable[[list[str]], bool]) -> None:
        if role in roles:
            return
        for number in _named(header, _SYNONYMS[role].split()):
            if number in free and fits(columns[number]):
                roles[role] = (number,)
                free.discard(number)
                return

    if "image" not in roles:
        roles["image"] = _guess_images(header, columns, free)
        free -= set(roles["image"])
    take("title", _holds_text)
    titles = columns[roles["title"][0]] if roles.get("title") else None
    take("product_id", lambda cells: _is_key(cells, titles))
    take("description", _holds_text)
    for role in ("price", "brand", "category", "color"):
        take(role, _has_digits if role == "price" else _is_filled)
    for role in ("product_id", "title"):
        if not roles.get(role):
            raise JobError(_not_found(role, header))
    return {role: roles[role] for role in ROLE_COLUMNS if roles.get(role)}


def _not_found(role: str, header: Sequence[str]) -> str:
    listed = ", ".join(repr(name) for name in header[:_MAX_GUESS_LISTED])
    more = f" and {len(header) - _MAX_GUESS_LISTED} more" * (len(header) > _MAX_GUESS_LISTED)
    needs = "filled and different in each product" if role == "product_id" else "with text"
    return (
        f"no column looks like the {role} ({needs}): name it with --column {role}=NAME; "
        f"the columns are {listed}{more}"
    )


def _named(header: Sequence[str], synonyms: Sequence[str]) -> Iterator[int]:
    """Yield the columns with one of these names, best name first; then without a prefix."""
    keys = [_key(name) for name in header]
    for cut in (False, True):
        for synonym in synonyms:
            for number, key in enumerate(keys):
                if (_PREFIX.sub("", key) if cut else key) == synonym:
                    yield number


def _guess_images(
    header: Sequence[str], columns: Sequence[list[str]], free: Iterable[int]
) -> tuple[int, ...]:
    more = _MORE_IMAGES.split()
    bases = {n: re.sub(r"\d+", "", _key(header[n])) for n in sorted(free)}
    good = [n for n in bases if _holds_images(columns[n])]
    found = next(
        (name for name in _MAIN_IMAGES.split() for n in good if bases[n] == name), None
    ) or next((bases[n] for n in good if bases[n] in more), None)
    if found is None:
        return ()
    # A column that is empty in the sample may hold a tenth picture later on.
    maybe = [n for n in bases if n in good or not any(columns[n])]
    main = [n for n in maybe if bases[n] == found]
    return (*main, *(n for n in maybe if bases[n] in more and n not in main))


def _holds_images(cells: Sequence[str]) -> bool:
    return _share(cells, lambda cell: _are_images(cell, _PATH))


def _are_images(cell: str, path: re.Pattern[str]) -> bool:
    pieces = split_images(cell)
    return bool(pieces) and all("://" in one or path.fullmatch(one) for one in pieces)


def _share(cells: Sequence[str], fits: Callable[[str], bool]) -> bool:
    """Tell whether most of the filled cells fit."""
    filled = [cell for cell in cells if cell][:_CHECKED_CELLS]
    return 2 * sum(map(fits, filled)) > len(filled)


def _holds_text(cells: Sequence[str]) -> bool:
    return any(cells) and not _share(cells, lambda cell: _are_images(cell, _PICTURE))


def _is_filled(cells: Sequence[str]) -> bool:
    return any(cells)


def _has_digits(cells: Sequence[str]) -> bool:
    return _share(cells, lambda cell: any(map(str.isdigit, cell)))


def _is_key(cells: Sequence[str], titles: Sequence[str] | None) -> bool:
    """Tell whether a column is filled and differs from product to product."""
    shown = titles if titles is not None and any(titles) else ["x"] * len(cells)
    products = [pair for pair in zip(cells, shown, strict=True) if pair[1]]
    filled = [cell for (cell, _), _ in groupby(products) if cell]  # a row a picture: one product
    return 2 * sum(bool(cell) for cell, _ in products) > len(products) and 2 * len(
        set(filled)
    ) > len(filled)


def read_choices(choices: Sequence[str], header: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Read `role=NAME` choices; `image=A,B` names several, `role=` turns a role off.

    Args:
        choices: As given on the command line.
        header: The columns' names.

    Raises:
        JobError: A role or a column is unknown (the nearest are named), or one is named twice.
    """
    found: dict[str, tuple[int, ...]] = {}
    for choice in choices:
        role, mark, name = choice.partition("=")
        role = {"image_uri": "image"}.get(role.strip(), role.strip())
        if not mark:
            raise JobError(f"--column {choice!r}: expected role=NAME")
        if role not in ROLE_COLUMNS:
            raise JobError(f"--column {choice!r}: no role {role!r}{_nearest(role, ROLE_COLUMNS)}")
        numbers = _find_columns(name.strip(), header, several=role == "image")
        if role in found and role != "image":
            raise JobError(f"--column {choice!r}: {role} is named twice")
        found[role] = tuple(dict.fromkeys((*found.get(role, ()), *numbers)))
    used = [number for numbers in found.values() for number in numbers]
    twice = [header[number] for number in set(used) if used.count(number) > 1]
    if twice:
        raise JobError(f"--column: {twice[0]!r} is named for two roles")
    return found


def _find_columns(name: str, header: Sequence[str], *, several: bool) -> tuple[int, ...]:
    if not name:
        return ()
    same = [n for n, one in enumerate(header) if one == name] or [
        n for n, one in enumerate(header) if _key(one) == _key(name) and _key(name)
    ]
    if several and not same and "," in name:
        parts = [part.strip() for part in name.split(",") if part.strip()]
        return tuple(n for part in parts for n in _find_columns(part, header, several=True))
    if not same:
        raise JobError(f"--column: no column {name!r}{_nearest(name, header)}")
    return tuple(same) if several else (same[0],)


def _nearest(name: str, known: Iterable[str]) -> str:
    names = list(dict.fromkeys(one for one in known if one))
    lower = {one.lower(): one for one in names}
    near = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(repr(lower[one]) for one in near)}?"
    return f"; expected one of {', '.join(repr(one) for one in names[:_MAX_GUESS_LISTED])}"


def name_columns(header: Sequence[str], roles: Mapping[str, tuple[int, ...]]) -> dict[int, str]:
    """Name the columns that are no role, each once: the number's catalog name.

    Args:
        header: The columns' names.
        roles: From `guess_roles`.
    """
    # A picture column of another name would be read as the catalog's.
    taken = {"image", "image_uri", *(ROLE_COLUMNS[role] for role in roles)}
    used = {number for numbers in roles.values() for number in numbers}
    names: dict[int, str] = {}
    for number, name in enumerate(header):
        if number in used:
            continue
        base = clean_name(name) or f"column_{number + 1}"
        free = base
        count = 2
        while free in taken:
            free, count = f"{base}_{count}", count + 1
        taken.add(free)
        names[number] = free
    return names
