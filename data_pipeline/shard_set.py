"""One shard set or several as clips by number: opened, compared with the manifests, read by offset."""

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from configs import s3, storage
from configs.errors import UserError
from configs.game import ActionSpace
from configs.s3_errors import Damaged
from data_pipeline.shards import (
    VERIFY,
    Entry,
    Layout,
    clip_layout,
    clip_shapes,
    compare_shard,
    find_strange,
    load_manifest,
    read_clip_into,
    shard_url,
    unpack_clip,
)
from data_pipeline.types import Clip, Manifest, ShardInfo, Source
from data_pipeline.verify import find_fault

TRIES = 2  # a disk, or a copy, may be at fault for a moment


class Shards:
    """All clips of one set or several by number, in the order of the manifests."""

    def __init__(
        self,
        sources: str | Path | Sequence[Source],  # manifests
        verify: bool = True,  # compare a shard's SHA-256 when it is used for the first time
        copies: bool = False,  # read shards on a server from copies on this machine, made when a clip is wanted
        faults: bool = False,  # a shard that is not as its manifest says is an error when a clip of it is wanted
    ) -> None:
        """Raises in one line for a set that is not there, is not whole, or is of another kind than the first."""
        given = [Source(str(sources))] if isinstance(sources, str | Path) else list(sources)
        self.sources, self.verify, self.copies = given, verify, copies
        self.manifests = load_manifests(given)
        self.shards = [
            (source.path, info)
            for source, manifest in zip(given, self.manifests, strict=True)
            for info in manifest.shards
        ]
        self.places: list[tuple[int, Entry]] = []  # which shard, and where in it
        self._faults: dict[int, list[str]] = {}  # of each shard, one for every time that it was looked at
        self._whole: set[int] = set()
        self._looking = [threading.Lock() for _ in self.shards]
        with ThreadPoolExecutor(s3.PARALLEL) as pool:
            looked_at = pool.map(lambda one: compare_shard(shard_url(*one), one[1]), self.shards)
            for number, (entries, fault) in enumerate(looked_at):
                if fault and not faults:
                    raise self._error(number, fault)
                self._faults[number] = [fault] * TRIES if fault else []
                unknown = [Entry("?", "?", 0, 0, 0, 0, 0)] * self.shards[number][1].clips  # they keep their numbers
                self.places += [(number, entry) for entry in (unknown if fault else entries)]

    def __len__(self) -> int:
        return len(self.places)

    @property
    def manifest(self) -> Manifest:
        """That of the first set: what all have in common can be asked of it."""
        return self.manifests[0]

    def read(self, number: int) -> dict[str, torch.Tensor]:
        """The tensors of a clip: latents (c f h w), keyboard (n k), mouse (n 2), start ()."""
        shard, entry = self.places[number]
        with self._opened(shard) as url:
            clip = unpack_clip(storage.read_range(url, entry.offset, entry.size), url)
            self._require_shapes(url, entry, {name: tuple(tensor.shape) for name, tensor in clip.items()})
            return clip

    def layout(self, number: int) -> Layout:
        """Dtype and shape of a clip's tensors by name."""
        shard, entry = self.places[number]
        with self._opened(shard) as url:
            layout = clip_layout(url, entry)
            self._require_shapes(url, entry, {name: shape for name, (_, shape) in layout.items()})
            return layout

    def _require_shapes(self, url: str, entry: Entry, found: Mapping[str, tuple[int, ...]]) -> None:
        if strange := find_strange(clip_shapes(self.manifest), found):
            raise UserError(f"{url}: clip {entry.key} has {strange}; {VERIFY}")

    def read_into(self, number: int, layout: Layout, rows: Mapping[str, memoryview]) -> None:
        """As `read`, into bytes that are there; the clip must have that layout."""
        shard, entry = self.places[number]
        with self._opened(shard) as url:
            read_clip_into(url, entry, layout, rows)

    def clip(self, number: int) -> Clip:
        """A whole clip, first frame and names too."""
        shard, entry = self.places[number]
        tensors = self.read(number)
        with self._opened(shard) as url:
            jpeg = storage.read_range(url, entry.jpeg_offset, entry.jpeg_size)
        given = (tensors["latents"], tensors["keyboard"], tensors["mouse"], jpeg, entry.episode, entry.start)
        return Clip(*given, tensors.get("visual"), tensors.get("image_latents"))

    def fetch(self, shard: int) -> None:
        """Makes the copy of a shard, so that nobody waits for it later."""
        with self._opened(shard):
            pass

    @contextmanager
    def _opened(self, shard: int) -> Iterator[str]:
        """Where the shard can be read within the block. Raises ValueError for one that is not what it should be."""
        path, info = self.shards[shard]
        url = shard_url(path, info)
        self._require_hope(shard)
        if self.copies and storage.is_s3(url):
            with self._copied(shard, url, info) as copy:
                yield str(copy)
            return
        if self.verify and shard not in self._whole:
            self._require_whole(shard, url, info)
        try:
            yield url
        except OSError as error:
            if error.filename is None and error.errno is not None:  # of a read, which does not say of what
                raise OSError(error.errno, error.strerror, url) from error
            raise

    @contextmanager
    def _copied(self, shard: int, url: str, info: ShardInfo) -> Iterator[Path]:
        """A copy of the shard on this machine, compared when it is made, by one of all readers."""
        with ExitStack() as held:
            with self._looking[shard]:
                self._require_hope(shard)
                try:
                    copy = held.enter_context(storage.cached_file(url, info.bytes, info.sha256))
                except Damaged as error:
                    raise self._found(shard, error.fault) from error
            yield copy

    def _require_hope(self, shard: int) -> None:
        """Raises ValueError for a shard in which a fault was found often enough."""
        if len(self._faults[shard]) == TRIES:
            raise self._error(shard, self._faults[shard][-1])

    def _require_whole(self, shard: int, url: str, info: ShardInfo) -> None:
        """Compares the shard's SHA-256, once for all readers."""
        with self._looking[shard]:
            if shard in self._whole:
                return
            self._require_hope(shard)
            if fault := find_fault(url, info):
                raise self._found(shard, fault)
            self._whole.add(shard)

    def _found(self, shard: int, fault: str) -> ValueError:
        """The error of a fault that was found just now, which is remembered."""
        self._faults[shard].append(fault)
        return self._error(shard, fault)

    def _error(self, shard: int, fault: str) -> ValueError:
        path, info = self.shards[shard]
        return UserError(f"shard {shard_url(path, info)}: {fault}; run python -m data_pipeline verify {path}")


OF_ALL = ("layout", "clip_frames", "clip_latents", "codec_hash", "vision", "unknown")


def load_manifests(sources: Sequence[Source]) -> list[Manifest]:
    """Their manifests. Raises in one line for one that is not there, or is of another kind than the first."""
    manifests = [load_manifest(source.path) for source in sources]
    for source, manifest in zip(sources, manifests, strict=True):
        for name, times in Counter(info.url for info in manifest.shards).items():
            if times > 1:
                raise UserError(f"{source.path} lists {name} {times} times; encode into a new folder")
    for source, manifest in zip(sources[1:], manifests[1:], strict=True):
        require_same_kind(manifests[0], sources[0].path, manifest, source.path)
    return manifests


def require_same_kind(
    manifest: Manifest, url: str, other: Manifest, other_url: str, of_set: Sequence[str] = OF_ALL
) -> None:
    """Raises ValueError, naming what differs, unless clips of both sets mean the same and have the same size."""
    require_action_space(other, manifest.game.action_space, f"those of {url}")
    of_game = ("fps", "height", "width")
    facts = [(name, getattr(manifest, name), getattr(other, name)) for name in of_set]
    facts += [(name, getattr(manifest.game, name), getattr(other.game, name)) for name in of_game]
    for name, ours, theirs in facts:
        if ours != theirs:
            raise UserError(f"{other_url} has {name} {theirs}, {url} {ours}; they must agree in it; encode both alike")


def read_clips(manifest_url: str | Path, limit: int | None = None) -> list[Clip]:
    """The first `limit` clips of a set (all if None) in the manifest's order, first frames included."""
    shards = Shards(manifest_url)
    return [shards.clip(number) for number in range(len(shards) if limit is None else min(limit, len(shards)))]


def require_action_space(manifest: Manifest, space: ActionSpace, whose: str) -> None:
    """Raises ValueError, naming both, unless the clips' action vectors mean what `whose` take them to mean."""
    own = manifest.game.action_space
    if own.hash != space.hash:
        raise UserError(
            f"the clips have the action space {own.describe()}, {whose} {space.describe()}; they must match"
        )
