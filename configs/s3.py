"""Requests to an S3 server: transfers are compared with their SHA-256, and repeated when they break off.

Credentials, profiles, roles, regions and the server are found by boto3's own rules; `S3_ENDPOINT_URL` comes before its
`AWS_ENDPOINT_URL_S3`. boto3 is imported only where s3 is used.
"""

import hashlib
import os
import random
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

from botocore.exceptions import ClientError, FlexibleChecksumError, HTTPClientError

from configs.errors import FileError, MissingFileError, RefusedError
from configs.files import sha256_file
from configs.s3_errors import BROKEN_OFF, MISSING, Damaged, NotOffered, bucket_and_key, error_code, named_errors

ATTEMPTS = 7  # of a request: half a minute of pauses on average
SILENT_S = 60.0  # after which a server that says nothing more is asked again
CONNECTIONS = 32  # at a time
PART_BYTES, PARALLEL = 16 << 20, 8  # of a large file's transfer: so many parts at a time, and no more in memory
SHA256 = "sha256"  # the name under which an object's metadata holds the digest of its bytes
ABANDONED_S = 86400.0  # an unfinished upload in parts that is older was left by a killed process
DOWNLOADS = 3  # of a file whose bytes are not what they should be
PAST_THE_END = ("416", "InvalidRange")
TAKEN = ("412", "PreconditionFailed", "409", "ConditionalRequestConflict")  # written before or at the same moment


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


def _pause(failed: int) -> None:
    """Waits before another attempt: longer each time, and a random part of it."""
    time.sleep(random.random() * 0.1 * 2**failed)


class Found(NamedTuple):
    """What a server says about an object."""

    st_size: int  # named as in os.stat
    etag: str  # changes when the object is written again
    sha256: str | None  # of its bytes, if Worldloom wrote it


def head(url: str) -> Found:
    """What is known about `url`. A FileNotFoundError if it, or its bucket, is not there."""
    bucket, key = bucket_and_key(url)
    with named_errors(url):
        try:
            answer = client().head_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if error_code(error) in MISSING:  # a HEAD has no body that would say which of the two is missing
                _require_bucket(client(), bucket)
            raise
    return Found(int(answer["ContentLength"]), answer["ETag"], answer["Metadata"].get(SHA256))


@lru_cache(maxsize=64)
def _require_bucket(asked: Any, bucket: str) -> None:
    try:
        asked.head_bucket(Bucket=bucket)
    except ClientError as error:
        if error_code(error) in (*MISSING, "NoSuchBucket"):
            raise ClientError({"Error": {"Code": "NoSuchBucket"}}, "HeadBucket") from error


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
            except ClientError as error:
                if error_code(error) in PAST_THE_END:
                    return b""
                raise
            try:
                data, digest = answer["Body"].read(), answer["Metadata"].get(SHA256)
                if ranged or digest in (None, hashlib.sha256(data).hexdigest()):
                    return data
                raise FlexibleChecksumError(error_msg=f"damaged: its SHA-256 is not {digest}")
            except BROKEN_OFF:
                if failed == ATTEMPTS:
                    raise
        _pause(failed)
    raise AssertionError("unreachable: the last attempt returns or raises")


def download(url: str, file: Path) -> None:
    """Writes the object to `file`, a large one in parallel, and compares its bytes with the digest."""
    from s3transfer.exceptions import RetriesExceededError

    bucket, key = bucket_and_key(url)
    for failed in range(1, DOWNLOADS + 1):
        found = head(url)
        with named_errors(url), suppress(FlexibleChecksumError), open(file, "wb") as out:
            try:
                client().download_fileobj(bucket, key, out, Config=_transfer())
            except RetriesExceededError as error:
                raise HTTPClientError(error=error.last_exception) from error
            out.flush()
            if found.st_size == file.stat().st_size and found.sha256 in (None, sha256_file(file)):
                return
        _pause(failed)
    file.unlink(missing_ok=True)
    raise Damaged(url, f"damaged, or changes while it is read: {DOWNLOADS} times other bytes came than it has")


def upload(data: IO[bytes], url: str) -> None:
    """Writes `data`, an open file, to `url`: a large one in parts, which are taken back if one of them fails."""
    bucket, key = bucket_and_key(url)
    digest = hashlib.file_digest(data, SHA256).hexdigest()  # type: ignore[arg-type]
    size, metadata = data.seek(0, os.SEEK_END), {SHA256: digest}
    data.seek(0)
    if size <= PART_BYTES:
        with named_errors(url):
            client().put_object(Bucket=bucket, Key=key, Body=data, Metadata=metadata)
    else:
        with suppress(OSError):  # they can wait
            abort_uploads(url, ABANDONED_S)
        with named_errors(url):
            client().upload_fileobj(data, bucket, key, ExtraArgs={"Metadata": metadata}, Config=_transfer())
    kept = head(url)
    if (kept.st_size, kept.sha256) != (size, digest):
        raise FileError(
            f"{url} has {kept.st_size} bytes after {size} were written: this server does not keep what it is given; "
            "AWS_REQUEST_CHECKSUM_CALCULATION=when_required helps with older ones"
        )


def create(url: str, data: bytes) -> bool:
    """Writes `data` to `url` if nothing is there, and says whether it did. `data` must differ from other writers'.

    Raises NotOffered if the server cannot do that, whether it says so or overwrites silently.
    """
    bucket, key = bucket_and_key(url)
    with named_errors(url):
        _require_conditions(client(), bucket, key.rpartition("/")[0])
        try:
            client().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
            return True
        except ClientError as error:
            if error_code(error) not in TAKEN:
                raise
    with suppress(MissingFileError):  # the other one was deleted at the same moment
        return read(url) == data  # ours, if the answer to a first attempt was lost
    return False


@lru_cache(maxsize=64)
def _require_conditions(asked: Any, bucket: str, folder: str) -> None:
    """Raises if the server ignores `If-None-Match`, as some do: then two writers would both be first."""
    probe = {"Bucket": bucket, "Key": f"{folder}/.probe-{os.urandom(8).hex()}".lstrip("/")}
    try:
        asked.put_object(**probe, Body=b"", IfNoneMatch="*")
        asked.put_object(**probe, Body=b"", IfNoneMatch="*")
        raise ClientError({"Error": {"Code": "NotImplemented"}}, "PutObject")
    except ClientError as error:
        if error_code(error) not in TAKEN:
            raise
    finally:
        asked.delete_object(**probe)


def remove(bucket: str, key: str) -> None:
    """Deletes the object, if it is there. By its key: some keys are no part of a url that is accepted."""
    with named_errors(f"s3://{bucket}/"):
        client().delete_object(Bucket=bucket, Key=key)


def list_objects(folder: str, delimiter: str = "") -> Iterator[tuple[str, Found]]:
    """The keys of everything below `folder`, which ends in `/`; with the delimiter `/` only what is directly in it, the
    folders there as keys that end in `/`. Page by page, a thousand at a time."""
    bucket, prefix = bucket_and_key(folder)
    with named_errors(folder):
        pages = client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, Delimiter=delimiter)
        for page in pages:
            yield from ((entry["Prefix"], Found(0, "", None)) for entry in page.get("CommonPrefixes", ()))
            yield from ((entry["Key"], Found(entry["Size"], entry["ETag"], None)) for entry in page.get("Contents", ()))


def list_folder(folder: str, delimiter: str = "") -> dict[str, Found]:
    """As `list_objects`, by the path from `folder`, without the object that may stand for `folder` itself."""
    _, prefix = bucket_and_key(f"{folder.rstrip('/')}/")
    listed = list_objects(f"{folder.rstrip('/')}/", delimiter)
    return {key.removeprefix(prefix): found for key, found in listed if key != prefix}


def abort_uploads(url: str, older_s: float) -> None:
    """Ends unfinished uploads begun more than `older_s` ago: those to `url`, or below it if it ends in `/`.

    They stay where the server does not list them, or not for this user: not everyone who may write may list.
    """
    bucket, prefix = bucket_and_key(url)
    with suppress(RefusedError, NotOffered), named_errors(url):
        for page in client().get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix):
            for begun in page.get("Uploads", ()):
                wanted = url.endswith("/") or begun["Key"] == prefix
                if not wanted or (datetime.now(UTC) - begun["Initiated"]).total_seconds() < older_s:
                    continue
                with suppress(MissingFileError), named_errors(url):  # it has come to its end meanwhile
                    client().abort_multipart_upload(Bucket=bucket, Key=begun["Key"], UploadId=begun["UploadId"])
