"""Held-out losses and videos during training."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from einops import repeat

from configs import storage
from configs.errors import MissingFileError, UserError
from data_pipeline.pictures import decode_picture
from data_pipeline.shard_set import Shards
from data_pipeline.shards import clip_key
from data_pipeline.stream import Stream
from data_pipeline.video import to_video
from model.flow import FlowMatch
from model.loss import velocity_loss
from model.world import WorldModel, WorldModelConfig, make_world
from sampling.metrics import action_variants, first_latents
from sampling.play import play
from sampling.scripts import Scripted, read_script
from sampling.video_grid import HELD_WIDTH, Panel, VideoGrid, write_grid
from train.checkpoint import weight_specs
from train.config import TrainConfig
from train.ema import Ema
from train.engine import Engine
from train.objectives.objective import Objective, rng_for_step

FOLDER = "videos"  # in the run folder
VARIANTS = ("right", "shuffled", "none")  # actions: the clip's own, those of other episodes, nothing pressed


class HeldOutLoss:
    """The same clips, noise levels and noise at every call, so that curves are comparable."""

    def __init__(self, config: TrainConfig, objective: Objective, engine: Engine, flow: FlowMatch) -> None:
        assert config.validation.manifest
        self.objective, self.engine, self.flow, self.batch = objective, engine, flow, config.batch
        self.stream = Stream(config.validation.manifest, config.batch, seed=0, workers=0)  # every rank sees all of it
        self.rounds = max(1, config.validation.clips // (config.batch * engine.accelerator.num_processes))

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """`heldout/right`, `/shuffled`, `/none`: mean squared velocity error of the latents that are not given."""
        sums = torch.zeros(2, len(VARIANTS))
        objective, accelerator = self.objective, self.engine.accelerator
        temporal = self.stream.shards.manifest.temporal
        for done in range(self.rounds):
            index = done * accelerator.num_processes + accelerator.process_index
            batch = self.stream.batch_at(index).to(accelerator.device)
            clips = first_latents(batch, objective.latents or batch.latents.shape[2], objective.layout, temporal)
            rng = rng_for_step(0, index, index * self.batch, self.batch)
            noise = objective.heldout_noise(clips.latents, self.flow, rng)
            for name, variant in action_variants(clips).items():
                loss = velocity_loss(self.engine.model, self.flow, variant, objective.known, noise, objective.layout)
                sums[:, VARIANTS.index(name)] += torch.tensor([loss.sum().item(), len(loss)])
        sums = self.engine.sum_over_ranks(sums)
        return {f"heldout/{name}": (sums[0, i] / sums[1, i]).item() for i, name in enumerate(VARIANTS) if sums[1, i]}


def averaged_world(config: TrainConfig, world: WorldModelConfig, engine: Engine, ema: Ema) -> WorldModel | None:
    """The world model with the averaged weights of all ranks, on the main process; None on the others. All ranks must
    call."""
    weights = {}
    for name, tensor in ema.whole(weight_specs(world)):
        if engine.accelerator.is_main_process:
            weights[name] = tensor
    if not weights:
        return None
    device, vision = str(engine.accelerator.device), config.validation.videos.vision
    return make_world(world, weights, device, config.engine.precision, vision)


class Videos:
    """One video per held-out picture: the scripts side by side, from one noise, each with its keys and mouse."""

    def __init__(self, config: TrainConfig, world: WorldModelConfig) -> None:
        """Raises UserError or FileError if no such videos can be made of a `world`."""
        videos, causal = config.validation.videos, world.model.causal
        assert config.validation.manifest
        self.config, self.folder = videos, config.folder / FOLDER
        shards = Shards(config.validation.manifest, verify=False)
        if videos.prompts > len(shards):
            raise UserError(f"validation.videos.prompts={videos.prompts}, but there are {len(shards)} held-out clips")
        if (world.model.vision == "none") != (videos.vision is None):
            needs = "leave out" if videos.vision else "give CLIP's weights as"
            raise UserError(f"the model has vision={world.model.vision}: {needs} validation.videos.vision")
        if videos.vision and not storage.path(videos.vision).is_file():
            raise MissingFileError(f"validation.videos.vision={videos.vision}: no such file")
        if causal and causal.window is None:
            raise UserError("validation.videos: a model with model.causal.window=null cannot stream; give it a window")
        if videos.few_steps and not causal:
            raise UserError("validation.videos.few_steps belongs to causal models; use validation.videos.steps")
        clips = np.linspace(0, len(shards) - 1, videos.prompts).round().astype(int).tolist()
        self.prompts = [shards.clip(clip) for clip in clips]
        scripted = Scripted(videos.frames, videos.seed)
        self.actions = [read_script(script, world.game.action_space, scripted) for script in videos.actions]

    def make(self, world: WorldModel, step: int, alive: Callable[[], None]) -> dict[str, Path]:
        """Writes `step_<step>_<clip>.mp4`, and its contact sheet beside it as .png; the files by clip. `alive` is
        called after every piece."""
        made = {}
        for clip in self.prompts:
            key, title = clip_key(clip.episode, clip.start), f"{clip.episode}, step {step}"
            panels = self._panels(world, decode_picture(clip.first_frame, title), alive)
            sentence, columns = "The same picture and noise under other actions.", min(len(panels), 4)
            grid = VideoGrid(f"step_{step:07d}_{key}", title, sentence, panels, columns, HELD_WIDTH)
            write_grid(self.folder, grid, world.game)
            made[key] = self.folder / f"{grid.name}.mp4"
        return made

    def _panels(self, world: WorldModel, picture: np.ndarray, alive: Callable[[], None]) -> list[Panel]:
        """What the world makes of one `picture` (h w 3) under every script."""
        scripts, pieces = len(self.actions), []
        prompt = to_video(repeat(torch.from_numpy(picture), "h w c -> b 1 h w c", b=scripts))[:, :, 0]
        keyboard = torch.from_numpy(np.stack([actions.keyboard for actions in self.actions]))
        mouse = torch.from_numpy(np.stack([actions.mouse for actions in self.actions]))
        for piece in play(world, prompt, (keyboard, mouse), [self.config.seed] * scripts, self.config.denoising):
            pieces.append(piece.cpu().numpy())
            alive()
        return list(map(Panel, self.config.actions, np.concatenate(pieces, axis=1), self.actions))
