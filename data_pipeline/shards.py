"""Clips to tar shards and back, and the manifest that makes them a set.

A shard is a webdataset-compatible tar with two members per clip: `<key>.safetensors` (latents and actions) and
`<key>.jpg` (first frame). Beside it lies its index: SHA-256, size, and the offset of each member.
"""

import io
import json
import math
import re
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from webdataset.writer import TarWriter

from configs import build_from, storage, to_dict
from configs.errors import MissingFileError, UserError
from configs.untrusted import parse_object, reading, require_inside
from data_pipeline.types import Clip, Manifest, ShardInfo
from model.layout import CHUNK_FRAMES, CHUNK_LATENTS

MANIFEST, INDEX = "manifest.json", ".index.json"
VERIFY = "verify the set (python -m data_pipeline verify MANIFEST)"
AGAIN = "delete it and run the same encode command again"
HEADER_BYTES = 1 << 20  # of a clip's tensors at most; they take less than 1 kB
ALIGNMENT = 64  # bytes, of a clip's latents in its shard: copying them is faster then
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}  # safetensors' names of their types

Shapes = Mapping[str, tuple[int, ...]]  # of a clip's tensors
TensorLayout = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # a clip's tensors in the order of their bytes


class Entry(NamedTuple):
    """Where one clip lies in its shard, in bytes."""

    key: str
    episode: str
    start: int  # pixel frame of the episode
    offset: int  # of the safetensors member
    size: int
    jpeg_offset: int
    jpeg_size: int

    def members(self) -> list[tuple[str, int, int]]:
        """Name, offset and size of the clip's two members, in their order."""
        return [
            (f"{self.key}.jpg", self.jpeg_offset, self.jpeg_size),
            (f"{self.key}.safetensors", self.offset, self.size),
        ]


class Index(NamedTuple):
    """What lies beside a shard."""

    info: ShardInfo
    entries: list[Entry]
    left_out: dict[str, str]  # episodes of the plan that could not be decoded, and why


def clip_key(episode: str, start: int) -> str:
    """The name of a clip's members; webdataset splits names at the first dot, so there is none in it."""
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', episode)[:64]}-{start:06d}"


def shard_url(manifest: str | Path, info: ShardInfo) -> str:
    """Where the shard lies: beside its manifest."""
    return storage.join(storage.parent(manifest), info.url)


def index_url(url: str) -> str:
    """Where the index of the shard at `url` lies."""
    return url.removesuffix(".tar") + INDEX


def write_shard(url: str, clips: Sequence[Clip], left_out: Mapping[str, str] = {}) -> ShardInfo:
    """Writes the shard, then its index, which also names the episodes `left_out`; the same clips give the same bytes.
    Without clips, only the index is written."""
    info, entries = ShardInfo(storage.name_of(url), 0, 0, "", ()), list[Entry]()
    if clips:
        keys = [(clip_key(clip.episode, clip.start), clip.episode, clip.start) for clip in clips]
        owner = {"user": "worldloom", "group": "worldloom", "mtime": 0}
        with storage.writing(url) as part:
            with open(part, "wb") as file, TarWriter(file, encoder=False, **owner) as tar:
                for (key, _, _), clip in zip(keys, clips, strict=True):
                    tar.write({"__key__": key, "jpg": clip.first_frame, "safetensors": pack_clip(clip)})
            members = list_members(part)
            spans = zip(keys, members[::2], members[1::2], strict=True)
            entries = [Entry(*key, *tensors[1:], *jpeg[1:]) for key, jpeg, tensors in spans]
            episodes = tuple(dict.fromkeys(clip.episode for clip in clips))
            info = ShardInfo(info.url, len(clips), part.stat().st_size, storage.sha256(part), episodes)
    else:
        storage.remove(url)  # one that was made when its episodes could be decoded
    content = {"shard": to_dict(info), "clips": entries} | ({"left_out": dict(left_out)} if left_out else {})
    storage.write_text(index_url(url), json.dumps(content) + "\n")
    return info


def list_members(path: Path) -> list[tuple[str, int, int]]:
    """Name, offset and size of each member of a tar."""
    with tarfile.open(path, "r:") as tar:
        return [(member.name, member.offset_data, member.size) for member in tar]


def pack_clip(clip: Clip) -> bytes:
    """A clip as safetensors: its tensors and `start`; the episode's id is in the file's metadata."""
    tensors = {name: value.contiguous() for name, value in vars(clip).items() if isinstance(value, torch.Tensor)}
    # One entry of metadata: the order of several is not reproducible.
    packed = save({**tensors, "start": torch.tensor(clip.start)}, metadata={"episode": clip.episode})
    length = int.from_bytes(packed[:8], "little")
    latents = json.loads(packed[8 : 8 + length])["latents"]["data_offsets"][0]
    blanks = -(8 + length + latents) % ALIGNMENT  # a tar's members begin at multiples of 512; a header may end in them
    return (length + blanks).to_bytes(8, "little") + packed[8 : 8 + length] + b" " * blanks + packed[8 + length :]


def clip_shapes(manifest: Manifest) -> Shapes:
    """The shapes of the tensors that every clip of the set must hold."""
    game, frames, space = manifest.game, manifest.clip_frames, manifest.game.action_space
    rows, columns = game.height // manifest.spatial, game.width // manifest.spatial
    latents = (manifest.latent_channels, manifest.clip_latents, rows, columns)
    shapes = {"latents": latents, "keyboard": (frames, len(space.keys)), "mouse": (frames, 2 * space.mouse)}
    return {**shapes, "start": ()} | ({"image_latents": latents} if manifest.unknown == "grey" else {})


class BatchBuffer:
    """Memory for `b` clips of one layout, that of the clip which is read first."""

    def __init__(self, b: int, pin_memory: bool = False) -> None:
        self.b, self.pin_memory = b, pin_memory
        self.layout: TensorLayout = {}
        self.tensors: dict[str, torch.Tensor] = {}  # (b ...) by name
        self.bytes: dict[str, np.ndarray] = {}  # (b n) uint8, the same memory

    def row(self, i: int, layout: TensorLayout, clip: str) -> dict[str, memoryview]:
        """The bytes of row `i` by tensor. Raises UserError, naming `clip`, for another layout than the first clip's."""
        if not self.layout:
            self.layout, self.tensors = layout, {name: self._allocate(*tensor) for name, tensor in layout.items()}
            flat = {name: tensor.reshape(self.b, math.prod(tensor.shape[1:])) for name, tensor in self.tensors.items()}
            self.bytes = {name: tensor.view(torch.uint8).numpy() for name, tensor in flat.items()}
        if layout != self.layout:
            raise UserError(f"{clip} has {layout}, others {self.layout}; encode them alike")
        return {name: rows[i].data for name, rows in self.bytes.items()}

    def _allocate(self, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        if self.pin_memory or 0 in shape:  # torch reuses pinned memory, but not before copies from it to a GPU end
            return torch.empty(self.b, *shape, dtype=dtype, pin_memory=self.pin_memory)
        memory = np.empty((self.b, math.prod(shape) * dtype.itemsize), np.uint8)  # in large pages, unlike torch's
        return torch.from_numpy(memory).view(dtype).view(self.b, *shape)


def read_clip(file: io.BufferedIOBase, url: str, entry: Entry, shapes: Shapes, buffer: BatchBuffer, row: int) -> None:
    """Reads a clip's tensors into a row of the buffer; of a local file each is copied once.

    Raises UserError, naming the `url` of the shard, if the clip is damaged or does not have the `shapes`.
    """
    with reading(url, VERIFY):
        file.seek(entry.offset)
        length = int.from_bytes(file.read(8), "little")
        if length > min(entry.size - 8, HEADER_BYTES):
            raise UserError(f"clip {entry.key} has a header of {length} bytes")
        header = dict(json.loads(file.read(length)))
        header.pop("__metadata__", None)
        tensors = sorted(header.items(), key=lambda item: item[1]["data_offsets"])  # which follow without gaps
        layout = {name: (DTYPES[tensor["dtype"]], tuple(tensor["shape"])) for name, tensor in tensors}
        there = {name: shape for name, (_, shape) in layout.items()}
        if any(type(size) is not int or size < 0 for shape in there.values() for size in shape):
            raise UserError(f"clip {entry.key} has an impossible shape")
        if {**there, "visual": ()} != {**shapes, "visual": ()}:  # whose size is the vision tower's
            raise UserError(f"clip {entry.key} has the shapes {there}, not {shapes}")
        size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())
        if size != entry.size - 8 - length:
            raise UserError(f"clip {entry.key} has {entry.size - 8 - length} bytes of tensors, not {size}")
    rows = buffer.row(row, layout, f"{url}: clip {entry.key}")
    file.seek(entry.offset + 8 + length)
    for name in layout:
        if (read := file.readinto(rows[name])) != len(rows[name]):
            raise UserError(f"{url} is truncated: {read} of {len(rows[name])} bytes of {entry.key}; {VERIFY}")


def read_index(url: str) -> Index:
    """The index of the shard at `url`."""
    path = index_url(url)
    loaded = parse_object(storage.read_bytes(path), path)
    with reading(path, AGAIN):
        info = build_from(ShardInfo, loaded["shard"], path)
        entries = [Entry(*values) for values in loaded["clips"]]
        for entry in entries:
            _require_possible_entry(entry, info.bytes)
        left_out = {str(name): str(why) for name, why in dict(loaded.get("left_out", {})).items()}
    return Index(info, entries, left_out)


def _require_possible_entry(entry: Entry, shard_bytes: int) -> None:
    if [type(value) for value in entry] != [str, str, int, int, int, int, int]:
        raise UserError(f"{list(entry)!r:.80} is no clip")
    for name, offset, size in entry.members():
        if min(offset, size) < 0 or offset + size > shard_bytes:
            raise UserError(f"{name:.80} lies at {offset}, {size} bytes of {shard_bytes}, which cannot be")


def read_entries(url: str, info: ShardInfo) -> list[Entry]:
    """The index entries of the shard at `url`. Raises UserError if its size or its index is not as `info` says."""
    size = storage.path(url).stat().st_size
    if size != info.bytes:
        raise UserError(f"truncated or grown: {size} bytes, not {info.bytes}")
    index = read_index(url)
    if index.info != info or len(index.entries) != info.clips:
        raise UserError(f"{index_url(url)} is of another shard; {AGAIN}")
    return index.entries


def save_manifest(manifest: Manifest, url: str | Path) -> None:
    """Writes the manifest; it comes last, so that its presence means that the set is complete."""
    storage.write_text(url, json.dumps(to_dict(manifest), indent=1) + "\n")


def load_manifest(url: str | Path) -> Manifest:
    """The manifest at `url`. Raises UserError if it is missing, is none, contradicts itself or lists no shards."""
    if not storage.exists(url):
        raise MissingFileError(f"no manifest {url}; it is written last, so run the encode command (again) to its end")
    manifest = build_from(Manifest, parse_object(storage.read_bytes(url), url), url)
    with reading(url, "encode the set again"):
        _require_possible(manifest)
    return manifest


def count_latents(layout: str, frames: int, temporal: int) -> int:
    """Latents of a clip of `frames` pixel frames, of a codec of `temporal` frames per latent; UserError for no clip."""
    if layout == "continuous":
        (latents, rest), allowed = divmod(frames + temporal - 1, temporal), f"1 + {temporal}k"
    else:
        if 1 + temporal * (CHUNK_LATENTS - 1) != CHUNK_FRAMES:
            raise UserError(f"layout={layout}: the codec has {temporal} frames per latent; use layout=continuous")
        (chunks, rest), allowed = divmod(frames, CHUNK_FRAMES), f"a multiple of {CHUNK_FRAMES}"
        latents = chunks * CHUNK_LATENTS
    if frames < 1 or rest:
        raise UserError(f"clip_frames={frames}: {layout} clips have {allowed} frames")
    return latents


def _require_possible(manifest: Manifest) -> None:
    """Raises UserError for a manifest that no encoding can have written."""
    latents = count_latents(manifest.layout, manifest.clip_frames, manifest.temporal)
    if manifest.clip_latents != latents:
        raise UserError(f"clip_latents={manifest.clip_latents} must be {latents}")
    if not manifest.latent_channels == len(manifest.latent_mean) == len(manifest.latent_std):
        raise UserError(f"latent_mean and latent_std must be {manifest.latent_channels} numbers each")
    names = [info.url for info in manifest.shards]
    if not names or len(set(names)) < len(names):
        raise UserError("it lists no shards, or one twice")
    for info in manifest.shards:
        # A bare name; the file may be a link to where the bytes lie, as in caches of downloads.
        if "/" in require_inside(info.url, "the manifest") or not info.url.isprintable() or not info.clips:
            raise UserError(f"shard {info.url!r:.80} of {info.clips} clips is impossible")
