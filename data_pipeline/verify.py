"""Whether shards are what their manifest and their indexes say: sizes, bytes, members, and the values in them."""

import random
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from configs import storage, within
from configs.errors import UserError
from configs.untrusted import DAMAGE
from data_pipeline import shards
from data_pipeline.types import ShardInfo

ALTERED = "altered: its SHA-256 is not the manifest's"
FAULT = (ValueError, FileNotFoundError)  # what a shard that is damaged or gone raises


def require_clips(url: str, info: ShardInfo, entries: Sequence[shards.Entry], shapes: shards.Shapes) -> None:
    """Raises UserError unless the shard's bytes are as `info` says, and the index's `entries`, the clips' shapes and
    their values are right. A shard on a server is copied."""
    with storage.cached_file(url) as path:
        if storage.sha256(path) != info.sha256:
            raise UserError(ALTERED)
        members = list[tuple[str, int, int]]()
        with suppress(tarfile.TarError, *DAMAGE):  # then the members are not those of the index
            members = shards.list_members(path)
        named = all(entry.key == shards.clip_key(entry.episode, entry.start) for entry in entries)
        known = {entry.episode for entry in entries} == set(info.episodes)
        if not named or not known or members != [member for entry in entries for member in entry.members()]:
            raise UserError(f"{shards.index_url(url)} does not match the clips in the shard; {shards.AGAIN}")
        buffer = shards.BatchBuffer(1)
        with open(path, "rb") as file:
            for entry in entries:
                shards.read_clip(file, url, entry, shapes, buffer, 0)
                if wrong := [name for name, tensor in buffer.tensors.items() if not tensor.isfinite().all()]:
                    raise UserError(f"{entry.key} has {wrong[0]} that are not finite; encode its recordings again")


@dataclass(frozen=True)
class VerifyConfig:
    """`python -m data_pipeline verify MANIFEST`."""

    manifest: str
    sample: int | None = within(0, 10_000_000, None)  # read so many shards, others each time, instead of all of them


def verify(config: VerifyConfig) -> int:
    """Re-read the shards of a manifest and compare: verify MANIFEST sample=10; exit status 1 if anything is wrong."""
    manifest, faults = shards.load_manifest(config.manifest), verify_set(config.manifest, config.sample)
    read = "" if config.sample is None else f", {min(config.sample, len(manifest.shards))} of them read"
    summary = f"{len(manifest.shards)} shards{read}, {manifest.clips} clips, {len(faults) or 'no'} faults"
    print("\n".join([*faults, f"{config.manifest}: {summary}"]))
    return 1 if faults else 0


def verify_set(url: str | Path, sample: int | None = None) -> list[str]:
    """A line per fault of the set with the manifest at `url`: shards missing, truncated, altered or stray.

    With `sample`, the bytes of so many random shards are read; of the others, sizes and indexes are compared.
    """
    manifest, faults, keys = shards.load_manifest(url), list[str](), dict[str, str]()
    shapes, urls = shards.clip_shapes(manifest), [shards.shard_url(url, info) for info in manifest.shards]
    read = set(urls if sample is None else random.sample(urls, min(sample, len(urls))))
    for shard, info in zip(urls, manifest.shards, strict=True):
        try:
            entries = shards.read_entries(shard, info)
            if shard in read:
                require_clips(shard, info, entries, shapes)
        except FAULT as error:
            faults.append(f"{shard}: {error}")
            continue
        firsts = [(entry.key, keys.setdefault(entry.key, shard)) for entry in entries]
        faults += [f"{shard}: clip {key} is in {first} too" for key, first in firsts if first != shard]
    folder = storage.parent(url)
    tars = [name for name in storage.list_folder(folder) if name.endswith(".tar") and not name.startswith(".")]
    strays = sorted({storage.join(folder, tar) for tar in tars} - set(urls))
    return faults + [f"{stray}: not in the manifest" for stray in strays]
