"""The one place that opens a url: a local path, or `s3://bucket/key` through boto3, by its rules for credentials."""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError, NoCredentialsError

from configs.files import atomic_path

ATTEMPTS = 5  # of one request, and of continuing one body that broke off
MISSING = ("404", "NoSuchKey", "NoSuchBucket")
FORBIDDEN = ("401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch")


def join(folder: str | Path, name: str) -> str:
    """The url of `name` in `folder`."""
    return f"{str(folder).rstrip('/')}/{name}" if str(folder) != "/" else f"/{name}"


def parent(url: str | Path) -> str:
    """The url of the folder that `url` lies in."""
    folder, slash, _ = str(url).rpartition("/")
    return folder if slash else "."


def read_bytes(url: str | Path) -> bytes:
    """The whole of `url`. Raises FileNotFoundError if it is not there."""
    if _is_s3(url):
        return _read_s3(str(url), 0, None)
    return Path(url).read_bytes()


def read_range(url: str | Path, offset: int, length: int) -> bytes:
    """`length` bytes of `url` from `offset` on. Raises ValueError if it ends before."""
    if _is_s3(url):
        found = _read_s3(str(url), offset, length)
    else:
        with open(url, "rb", buffering=0) as file:
            found = os.pread(file.fileno(), length, offset)
    if len(found) != length:
        raise ValueError(f"{url} is truncated: {len(found)} of {length} bytes at {offset}; fetch or encode it again")
    return found


def size(url: str | Path) -> int:
    """Bytes of `url`. Raises FileNotFoundError if it is not there."""
    if not _is_s3(url):
        return Path(url).stat().st_size
    bucket, key = _bucket_and_key(str(url))
    with _named_errors(str(url)):
        return int(_client().head_object(Bucket=bucket, Key=key)["ContentLength"])


def exists(url: str | Path) -> bool:
    """Whether there is a file at `url`."""
    try:
        size(url)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def list_files(folder: str | Path) -> list[str]:
    """The urls of the files directly in `folder`, sorted; none if there is no such folder."""
    if not _is_s3(folder):
        found = Path(folder).iterdir() if Path(folder).is_dir() else ()
        return sorted(join(folder, path.name) for path in found if path.is_file())
    bucket, prefix = _bucket_and_key(join(folder, ""))
    with _named_errors(str(folder)):
        pages = _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, Delimiter="/")
        return sorted(f"s3://{bucket}/{item['Key']}" for page in pages for item in page.get("Contents", ()))


def remove_unfinished(folder: str | Path) -> None:
    """Deletes what a killed writer left in a local folder; to be called while nobody else writes there."""
    if not _is_s3(folder) and Path(folder).is_dir():
        for left in Path(folder).glob(".*.tmp.*"):
            left.unlink()


@contextmanager
def writing(url: str | Path) -> Iterator[Path]:
    """A local path to write to; what lies there when the block ends well appears at `url`, whole."""
    if not _is_s3(url):
        with atomic_path(url) as part:
            yield part
        return
    with tempfile.TemporaryDirectory() as scratch:
        part = Path(scratch) / str(url).rpartition("/")[2]
        yield part
        write_file(part, url)


def write_file(local: Path, url: str | Path) -> None:
    """Uploads the file `local` to the s3 `url`; boto3 splits large ones, and takes back the parts if it fails."""
    from boto3.exceptions import Boto3Error

    bucket, key = _bucket_and_key(str(url))
    with _named_errors(str(url)):
        try:
            _client().upload_file(str(local), bucket, key)
        except Boto3Error as error:
            raise OSError(f"cannot upload {url}: {error}") from error


def write_text(url: str | Path, text: str) -> None:
    """Writes `text` to `url` as UTF-8, whole or not at all."""
    with writing(url) as part:
        part.write_text(text, encoding="utf-8")


def _is_s3(url: str | Path) -> bool:
    return str(url).startswith("s3:/")


def _bucket_and_key(url: str) -> tuple[str, str]:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not url.startswith("s3://") or not bucket or not key:
        raise ValueError(f"{url!r} is no s3 url; write s3://bucket/key")
    return bucket, key


def _client() -> Any:
    return _client_of_process(os.getpid())


@lru_cache(maxsize=1)
def _client_of_process(pid: int) -> Any:
    # One per process, since a client does not survive a fork; boto3 is imported only where s3 is used (0.3 s).
    import boto3
    from botocore.config import Config

    return boto3.client("s3", config=Config(retries={"max_attempts": ATTEMPTS, "mode": "standard"}))


def _read_s3(url: str, offset: int, length: int | None) -> bytes:
    bucket, key = _bucket_and_key(url)
    found = bytearray()
    for attempt in range(1, ATTEMPTS + 1):
        start, end = offset + len(found), "" if length is None else offset + length - 1
        wanted = {"Range": f"bytes={start}-{end}"} if length is not None or start else {}
        with _named_errors(url):
            try:
                body = _client().get_object(Bucket=bucket, Key=key, **wanted)["Body"]
                for block in body.iter_chunks(1 << 20):
                    found += block
                return bytes(found)
            except (HTTPClientError, IncompleteReadError):
                # boto3 repeats requests, but not a body that breaks off: go on from where it stopped.
                if attempt == ATTEMPTS:
                    raise
                time.sleep(0.1 * 2**attempt)
    raise AssertionError("unreachable: the last attempt returns or raises")


@contextmanager
def _named_errors(url: str) -> Iterator[None]:
    """boto3's errors as the built-in ones that fit, in one line with the url."""
    try:
        yield
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        kind = FileNotFoundError if code in MISSING else PermissionError if code in FORBIDDEN else OSError
        raise kind(f"{url}: {error}") from error
    except NoCredentialsError as error:
        raise PermissionError(f"{url}: {error}; set AWS_PROFILE or AWS_ACCESS_KEY_ID") from error
    except BotoCoreError as error:
        raise OSError(f"{url}: {error}") from error
