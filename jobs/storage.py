"""Opens the file system of an address, fetches from it, and says how long S3 is waited for.

A refused connection, a cut one, a slow answer and a 503 are tried again wherever they meet us,
for `patience_s()` seconds in all; what is left after that is one line. `jobs.delta` does the same
for tables.
"""

import hashlib
import logging
import os
import random
import re
import shutil
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import fsspec
import pyarrow as pa
import s3fs
import tenacity
from botocore.exceptions import BotoCoreError, ClientError
from botocore.exceptions import ConnectionError as S3ConnectionError
from fsspec.asyn import sync_wrapper
from fsspec.implementations.local import LocalFileSystem
from s3fs.core import S3_RETRYABLE_ERRORS
from s3fs.errors import translate_boto_error

from jobs.errors import StoreError

PATIENCE_VARIABLE: Final = "VITRINE_STORAGE_PATIENCE_S"
DEFAULT_PATIENCE_S: Final = 60.0
SILENT_S: Final = 3.0  # a wait that is longer is told
CONNECT_TIMEOUT_S: Final = 5
READ_TIMEOUT_S: Final = 20  # between two reads of one answer
BODY_READS: Final = 8  # an answer that is cut is asked for again; each may wait for the storage
RETRY_CODES: Final = frozenset(
    ("SlowDown", "Throttling", "ThrottlingException", "RequestTimeout", "RequestLimitExceeded",
     "InternalError", "ServiceUnavailable", "XAmzContentSHA256Mismatch", "IncompleteBody")
)  # fmt: skip
CREDENTIALS: Final = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
LINE_CHARS: Final = 320
# What reading a Parquet file ends with that is cut, damaged, or on a storage that cuts its answers.
PARQUET_ERRORS: Final = (OSError, pa.ArrowException, UnicodeDecodeError, *S3_RETRYABLE_ERRORS)
RAY_NODE: Final = re.compile(r"\(Ray node ([0-9a-f]{56})\)")  # as `on_machine` names it
REFUSED: Final = ", refused"  # before a machine whose own role or clock may be why
_BACKTRACE: Final = re.compile(r"\n\s+0: .*", re.DOTALL)  # of Rust, without a name in it
_ANSWER: Final = re.compile(r"<\?xml.*?<Code>(.*?)</Code>.*?<Message>(.*?)</Message>.*", re.DOTALL)
_log = logging.getLogger(__name__)


class StorageError(StoreError):
    """A storage did not answer in time, or can't be asked at all."""


def patience_s() -> float:
    """Return how long, in seconds, one read or write waits in all for a storage that fails.

    Raises:
        StorageError: The environment's value is no number.
    """
    text = os.environ.get(PATIENCE_VARIABLE, "")
    try:
        return float(text) if text else DEFAULT_PATIENCE_S
    except ValueError as error:
        raise StorageError(f"{PATIENCE_VARIABLE} is {text!r}, expected seconds") from error


class PatientS3(s3fs.S3FileSystem):  # type: ignore[misc]  # s3fs has no types
    """S3 whose every request is tried again with back-off and jitter, bounded in time.

    botocore's and s3fs's own settings count attempts: of a second together or of many minutes,
    and none says that it waits.
    """

    retries = BODY_READS

    async def _call_s3(self, method: str, *arguments: Any, **named: Any) -> Any:  # noqa: ANN401
        address = f"s3://{named.get('Bucket', '')}/{named.get('Key', named.get('Prefix', ''))}"
        attempts = tenacity.AsyncRetrying(**retrying(address, is_transient))
        try:
            return await attempts(self._call_once, method, *arguments, **named)
        except ClientError as error:
            if is_transient(error):
                raise gone(address, error) from error
            raise translate_boto_error(error) from error
        except (BotoCoreError, OSError, *S3_RETRYABLE_ERRORS) as error:
            if is_transient(error):
                raise gone(address, error) from error
            if isinstance(error, BotoCoreError):
                raise StorageError(
                    f"{address} can't be read or written{on_machine()}: {one_line(error)}"
                ) from error
            raise

    async def _call_once(self, method: str, *arguments: Any, **named: Any) -> Any:  # noqa: ANN401
        await self.set_session()
        client = await self.get_s3(named.get("Bucket"))
        call = getattr(client, method)
        return await call(**self._get_s3_method_kwargs(call, *arguments, **named))

    call_s3 = sync_wrapper(_call_s3)  # the base class has bound its own


def open_filesystem(address: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of an address, and the path on it.

    Args:
        address: A local path, `file://` or `s3://bucket/key`.

    Raises:
        ValueError: The protocol is unknown.
    """
    if not address.startswith(("s3://", "s3a://")):
        found: tuple[fsspec.AbstractFileSystem, str] = fsspec.core.url_to_fs(address)
        return found
    filesystem = PatientS3(
        use_listings_cache=False,  # others write too
        config_kwargs={
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "retries": {"mode": "standard", "total_max_attempts": 1},
        },
    )
    return filesystem, filesystem._strip_protocol(address)


def is_transient(error: BaseException) -> bool:
    """Whether a later try of the same S3 request may succeed."""
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = error.response.get("Error", {}).get("Code", "")
        return status >= 500 or status == 429 or code in RETRY_CODES
    return isinstance(error, (S3ConnectionError, ConnectionError, *S3_RETRYABLE_ERRORS))


@contextmanager
def storage_errors(address: str, doing: str) -> Iterator[None]:
    """Turn what a file system raises into one line.

    Args:
        address: What is read or written.
        doing: As in "written": `ADDRESS can't be written: …`.

    Raises:
        StoreError: The block raised an OSError, or an answer was cut again and again. Of what was
            refused on a cluster it names the machine.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise StoreError(f"{address} is missing") from error
    except PermissionError as error:
        machine = on_machine()
        where = f"{REFUSED}{machine}" if machine else ""
        raise StoreError(f"{address} can't be {doing}{where}: {one_line(error)}") from error
    except (OSError, *S3_RETRYABLE_ERRORS) as error:  # the last: an answer cut every time
        raise StoreError(f"{address} can't be {doing}: {one_line(error)}") from error


@contextmanager
def parquet_errors(address: str) -> Iterator[None]:
    """Turn what reading a Parquet file raises into one line.

    Args:
        address: Of the file.

    Raises:
        StoreError: The block raised one of `PARQUET_ERRORS`.
    """
    try:
        with storage_errors(address, "read"):
            yield
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise StoreError(f"{address} can't be read: {one_line(error)}") from error


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a local file, in hexadecimal.

    Raises:
        OSError: It can't be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def machine_cache() -> Path:
    """Return this user's folder on this machine for what never changes, of all stores.

    `checkpoints/<fingerprint>` are remote stores' encoders, `ids/<sha256>.arrow` the ids of
    releases.

    Raises:
        StoreError: It can't be made, or is another user's.
    """
    folder = Path(tempfile.gettempdir()) / f"vitrine-cache-{os.getuid()}"
    with storage_errors(str(folder), "written"):
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise PermissionError("it belongs to another user")
    return folder


def put_whole(filesystem: fsspec.AbstractFileSystem, source: Path | bytes, target: str) -> None:
    """Write a file that appears whole or not at all, as on S3, so on a local file system.

    Two may write it at once, and who has mapped the one that was there before keeps that.

    Args:
        filesystem: Where it is written.
        source: A local file, or what to write.
        target: Its address; a local folder that is missing is made.

    Raises:
        OSError: It can't be written; so do the other errors of `storage_errors`.
    """
    if isinstance(filesystem, LocalFileSystem):
        _replace_local(source, Path(filesystem._strip_protocol(target)))
    elif isinstance(source, Path):
        filesystem.put_file(str(source), target)
    else:
        filesystem.pipe_file(target, source)


def _replace_local(source: Path | bytes, local: Path) -> None:
    local.parent.mkdir(parents=True, exist_ok=True)
    part = local.with_name(f"{local.name}.{uuid.uuid4().hex}.part")
    try:
        if isinstance(source, Path):
            shutil.copyfile(source, part)
        else:
            part.write_bytes(source)
        part.replace(local)
    finally:
        part.unlink(missing_ok=True)


def fetch_file(filesystem: fsspec.AbstractFileSystem, target: str, local: Path) -> None:
    """Copy a remote file to this machine; it appears whole or not at all.

    Raises:
        OSError: It can't be read or written; so do the other errors of `storage_errors`.
    """
    part = local.with_name(f"{local.name}.{uuid.uuid4().hex}.part")
    filesystem.get_file(target, str(part))
    part.replace(local)


def fetch_folder(filesystem: fsspec.AbstractFileSystem, target: str, local: Path) -> None:
    """Copy a remote folder to this machine, if it isn't there; it appears whole or not at all.

    Many processes may do so at once. A local folder that lacks a file, as where temporary files
    are swept by their age, is replaced.

    Args:
        filesystem: Where the folder lies.
        target: Its address; its files never change.
        local: The local folder.

    Raises:
        OSError: It can't be read or written; so do the other errors of `storage_errors`.
    """
    base = filesystem._strip_protocol(target).rstrip("/")
    found = filesystem.find(base, detail=True).items()
    sizes = {k.removeprefix(f"{base}/"): int(v["size"]) for k, v in found if v["type"] == "file"}
    if not sizes:
        raise FileNotFoundError(target)
    if _holds(local, sizes):
        return
    part = local.with_name(f"{local.name}.{uuid.uuid4().hex}.part")
    try:
        for name in sizes:
            (part / name).parent.mkdir(parents=True, exist_ok=True)
        filesystem.get([f"{base}/{name}" for name in sizes], [str(part / name) for name in sizes])
        if not _holds(part, sizes):
            raise OSError("it was cut short on its way")
        _put_in_place(part, local, sizes)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _holds(folder: Path, sizes: dict[str, int]) -> bool:
    """Whether a local folder has all files, in their sizes in bytes."""
    try:
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (FileNotFoundError, NotADirectoryError):
        return False


def _put_in_place(part: Path, local: Path, sizes: dict[str, int]) -> None:
    if _holds(local, sizes):
        return
    stale = part.with_suffix(".stale")
    with suppress(FileNotFoundError):
        local.rename(stale)
    try:
        part.rename(local)
    except OSError:
        if not _holds(local, sizes):  # else another process was quicker
            raise
    finally:
        shutil.rmtree(stale, ignore_errors=True)


def retrying(address: str, may_pass: Callable[[BaseException], bool]) -> dict[str, Any]:
    """Return tenacity's settings: full jitter, up to 8 s between two tries, bounded in time.

    Args:
        address: What is read or written, for the line that says that it waits.
        may_pass: Whether a later try may succeed after this error.

    Raises:
        StorageError: The patience is no number.
    """
    limit_s, told = patience_s(), _Told(address)
    return {
        "retry": tenacity.retry_if_exception(may_pass),
        "wait": lambda state: random.uniform(0.1, min(8.0, 0.2 * 2**state.attempt_number)),
        "stop": tenacity.stop_after_delay(limit_s),
        "before_sleep": lambda state: told.tell(state, limit_s),
        "reraise": True,
    }


class _Told:
    """Says once an operation that it waits, and only if it waits for long."""

    def __init__(self, address: str) -> None:
        self._address, self._started, self._said = address, time.monotonic(), False

    def tell(self, state: tenacity.RetryCallState, limit_s: float) -> None:
        if self._said or time.monotonic() - self._started < SILENT_S or state.outcome is None:
            return
        self._said = True
        error = state.outcome.exception()
        reason = one_line(error) if error else "no reason"
        _log.warning(
            "vitrine: %s does not answer; trying for up to %g s: %s", self._address, limit_s, reason
        )


def gone(address: str, error: BaseException) -> StorageError:
    """Return the error that ends the waiting."""
    return StorageError(
        f"{address} did not answer for {patience_s():g} s{on_machine()} ({one_line(error)}); what "
        "was committed stays, and the next run goes on from there"
    )


def on_machine() -> str:
    """Name this machine, as ` on machine NAME (Ray node ID)`; empty outside of Ray's workers.

    Also empty where the cluster has no other machine that the fault could be told from.
    """
    ray = sys.modules.get("ray")  # a worker has it; all others need not load it
    if ray is None or not ray.is_initialized():
        return ""
    context = ray.get_runtime_context()
    if context.worker.mode != ray.WORKER_MODE or sum(n["Alive"] for n in ray.nodes()) < 2:
        return ""
    return f" on machine {socket.gethostname()} (Ray node {context.get_node_id()})"


def one_line(error: BaseException) -> str:
    """Return an error's words: one line of bounded length, without colours and credentials."""
    text = re.sub(r"\x1b\[[0-9;]*m|\u21b3", "", str(error))
    text = _BACKTRACE.sub("", text)
    text = _ANSWER.sub(r"\1: \2", text)  # AWS repeats the key's id and what was signed
    for name in CREDENTIALS:
        text = text.replace(os.environ.get(name) or name, "***")
    words = " ".join(text.split()) or type(error).__name__
    return words if len(words) <= LINE_CHARS else f"{words[:100]} … {words[100 - LINE_CHARS :]}"
