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
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from webdataset.writer import TarWriter

from configs import build_from, storage, to_dict
from configs.errors import MissingFileError, UserError
from configs.files import sha256_file
from configs.foreign import parse_object, reading, require_inside
from data_pipeline.batch_buffer import BatchBuffer, TensorLayout
from data_pipeline.types import Clip, Manifest, ShardInfo
from model.layout import CHUNK_FRAMES, CHUNK_LATENTS

MANIFEST, INDEX = "manifest.json", ".index.json"
VERIFY = "verify the set (python -m data_pipeline verify MANIFEST)"
AGAIN = "delete it and run the same encode command again"
CLIP_BYTES = 1 << 30  # of one clip at most; an index that says more is wrong
SHARD_CLIPS = 10_000_000  # of one shard at most
ALIGNMENT = 64  # bytes, of a clip's latents in its shard: copying them is faster then
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}  # safetensors' names of what clips hold


class Entry(NamedTuple):
    """Where one clip lies in its shard, in bytes."""

    key: str
    episode: str
    start: int  # pixel frame of the episode
    offset: int  # of the safetensors member
    size: int
    jpeg_offset: int
    jpeg_size: int


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
        with storage.writing(url) as part:
            entries = _write_tar(part, clips)
            episodes = tuple(dict.fromkeys(entry.episode for entry in entries))
            info = ShardInfo(info.url, len(entries), part.stat().st_size, sha256_file(part), episodes)
    else:
        storage.remove(url)  # one that was made when its episodes could be decoded
    content = {"shard": to_dict(info), "clips": entries} | ({"left_out": dict(left_out)} if left_out else {})
    storage.write_text(index_url(url), json.dumps(content) + "\n")
    return info


def _write_tar(path: Path, clips: Sequence[Clip]) -> list[Entry]:
    keys = [clip_key(clip.episode, clip.start) for clip in clips]
    with open(path, "wb") as file, TarWriter(file, user="worldloom", group="worldloom", mtime=0, encoder=False) as tar:
        for key, clip in zip(keys, clips, strict=True):
            tar.write({"__key__": key, "jpg": clip.first_frame, "safetensors": pack_clip(clip)})
    with tarfile.open(path) as tar:
        where = {member.name: (member.offset_data, member.size) for member in tar}
    return [
        Entry(key, clip.episode, clip.start, *where[f"{key}.safetensors"], *where[f"{key}.jpg"])
        for key, clip in zip(keys, clips, strict=True)
    ]


def pack_clip(clip: Clip) -> bytes:
    """A clip as safetensors: latents, keyboard, mouse, start; the episode's id is in the file's metadata."""
    tensors = {name: value for name, value in vars(clip).items() if isinstance(value, torch.Tensor)}
    tensors = {name: tensor.contiguous() for name, tensor in {**tensors, "start": torch.tensor(clip.start)}.items()}
    packed = save(tensors, metadata={"episode": clip.episode})  # one entry: the order of several is not reproducible
    length = int.from_bytes(packed[:8], "little")
    latents = json.loads(packed[8 : 8 + length])["latents"]["data_offsets"][0]
    blanks = -(8 + length + latents) % ALIGNMENT  # a tar's members begin at multiples of 512; a header may end in them
    return (length + blanks).to_bytes(8, "little") + packed[8 : 8 + length] + b" " * blanks + packed[8 + length :]


Shapes = Mapping[str, tuple[int, ...]]  # of a clip's tensors


def clip_shapes(manifest: Manifest) -> Shapes:
    """The shapes of the tensors that every clip of the set must hold."""
    game, frames, space = manifest.game, manifest.clip_frames, manifest.game.action_space
    rows, columns = game.height // manifest.spatial, game.width // manifest.spatial
    latents = (manifest.latent_channels, manifest.clip_latents, rows, columns)
    shapes = {"latents": latents, "keyboard": (frames, len(space.keys)), "mouse": (frames, 2 * space.mouse)}
    return {**shapes, "start": ()} | ({"image_latents": latents} if manifest.unknown == "grey" else {})


def read_clip(file: io.BufferedIOBase, url: str, entry: Entry, shapes: Shapes, buffer: BatchBuffer, row: int) -> None:
    """Reads a clip's tensors into a row of the buffer; of a local file each is copied once.

    Raises UserError, naming the `url` of the shard, if the clip is damaged or has not the `shapes`.
    """
    layout, first = _read_layout(file, url, entry)
    found = {name: shape for name, (_, shape) in layout.items()}
    for name, shape in shapes.items():
        if found.get(name) != shape:
            raise UserError(f"{url}: clip {entry.key} has {name} of the shape {found.get(name)}, not {shape}; {VERIFY}")
    rows = buffer.row(row, layout, f"{url}: clip {entry.key}")
    file.seek(first)
    for name in layout:
        if (read := file.readinto(rows[name])) != len(rows[name]):
            raise UserError(f"{url} is truncated: {read} of {len(rows[name])} bytes of {entry.key}; {VERIFY}")


def _read_layout(file: io.BufferedIOBase, url: str, entry: Entry) -> tuple[TensorLayout, int]:
    """The clip's layout, and the offset in the shard of its first tensor; the others follow without gaps."""
    file.seek(entry.offset)
    length = int.from_bytes(file.read(8), "little")
    if length > entry.size - 8:
        raise UserError(f"{url} holds a damaged clip at {entry.offset}; {VERIFY}")
    with reading(url, VERIFY):
        header = parse_object(file.read(length), f"{url}: the header of clip {entry.key}")
        header.pop("__metadata__", None)
        tensors = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        layout = {name: (DTYPES[tensor["dtype"]], tuple(tensor["shape"])) for name, tensor in tensors}
        if any(type(size) is not int or size < 0 for _, shape in layout.values() for size in shape):
            raise UserError(f"clip {entry.key} has an impossible shape")
        size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())
    if size != entry.size - 8 - length:
        raise UserError(f"{url} holds a damaged clip ({size} bytes in {entry.size}); {VERIFY}")
    return layout, entry.offset + 8 + length


def read_index(url: str) -> Index:
    """The index of the shard at `url`."""
    path = index_url(url)
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError as error:
        raise MissingFileError(f"{path} is missing; run the same encode command again") from error
    with reading(path, AGAIN):
        loaded = parse_object(data, path)
        info = build_from(ShardInfo, loaded["shard"], path)
        entries = [_read_entry(entry, info) for entry in loaded["clips"]]
        left_out = {str(name): str(why) for name, why in dict(loaded.get("left_out", {})).items()}
    return Index(info, entries, left_out)


def _read_entry(values: Any, info: ShardInfo) -> Entry:
    entry = Entry(*values)
    numbers = entry[2:]
    if not isinstance(entry.key, str) or not isinstance(entry.episode, str) or any(type(n) is not int for n in numbers):
        raise UserError(f"{values!r:.80} is no clip")
    largest = min(info.bytes, CLIP_BYTES)
    for offset, size in (numbers[1:3], numbers[3:5]):
        if offset < 0 or not 0 <= size <= largest or offset + size > info.bytes:
            raise UserError(f"clip {entry.key:.80} lies at {offset}, {size} bytes of {info.bytes}, which cannot be")
    return entry


def read_entries(url: str, info: ShardInfo) -> list[Entry]:
    """The index entries of the shard at `url`. Raises UserError if its size or its index is not as `info` says."""
    require_size(url, info)
    found, entries, _ = read_index(url)
    if found != info or len(entries) != info.clips:
        raise UserError(f"{index_url(url)} is of another shard; {AGAIN}")
    return entries


def require_size(url: str, info: ShardInfo) -> None:
    """Raises UserError, not naming the `url`, unless a shard of the right size is there."""
    try:
        size = storage.size(url)
    except FileNotFoundError as error:
        raise UserError("missing") from error
    if size != info.bytes:
        raise UserError(f"truncated or grown: {size} bytes, not {info.bytes}")


def save_manifest(manifest: Manifest, url: str | Path) -> None:
    """Writes the manifest; it comes last, so that its presence means that the set is complete."""
    storage.write_text(url, json.dumps(to_dict(manifest), indent=1) + "\n")


def load_manifest(url: str | Path) -> Manifest:
    """The manifest at `url`. Raises UserError if it is missing, is none, contradicts itself or lists no shards."""
    if not storage.exists(url):
        raise MissingFileError(f"no manifest {url}; it is written last, so run the encode command (again) to its end")
    manifest = build_from(Manifest, parse_object(storage.read_bytes(url), url), url)
    if not manifest.shards:
        raise UserError(f"{url} lists no shards; encode some episodes first")
    _require_possible(manifest, str(url))
    return manifest


def count_latents(layout: str, frames: int, temporal: int) -> int:
    """Latent frames of a clip of `frames` pixel frames, `temporal` of them per latent."""
    return frames // CHUNK_FRAMES * CHUNK_LATENTS if layout == "chunked" else 1 + (frames - 1) // temporal


def _require_possible(manifest: Manifest, url: str) -> None:
    """Raises UserError for a manifest that no encoding can have written."""
    frames, latents, channels = manifest.clip_frames, manifest.clip_latents, manifest.latent_channels
    if min(manifest.spatial, manifest.temporal) < 1:
        raise UserError(f"{url}: spatial={manifest.spatial} and temporal={manifest.temporal} must be at least 1")
    off = frames % CHUNK_FRAMES if manifest.layout == "chunked" else (frames - 1) % manifest.temporal
    if frames < 1 or off or latents != count_latents(manifest.layout, frames, manifest.temporal):
        raise UserError(f"{url} says {manifest.layout} clips of {frames} frames and {latents} latents; there are none")
    mean, std = manifest.latent_mean, manifest.latent_std
    if channels < 1 or len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise UserError(f"{url}: latent_mean and latent_std must be {channels} numbers each, those of std above 0")
    for info in manifest.shards:
        # A bare name; the file may be a link to where the bytes lie, as in caches of downloads.
        named = "/" not in require_inside(info.url, url) and info.url.isprintable()
        if not named or not 1 <= info.clips <= SHARD_CLIPS or info.bytes < 1:
            raise UserError(
                f"{url} lists an impossible shard: {info.url!r:.80}, {info.clips} clips, {info.bytes} bytes"
            )
