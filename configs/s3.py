"""Requests to an S3 server. Bytes are compared with their SHA-256; what fails for a while is repeated.

Credentials, profiles, roles, regions and the server are found by boto3's own rules; `S3_ENDPOINT_URL` comes before its
`AWS_ENDPOINT_URL_S3`. boto3 is imported only where s3 is used.
"""

import hashlib
import os
import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from botocore import exceptions as boto

from configs.errors import FileError, MissingFileError, RefusedError, UserError, one_line
from configs.untrusted import require_inside

ATTEMPTS = 7  # of a request: half a minute of pauses on average
SILENT_S = 60.0  # after which a server that says nothing more is asked again
CONNECTIONS = 32  # at a time
PART_BYTES, PARALLEL = 16 << 20, 8  # of a large file's transfer: so many parts at a time, and no more in memory
SHA256 = "sha256"  # the name under which an object's metadata holds the digest of its bytes
DOWNLOADS = 3  # of a file whose bytes are not what they should be
BAD_BODY = (boto.IncompleteReadError, boto.FlexibleChecksumError)
BROKEN_OFF = (boto.HTTPClientError, boto.ConnectionError, *BAD_BODY)  # another attempt may succeed
CHECK = "check S3_ENDPOINT_URL and the credentials: AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


class Found(NamedTuple):
    """What a server says about an object."""

    st_size: int  # named as in os.stat
    etag: str  # changes when the object is written again
    sha256: str | None  # of its bytes, if Worldloom wrote it


def is_s3(url: str | Path) -> bool:
    """Whether `url` is on a server; a Path too, which turns the two slashes of a url into one."""
    return str(url).startswith("s3:/")


def bucket_and_key(url: str) -> tuple[str, str]:
    """The two parts of `s3://bucket/key`; the key of a folder, which ends in `/`, may be empty.

    Any other text is a UserError; so are keys that no path can have, such as `a/../b`.
    """
    bucket, slash, key = url.removeprefix("s3://").partition("/")
    if not url.startswith("s3://") or not bucket or not (key or slash) or "@" in bucket or ":" in bucket:
        shown = url.rpartition("@")[2]  # before it may be a password
        raise UserError(f"{shown!r} is no s3 url; write s3://bucket/key, without credentials and port")
    require_inside(f"{bucket}/{key}".rstrip("/"), url)
    return bucket, key


@contextmanager
def named_errors(url: str) -> Iterator[None]:
    """Turns boto3's errors into FileErrors about `url`."""
    try:
        yield
    except (boto.ClientError, boto.BotoCoreError) as error:
        text = re.sub(r"//[^/@\s]+@", "//***@", one_line(error))  # the server's address may hold a password
        kind: type[FileError] = FileError
        if isinstance(error, boto.ClientError):
            code, status = error.response.get("Error", {}).get("Code", ""), _status(error)
            if code == "NoSuchBucket":  # no MissingFileError: what is asked about is not only a file
                text = f"there is no bucket {bucket_and_key(url)[0]!r}; create it, or check the name and the server"
            elif status == 404:
                kind, text = MissingFileError, "it is not there"
            elif status in (401, 403) or code in ("ExpiredToken", "InvalidToken"):
                kind, text = RefusedError, f"the server refuses ({code}); {CHECK}"
        elif not isinstance(error, BAD_BODY):
            text = f"{text}; {CHECK}"
        raise kind(f"{url}: {text}") from error


def _status(error: boto.ClientError) -> int:
    return error.response["ResponseMetadata"]["HTTPStatusCode"]


def client() -> Any:
    """boto3's client of this process, replaced when the environment names another server or identity."""
    chosen = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_") or k == "S3_ENDPOINT_URL"))
    return _client(os.getpid(), chosen)  # a client does not survive a fork


@lru_cache(maxsize=1)
def _client(pid: int, chosen: tuple[tuple[str, str], ...]) -> Any:
    import boto3
    from botocore.config import Config

    config = Config(
        # The mode "standard" has 500 tokens for all threads, 14 a retry (botocore 1.44): the 8 parts of one transfer
        # use them up within a second of an outage. And it does not repeat BadDigest.
        retries={"mode": "legacy", "total_max_attempts": ATTEMPTS},
        connect_timeout=10,
        read_timeout=SILENT_S,
        max_pool_connections=CONNECTIONS,
        tcp_keepalive=True,
    )
    # A session of its own: the default one keeps the credentials that it found first.
    return boto3.Session().client("s3", endpoint_url=dict(chosen).get("S3_ENDPOINT_URL") or None, config=config)


def _transfer() -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=PARALLEL)


def head(url: str) -> Found:
    """What is known about `url`. A FileNotFoundError if it is not there."""
    bucket, key = bucket_and_key(url)
    with named_errors(url):
        try:
            answer = client().head_object(Bucket=bucket, Key=key)
        except boto.ClientError as error:
            if _status(error) not in (400, 404):
                raise
            # The answer to HEAD has no body. That to GET says what is wrong, so that boto3 knows what to repeat.
            answer = client().get_object(Bucket=bucket, Key=key)
    return Found(int(answer["ContentLength"]), answer["ETag"], answer["Metadata"].get(SHA256))


def read(url: str, offset: int = 0, length: int | None = None) -> bytes:
    """`length` bytes from `offset` on, fewer if the object ends before; all that follow if None.

    A body that breaks off is asked for again; a whole object is compared with the digest that was uploaded with it.
    """
    bucket, key = bucket_and_key(url)
    if length == 0:
        return b""
    last = "" if length is None else offset + length - 1
    ranged = {"Range": f"bytes={offset}-{last}"} if offset or length is not None else {}
    for failed in range(1, ATTEMPTS + 1):
        with named_errors(url):
            try:
                answer = client().get_object(Bucket=bucket, Key=key, **ranged)
            except boto.ClientError as error:
                if _status(error) == 416:  # past the end
                    return b""
                raise
            try:
                data, digest = answer["Body"].read(), answer["Metadata"].get(SHA256)
                if ranged or digest in (None, hashlib.sha256(data).hexdigest()):
                    return data
                raise boto.FlexibleChecksumError(error_msg=f"damaged: its SHA-256 is not {digest}")
            except BROKEN_OFF:
                if failed == ATTEMPTS:
                    raise
        time.sleep(random.random() * 0.1 * 2**failed)
    raise AssertionError("unreachable: the last attempt returns or raises")


def download(url: str, file: Path) -> Found:
    """Writes the object to `file`, a large one in parallel; its bytes are compared with the digest if there is one, and
    theirs is returned."""
    from s3transfer.exceptions import RetriesExceededError

    bucket, key = bucket_and_key(url)
    for _ in range(DOWNLOADS):
        listed = head(url)
        with named_errors(url), suppress(boto.FlexibleChecksumError), open(file, "w+b") as out:
            try:
                client().download_fileobj(bucket, key, out, Config=_transfer())
            except RetriesExceededError as error:
                raise boto.HTTPClientError(error=error.last_exception) from error
            out.seek(0)
            digest = hashlib.file_digest(out, SHA256).hexdigest()
            if out.tell() == listed.st_size and listed.sha256 in (None, digest):
                return listed._replace(sha256=digest)
    file.unlink(missing_ok=True)
    raise UserError(f"{url} is damaged, or changes while it is read: {DOWNLOADS} times other bytes came than it has")


def upload(file: Path, url: str) -> Found:
    """Copies `file` to `url`: a large one in parts, which are taken back if one of them fails."""
    bucket, key = bucket_and_key(url)
    with named_errors(url), open(file, "rb") as data:
        digest = hashlib.file_digest(data, SHA256).hexdigest()
        size = data.tell()
        data.seek(0)
        client().upload_fileobj(data, bucket, key, ExtraArgs={"Metadata": {SHA256: digest}}, Config=_transfer())
    stored = head(url)
    if (stored.st_size, stored.sha256) != (size, digest):
        fix = "this server alters what it is given; set AWS_REQUEST_CHECKSUM_CALCULATION=when_required"
        raise FileError(f"{url} has {stored.st_size} bytes after {size} were written: {fix}")
    return stored


def create(url: str, data: bytes) -> bool:
    """Writes `data` to `url` if nothing is there, and says whether it did. `data` must differ from other writers'.

    A server without conditional writes overwrites, in spite of what it is asked or because it is asked again.
    """
    bucket, key = bucket_and_key(url)
    with named_errors(url):
        try:
            client().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
            return True
        except boto.ClientError as error:
            if _status(error) == 501:
                client().put_object(Bucket=bucket, Key=key, Body=data)
                return True
            if _status(error) not in (409, 412):  # written at the same moment, or before
                raise
    with suppress(MissingFileError):  # the other one was deleted at the same moment
        return read(url) == data  # ours, if the answer to a first attempt was lost
    return False


def remove(bucket: str, key: str) -> None:
    """Deletes the object, if it is there. By its key: some keys are no part of a url that is accepted."""
    with named_errors(f"s3://{bucket}/"):
        client().delete_object(Bucket=bucket, Key=key)


def list_folder(folder: str, delimiter: str = "") -> Iterator[tuple[str, Found]]:
    """Everything below `folder` by its path from there, but for an object that stands for `folder` itself; with the
    delimiter `/` only what is directly in it, the folders there as names that end in `/`. A thousand at a time."""
    bucket, prefix = bucket_and_key(f"{folder.rstrip('/')}/")
    with named_errors(folder):
        pages = client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, Delimiter=delimiter)
        for page in pages:
            folders = [(entry["Prefix"], Found(0, "", None)) for entry in page.get("CommonPrefixes", ())]
            files = [(entry["Key"], Found(entry["Size"], entry["ETag"], None)) for entry in page.get("Contents", ())]
            yield from ((key.removeprefix(prefix), found) for key, found in folders + files if key != prefix)
