"""Videos during training: what the averaged weights make of held-out pictures under fixed actions and noise."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from configs import storage
from configs.errors import MissingFileError, UserError
from data_pipeline.pictures import decode_picture
from data_pipeline.shard_set import Shards
from data_pipeline.shards import clip_key
from data_pipeline.types import Actions
from data_pipeline.video import to_video
from model.layout import CHUNK_FRAMES
from model.world import WorldModel, WorldModelConfig, make_world
from sampling.films import HELD_FILM_WIDTH, Film, Take, write_film
from sampling.scripts import Scripted, read_script
from sampling.trials import block_by_block, chunk_by_chunk
from train.checkpoint import weight_specs
from train.config import TrainConfig, VideosConfig
from train.ema import Ema
from train.engine import Engine

FOLDER = "videos"  # in the run folder


def check_videos(config: VideosConfig, clips: int, world: WorldModelConfig) -> None:
    """Raises ValueError or OSError in one line if no such videos can be made of a `world` with `clips` held out."""
    if config.prompts > clips:
        raise UserError(f"validation.videos.prompts={config.prompts}, but there are {clips} held-out clips; use fewer")
    if (world.model.vision == "none") != (config.vision is None):
        needs = "leave out" if config.vision else "give CLIP's weights as"
        raise UserError(f"the model has vision={world.model.vision}: {needs} validation.videos.vision")
    if config.vision and not storage.path(config.vision).is_file():
        raise MissingFileError(f"validation.videos.vision={config.vision}: no such file")
    causal = world.model.causal
    if causal and causal.window is None:
        raise UserError("validation.videos: a model with model.causal.window=null cannot stream; give it a window")
    if config.few_steps and not causal:
        raise UserError("validation.videos.few_steps belongs to causal models; use validation.videos.steps")
    _ = scripted(config, world)  # checks of its own


def scripted(config: VideosConfig, world: WorldModelConfig) -> list[Actions]:
    """The actions of every script, `frames` rows each."""
    how = Scripted(config.frames, config.seed)
    return [read_script(script, world.game.action_space, how) for script in config.actions]


def averaged_world(config: TrainConfig, world: WorldModelConfig, engine: Engine, ema: Ema) -> WorldModel | None:
    """The world model of the averaged weights, put together from all ranks on the main process, where it is to sample;
    None on the others. All ranks must call."""
    main, weights = engine.accelerator.is_main_process, {}
    for name, tensor in ema.whole(weight_specs(world)):
        if main:
            weights[name] = tensor
    if not main:
        return None
    device, vision = str(engine.accelerator.device), config.validation.videos.vision
    return make_world(world, weights, device, config.engine.precision, vision)


class Videos:
    """One video per prompt at every call, the scripts side by side, each with its keys and mouse drawn in."""

    def __init__(self, config: TrainConfig, world: WorldModelConfig) -> None:
        assert config.validation.manifest
        self.config, self.folder = config.validation.videos, Path(config.out) / FOLDER
        shards = Shards(config.validation.manifest, verify=False)
        places = np.linspace(0, len(shards) - 1, self.config.prompts).round().astype(int).tolist()
        self.prompts = [shards.clip(place) for place in places]
        self.actions = scripted(self.config, world)

    def make(self, world: WorldModel, step: int, alive: Callable[[], None]) -> dict[str, Path]:
        """Writes `step_<step>_<clip>.mp4`, and its contact sheet beside it as .png; the files by clip. `alive` is
        called after every piece."""
        made = {}
        for clip in self.prompts:
            name = clip_key(clip.episode, clip.start)
            film = self._film(world, clip.first_frame, f"step_{step:07d}_{name}", f"{clip.episode}, step {step}", alive)
            write_film(self.folder, film, world.game)
            made[name] = self.folder / f"{film.name}.mp4"
        return made

    def _film(self, world: WorldModel, jpeg: bytes, name: str, title: str, alive: Callable[[], None]) -> Film:
        """All scripts from one picture and one noise."""
        picture = torch.from_numpy(decode_picture(jpeg, title))
        prompt = to_video(picture[None, None])[:, :, 0].to(world.device).expand(len(self.actions), -1, -1, -1)
        padding = ((0, -self.config.frames % CHUNK_FRAMES), (0, 0))  # chunks are whole; what is too much is cut
        keyboard, mouse = (
            torch.from_numpy(np.stack([np.pad(rows, padding, mode="edge") for rows in of_all])).to(world.device)
            for of_all in ([one.keyboard for one in self.actions], [one.mouse for one in self.actions])
        )
        method = chunk_by_chunk if world.layout == "chunked" else block_by_block
        seeds, pieces = [self.config.seed] * len(self.actions), []
        for piece in method(world, prompt, (keyboard, mouse), seeds, self.config.denoising):
            pieces.append(piece.cpu().numpy())
            alive()
        frames = np.concatenate(pieces, axis=1)[:, : self.config.frames]
        takes = [Take(*one) for one in zip(self.config.actions, frames, self.actions, strict=True)]
        sentence = "The same picture and noise under other actions."
        return Film(name, title, sentence, takes, min(len(takes), 4), HELD_FILM_WIDTH, given=1)
