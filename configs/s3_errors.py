"""boto3's errors as the built-in ones that fit, in one line: what is wrong with which url, and what to do."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    TokenRetrievalError,
    UnauthorizedSSOTokenError,
)

from configs.errors import FileError, MissingFileError, RefusedError, UserError, one_line

MISSING = ("404", "NoSuchKey", "NotFound")
NO_BUCKET = "NoSuchBucket"
NOT_OFFERED = ("501", "NotImplemented")
FORBIDDEN = (
    "401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken",
    "RequestTimeTooSkewed",
)  # fmt: skip
NO_ANSWER = (HTTPClientError, ConnectionError)
NO_IDENTITY = (
    NoCredentialsError, PartialCredentialsError, ProfileNotFound, TokenRetrievalError, UnauthorizedSSOTokenError,
)  # fmt: skip


class MissingBucket(MissingFileError):
    """Not even the bucket is there."""


class NotOffered(FileError):
    """The server cannot do what is asked."""


class Damaged(FileError):
    """Other bytes lie at a url than should; `fault` says how, in a few words."""

    def __init__(self, url: str, fault: str) -> None:
        super().__init__(f"{url} is {fault}")
        self.fault = fault


def bucket_and_key(url: str) -> tuple[str, str]:
    """The two parts of `s3://bucket/key`; of a folder, which ends in `/`, the key may be empty.

    Raises ValueError in one line for anything else.
    """
    bucket, slash, key = url.removeprefix("s3://").partition("/")
    if url.startswith("s3://") and ("@" in bucket or ":" in bucket):
        raise UserError(
            "an s3 url holds no credentials and no port: write s3://bucket/key, and set AWS_PROFILE, or "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and S3_ENDPOINT_URL"
        )
    if not url.startswith("s3://") or not bucket or not (key or slash):
        raise UserError(f"{url!r} is no s3 url; write s3://bucket/key")
    return bucket, key


def error_code(error: ClientError) -> str:
    """What the server calls it: a name, or for answers without a body the HTTP status."""
    return code_of(error.response)


def code_of(answer: Mapping[str, Any]) -> str:
    """The same of an answer, as boto3 gives it."""
    return str(answer.get("Error", {}).get("Code", ""))


def clean(error: BaseException) -> str:
    """The error's text in one line, without what a server's address may hold before an @."""
    return re.sub(r"//[^/@\s]+@", "//***@", one_line(error))


@contextmanager
def named_errors(url: str) -> Iterator[None]:
    """Turns boto3's errors within the block into OSError, FileNotFoundError or PermissionError about `url`."""
    try:
        yield
    except ClientError as error:
        raise _named(url, error_code(error), error) from error
    except NO_IDENTITY as error:
        raise RefusedError(
            f"{url}: {clean(error)}; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from error
    except NO_ANSWER as error:
        raise FileError(f"{url}: the server does not answer ({clean(error)}); is S3_ENDPOINT_URL right?") from error
    except BotoCoreError as error:
        raise FileError(f"{url}: {clean(error)}") from error


def _named(url: str, code: str, error: ClientError) -> OSError:
    bucket = bucket_and_key(url)[0]
    if code in MISSING:
        return MissingFileError(f"{url} is not there")
    if code == NO_BUCKET:
        return MissingBucket(f"{url}: there is no bucket {bucket!r}; create it, or look at the name and the server")
    if code in FORBIDDEN:
        return PermissionError(
            f"{url}: the server refuses ({code}); look at the credentials (AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
            f"AWS_SECRET_ACCESS_KEY) and at what they may do in the bucket {bucket!r}"
        )
    if code in NOT_OFFERED:
        return NotOffered(
            f"{url}: this server cannot write a file only if it is not there (If-None-Match); use one that can, or a "
            "local folder"
        )
    return FileError(f"{url}: {clean(error)}")
