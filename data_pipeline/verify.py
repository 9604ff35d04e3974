"""Whether shards are what their manifest and their indexes say: sizes, bytes, members, and the values in them."""

import hashlib
import io
import random
import tarfile
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, cast

import torch

from configs import storage
from configs.errors import UserError
from configs.foreign import DAMAGE
from data_pipeline.batch_buffer import BatchBuffer
from data_pipeline.shards import (
    AGAIN,
    CLIP_BYTES,
    Entry,
    Shapes,
    clip_key,
    clip_shapes,
    index_url,
    load_manifest,
    read_clip,
    read_entries,
    require_size,
    shard_url,
)
from data_pipeline.types import ShardInfo

BLOCK_BYTES = 1 << 18  # hashed at a time, as hashlib does; tarfile copies what is left of a block for each member
ALTERED = "altered: its SHA-256 is not the manifest's"
FAULT = (ValueError, FileNotFoundError)  # what a shard that is damaged or gone raises


def require_bytes(url: str, info: ShardInfo) -> None:
    """Raises UserError, not naming the `url`, unless the shard's bytes are as `info` says. Reads all of them."""
    require_size(url, info)
    if storage.sha256(url) != info.sha256:
        raise UserError(ALTERED)


class _HashingReader:
    """A file that is read once from beginning to end, and the SHA-256 of what was read."""

    def __init__(self, file: io.BufferedReader) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.digest.update(data)
        return data


def require_clips(url: str, info: ShardInfo, entries: Sequence[Entry], shapes: Shapes) -> None:
    """As `require_bytes`, and the index's `entries`, the clips' shapes and their values must be right too."""
    require_size(url, info)
    members, fault = list[tuple[str, int, int]](), None  # name, offset, size
    with storage.open(url, storage.WHOLE_BYTES) as file:
        reader = _HashingReader(file)
        with (
            suppress(tarfile.TarError, *DAMAGE),  # then the members are not those of the index
            tarfile.open(fileobj=cast(IO[bytes], reader), mode="r|", bufsize=BLOCK_BYTES) as tar,
        ):
            for member in tar:
                members.append((member.name, member.offset_data, member.size))
                if member.name.endswith(".safetensors") and member.size <= CLIP_BYTES:
                    packed = cast(IO[bytes], tar.extractfile(member)).read()
                    fault = fault or _find_wrong_values(url, member.name, packed, shapes)
        while reader.read(BLOCK_BYTES):
            pass
    if reader.digest.hexdigest() != info.sha256:
        raise UserError(ALTERED)
    if members != [member for entry in entries for member in _expected_members(entry, info)]:
        raise UserError(f"{index_url(url)} does not match the clips in the shard; {AGAIN}")
    if fault:
        raise UserError(fault)


def _expected_members(entry: Entry, info: ShardInfo) -> list[tuple[str, int, int]]:
    if entry.episode not in info.episodes or entry.key != clip_key(entry.episode, entry.start):
        return []
    return [
        (f"{entry.key}.jpg", entry.jpeg_offset, entry.jpeg_size),
        (f"{entry.key}.safetensors", entry.offset, entry.size),
    ]


def _find_wrong_values(url: str, name: str, packed: bytes, shapes: Shapes) -> str | None:
    buffer = BatchBuffer(1)
    try:
        read_clip(io.BytesIO(packed), url, Entry(name, "", 0, 0, len(packed), 0, 0), shapes, buffer, 0)
    except ValueError as error:
        return str(error)
    wrong = [of for of, tensor in buffer.tensors().items() if not torch.isfinite(tensor).all()]
    return f"{name} has {wrong[0]} that are not finite; encode its recordings again" if wrong else None


def verify_set(url: str | Path, sample: int | None = None) -> list[str]:
    """A line per fault of the set with the manifest at `url`: shards missing, truncated, altered, stray or twice.

    With `sample`, the bytes of so many random shards are read; of the others, sizes and indexes are compared.
    """
    manifest, faults = load_manifest(url), list[str]()
    count = len(manifest.shards) if sample is None else min(max(0, sample), len(manifest.shards))
    read = set(random.sample(range(len(manifest.shards)), count))
    keys: dict[str, str] = {}
    for i, info in enumerate(manifest.shards):
        shard = shard_url(url, info)
        try:
            entries = read_entries(shard, info)
            if i in read:
                require_clips(shard, info, entries, clip_shapes(manifest))
        except FAULT as error:
            faults.append(f"{shard}: {error}")
            continue
        firsts = [(entry.key, keys.setdefault(entry.key, shard)) for entry in entries]
        faults += [f"{shard}: clip {key} is in {first} too" for key, first in firsts if first != shard]
    times = Counter(info.url for info in manifest.shards)
    faults += [f"{name}: {count} times in the manifest" for name, count in times.items() if count > 1]
    listed = {shard_url(url, info) for info in manifest.shards}
    tars = [file for file in storage.list_files(storage.parent(url)) if file.endswith(".tar")]
    strays = [tar for tar in tars if tar not in listed and not storage.name_of(tar).startswith(".")]
    return faults + [f"{stray}: not in the manifest" for stray in strays]
