"""Clips to tar shards and back, and the manifest that makes them a set.

A shard is a webdataset-compatible tar with two members per clip: `<key>.safetensors` (latents and actions) and
`<key>.jpg` (first frame). Beside it lies its index: SHA-256, bytes, and where each member begins, so that a clip is
read by offset.
"""

import hashlib
import io
import json
import math
import random
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from webdataset.writer import TarWriter

from configs import build, to_dict
from configs.files import sha256_file
from data_pipeline import storage
from data_pipeline.types import Clip, Manifest, ShardInfo

MANIFEST, INDEX = "manifest.json", ".index.json"
VERIFY = "verify the set (python -m data_pipeline verify MANIFEST)"
BLOCK_BYTES = 1 << 18  # hashed at a time, as hashlib does; tarfile copies what is left of a block for each member
ALIGNMENT = 64  # bytes; where a clip's latents begin in its shard, so that they are copied at the full rate
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}  # of `pack_clip`, in safetensors' words


class Entry(NamedTuple):
    """Where one clip lies in its shard, in bytes."""

    key: str
    episode: str
    start: int  # pixel frame of the episode
    offset: int  # of the safetensors member
    size: int
    jpeg_offset: int
    jpeg_size: int


def clip_key(episode: str, start: int) -> str:
    """The name of a clip's members; webdataset splits names at the first dot, so there is none in it."""
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', episode)[:64]}-{start:06d}"


def shard_url(manifest: str | Path, info: ShardInfo) -> str:
    """Where the shard lies: beside its manifest."""
    return storage.join(storage.parent(manifest), info.url)


def index_url(url: str) -> str:
    """Where the index of the shard at `url` lies."""
    return url.removesuffix(".tar") + INDEX


def write_shard(folder: str | Path, name: str, clips: Iterable[Clip]) -> ShardInfo:
    """Writes `<name>` into `folder`, then its index; the same clips give the same bytes."""
    url = storage.join(folder, name)
    placed: list[tuple[str, str, int]] = []
    with storage.writing(url) as part:
        with open(part, "wb") as file, _tar_writer(file) as tar:
            for clip in clips:
                key = clip_key(clip.episode, clip.start)
                tar.write({"__key__": key, "jpg": clip.first_frame, "safetensors": pack_clip(clip)})
                placed.append((key, clip.episode, clip.start))
        with tarfile.open(part) as tar:
            where = {member.name: (member.offset_data, member.size) for member in tar}
        digest, size = sha256_file(part), part.stat().st_size
    entries = [Entry(*one, *where[f"{one[0]}.safetensors"], *where[f"{one[0]}.jpg"]) for one in placed]
    episodes = tuple(dict.fromkeys(entry.episode for entry in entries))
    info = ShardInfo(name, len(entries), size, digest, episodes)
    storage.write_text(index_url(url), json.dumps({"shard": to_dict(info), "clips": entries}) + "\n")
    return info


def _tar_writer(file: Any) -> TarWriter:
    return TarWriter(file, user="worldloom", group="worldloom", mtime=0, encoder=False)


def pack_clip(clip: Clip) -> bytes:
    """A clip as safetensors: latents, keyboard, mouse, start; the episode's id is in the file's metadata."""
    tensors = {
        "latents": clip.latents.contiguous(),
        "keyboard": clip.keyboard.contiguous(),
        "mouse": clip.mouse.contiguous(),
        "start": torch.tensor(clip.start),
    }
    optional = {"visual": clip.visual, "image_latents": clip.image_latents}
    tensors |= {name: tensor.contiguous() for name, tensor in optional.items() if tensor is not None}
    packed = save(tensors, metadata={"episode": clip.episode})  # one entry: the order of several is not reproducible
    length = int.from_bytes(packed[:8], "little")
    latents = json.loads(packed[8 : 8 + length])["latents"]["data_offsets"][0]
    blanks = -(8 + length + latents) % ALIGNMENT  # a tar's members begin at multiples of 512; a header may end in them
    return (length + blanks).to_bytes(8, "little") + packed[8 : 8 + length] + b" " * blanks + packed[8 + length :]


def unpack_clip(data: bytes, url: str) -> dict[str, torch.Tensor]:
    """The tensors that `pack_clip` wrote."""
    try:
        return load(data)
    except SafetensorError as error:
        raise ValueError(f"{url} holds a damaged clip ({error}); {VERIFY}") from error


Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape of a clip's tensors, as they lie there


def clip_layout(url: str, entry: Entry) -> Layout:
    """What the tensors of a clip are."""
    with storage.opened(url, entry.size) as file:
        return _read_layout(file, url, entry)[0]


def read_clip_into(url: str, entry: Entry, layout: Layout, rows: Mapping[str, memoryview]) -> None:
    """Fills `rows`, bytes by name, with a clip's tensors; of a local file each is copied once.

    Raises ValueError if the clip is damaged or has another layout.
    """
    with storage.opened(url, entry.size) as file:
        found, first = _read_layout(file, url, entry)
        if found != layout:
            raise ValueError(f"{url}: clip {entry.key} has {found}, others {layout}; {VERIFY}")
        file.seek(first)
        for name in found:
            if (got := file.readinto(rows[name])) != len(rows[name]):
                raise ValueError(f"{url} is truncated: {got} of {len(rows[name])} bytes of {entry.key}; {VERIFY}")


def _read_layout(file: io.BufferedReader, url: str, entry: Entry) -> tuple[Layout, int]:
    """The clip's layout, and where in the shard its tensors begin; they lie there one after the other."""
    file.seek(entry.offset)
    length = int.from_bytes(file.read(8), "little")
    if length > entry.size - 8:
        raise ValueError(f"{url} holds a damaged clip at {entry.offset}; {VERIFY}")
    try:
        header = {name: one for name, one in json.loads(file.read(length)).items() if name != "__metadata__"}
        tensors = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        layout = {name: (DTYPES[one["dtype"]], tuple(one["shape"])) for name, one in tensors}
        told = sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{url} holds a damaged clip ({error}); {VERIFY}") from error
    if told != entry.size - 8 - length:
        raise ValueError(f"{url} holds a damaged clip ({told} bytes in {entry.size}); {VERIFY}")
    return layout, entry.offset + 8 + length


def read_index(url: str) -> tuple[ShardInfo, list[Entry]]:
    """What the index of the shard at `url` says."""
    path = index_url(url)
    try:
        loaded = json.loads(storage.read_bytes(path))
        info = build(ShardInfo, loaded["shard"], f"{path}: shard.")
        return info, [Entry(*entry) for entry in loaded["clips"]]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing; run the same encode command again") from error
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no shard index; delete it and run the same encode command again") from error


def compare_shard(url: str, info: ShardInfo) -> tuple[list[Entry], str | None]:
    """The index of the shard at `url`, and what is wrong with its size or its index, in a few words, if anything is."""
    fault = _find_size_fault(url, info)
    if fault:
        return [], fault
    try:
        found, entries = read_index(url)
    except (FileNotFoundError, ValueError) as error:
        return [], str(error)
    if found != info or len(entries) != info.clips:
        return [], f"{index_url(url)} is of another shard; delete it and run the same encode command again"
    return entries, None


def find_fault(url: str, info: ShardInfo, entries: Sequence[Entry] | None = None) -> str | None:
    """What is wrong with the bytes of the shard at `url`, in a few words, or None. Reads all of it.

    With its index's `entries`, they are compared with what lies in it too.
    """
    return _find_size_fault(url, info) or _find_altered(url, info, entries)


def _find_altered(url: str, info: ShardInfo, entries: Sequence[Entry] | None) -> str | None:
    sha256, members = (storage.sha256(url), None) if entries is None else _read_members(url)
    if sha256 != info.sha256:
        return "altered: its SHA-256 is not the manifest's"
    for i, entry in enumerate(entries or ()):
        if members is None or _parts_of(entry, info) != members[2 * i : 2 * i + 2]:
            return f"{index_url(url)} says of clip {i} what is not so; delete it and run the same encode command again"
    return None


class _Hashed:
    """A file that is read once from its beginning to its end, and the SHA-256 of what was read."""

    def __init__(self, file: io.BufferedReader) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.digest.update(data)
        return data


def _read_members(url: str) -> tuple[str, list[tuple[str, int, int]] | None]:
    """The SHA-256 of a tar, and name, offset and size of what lies in it, in its order, from one pass over its bytes;
    None if it is no tar."""
    members = None
    with storage.opened(url, storage.WHOLE_BYTES) as file:
        read = _Hashed(file)
        with (
            suppress(tarfile.TarError),
            tarfile.open(fileobj=cast(IO[bytes], read), mode="r|", bufsize=BLOCK_BYTES) as tar,
        ):
            members = [(member.name, member.offset_data, member.size) for member in tar]
        while read.read(BLOCK_BYTES):
            pass
    return read.digest.hexdigest(), members


def _parts_of(entry: Entry, info: ShardInfo) -> list[tuple[str, int, int]] | None:
    """What must lie in the shard if the entry is right; None if it is not."""
    if entry.episode not in info.episodes or not isinstance(entry.start, int):
        return None
    if entry.key != clip_key(entry.episode, entry.start):
        return None
    return [
        (f"{entry.key}.jpg", entry.jpeg_offset, entry.jpeg_size),
        (f"{entry.key}.safetensors", entry.offset, entry.size),
    ]


def _find_size_fault(url: str, info: ShardInfo) -> str | None:
    try:
        found = storage.size(url)
    except FileNotFoundError:
        return "missing"
    return None if found == info.bytes else f"truncated or grown: {found} bytes, not {info.bytes}"


def save_manifest(manifest: Manifest, url: str | Path) -> None:
    """Writes the manifest; it comes last, so that its presence means that the set is complete."""
    storage.write_text(url, json.dumps(to_dict(manifest), indent=1) + "\n")


def load_manifest(url: str | Path) -> Manifest:
    """The manifest at `url`. Raises in one line if it is not there, is none, or lists no shards."""
    if not storage.exists(url):
        raise FileNotFoundError(f"no manifest {url}; it is written last, so run the encode command (again) to its end")
    try:
        loaded = json.loads(storage.read_bytes(url))
    except ValueError as error:
        raise ValueError(f"{url} is not valid JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{url} is no manifest: it must hold an object")
    manifest = build(Manifest, loaded, f"{url}: ")
    if not manifest.shards:
        raise ValueError(f"{url} lists no shards; encode some episodes first")
    return manifest


def verify_set(url: str | Path, sample: int | None = None, seed: int | None = None) -> list[str]:
    """A line per fault of the set behind the manifest at `url`: shards missing, truncated, altered, strange, twice.

    With `sample`, the bytes of so many shards are read, drawn anew each time unless there is a `seed`; of the others,
    sizes and indexes are compared.
    """
    manifest, faults = load_manifest(url), []
    count = len(manifest.shards) if sample is None else min(max(0, sample), len(manifest.shards))
    read = set(random.Random(seed).sample(range(len(manifest.shards)), count))
    keys: dict[str, str] = {}
    for i, info in enumerate(manifest.shards):
        shard = shard_url(url, info)
        entries, fault = compare_shard(shard, info)
        fault = fault or (_find_altered(shard, info, entries) if i in read else None)
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
