"""Asks one question of the releases on the page, and compares what they find.

An answer is plain values for JSON; `docs/demo-page.md` lists them.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from jobs.demo_columns import Filter, make_predicate
from jobs.demo_pictures import Pictures
from jobs.demo_release import Shown, product_vector
from jobs.errors import JobError
from jobs.images import FORMATS, ImageRejected, RejectReason
from jobs.search import Result

Float32Array = npt.NDArray[np.float32]
Row = dict[str, Any]

LARGEST_EXACT: Final = 2**53  # JavaScript rounds larger integers
REFUSALS: Final = {
    RejectReason.NOT_AN_IMAGE: f"This file is not a picture. These are read: {', '.join(FORMATS)}.",
    RejectReason.EMPTY_FILE: "This file is empty.",
    RejectReason.TRUNCATED: "This picture's file is cut short.",
    RejectReason.UNDECODABLE: "This picture's file is damaged.",
    RejectReason.TOO_MANY_BYTES: "This picture's file is too large.",
    RejectReason.TOO_MANY_PIXELS: "This picture has too many pixels.",
}


class PhotoError(JobError):
    """A photo that can't be a query, told in a sentence.

    Attributes:
        reason: Why.
    """

    def __init__(self, rejected: ImageRejected) -> None:
        """Take the reason and, of a limit, the figures."""
        self.reason = rejected.reason
        sentence = REFUSALS.get(rejected.reason, f"This photo can't be used: {rejected}.")
        figures = rejected.reason in (RejectReason.TOO_MANY_BYTES, RejectReason.TOO_MANY_PIXELS)
        super().__init__(f"{sentence[:-1]}: {rejected.detail}." if figures else sentence)


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is searched for: a photo, words, both, or what is like a product.

    Attributes:
        image: An encoded picture.
        text: Words.
        product_id: A product; then there is neither photo nor words.
        image_weight: Share of the photo, in [0, 1]; None: each release's own.
        field: Which product vectors to compare with; None: each release's first.
        k: Most products.
        filters: What all products have to pass.
    """

    image: bytes | None = None
    text: str | None = None
    product_id: str | None = None
    image_weight: float | None = None
    field: str | None = None
    k: int = 10
    filters: tuple[Filter, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Query:
    """A query's vector (1, D), how long it took, and the product to leave out."""

    vector: Float32Array
    encode_ms: float
    without: str | None = None


def ask(shown: Sequence[Shown], question: Question, pictures: Pictures) -> Row:
    """Search all releases for the same; each encodes the query by its own encoder.

    Args:
        shown: The releases; what the first can't answer is an error, what only another can't is
            said in that one's answer.
        question: What is searched for.
        pictures: Tells which products have one.

    Returns:
        `answers`, and `shared`: how many products both of them found; None where one alone answers.

    Raises:
        PhotoError: The photo can't be used.
        JobError: The first release can't be searched so, or lacks the product.
    """
    encoded: dict[Any, _Query] = {}
    answers: list[Row] = []
    for place, one in enumerate(shown):
        try:
            answers.append(_answer(one, question, pictures, encoded))
        except JobError as error:
            if place == 0:
                raise
            answers.append({"error": str(error), "results": [], "ms": None})
        answers[-1] |= {"key": one.key, "name": one.name}
    both = len(answers) > 1 and answers[-1]["error"] is None
    return {"answers": answers, "shared": _mark_places(answers) if both else None}


def _answer(one: Shown, question: Question, pictures: Pictures, encoded: dict[Any, _Query]) -> Row:
    only = make_predicate(question.filters, one.columns)
    query = _encode(one, question, encoded)
    start = time.perf_counter()
    k = question.k if query.without is None else question.k + 1
    found = one.searcher.search_vectors(query.vector, k=k, field=question.field, only=only)[0]
    search_ms = 1e3 * (time.perf_counter() - start)
    kept = [result for result in found if result.product_id != query.without][: question.k]
    return {
        "results": _result_rows(one, kept, pictures),
        "ms": {"encode": query.encode_ms, "search": search_ms},
        "error": None,
    }


def _encode(one: Shown, question: Question, encoded: dict[Any, _Query]) -> _Query:
    """Make the query's vector, once for releases of one encoder and one fusion."""
    start = time.perf_counter()
    if question.product_id is not None:
        field = question.field or one.searcher.fields[0]
        if field not in one.searcher.fields:
            raise JobError(f"{one.name} has no field {field!r}")
        vector = product_vector(one, question.product_id, field)
        if vector is None:
            raise JobError(f"{one.name} has no product {question.product_id!r}")
        return _Query(vector=vector[None], encode_ms=_since(start), without=question.product_id)
    space = (one.searcher.space.encoder, one.searcher.space.fusion)
    if space not in encoded:
        try:
            vector = one.searcher.encode(
                question.image, question.text, image_weight=question.image_weight
            )
        except JobError as error:
            if isinstance(error.__cause__, ImageRejected):
                raise PhotoError(error.__cause__) from error
            raise
        encoded[space] = _Query(vector=vector[None], encode_ms=_since(start))
    return encoded[space]


def _since(start: float) -> float:
    return 1e3 * (time.perf_counter() - start)


def _result_rows(one: Shown, results: Sequence[Result], pictures: Pictures) -> list[Row]:
    return [
        {
            "place": place,
            "product_id": result.product_id,
            "title": _words(result.metadata.get(one.title or "")) or result.product_id,
            "price": plain(result.metadata.get(one.price or "")),
            "score": result.score,
            "image": f"/api/image/{one.key}/{result.vector_id}"
            if pictures.has(result.image_uri)
            else None,
            "metadata": plain(result.metadata),
        }
        for place, result in enumerate(results, 1)
    ]


def _words(value: object) -> str:
    return "" if value is None else str(value).strip()


def plain(value: object) -> object:
    """Turn what a table holds into what the page's JSON can hold: all else is said in words."""
    if isinstance(value, dict):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int) and abs(value) > LARGEST_EXACT:
        return str(value)
    return value if value is None or isinstance(value, str | int) else str(value)


def _mark_places(answers: Sequence[Row]) -> int:
    """Say of each result where the other release has it; return how many both have."""
    first, second = (
        {row["product_id"]: row["place"] for row in answer["results"]} for answer in answers
    )
    for answer, other in zip(answers, (second, first), strict=True):
        for row in answer["results"]:
            row["other_place"] = other.get(row["product_id"])
    return len(first.keys() & second.keys())
