"""Reads objects and their ETags from S3, and tells the faults that pass from those that stay."""

import functools
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import aiohttp
import botocore.exceptions
import botocore.parsers
import fsspec
from fsspec.asyn import sync as run_on_loop

from jobs.fetch_http import reason_of_status
from jobs.images import ImageRejected, ImagesConfig, RejectReason

# S3 answers these with 4xx, but they speak of this run, not of the object: a slow line, a clock
# that is off, credentials that expired or were rotated. The next run may have better ones.
_PASSING_S3_CODES: Final = (
    "RequestTimeout",
    "RequestTimeTooSkewed",
    "OperationAborted",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
)
_Found = TypeVar("_Found", bytes, str)


def read_s3(uri: str, config: ImagesConfig) -> bytes:
    """Read one object, at most max_bytes + 1 of it.

    Args:
        uri: `s3://bucket/key`; every character of the key is literal.
        config: Limits.

    Raises:
        ImageRejected: With the reason; unreachable and timeout are worth another try.
    """
    return _call(functools.partial(_get_object, limit=config.max_bytes + 1), uri, config)


def read_s3_etag(uri: str, config: ImagesConfig) -> str:
    """Ask by HEAD for an object's ETag, in its quotes.

    Raises:
        ImageRejected: As `read_s3`.
    """
    return _call(_head_object, uri, config)


@functools.cache
def _filesystem(timeout_s: float, concurrency: int) -> Any:  # noqa: ANN401 - s3fs has no types
    """Build one per setting: fsspec's own cache would make one in every thread."""
    return fsspec.filesystem(
        "s3",
        skip_instance_cache=True,
        config_kwargs={
            "connect_timeout": timeout_s,
            "read_timeout": timeout_s,
            "max_pool_connections": concurrency,
            "retries": {"max_attempts": 2, "mode": "standard"},
        },
    )


async def _get_object(filesystem: Any, bucket: str, key: str, limit: int) -> bytes:  # noqa: ANN401
    """Read at most limit bytes. Not cat_file(): it takes `?versionId=` out of a key."""
    response = await filesystem._call_s3("get_object", Bucket=bucket, Key=key)
    async with response["Body"] as body:
        parts, size = [], 0
        while size < limit and (part := await body.read(min(limit - size, 1 << 20))):
            parts.append(part)
            size += len(part)
        return b"".join(parts)


async def _head_object(filesystem: Any, bucket: str, key: str) -> str:  # noqa: ANN401
    response = await filesystem._call_s3("head_object", Bucket=bucket, Key=key)
    return str(response.get("ETag", ""))


def _call(
    call: Callable[[Any, str, str], Awaitable[_Found]], uri: str, config: ImagesConfig
) -> _Found:
    bucket, _, key = uri[len("s3://") :].partition("/")
    if not bucket or not key:
        raise ImageRejected(RejectReason.BAD_URI, f"{uri!r} names no object")
    files = _filesystem(config.timeout_s, config.concurrency)
    try:
        found: _Found = run_on_loop(files.loop, call, files, bucket, key, timeout=config.timeout_s)
    except (botocore.exceptions.ParamValidationError, UnicodeError) as error:
        raise ImageRejected(RejectReason.BAD_URI, f"{uri}: {error}") from error
    except (
        TimeoutError,  # fsspec's own is one
        botocore.exceptions.ConnectTimeoutError,
        botocore.exceptions.ReadTimeoutError,
    ) as error:
        raise ImageRejected(RejectReason.TIMEOUT, f"{uri}: {config.timeout_s} s") from error
    except OSError as error:
        raise ImageRejected(_reason_of(error), f"{uri}: {error}") from error
    except (
        botocore.exceptions.BotoCoreError,
        botocore.parsers.ResponseParserError,  # a proxy's page instead of XML
        aiohttp.ClientError,  # the connection was lost while the body was read
        ValueError,  # AWS_ENDPOINT_URL is no URL
    ) as error:
        raise ImageRejected(RejectReason.UNREACHABLE, f"{uri}: {error}") from error
    return found


def _reason_of(error: OSError) -> RejectReason:
    """Judge by the server's answer: s3fs gives one errno to faults that pass and that stay."""
    answer = error.__cause__
    if not isinstance(answer, botocore.exceptions.ClientError):
        return RejectReason.UNREACHABLE
    if answer.response["Error"].get("Code") in _PASSING_S3_CODES:
        return RejectReason.UNREACHABLE
    return reason_of_status(answer.response["ResponseMetadata"]["HTTPStatusCode"])
