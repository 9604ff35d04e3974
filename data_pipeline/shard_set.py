"""One shard set or several as clips by number: opened, compared with the manifests, read by offset."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from configs import s3, storage
from configs.errors import UserError
from configs.game import ActionSpace
from data_pipeline.shards import BatchBuffer, Entry, clip_shapes, load_manifest, read_clip, read_entries, shard_url
from data_pipeline.types import Clip, Manifest, ShardInfo, Source
from data_pipeline.verify import ALTERED, FAULT

TRIES = 2  # a disk, or a copy, may be at fault for a moment
SET_KIND = ("layout", "clip_frames", "clip_latents", "spatial", "temporal", "codec_hash", "vision", "unknown")


class ShardFile:
    """One shard of a set. The first reader compares its bytes; after `TRIES` faults it is not looked at again."""

    def __init__(self, manifest: str, info: ShardInfo, verify: bool, copy: bool) -> None:
        self.info, self.url, self._manifest = info, shard_url(manifest, info), manifest
        self._copy, self._trusted = copy and storage.is_s3(self.url), not verify
        self._fault, self._tries = "", TRIES
        self._lock = threading.Lock()

    def read_entries(self, faults: bool) -> list[Entry]:
        """Where its clips lie, by its index. Raises UserError if size or index are not as the manifest says; with
        `faults`, only when a clip is read."""
        try:
            return read_entries(self.url, self.info)
        except FAULT as error:
            self._note(error)
            self._tries = 0
            if not faults:
                raise UserError(self._fault) from error
            return [Entry("?", "?", 0, 0, 0, 0, 0)] * self.info.clips  # its clips keep their numbers

    @contextmanager
    def open(self) -> Iterator[str]:
        """The url or the path to read from. Raises UserError for a shard that is not as its manifest says."""
        with ExitStack() as stack:
            with self._lock:
                url = self._check(stack)
            try:
                yield url
            except OSError as error:
                if error.filename is None and error.errno is not None:  # of a read, which does not name the file
                    raise OSError(error.errno, error.strerror, self.url) from error
                raise

    def _check(self, stack: ExitStack) -> str:
        while self._tries:
            try:
                if self._copy:
                    return str(stack.enter_context(storage.cached_file(self.url, self.info.bytes, self.info.sha256)))
                if not self._trusted and storage.sha256(self.url) != self.info.sha256:
                    raise UserError(ALTERED)
                self._trusted = True
                return self.url
            except FAULT as error:
                self._note(error)
        raise UserError(self._fault)

    def _note(self, error: Exception) -> None:
        self._fault = f"shard {self.url}: {error}; run python -m data_pipeline verify {self._manifest}"
        self._tries -= 1


class Shards:
    """All clips of one set or several by number, in the order of the manifests."""

    def __init__(
        self,
        sources: str | Path | Sequence[Source],  # manifests
        verify: bool = True,  # compare a shard's SHA-256 when it is used for the first time
        copies: bool = False,  # read shards on a server from copies on this machine, made when a clip is wanted
        faults: bool = False,  # a shard that is not as its manifest says is an error only when a clip of it is wanted
    ) -> None:
        """Raises UserError for a set that is not there, is not whole, or is of another kind than the first."""
        self.sources = [Source(str(sources))] if isinstance(sources, str | Path) else list(sources)
        self.manifests = load_manifests(self.sources)
        self.manifest = self.manifests[0]  # what all have in common can be asked of it
        self.shapes = clip_shapes(self.manifest)
        self.shards = [
            ShardFile(source.path, info, verify, copies)
            for source, manifest in zip(self.sources, self.manifests, strict=True)
            for info in manifest.shards
        ]
        with ThreadPoolExecutor(s3.PARALLEL) as pool:
            entries = pool.map(lambda shard: shard.read_entries(faults), self.shards)
            self.places = [(number, entry) for number, of_shard in enumerate(entries) for entry in of_shard]

    def __len__(self) -> int:
        return len(self.places)

    def read(self, number: int) -> dict[str, torch.Tensor]:
        """The tensors of a clip: latents (c f h w), keyboard (n k), mouse (n 2), and those that its kind adds."""
        buffer = BatchBuffer(1)
        self.read_into(number, buffer, 0)
        return {name: tensor[0] for name, tensor in buffer.tensors.items() if name != "start"}

    def read_into(self, number: int, buffer: BatchBuffer, row: int) -> None:
        """As `read`, into a row of the buffer."""
        shard, entry = self.places[number]
        with self.shards[shard].open() as url, storage.open(url, entry.size) as file:
            read_clip(file, url, entry, self.shapes, buffer, row)

    def clip(self, number: int) -> Clip:
        """A whole clip, first frame and names too."""
        shard, entry = self.places[number]
        tensors = self.read(number)
        with self.shards[shard].open() as url:
            jpeg = storage.read_range(url, entry.jpeg_offset, entry.jpeg_size)
        return Clip(first_frame=jpeg, episode=entry.episode, start=entry.start, **tensors)

    def fetch(self, shard: int) -> None:
        """Makes the copy of a shard, so that nobody waits for it later."""
        with self.shards[shard].open():
            pass


def load_manifests(sources: Sequence[Source]) -> list[Manifest]:
    """Their manifests. Raises UserError for one that is not there, or is of another kind than the first."""
    manifests = [load_manifest(source.path) for source in sources]
    for source, manifest in zip(sources[1:], manifests[1:], strict=True):
        require_same_kind(manifests[0], sources[0].path, manifest, source.path)
    return manifests


def require_same_kind(
    manifest: Manifest, url: str, other: Manifest, other_url: str, of_set: Sequence[str] = SET_KIND
) -> None:
    """Raises UserError, naming what differs, unless clips of both sets mean the same and have the same size."""
    require_action_space(other, manifest.game.action_space, f"those of {url}")
    pairs = [(name, getattr(manifest, name), getattr(other, name)) for name in of_set]
    pairs += [(name, getattr(manifest.game, name), getattr(other.game, name)) for name in ("fps", "height", "width")]
    for name, ours, theirs in pairs:
        if ours != theirs:
            raise UserError(f"{other_url} has {name} {theirs}, {url} {ours}; they must agree in it; encode both alike")


def require_action_space(manifest: Manifest, space: ActionSpace, whose: str) -> None:
    """Raises UserError, naming both, unless the clips' action vectors mean what `whose` mean."""
    clips = manifest.game.action_space
    if clips.hash != space.hash:
        raise UserError(f"the clips have action space {clips.describe()}, {whose} {space.describe()}; they must match")
