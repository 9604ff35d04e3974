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
from configs.untrusted import DAMAGE
from data_pipeline.shards import (
    AGAIN,
    CLIP_BYTES,
    BatchBuffer,
    Entry,
    Shapes,
    clip_key,
    clip_shapes,
    index_url,
    load_manifest,
    read_clip,
    read_entries,
    shard_url,
)
from data_pipeline.types import ShardInfo

BLOCK_BYTES = 1 << 18  # hashed at a time, as hashlib does; tarfile copies what is left of a block for each member
ALTERED = "altered: its SHA-256 is not the manifest's"
FAULT = (ValueError, FileNotFoundError)  # what a shard that is damaged or gone raises


class _HashingReader:
    """A file that is read once from beginning to end, and the SHA-256 of what was read."""

    def __init__(self, file: io.BufferedReader) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.digest.update(data)
        return data


def require_clips(url: str, info: ShardInfo, entries: Sequence[Entry], shapes: Shapes) -> None:
    """Raises UserError unless the shard's bytes are as `info` says, and the index's `entries`, the clips' shapes and
    their values are right. Reads all of it, once."""
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
    expected = [
        member
        for entry in entries
        if entry.episode in info.episodes and entry.key == clip_key(entry.episode, entry.start)
        for member in (
            (f"{entry.key}.jpg", entry.jpeg_offset, entry.jpeg_size),
            (f"{entry.key}.safetensors", entry.offset, entry.size),
        )
    ]
    if members != expected:
        raise UserError(f"{index_url(url)} does not match the clips in the shard; {AGAIN}")
    if fault:
        raise UserError(fault)


def _find_wrong_values(url: str, name: str, packed: bytes, shapes: Shapes) -> str | None:
    buffer = BatchBuffer(1)
    try:
        read_clip(io.BytesIO(packed), url, Entry(name, "", 0, 0, len(packed), 0, 0), shapes, buffer, 0)
    except UserError as error:
        return str(error)
    wrong = [of for of, tensor in buffer.tensors().items() if not torch.isfinite(tensor).all()]
    return f"{name} has {wrong[0]} that are not finite; encode its recordings again" if wrong else None


def verify_set(url: str | Path, sample: int | None = None) -> list[str]:
    """A line per fault of the set with the manifest at `url`: shards missing, truncated, altered, stray or twice.

    With `sample`, the bytes of so many random shards are read; of the others, sizes and indexes are compared.
    """
    manifest, faults, keys = load_manifest(url), list[str](), dict[str, str]()
    shapes, urls = clip_shapes(manifest), [shard_url(url, info) for info in manifest.shards]
    read = set(urls if sample is None else random.sample(urls, min(max(0, sample), len(urls))))
    for shard, info in zip(urls, manifest.shards, strict=True):
        try:
            entries = read_entries(shard, info)
            if shard in read:
                require_clips(shard, info, entries, shapes)
        except FAULT as error:
            faults.append(f"{shard}: {error}")
            continue
        firsts = [(entry.key, keys.setdefault(entry.key, shard)) for entry in entries]
        faults += [f"{shard}: clip {key} is in {first} too" for key, first in firsts if first != shard]
    faults += [f"{shard}: {times} times in the manifest" for shard, times in Counter(urls).items() if times > 1]
    folder = storage.parent(url)
    tars = [name for name in storage.list_folder(folder) if name.endswith(".tar") and not name.startswith(".")]
    strays = sorted({storage.join(folder, tar) for tar in tars} - set(urls))
    return faults + [f"{stray}: not in the manifest" for stray in strays]
