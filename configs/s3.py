"""Requests to a server that speaks S3: what is moved is compared, what breaks off is continued."""

import hashlib
import io
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from botocore.exceptions import ClientError, FlexibleChecksumError, IncompleteReadError

from configs import s3_client
from configs.errors import FileError
from configs.files import sha256_file
from configs.s3_client import client, pause_s
from configs.s3_errors import (
    MISSING,
    NO_ANSWER,
    NO_BUCKET,
    NOT_OFFERED,
    Damaged,
    NotOffered,
    bucket_and_key,
    clean,
    error_code,
    named_errors,
)

PART_BYTES, PARALLEL = 16 << 20, 8  # of a large file's transfer: so many parts at a time, and no more in memory
SHA256 = "sha256"  # the name under which an object's metadata holds the digest of its bytes
ABANDONED_S = 86400.0  # an upload in parts that was begun so long ago and is not done is a killed writer's
DOWNLOADS = 3  # of a file whose bytes are not what they should be
PAST_THE_END = ("416", "InvalidRange")
TAKEN = ("412", "PreconditionFailed")
BOTH_AT_ONCE = ("409", "ConditionalRequestConflict")
BROKEN_BODY = (*NO_ANSWER, IncompleteReadError, FlexibleChecksumError)


class Found(NamedTuple):
    """What a server says about an object."""

    bytes: int
    etag: str
    age_s: float  # since it was written, by the server's own clock
    sha256: str | None  # of its bytes, if Worldloom wrote it


class Listed(NamedTuple):
    """An object in a listing."""

    key: str
    bytes: int
    etag: str


def head(url: str) -> Found:
    """What is known about `url`. Raises FileNotFoundError if it, or its bucket, is not there."""
    bucket, key = bucket_and_key(url)
    with named_errors(url):
        try:
            answer = client().head_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if error_code(error) in MISSING:  # a HEAD has no body that would say which of the two is missing
                _require_bucket(client(), bucket)
            raise
    told_at = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    age_s = (told_at - answer["LastModified"]).total_seconds()
    return Found(int(answer["ContentLength"]), answer["ETag"], age_s, answer["Metadata"].get(SHA256))


@lru_cache(maxsize=64)
def _require_bucket(asked: Any, bucket: str) -> None:
    """Raises ClientError with the code NO_BUCKET if there is no such bucket."""
    try:
        asked.head_bucket(Bucket=bucket)
    except ClientError as error:
        if error_code(error) in (*MISSING, NO_BUCKET):
            raise ClientError({"Error": {"Code": NO_BUCKET}}, "HeadBucket") from error


def read(url: str, offset: int = 0, length: int | None = None) -> bytes:
    """`length` bytes from `offset` on, fewer if the object ends before; all that follow if None.

    A body that breaks off is continued where it stopped. A whole object is compared with the digest that was uploaded
    with it.
    """
    bucket, key = bucket_and_key(url)
    found, etag, failed, whole = bytearray(), None, 0, not offset and length is None
    while length is None or len(found) < length:
        start, before = offset + len(found), len(found)
        end = "" if length is None else offset + length - 1
        wanted = {"Range": f"bytes={start}-{end}"} if start or length is not None else {}
        with named_errors(url):
            try:
                answer = client().get_object(Bucket=bucket, Key=key, **wanted)
            except ClientError as error:
                if error_code(error) in PAST_THE_END:
                    break
                raise
            if etag not in (None, answer["ETag"]):  # it was written anew meanwhile
                found, etag = bytearray(), None
                continue
            etag = answer["ETag"]
            try:
                for block in answer["Body"].iter_chunks(1 << 20):
                    found += block
                if whole:
                    _compare(found, answer["Metadata"].get(SHA256))
                break
            except BROKEN_BODY as error:
                damaged = isinstance(error, FlexibleChecksumError)
                failed = failed + 1 if damaged or len(found) == before else 1
                if failed >= s3_client.ATTEMPTS:
                    raise
                found = bytearray() if damaged else found
                time.sleep(pause_s(failed))
    return bytes(found)


def _compare(data: bytes | bytearray, sha256: str | None) -> None:
    actual = hashlib.sha256(data).hexdigest()
    if sha256 not in (None, actual):
        raise FlexibleChecksumError(error_msg=f"its bytes have the SHA-256 {actual}, not {sha256}: it is damaged")


class RemoteFile(io.RawIOBase):
    """An object as a file for reading, each read a request for just those bytes."""

    def __init__(self, url: str) -> None:
        self.url, self.name, self.place = url, url, 0

    @cached_property
    def size(self) -> int:
        return head(self.url).bytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = self.size if whence == io.SEEK_END else self.place if whence == io.SEEK_CUR else 0
        self.place = max(0, start + offset)
        return self.place

    def readinto(self, buffer: Any) -> int:
        memory = memoryview(buffer).cast("B")
        data = read(self.url, self.place, len(memory))
        memory[: len(data)] = data
        self.place += len(data)
        return len(data)

    def readall(self) -> bytes:
        data = read(self.url, self.place)  # io's own asks for 8 kB at a time
        self.place += len(data)
        return data


def download(url: str, local: Path) -> None:
    """Writes the object to the file `local`, large ones in parallel, and compares its bytes with the digest."""
    from boto3.exceptions import Boto3Error

    bucket, key = bucket_and_key(url)
    for failed in range(1, DOWNLOADS + 1):
        found = head(url)
        with named_errors(url):
            try:
                client().download_file(bucket, key, str(local), Config=_transfer())
                if found.bytes == local.stat().st_size and found.sha256 in (None, sha256_file(local)):
                    return
            except FlexibleChecksumError:  # what the server says of the bytes, if it does, was compared already
                pass
            except Boto3Error as error:
                raise FileError(f"cannot download {url}: {clean(error)}") from error
        time.sleep(pause_s(failed))
    local.unlink(missing_ok=True)
    raise Damaged(url, f"damaged, or changes while it is read: {DOWNLOADS} times other bytes came than it has")


def upload(local: Path, url: str) -> None:
    """Writes the file `local` to `url`, large ones in parts that are taken back if one of them fails."""
    from boto3.exceptions import Boto3Error

    bucket, key = bucket_and_key(url)
    size, digest = local.stat().st_size, sha256_file(local)
    if size <= PART_BYTES:
        put(url, local.read_bytes())
        return
    with suppress(OSError):  # they can wait
        abort_uploads(url, ABANDONED_S)
    with named_errors(url):
        try:
            more = {"Metadata": {SHA256: digest}}
            client().upload_file(str(local), bucket, key, ExtraArgs=more, Config=_transfer())
        except Boto3Error as error:
            if isinstance(error.__context__, ClientError):  # boto3 puts its own error around the one that tells
                raise error.__context__ from error
            raise FileError(f"cannot upload {url}: {clean(error)}") from error
    _require_kept(url, size, digest)


def put(url: str, data: bytes) -> None:
    """Writes `data` to `url` in one request."""
    bucket, key = bucket_and_key(url)
    digest = hashlib.sha256(data).hexdigest()
    with named_errors(url):
        client().put_object(Bucket=bucket, Key=key, Body=data, Metadata={SHA256: digest})
    _require_kept(url, len(data), digest)


def _require_kept(url: str, size: int, digest: str) -> None:
    found = head(url)
    if (found.bytes, found.sha256) != (size, digest):
        raise FileError(
            f"{url} has {found.bytes} bytes after {size} were written: this server does not keep what it is given; "
            "AWS_REQUEST_CHECKSUM_CALCULATION=when_required helps with older ones"
        )


def _transfer() -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=PARALLEL)


def create(url: str, data: bytes) -> bool:
    """Writes `data` to `url` if nothing is there, and says whether it did. `data` must tell this writer from others.

    Raises OSError in one line if the server cannot do that, whether it says so or overwrites without a word.
    """
    bucket, key = bucket_and_key(url)
    with named_errors(url):
        _require_creation(client(), bucket, key.rpartition("/")[0])
        if _put_new(client(), bucket, key, data):
            return True
    return read(url) == data  # ours, if the answer to a first attempt was lost


def _put_new(asked: Any, bucket: str, key: str, data: bytes) -> bool:
    for attempt in range(1, s3_client.ATTEMPTS + 1):
        try:
            asked.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
            return True
        except ClientError as error:
            if error_code(error) in TAKEN:
                return False
            if error_code(error) not in BOTH_AT_ONCE or attempt == s3_client.ATTEMPTS:
                raise
            time.sleep(pause_s(attempt))  # two writers at the same moment: the server asks again
    raise AssertionError("unreachable: the last attempt returns or raises")


@lru_cache(maxsize=64)
def _require_creation(asked: Any, bucket: str, folder: str) -> None:
    """Raises if the server ignores `If-None-Match`, as some do: then two writers would both be first."""
    probe = f"{folder}/.probe-{os.urandom(8).hex()}".lstrip("/")
    try:
        asked.put_object(Bucket=bucket, Key=probe, Body=b"", IfNoneMatch="*")
        if _put_new(asked, bucket, probe, b""):
            raise ClientError({"Error": {"Code": NOT_OFFERED[0]}}, "PutObject")
    finally:
        asked.delete_object(Bucket=bucket, Key=probe)


def remove(url: str) -> None:
    """Deletes `url`; nothing happens if it is not there."""
    bucket, key = bucket_and_key(url)
    with named_errors(url):
        client().delete_object(Bucket=bucket, Key=key)


def list_objects(folder: str, delimiter: str = "") -> Iterator[Listed]:
    """Everything below `folder`, which ends in `/`; with the delimiter `/` only what is directly in it, the folders
    there as keys that end in `/`. Page by page, a thousand at a time."""
    bucket, prefix = bucket_and_key(folder)
    with named_errors(folder):
        pages = client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, Delimiter=delimiter)
        for page in pages:
            yield from (Listed(one["Prefix"], 0, "") for one in page.get("CommonPrefixes", ()))
            yield from (Listed(one["Key"], one["Size"], one["ETag"]) for one in page.get("Contents", ()))


def abort_uploads(url: str, older_s: float) -> None:
    """Ends unfinished uploads begun more than `older_s` ago: those to `url`, or below it if it ends in `/`.

    They stay where the server does not list them, or not to whoever asks: not everybody who may write may list.
    """
    bucket, prefix = bucket_and_key(url)
    with suppress(PermissionError, NotOffered), named_errors(url):
        for page in client().get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix):
            for one in page.get("Uploads", ()):
                meant = url.endswith("/") or one["Key"] == prefix
                if meant and (datetime.now(UTC) - one["Initiated"]).total_seconds() >= older_s:
                    _abort(bucket, one["Key"], one["UploadId"])


def _abort(bucket: str, key: str, upload: str) -> None:
    try:
        client().abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload)
    except ClientError as error:
        if error_code(error) != "NoSuchUpload":  # it has come to its end meanwhile
            raise
