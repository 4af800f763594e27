"""Keeps other web sites from using the page, and large uploads from being read."""

from collections.abc import Mapping
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.demo_hosts import host_name, is_loopback

SECURITY_HEADERS: Final[Mapping[str, str]] = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
        "form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Guard:
    """An ASGI application around another: refuses, or adds `SECURITY_HEADERS` to its answers."""

    def __init__(self, app: ASGIApp, *, loopback: bool, max_body_bytes: int) -> None:
        """Put it around an application.

        Args:
            app: The application.
            loopback: Whether it is bound to this machine alone. Then a request must name this
                machine as its host: a name of others that resolves to it is DNS rebinding.
            max_body_bytes: Most bytes of a request's body.
        """
        self._app, self._loopback, self._max_body_bytes = app, loopback, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        refused = self._refuse(scope["method"], Headers(scope=scope))
        await (refused or self._app)(scope, receive, send_guarded)

    def _refuse(self, method: str, headers: Headers) -> JSONResponse | None:
        host = headers.get("host", "")
        if self._loopback and not is_loopback(host_name(host)):
            return _refusal(421, f"This page is served to this machine alone, not as {host!r}.")
        if method in ("GET", "HEAD"):
            return None
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        own = origin is None or origin.partition("://")[2] == host
        if not own or site not in ("same-origin", "none"):
            return _refusal(403, "Another web site sent this; only the page itself may search.")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._max_body_bytes:
            return _refusal(413, too_large(self._max_body_bytes))
        return None


def too_large(max_body_bytes: int) -> str:
    """Return the sentence for an upload over the limit."""
    return f"This upload is too large: the limit is {max_body_bytes / 1e6:.1f} MB."


def _refusal(status: int, sentence: str) -> JSONResponse:
    # What is left of the request is not read: the connection ends.
    return JSONResponse({"error": sentence}, status, {"Connection": "close"})
