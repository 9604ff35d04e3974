"""Whether shards are what their manifest and their indexes say: sizes, bytes, members, and the values in them."""

import hashlib
import io
import random
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, cast

import torch

from configs import storage
from configs.foreign import DAMAGE
from data_pipeline.shards import (
    AGAIN,
    CLIP_BYTES,
    Entry,
    clip_key,
    clip_shapes,
    compare_shard,
    find_size_fault,
    find_wrong_shape,
    index_url,
    load_manifest,
    shard_url,
    unpack_clip,
)
from data_pipeline.types import ShardInfo

BLOCK_BYTES = 1 << 18  # hashed at a time, as hashlib does; tarfile copies what is left of a block for each member
ALTERED = "altered: its SHA-256 is not the manifest's"
Shapes = Mapping[str, tuple[int, ...]]  # of a clip's tensors


def find_altered(url: str, info: ShardInfo) -> str | None:
    """What is wrong with the bytes of the shard at `url`, in a few words, or None. Reads all of it."""
    return find_size_fault(url, info) or (ALTERED if storage.sha256(url) != info.sha256 else None)


class _HashingReader:
    """A file that is read once from beginning to end, and the SHA-256 of what was read."""

    def __init__(self, file: io.BufferedReader) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.digest.update(data)
        return data


def find_fault(url: str, info: ShardInfo, entries: Sequence[Entry], shapes: Shapes) -> str | None:
    """As `find_altered`, and whether the `entries` of its index and the clips' shapes and values are right."""
    if fault := find_size_fault(url, info):
        return fault
    members = list[tuple[str, int, int]]()  # name, offset, size
    with storage.open(url, storage.WHOLE_BYTES) as file:
        reader = _HashingReader(file)
        with (
            suppress(tarfile.TarError, *DAMAGE),  # then the members are not those of the index
            tarfile.open(fileobj=cast(IO[bytes], reader), mode="r|", bufsize=BLOCK_BYTES) as tar,
        ):
            for member in tar:
                members.append((member.name, member.offset_data, member.size))
                if member.name.endswith(".safetensors") and member.size <= CLIP_BYTES:
                    fault = fault or _find_wrong_values(url, cast(IO[bytes], tar.extractfile(member)).read(), shapes)
        while reader.read(BLOCK_BYTES):
            pass
    if reader.digest.hexdigest() != info.sha256:
        return ALTERED
    if members != [member for entry in entries for member in _expected_members(entry, info)]:
        return f"{index_url(url)} does not match the clips in the shard; {AGAIN}"
    return fault


def _expected_members(entry: Entry, info: ShardInfo) -> list[tuple[str, int, int]]:
    if entry.episode not in info.episodes or entry.key != clip_key(entry.episode, entry.start):
        return []
    return [
        (f"{entry.key}.jpg", entry.jpeg_offset, entry.jpeg_size),
        (f"{entry.key}.safetensors", entry.offset, entry.size),
    ]


def _find_wrong_values(url: str, packed: bytes, shapes: Shapes) -> str | None:
    try:
        clip = unpack_clip(packed, url)
    except ValueError as error:
        return str(error)
    where = f"a clip at frame {clip['start'].tolist()}" if "start" in clip else "a clip"
    if wrong := find_wrong_shape(shapes, {name: tuple(tensor.shape) for name, tensor in clip.items()}):
        return f"{where} has {wrong}"
    for name, tensor in clip.items():
        if not torch.isfinite(tensor).all():
            return f"{where} has {name} that are not finite; encode its recordings again"
    return None


def verify_set(url: str | Path, sample: int | None = None, seed: int | None = None) -> list[str]:
    """A line per fault of the set with the manifest at `url`: shards missing, truncated, altered, stray or twice.

    With `sample`, the bytes of so many shards are read, drawn at random by `seed` if there is one; of the others, sizes
    and indexes are compared.
    """
    manifest, faults = load_manifest(url), []
    count = len(manifest.shards) if sample is None else min(max(0, sample), len(manifest.shards))
    read = set(random.Random(seed).sample(range(len(manifest.shards)), count))
    keys: dict[str, str] = {}
    shapes = clip_shapes(manifest)
    for i, info in enumerate(manifest.shards):
        shard = shard_url(url, info)
        entries, fault = compare_shard(shard, info)
        fault = fault or (find_fault(shard, info, entries, shapes) if i in read else None)
        faults += [f"{shard}: {fault}"] if fault else []
        for entry in [] if fault else entries:
            first = keys.setdefault(entry.key, shard)
            faults += [f"{shard}: clip {entry.key} is in {first} too"] if first != shard else []
    times = Counter(info.url for info in manifest.shards)
    faults += [f"{name}: {count} times in the manifest" for name, count in times.items() if count > 1]
    listed = {shard_url(url, info) for info in manifest.shards}
    tars = [file for file in storage.list_files(storage.parent(url)) if file.endswith(".tar")]
    strays = [tar for tar in tars if tar not in listed and not storage.name_of(tar).startswith(".")]
    return faults + [f"{stray}: not in the manifest" for stray in strays]
