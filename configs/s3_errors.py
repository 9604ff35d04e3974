"""boto3's errors as UserErrors: what is wrong with which url, and what to do."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

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
from configs.foreign import require_inside

NO_ANSWER = (HTTPClientError, ConnectionError)
NO_CREDENTIALS = (
    NoCredentialsError, PartialCredentialsError, ProfileNotFound, TokenRetrievalError, UnauthorizedSSOTokenError,
)  # fmt: skip
SET_CREDENTIALS = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


class MissingBucket(MissingFileError):
    """Not even the bucket is there."""


class NotOffered(FileError):
    """The server cannot do what is asked."""


class Damaged(FileError):
    """The bytes at a url are not what they should be; `fault` says how, in a few words."""

    def __init__(self, url: str, fault: str) -> None:
        super().__init__(f"{url} is {fault}")
        self.fault = fault


# The server's error code, or for an answer without a body the HTTP status: our error and what it says.
MISSING = dict.fromkeys(("404", "NoSuchKey", "NotFound", "NoSuchUpload"), (MissingFileError, "it is not there"))
NAMED: dict[str, tuple[type[FileError], str]] = {
    **MISSING,
    "NoSuchBucket": (MissingBucket, "there is no bucket {bucket!r}; create it, or check the name and the server"),
    **dict.fromkeys(
        (
            "401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken",
            "RequestTimeTooSkewed",
        ),
        (RefusedError, f"the server refuses ({{code}}); {SET_CREDENTIALS}, and check what they may do in {{bucket!r}}"),
    ),
    **dict.fromkeys(
        ("501", "NotImplemented"),
        (NotOffered, "this server cannot write a file only if it is not there (If-None-Match); use another"),
    ),
}  # fmt: skip


def bucket_and_key(url: str) -> tuple[str, str]:
    """The two parts of `s3://bucket/key`; the key of a folder, which ends in `/`, may be empty.

    Any other text is a UserError; so are keys that no path can have, such as `a/../b`.
    """
    bucket, slash, key = url.removeprefix("s3://").partition("/")
    if url.startswith("s3://") and ("@" in bucket or ":" in bucket):
        raise UserError(
            f"an s3 url holds no credentials and no port: write s3://bucket/key, {SET_CREDENTIALS}, and S3_ENDPOINT_URL"
        )
    if not url.startswith("s3://") or not bucket or not (key or slash):
        raise UserError(f"{url!r} is no s3 url; write s3://bucket/key")
    require_inside(f"{bucket}/{key}".rstrip("/"), url)
    return bucket, key


def error_code(error: ClientError) -> str:
    """The server's name for the error, or for an answer without a body the HTTP status."""
    return str(error.response.get("Error", {}).get("Code", ""))


def without_password(error: BaseException) -> str:
    """The error in one line, without the password that the server's address may hold before an @."""
    return re.sub(r"//[^/@\s]+@", "//***@", one_line(error))


@contextmanager
def named_errors(url: str) -> Iterator[None]:
    """Turns boto3's errors into FileErrors about `url`."""
    try:
        yield
    except ClientError as error:
        code = error_code(error)
        kind, text = NAMED.get(code, (FileError, "{error}"))
        text = text.format(bucket=bucket_and_key(url)[0], code=code, error=without_password(error))
        raise kind(f"{url}: {text}") from error
    except NO_CREDENTIALS as error:
        raise RefusedError(f"{url}: {without_password(error)}; {SET_CREDENTIALS}") from error
    except NO_ANSWER as error:
        raise FileError(
            f"{url}: the server does not answer ({without_password(error)}); check S3_ENDPOINT_URL"
        ) from error
    except BotoCoreError as error:
        raise FileError(f"{url}: {without_password(error)}") from error
