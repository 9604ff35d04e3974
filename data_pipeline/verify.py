"""Whether shards are what their manifest and their indexes say: sizes, bytes, members, and the values in them."""

import hashlib
import io
import random
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple, cast

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
    find_strange,
    index_url,
    load_manifest,
    shard_url,
    unpack_clip,
)
from data_pipeline.types import ShardInfo

BLOCK_BYTES = 1 << 18  # hashed at a time, as hashlib does; tarfile copies what is left of a block for each member
Shapes = Mapping[str, tuple[int, ...]]  # of a clip's tensors


def find_fault(url: str, info: ShardInfo, entries: Sequence[Entry] | None = None) -> str | None:
    """What is wrong with the bytes of the shard at `url`, in a few words, or None. Reads all of it.

    With its index's `entries`, they are compared with what lies in it too, and the values in it looked at.
    """
    return find_size_fault(url, info) or _find_altered(url, info, entries, {})


def _find_altered(url: str, info: ShardInfo, entries: Sequence[Entry] | None, shapes: Shapes) -> str | None:
    sha256, found = (storage.sha256(url), None) if entries is None else _read_members(url, shapes)
    if sha256 != info.sha256:
        return "altered: its SHA-256 is not the manifest's"
    for i, entry in enumerate(entries or ()):
        if found is None or _parts_of(entry, info) != found.members[2 * i : 2 * i + 2]:
            return f"{index_url(url)} says of clip {i} what is not so; {AGAIN}"
    return found.fault if found else None


class _Hashed:
    """A file that is read once from its beginning to its end, and the SHA-256 of what was read."""

    def __init__(self, file: io.BufferedReader) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.digest.update(data)
        return data


class _Members(NamedTuple):
    """What lies in a shard, in its order."""

    members: list[tuple[str, int, int]]  # name, offset, size
    fault: str | None  # of the first clip whose values are none


def _read_members(url: str, shapes: Shapes) -> tuple[str, _Members | None]:
    """The SHA-256 of a tar and what lies in it, from one pass over its bytes; None if it is no tar."""
    found = None
    with storage.open(url, storage.WHOLE_BYTES) as file:
        read = _Hashed(file)
        with (
            suppress(tarfile.TarError, *DAMAGE),
            tarfile.open(fileobj=cast(IO[bytes], read), mode="r|", bufsize=BLOCK_BYTES) as tar,
        ):
            members, fault = [], None
            for member in tar:
                members.append((member.name, member.offset_data, member.size))
                if fault is None and member.name.endswith(".safetensors"):
                    packed = tar.extractfile(member) if member.size <= CLIP_BYTES else None
                    fault = f"{member.name} is no clip" if packed is None else _look_at(url, packed.read(), shapes)
            found = _Members(members, fault)
        while read.read(BLOCK_BYTES):
            pass
    return read.digest.hexdigest(), found


def _look_at(url: str, packed: bytes, shapes: Shapes) -> str | None:
    """What is wrong with the shapes and values of a clip, in a few words, or None."""
    try:
        clip = unpack_clip(packed, url)
    except ValueError as error:
        return str(error)
    strange = find_strange(shapes, {name: tuple(tensor.shape) for name, tensor in clip.items()})
    where = f"a clip at frame {clip['start'].tolist()}" if "start" in clip else "a clip"
    if strange:
        return f"{where} has {strange}"
    for name, tensor in clip.items():
        if not torch.isfinite(tensor).all():
            return f"{where} has {name} that are not finite; encode its recordings again"
    return None


def _parts_of(entry: Entry, info: ShardInfo) -> list[tuple[str, int, int]] | None:
    """What must lie in the shard if the entry is right; None if it is not."""
    if entry.episode not in info.episodes or entry.key != clip_key(entry.episode, entry.start):
        return None
    return [
        (f"{entry.key}.jpg", entry.jpeg_offset, entry.jpeg_size),
        (f"{entry.key}.safetensors", entry.offset, entry.size),
    ]


def verify_set(url: str | Path, sample: int | None = None, seed: int | None = None) -> list[str]:
    """A line per fault of the set behind the manifest at `url`: shards missing, truncated, altered, strange, twice.

    With `sample`, the bytes of so many shards are read, drawn anew each time unless there is a `seed`; of the others,
    sizes and indexes are compared.
    """
    manifest, faults = load_manifest(url), []
    count = len(manifest.shards) if sample is None else min(max(0, sample), len(manifest.shards))
    read = set(random.Random(seed).sample(range(len(manifest.shards)), count))
    keys: dict[str, str] = {}
    shapes = clip_shapes(manifest)
    for i, info in enumerate(manifest.shards):
        shard = shard_url(url, info)
        entries, fault = compare_shard(shard, info)
        fault = fault or (_find_altered(shard, info, entries, shapes) if i in read else None)
        faults += [f"{shard}: {fault}"] if fault else []
        for entry in [] if fault else entries:
            first = keys.setdefault(entry.key, shard)
            faults += [f"{shard}: clip {entry.key} is in {first} too"] if first != shard else []
    twice = Counter(info.url for info in manifest.shards)
    faults += [f"{name}: {times} times in the manifest" for name, times in twice.items() if times > 1]
    listed = {shard_url(url, info) for info in manifest.shards}
    beside = [found for found in storage.list_files(storage.parent(url)) if found.endswith(".tar")]
    strays = [found for found in beside if found not in listed and not storage.name_of(found).startswith(".")]
    return faults + [f"{found}: not in the manifest" for found in strays]
