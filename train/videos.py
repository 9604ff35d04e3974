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
from model.world import WorldModel, WorldModelConfig, make_world
from sampling.play import play
from sampling.scripts import Scripted, read_script
from sampling.video_grid import HELD_WIDTH, Panel, VideoGrid, write_grid
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
            grid = self._grid(world, clip.first_frame, f"step_{step:07d}_{name}", f"{clip.episode}, step {step}", alive)
            write_grid(self.folder, grid, world.game)
            made[name] = self.folder / f"{grid.name}.mp4"
        return made

    def _grid(self, world: WorldModel, jpeg: bytes, name: str, title: str, alive: Callable[[], None]) -> VideoGrid:
        """All scripts from one picture and one noise."""
        scripts, pieces = len(self.actions), []
        picture = torch.from_numpy(decode_picture(jpeg, title))
        prompt = to_video(picture[None, None])[:, :, 0].expand(scripts, -1, -1, -1)
        keyboard = torch.from_numpy(np.stack([one.keyboard for one in self.actions]))
        mouse = torch.from_numpy(np.stack([one.mouse for one in self.actions]))
        for piece in play(world, prompt, (keyboard, mouse), [self.config.seed] * scripts, self.config.denoising):
            pieces.append(piece.cpu().numpy())
            alive()
        frames = np.concatenate(pieces, axis=1)
        panels = [Panel(*one) for one in zip(self.config.actions, frames, self.actions, strict=True)]
        sentence = "The same picture and noise under other actions."
        return VideoGrid(name, title, sentence, panels, min(scripts, 4), HELD_WIDTH, given=1)
