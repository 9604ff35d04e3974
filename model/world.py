"""A trained world model on disk or in a bucket: which checkpoints are whole, what they are, loading one to sample."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

import torch
from torch import Tensor

from configs import load_file, save_config, storage
from configs.errors import MissingFileError, UserError
from configs.game import GameConfig
from configs.s3 import bucket_and_key
from configs.untrusted import parse_object, reading
from model.action_dit import ActionDiT
from model.codec import CONFIG_FILE, Codec, codec_hash, copy_codec, load_codec
from model.config import ActionDiTConfig
from model.flow import FlowMatch, FlowMatchConfig
from model.layout import CHUNK_LATENTS, Layout
from model.limits import Precision, faster_precision, require_device
from model.official import WEIGHTS_NAME, read_official
from model.third_party import PICKLES
from model.vision import VisionTower, image_tokens, load_vision
from model.weights import load_into, open_weights

COMPLETE = "COMPLETE"  # the file that a checkpoint folder gets last
CODEC = "codec"  # the folder in which a checkpoint, its run or the folder above holds its codec
WORLD_FILE = "world.yaml"  # WorldModelConfig: all that sampling needs to know besides weights
STEP_FOLDERS = "step_" + "[0-9]" * 7  # so names sort like steps, and step_0000500_copy is none of them

Weights = Literal["ema", "model"]


@dataclass(frozen=True)
class WorldModelConfig:
    """What a checkpoint is; training writes it, sampling reads it, so that the two cannot disagree."""

    model: ActionDiTConfig
    flow: FlowMatchConfig
    game: GameConfig
    layout: Layout  # of the clips it was trained on
    codec: str  # folder of the codec: a url, absolute, or relative to where training was started
    codec_hash: str  # of its weights, first 12 hex digits

    def __post_init__(self) -> None:
        if action := self.model.action:  # its sizes follow from the game; a UserError if the model says others
            object.__setattr__(self, "model", replace(self.model, action=action.for_game(self.game.action_space)))


@dataclass(frozen=True)
class WorldModel:
    """Everything a rollout needs, in eval mode on one device."""

    dit: ActionDiT
    flow: FlowMatch
    codec: Codec
    game: GameConfig
    tower: VisionTower | None = None  # of a model with vision

    @property
    def device(self) -> torch.device:
        return next(self.dit.parameters()).device

    @torch.inference_mode()
    def look(self, image: Tensor) -> Tensor | None:
        """Image tokens (b m c) of a clip's first frame `image` (b 3 h w) in [-1, 1]; None without vision."""
        return image_tokens(self.tower, image, self.dit.config.vision)

    @property
    def layout(self) -> Layout:
        """Of the clips that the model sees: a causal one streams through the codec without a cut."""
        return "chunked" if self.dit.config.causal is None else "continuous"

    @property
    def block(self) -> int:
        """Latent frames that are made together."""
        return CHUNK_LATENTS if self.dit.config.causal is None else self.dit.config.causal.block

    @property
    def dtype(self) -> torch.dtype:
        """Of the DiT's arithmetic; latents, noise and steps are float32 whatever it is."""
        return next(self.dit.parameters()).dtype

    @property
    def precision(self) -> Precision:
        """Of the DiT's weights."""
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"


def complete_steps(run: str | Path) -> list[str]:
    """The names of the checkpoint folders of a run, which may be an s3:// url, that were written to the end; oldest
    first."""
    names = (name.rstrip("/") for name in storage.list_folder(run))
    return [name for name in names if fnmatch(name, STEP_FOLDERS) and storage.exists(f"{run}/{name}/{COMPLETE}")]


def newest_step(run: str | Path) -> str | None:
    """The url of the newest of them."""
    steps = complete_steps(run)
    return storage.join(run, steps[-1]) if steps else None


def find_checkpoint(path: str | Path) -> str:
    """The url of `path` itself if it is a complete checkpoint, else of the newest complete one of the run `path`."""
    url = str(path).rstrip("/")
    if storage.exists(storage.join(url, COMPLETE)):
        return url
    if not storage.is_s3(url) and not Path(url).is_dir():
        raise MissingFileError(f"no checkpoint {url}; give a run folder or one of its step_* folders")
    if fnmatch(storage.name_of(url), STEP_FOLDERS) or storage.exists(storage.join(url, WORLD_FILE)):
        raise UserError(f"{url} has no {COMPLETE} file: it was never written to the end; give the run folder instead")
    newest = newest_step(url)
    if newest is None:
        raise MissingFileError(f"no complete checkpoint in {url} (step_*/{COMPLETE}); train first")
    return newest


def write_complete(folder: str | Path, **about: int) -> None:
    """Says that all files of a checkpoint are in `folder`, with their sizes; to be called last."""
    text = json.dumps({**about, "bytes": storage.list_tree(folder)}, indent=1)
    storage.write_text(storage.join(folder, COMPLETE), text)


def read_complete(folder: str | Path) -> int:
    """The format of the checkpoint `folder`, 0 if no run can go on from it. Raises UserError if one of its files is
    missing or truncated."""
    file, remedy = storage.join(folder, COMPLETE), f"delete {folder}, or go on without it"
    with reading(file, remedy):
        saved = parse_object(storage.read_bytes(file), file)
        sizes, version = dict(saved.get("bytes", {})), int(saved.get("format", 0))
    stored = storage.list_tree(folder)
    for name, size in sizes.items():
        if stored.get(name) != size:
            raise UserError(f"{storage.join(folder, name)} is missing or truncated; {remedy}")
    return version


def checkpoint_files(checkpoint: str) -> list[str]:
    """The urls of what sampling reads of the checkpoint folder, and `config.yaml`."""
    weights = [f"{name}.safetensors" for name in get_args(Weights)]
    return [storage.join(checkpoint, name) for name in (COMPLETE, WORLD_FILE, "config.yaml", *weights)]


def newest_checkpoint(path: str | Path, weights: Weights | None = None) -> Path:
    """What `find_checkpoint` finds, on this machine: of an s3:// url a copy without what only resuming needs, and with
    no other weights than `weights` if that is given."""
    others = {f"{kind}.safetensors" for kind in get_args(Weights) if weights not in (None, kind)}
    return storage.local(find_checkpoint(path), lambda name: "/" not in name and name not in others)


def read_world_config(checkpoint: str | Path) -> WorldModelConfig:
    """What the complete checkpoint `checkpoint` says about itself."""
    return load_file(WorldModelConfig, storage.local(storage.join(checkpoint, WORLD_FILE)))


def find_codec(checkpoint: str | Path, config: WorldModelConfig, codec: str | None = None) -> str:
    """The url of the codec with which the complete checkpoint `checkpoint` was trained, known by its hash: `codec` if
    given, else one in the checkpoint's folder, beside it, beside its run, or where training had it.

    Nothing is fetched from another bucket than the checkpoint's because a checkpoint says so, and no file is read but
    those that are called as weights are: some of a machine's files have no end. Raises UserError if none has that hash.
    """
    fault = f"{checkpoint} was trained on latents of codec {config.codec_hash}"
    if codec:
        if (actual := codec_hash(codec)) != config.codec_hash:
            raise UserError(f"{fault}; {codec} is {actual}: give the right one as codec=")
        return codec
    others, urls = [], list(dict.fromkeys(_codec_urls(str(checkpoint), config.codec)))
    for url in urls:
        try:
            path = storage.path(url)
            if path.is_dir() or (path.suffix in (".safetensors", *PICKLES) and path.is_file()):
                if (actual := codec_hash(url)) == config.codec_hash:
                    return url
                others.append(f"{url} is {actual}")
        except (ValueError, OSError) as error:  # what merely lies there need not be a codec, nor be ours to read
            others.append(f"{url} is none ({error})")
    if config.codec not in urls:
        raise UserError(f"{fault}; {config.codec} is in another bucket and not fetched: codec={config.codec} allows it")
    raise UserError(f"{fault}; {', '.join(others) or f'{config.codec} is missing'}: give the right one as codec=")


def _codec_urls(checkpoint: str, recorded: str) -> Iterator[str]:
    """Where a codec that training had at `recorded` may lie, nearest first."""
    folder = checkpoint if storage.is_s3(checkpoint) else os.path.abspath(checkpoint)
    names = dict.fromkeys((CODEC, storage.name_of(recorded)))
    for _ in range(3):  # the checkpoint, its run, the folder of the run
        yield from (storage.join(folder, name) for name in names if name not in ("", ".", ".."))
        folder = storage.parent(folder) or "/"
        if storage.is_s3(folder) and len(PurePosixPath(folder).parts) < 2:  # above the bucket
            break
    if not storage.is_s3(recorded):
        if not storage.is_s3(checkpoint):
            yield os.path.join(os.path.abspath(checkpoint), recorded)
        yield recorded
    elif storage.is_s3(checkpoint) and bucket_and_key(recorded)[0] == bucket_and_key(checkpoint)[0]:
        yield recorded


def keep_codec(codec: str, run: str) -> None:
    """Puts a copy of `codec` into the folder `run`, unless one is there: its checkpoints then play wherever it goes."""
    kept = storage.join(run, CODEC)
    same = os.path.realpath(codec) == os.path.realpath(kept)  # of a url the text decides
    if not same and not storage.exists(storage.join(kept, CONFIG_FILE)):
        with storage.writing_folder(kept, last=CONFIG_FILE) as folder:
            copy_codec(codec, folder)


@contextmanager
def writing_world(out: str, world: WorldModelConfig, codec: str | None) -> Iterator[Path]:
    """A local folder to write weights into, model.safetensors being the averaged ones too; with what `world` says and a
    copy of `codec` it becomes the checkpoint `out`, which plays wherever it is copied.

    Raises UserError if something is in `out` already: it may be what is read.
    """
    if any(not name.startswith(".") for name in storage.list_folder(out)):  # such as what a killed writer left
        what = "is a checkpoint" if storage.exists(storage.join(out, COMPLETE)) else "holds files"
        raise UserError(f"{out} {what} already; choose another out=")
    with storage.writing_folder(out, last=COMPLETE, new=True) as folder:
        yield folder
        weights, average = folder / "model.safetensors", folder / "ema.safetensors"
        if weights.is_file():
            try:
                os.link(weights, average)  # no copy: files are replaced, never changed
            except OSError:  # a file system without hard links
                shutil.copyfile(weights, average)
        if codec is not None:
            copy_codec(codec, folder / CODEC)
        save_config(replace(world, codec=CODEC), folder / WORLD_FILE)
        write_complete(folder)


def load_world(
    path: str | Path,
    weights: Weights = "ema",
    device: str = "cpu",
    precision: Precision = "fp32",
    vision: str | None = None,
    codec: str | None = None,
) -> WorldModel:
    """The world model in a checkpoint or in the newest one of a run folder, ready to sample on `device`.

    `precision` bf16 puts the DiT's weights into bfloat16: half the memory, faster where the processor multiplies it.
    `vision`: weights of CLIP's vision tower, for a model that is shown the prompt through it.
    `codec`: where the codec is, if `find_codec` does not find it by itself.
    Raises UserError for no checkpoint, one that was never finished, or another codec than that of the training.
    """
    require_device(device)
    url = find_checkpoint(path)
    checkpoint = newest_checkpoint(url, weights)
    config = read_world_config(checkpoint)
    config = replace(config, codec=find_codec(url, config, codec))
    if (config.model.vision == "none") != (vision is None):
        needs = "has no vision: leave vision= out" if vision else "needs vision=<weights of CLIP's vision tower>"
        raise UserError(f"{checkpoint} was trained with model.vision={config.model.vision} and {needs}")
    file, exported = checkpoint / f"{weights}.safetensors", checkpoint / WEIGHTS_NAME
    if exported.is_file() and not file.is_file():
        state = read_official(exported, config.model)[0]
    else:
        state = open_weights(file)
    return make_world(config, state, device, precision, vision)


def make_world(
    config: WorldModelConfig, weights: Mapping[str, Tensor], device: str, precision: Precision, vision: str | None
) -> WorldModel:
    """The world model of `config` with `weights`, as of `load_world`."""
    with torch.device("meta"):
        dit = ActionDiT(config.model)
    load_into(dit, weights)
    chosen = faster_precision(device) if precision == "auto" else precision
    return WorldModel(
        dit.eval().requires_grad_(False).to(device, torch.bfloat16 if chosen == "bf16" else torch.float32),
        FlowMatch(config.flow),
        load_codec(config.codec).requires_grad_(False).to(device),
        config.game,
        load_vision(vision).requires_grad_(False).to(device) if vision else None,
    )


def check_same_game(world_game: GameConfig, other: GameConfig, where: str) -> None:
    """Raises UserError if recordings of `other` cannot be put to a model of `world_game`."""
    ours, theirs = (
        (game.action_space.hash, f"{game.action_space.describe()}, {game.height}x{game.width} px at {game.fps:g} fps")
        for game in (world_game, other)
    )
    if ours != theirs:
        raise UserError(f"{where} has the action space {theirs[1]}, the checkpoint was trained on {ours[1]}")
