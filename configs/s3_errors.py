"""boto3's errors as FileErrors: what is wrong with which url, and what to do."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from botocore import exceptions as boto

from configs.errors import FileError, MissingFileError, RefusedError, UserError, one_line
from configs.foreign import require_inside

BAD_BODY = (boto.IncompleteReadError, boto.FlexibleChecksumError)
BROKEN_OFF = (boto.HTTPClientError, boto.ConnectionError, *BAD_BODY)  # another attempt may succeed
SETTINGS = "check S3_ENDPOINT_URL and the credentials: AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


class MissingBucket(MissingFileError):
    """Not even the bucket is there."""


class NotOffered(FileError):
    """The server cannot do what is asked."""


class Damaged(FileError):
    """The bytes at a url are not what they should be; `fault` says how, in a few words."""

    def __init__(self, url: str, fault: str) -> None:
        super().__init__(f"{url} is {fault}")
        self.fault = fault


# By the server's name for the error, or for an answer without a body the HTTP status.
MISSING = ("404", "NoSuchKey", "NotFound", "NoSuchUpload")
REFUSED = (
    "401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken",
    "RequestTimeTooSkewed",
)  # fmt: skip
NAMED: dict[str, tuple[type[FileError], str]] = {
    **dict.fromkeys(MISSING, (MissingFileError, "it is not there")),
    **dict.fromkeys(REFUSED, (RefusedError, f"the server refuses ({{code}}); {SETTINGS}")),
    "NoSuchBucket": (MissingBucket, "there is no bucket {bucket!r}; create it, or check the name and the server"),
    "NotImplemented": (NotOffered, "the server cannot write a file only if it is not there (If-None-Match)"),
}
NAMED["501"] = NAMED["NotImplemented"]


def bucket_and_key(url: str) -> tuple[str, str]:
    """The two parts of `s3://bucket/key`; the key of a folder, which ends in `/`, may be empty.

    Any other text is a UserError; so are keys that no path can have, such as `a/../b`.
    """
    bucket, slash, key = url.removeprefix("s3://").partition("/")
    if url.startswith("s3://") and ("@" in bucket or ":" in bucket):
        raise UserError(f"an s3 url holds no credentials and no port; write s3://bucket/key, and {SETTINGS}")
    if not url.startswith("s3://") or not bucket or not (key or slash):
        raise UserError(f"{url!r} is no s3 url; write s3://bucket/key")
    require_inside(f"{bucket}/{key}".rstrip("/"), url)
    return bucket, key


def error_code(error: boto.ClientError) -> str:
    """The server's name for the error, or for an answer without a body the HTTP status."""
    return str(error.response.get("Error", {}).get("Code", ""))


@contextmanager
def named_errors(url: str) -> Iterator[None]:
    """Turns boto3's errors into FileErrors about `url`."""
    try:
        yield
    except (boto.ClientError, boto.BotoCoreError) as error:
        # The server's address may hold a password before an @.
        text = re.sub(r"//[^/@\s]+@", "//***@", one_line(error))
        kind = FileError if isinstance(error, (boto.ClientError, *BROKEN_OFF)) else RefusedError
        if isinstance(error, boto.ClientError) and error_code(error) in NAMED:
            kind, text = NAMED[error_code(error)]
            text = text.format(code=error_code(error), bucket=bucket_and_key(url)[0])
        elif isinstance(error, boto.BotoCoreError) and not isinstance(error, BAD_BODY):
            text = f"{text}; {SETTINGS}"
        raise kind(f"{url}: {text}") from error
