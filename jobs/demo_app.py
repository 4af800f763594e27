"""The page's HTTP interface: static files, what is open, a search, and pictures."""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Annotated, Any, Final

import numpy as np
from fastapi import FastAPI, File, Form, Header, HTTPException, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp

from jobs.demo_columns import read_filters
from jobs.demo_guard import Guard, too_large
from jobs.demo_pictures import Pictures
from jobs.demo_release import Shown
from jobs.demo_search import PhotoError, Question, ask
from jobs.errors import JobError, StoreError
from jobs.images import ImageRejected, ImagesConfig, RejectReason

MOST_RESULTS: Final = 100
FORM_BYTES: Final = 1_000_000  # of a request, beside the photo
CACHE_S: Final = 86_400
STATIC: Final = ("index.html", "demo.css", "demo.js", "elements.js", "filters.js", "products.js")
KINDS: Final = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
PHOTO_STATUS: Final = {
    RejectReason.TOO_MANY_BYTES: 413,
    RejectReason.TOO_MANY_PIXELS: 413,
    RejectReason.NOT_AN_IMAGE: 415,
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Page:
    """What the page shows.

    Attributes:
        shown: One release or two.
        pictures: Of the catalog.
        images: Limits of photos.
        max_text_chars: Most characters of the words.
    """

    shown: tuple[Shown, ...]
    pictures: Pictures
    images: ImagesConfig
    max_text_chars: int


def create_app(page: Page, *, loopback: bool) -> ASGIApp:
    """Make the application.

    Args:
        page: What it shows.
        loopback: Whether it is bound to this machine alone.
    """
    app = FastAPI(openapi_url=None)
    max_body_bytes = page.images.max_bytes + FORM_BYTES
    _add_errors(app, max_body_bytes)
    _add_static(app)
    _add_release(app, page)
    _add_image(app, page)
    _add_search(app, page, max_body_bytes)
    return Guard(app, loopback=loopback, max_body_bytes=max_body_bytes)


def _add_errors(app: FastAPI, max_body_bytes: int) -> None:
    """Answer every error with one sentence."""

    @app.exception_handler(JobError)
    def tell_job_error(_: Request, error: JobError) -> JSONResponse:
        status = 503 if isinstance(error, StoreError) else 400
        if isinstance(error, PhotoError):
            status = PHOTO_STATUS.get(error.reason, 422)
        return _error(status, str(error))

    @app.exception_handler(RequestValidationError)
    def tell_fault(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return _error(400, f"{first['loc'][-1]}: {first['msg']}")

    @app.exception_handler(StarletteHTTPException)
    def tell_status(_: Request, error: StarletteHTTPException) -> JSONResponse:
        too_much = error.status_code == 413
        return _error(error.status_code, too_large(max_body_bytes) if too_much else error.detail)

    @app.exception_handler(Exception)
    def tell_bug(_: Request, __: Exception) -> JSONResponse:  # Starlette raises it again: a log
        return _error(500, "The server failed; the terminal that runs it says why.")


def _error(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"error": sentence}, status)


def _add_static(app: FastAPI) -> None:
    folder = resources.files("jobs") / "demo_page"

    def add(path: str, content: bytes, kind: str) -> None:
        @app.get(path)
        def static() -> Response:
            return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    for name in STATIC:
        path = "/" if name == "index.html" else f"/{name}"
        add(path, (folder / name).read_bytes(), KINDS[name.rpartition(".")[2]])


def _add_release(app: FastAPI, page: Page) -> None:
    described = {
        "releases": [_describe(one) for one in page.shown],
        "limits": {
            "image_bytes": page.images.max_bytes,
            "text_chars": page.max_text_chars,
            "results": MOST_RESULTS,
        },
    }

    @app.get("/api/release")
    def release() -> JSONResponse:
        return JSONResponse(described, headers={"Cache-Control": "no-cache"})


def _describe(one: Shown) -> dict[str, Any]:
    space = one.searcher.space
    return {
        "key": one.key,
        "name": one.name,
        "created_at": one.release.created_at,
        "products": one.release.products,
        "encoder": space.encoder,
        "fields": one.searcher.fields,
        "default_field": one.searcher.fields[0],
        "image_weight": space.fusion.query_image_weight,
        "filters": [asdict(column) for column in one.columns.values()],
    }


def _add_image(app: FastAPI, page: Page) -> None:
    @app.get("/api/image/{key}/{vector_id}")
    def image(key: str, vector_id: int, if_none_match: Annotated[str, Header()] = "") -> Response:
        row = _find_row(page.shown, key, vector_id)
        tag = f'"{key}-{vector_id}"'  # a release never changes
        headers = {"ETag": tag, "Cache-Control": f"private, max-age={CACHE_S}"}
        if tag in if_none_match:
            return Response(status_code=304, headers=headers)
        try:
            content = page.pictures.thumbnail(row)
        except ImageRejected as rejected:
            _log.warning("no picture of %s: %s", row["product_id"], rejected)
            raise HTTPException(404, f"There is no picture: {rejected.reason}.") from rejected
        return Response(content, media_type="image/jpeg", headers=headers)


def _find_row(shown: tuple[Shown, ...], key: str, vector_id: int) -> dict[str, Any]:
    """Return the row of a release's ids.

    Raises:
        HTTPException: It is of no release that is open.
    """
    for one in shown:
        if one.key == key and 0 <= vector_id < 2**63:
            known = one.searcher.ids.present(np.array([vector_id], np.int64))
            for row in one.searcher.ids.find(known):
                return row
    raise HTTPException(404, "No release that is open has such a picture.")


def _add_search(app: FastAPI, page: Page, max_body_bytes: int) -> None:
    # One thread: torch and FAISS have all cores, and the time that is shown is the search's own.
    thread = ThreadPoolExecutor(1, "search")

    @app.post("/api/search", max_body_size=max_body_bytes)
    def search(
        image: Annotated[UploadFile | None, File()] = None,
        text: Annotated[str, Form(max_length=page.max_text_chars)] = "",
        product_id: Annotated[str, Form()] = "",
        image_weight: Annotated[float | None, Form(ge=0, le=1)] = None,
        field: Annotated[str | None, Form()] = None,
        k: Annotated[int, Form(ge=1, le=MOST_RESULTS)] = 10,
        filters: Annotated[str, Form()] = "[]",
    ) -> JSONResponse:
        question = Question(
            image=_read_photo(image, page.images),
            text=text.strip() or None,
            product_id=product_id or None,
            image_weight=image_weight,
            field=field,
            k=k,
            filters=tuple(read_filters(filters)),
        )
        _check_question(question)
        return JSONResponse(thread.submit(ask, page.shown, question, page.pictures).result())


def _read_photo(image: UploadFile | None, images: ImagesConfig) -> bytes | None:
    """Return an upload's bytes; None where no file was chosen.

    Raises:
        PhotoError: It is too large.
    """
    if image is None or not image.filename:
        return None
    if image.size is None or image.size > images.max_bytes:
        detail = f"{image.size} bytes, limit {images.max_bytes}"
        raise PhotoError(ImageRejected(RejectReason.TOO_MANY_BYTES, detail))
    return image.file.read()


def _check_question(question: Question) -> None:
    """Refuse a question of nothing, or of too much.

    Raises:
        JobError: As the first line says.
    """
    given = question.image is not None or question.text is not None
    if question.product_id is not None and given:
        raise JobError("Give a product, or a photo and words, not both.")
    if question.product_id is None and not given:
        raise JobError("Give a photo, words, or both.")
