"""The `demo` command: a web page that searches one release, or two side by side."""

import errno
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from jobs.catalog import Catalog, read_catalog
from jobs.config import JobConfig
from jobs.demo_hosts import is_loopback, page_address
from jobs.errors import JobError
from jobs.progress import Progress
from jobs.store import Release, Store

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from jobs.demo_release import Shown

NEEDED = {"fastapi": "fastapi", "uvicorn": "uvicorn", "python_multipart": "python-multipart"}
LAST_ANSWERS_S = 3


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What is shown, and where.

    Attributes:
        release: The release; the newest if None.
        compare: Another release's version, or a candidate's name; None: nothing beside it.
        host: Name or address to bind to.
        port: 0: any that is free.
    """

    release: int | None = None
    compare: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000


def demo(
    config: JobConfig, options: DemoOptions, progress: Progress, announce: Callable[[str], None]
) -> None:
    """Open the releases and serve the page until Ctrl-C.

    Args:
        config: The job; `store`, `catalog` and `images` are read.
        options: What is shown, and where.
        progress: Shows what happens before.
        announce: Is told the address once the page answers.

    Raises:
        JobError: The optional packages are missing, or the address can't be bound to.
        StoreError: There is no such release, or it is damaged.
        CatalogError: The catalog, whose pictures are shown, can't be read.
    """
    _check_installed()
    from jobs.demo_app import Page, create_app
    from jobs.demo_pictures import Pictures

    with _listen(options.host, options.port) as listener:
        shown = _open_releases(config, options, progress)
        progress.stage("read the catalog")
        pictures = Pictures(_find_catalog(config, shown), config.images)
        page = Page(
            shown=shown,
            pictures=pictures,
            images=config.images,
            max_text_chars=config.catalog.max_text_chars,
        )
        app = create_app(page, loopback=is_loopback(options.host))
        names = " and ".join(one.name for one in shown)
        address = page_address(options.host, listener.getsockname()[1])
        announce(f"{names} on {address} (Ctrl-C ends it)")
        _serve(app, listener)


def _check_installed() -> None:
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise JobError(
            f"`vitrine demo` needs {', '.join(missing)}, not installed here; run `pip install "
            "--editable '.[demo]'` in Vitrine's folder, or install all of requirements.lock"
        )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family)
    except (OSError, OverflowError) as error:
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        advice = "; another program has it: give another --port, or 0 for any" if taken else ""
        raise JobError(f"can't serve on {host}, port {port}: {error}{advice}") from error


def _open_releases(
    config: JobConfig, options: DemoOptions, progress: Progress
) -> tuple["Shown", ...]:
    from jobs.demo_release import open_shown

    store = Store(config.store)
    found = [store.release(options.release)]
    names = [f"release {found[0].version}"]
    if options.compare is not None:
        other, name = _find_release(store, options.compare)
        found.append(other)
        names.append(name)
    shown: list[Shown] = []
    for release, name in zip(found, names, strict=True):
        progress.stage(f"open {name}")
        beside = shown[0] if shown else None
        shown.append(open_shown(store, release, name, config, beside))
    return tuple(shown)


def _find_release(store: Store, wanted: str) -> tuple[Release, str]:
    """Return a release by its version, or a candidate by its name, and what to call it."""
    if wanted.isdecimal():
        return store.release(int(wanted)), f"release {wanted}"
    return store.candidate(wanted), f"candidate {wanted}"


def _find_catalog(config: JobConfig, shown: tuple["Shown", ...]) -> Catalog:
    need_images = any("image" in one.searcher.space.takes for one in shown)
    return read_catalog(config.catalog, need_images=need_images, need_text=False)


def _serve(app: "ASGIApp", listener: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM; answers that are on their way have some seconds."""
    import uvicorn

    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=LAST_ANSWERS_S,
    )
    with suppress(KeyboardInterrupt):  # uvicorn raises it again, once all is closed
        uvicorn.Server(config).run(sockets=[listener])
