"""Clips to tar shards and back, and the manifest that makes them a set.

A shard is a webdataset-compatible tar with two members per clip: `<key>.safetensors` (latents and actions) and
`<key>.jpg` (first frame). Beside it lies its index: SHA-256, bytes, and where each member begins, so that a clip is
read by offset.
"""

import hashlib
import json
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from webdataset.writer import TarWriter

from configs import build, to_dict
from data_pipeline import storage
from data_pipeline.types import Clip, Manifest, ShardInfo
from model.weights import sha256_file

MANIFEST = "manifest.json"


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
    return url.removesuffix(".tar") + ".index.json"


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
    return save(tensors, metadata={"episode": clip.episode})  # one entry: the order of several is not reproducible


def unpack_clip(data: bytes, url: str) -> dict[str, torch.Tensor]:
    """The tensors that `pack_clip` wrote."""
    try:
        return load(data)
    except SafetensorError as error:
        raise ValueError(f"{url} holds a damaged clip ({error}); run python -m data_pipeline verify") from error


def read_index(url: str) -> tuple[ShardInfo, list[Entry]]:
    """What the index of the shard at `url` says."""
    path = index_url(url)
    if not storage.exists(path):
        raise FileNotFoundError(f"{path} is missing; run the same encode command again")
    try:
        loaded = json.loads(storage.read_bytes(path))
        info = build(ShardInfo, loaded["shard"], f"{path}: shard.")
        return info, [Entry(*entry) for entry in loaded["clips"]]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no shard index; delete it and run the same encode command again") from error


def find_fault(url: str, info: ShardInfo) -> str | None:
    """What is wrong with the shard at `url`, in a few words, or None. Reads all of it."""
    if not storage.exists(url):
        return "missing"
    found = storage.size(url)
    if found != info.bytes:
        return f"truncated or grown: {found} bytes, not {info.bytes}"
    if sha256_of(url) != info.sha256:
        return "altered: its SHA-256 is not the manifest's"
    return None


def sha256_of(url: str) -> str:
    """The SHA-256 of what lies at `url`, read in pieces."""
    digest, total = hashlib.sha256(), storage.size(url)
    for offset in range(0, total, 8 << 20):
        digest.update(storage.read_range(url, offset, min(8 << 20, total - offset)))
    return digest.hexdigest()


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


def verify_set(url: str | Path) -> list[str]:
    """A line per fault of the shard set behind the manifest at `url`: missing, truncated, altered, not in the set."""
    manifest = load_manifest(url)
    faults = []
    for info in manifest.shards:
        shard = shard_url(url, info)
        fault = find_fault(shard, info) or _find_index_fault(shard, info)
        faults += [f"{shard}: {fault}"] if fault else []
    listed = {shard_url(url, info) for info in manifest.shards}
    beside = [found for found in storage.list_files(storage.parent(url)) if found.endswith(".tar")]
    strays = [found for found in beside if found not in listed and "/." not in found]
    return faults + [f"{found}: not in the manifest" for found in strays]


def _find_index_fault(shard: str, info: ShardInfo) -> str | None:
    try:
        found, entries = read_index(shard)
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    same = found == info and len(entries) == info.clips
    return None if same else f"{index_url(shard)} is of another shard; delete it and run the same encode command again"
