"""Rollouts to be judged: from places in held-out episodes, along the recorded actions or under a constant action."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from configs.errors import UserError
from configs.game import GameConfig
from data_pipeline.motion import EXPECTED
from data_pipeline.readers import Reader, find_recordings, read_game_frames
from data_pipeline.readers.recording import recording_of
from data_pipeline.types import Actions, Episode, Manifest
from data_pipeline.video import to_video
from model.layout import CHUNK_FRAMES
from model.world import WorldModel
from sampling.denoising import Denoising
from sampling.play import play
from sampling.rollout import decode_frames
from sampling.scripts import Scripted, read_script, script_words


@dataclass(frozen=True)
class Prompt:
    """A place in a held-out episode: 9 frames to start from and what really followed."""

    name: str
    frames: np.ndarray  # (9 + 9 chunks, h w 3) uint8
    actions: Actions  # of these frames

    def with_constant_action(self, command: str, game: GameConfig, mouse_deg: float) -> Actions:
        """The actions of the 9 given frames, then `command`."""
        constant = read_script(command, game.action_space, Scripted(len(self.frames) - CHUNK_FRAMES, 0, mouse_deg))
        return Actions(
            np.concatenate([self.actions.keyboard[:CHUNK_FRAMES], constant.keyboard]),
            np.concatenate([self.actions.mouse[:CHUNK_FRAMES], constant.mouse]),
        )


def heldout_episodes(recordings: str | Path, reader: Reader, manifest: Manifest) -> list[Episode]:
    """The episodes that the manifest's shards were made of."""
    listed = {episode for info in manifest.shards for episode in info.episodes}
    names = listed | {recording_of(episode) for episode in listed}
    chosen = [recording for recording in find_recordings(reader, recordings) if recording.name in names]
    episodes = [episode for recording in chosen for episode in recording.read(manifest.game) if episode.id in listed]
    if not episodes:
        raise UserError(f"{recordings} holds none of the manifest's {len(listed)} episodes, such as {min(listed)}")
    return episodes


def read_prompts(episodes: Sequence[Episode], game: GameConfig, starts: int, chunks: int, seed: int) -> list[Prompt]:
    """`starts` places followed by `chunks`, spread over the episodes in an order and at frames drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)
    length, prompts = CHUNK_FRAMES * (1 + chunks), []
    long = [episode for episode in episodes if len(episode.actions) >= length]
    if not long:
        raise UserError(f"no held-out episode has {length} frames; use fewer chunks")
    order = [long[i] for i in torch.randperm(len(long), generator=generator).tolist()]
    for i in tqdm(range(starts), desc="read held-out episodes", unit="start"):
        episode = order[i % len(order)]
        first = int(torch.randint(len(episode.actions) - length + 1, (), generator=generator))
        frames = np.stack(list(islice(read_game_frames(episode, game), first, first + length)))
        prompts.append(Prompt(f"{episode.id}, frame {first}", frames, episode.actions[first : first + length]))
    return prompts


def commanded_yaw(prompts: Sequence[Prompt], game: GameConfig) -> list[float]:
    """Mean yaw in degrees per frame of each recorded chunk after the prompts, prompt by prompt; 0 without a mouse."""
    yaw_deg = []
    for prompt in prompts:
        for first in range(CHUNK_FRAMES, len(prompt.actions), CHUNK_FRAMES):
            mouse = prompt.actions.mouse[first : first + CHUNK_FRAMES - 1]  # a chunk's last row leads out of it
            yaw_deg.append(float(mouse[:, 1:].sum(axis=1).mean()) * game.action_space.mouse_unit_deg)
    return yaw_deg


@dataclass(frozen=True)
class Player:
    """Makes rollouts of a world from many prompts."""

    world: WorldModel
    denoising: Denoising
    batch: int  # rollouts computed at once
    seed: int  # of the noise, plus the prompt's number

    def replay(self, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        """Frames (b n h w 3) uint8 that follow the 9 of every prompt: `real`, those through the `codec`, generated
        `from_context` (the 9) or `from_frame` (the last of them, n - 1 frames), and that one repeated."""
        frames, recorded = np.stack([prompt.frames for prompt in prompts]), [prompt.actions for prompt in prompts]
        video, last = to_video(torch.from_numpy(frames)), CHUNK_FRAMES - 1
        real, after_last = frames[:, CHUNK_FRAMES:], [actions[last:-1] for actions in recorded]
        return {
            "real": real,
            "codec": self._through_codec(video)[:, CHUNK_FRAMES:],
            "from_context": self._play(video[:, :, :CHUNK_FRAMES], recorded, len(prompts)),
            "from_frame": self._play(video[:, :, last], after_last, len(prompts))[:, 1:],
            "repeat_prompt": np.broadcast_to(frames[:, last, None], real.shape),
        }

    def constant_actions(self, prompts: Sequence[Prompt], mouse_deg: float) -> dict[str, np.ndarray]:
        """Frames (b n h w 3) uint8 after the 9 of every prompt, by the constant action: idle, and all whose effect on
        the picture is known. The noise is the same for all."""
        game = self.world.game
        commands = [command for command in [*EXPECTED, "idle"] if command in script_words(game.action_space)]
        video = to_video(torch.from_numpy(np.stack([prompt.frames[:CHUNK_FRAMES] for prompt in prompts])))
        actions = [prompt.with_constant_action(name, game, mouse_deg) for name in commands for prompt in prompts]
        frames = self._play(video.repeat(len(commands), 1, 1, 1, 1), actions, len(prompts))
        return dict(zip(commands, np.split(frames, len(commands)), strict=True))

    def _play(self, start: Tensor, actions: Sequence[Actions], prompts: int) -> np.ndarray:
        """Frames (b n h w 3) uint8 of rollouts from pictures (b 3 h w) in [-1, 1], which come first, or clips
        (b 3 9 h w), which are left out. `actions` have a row for every frame; noise repeats after `prompts`."""
        seeds = [self.seed + i % prompts for i in range(len(start))]
        skipped, done = start.shape[2] if start.ndim == 5 else 0, []
        keyboard = torch.from_numpy(np.stack([rows.keyboard for rows in actions]))
        mouse = torch.from_numpy(np.stack([rows.mouse for rows in actions]))
        with tqdm(total=len(start) * keyboard.shape[1], desc="play", unit="frame") as progress:
            for first in range(0, len(start), self.batch):
                part, pieces = slice(first, first + self.batch), []
                for piece in play(self.world, start[part], (keyboard[part], mouse[part]), seeds[part], self.denoising):
                    pieces.append(piece.cpu())
                    progress.update(len(piece) * piece.shape[1])
                done.append(torch.cat(pieces, dim=1)[:, skipped:])
        return torch.cat(done).numpy()

    @torch.inference_mode()
    def _through_codec(self, video: Tensor) -> np.ndarray:
        """`video` (b 3 n h w), n a multiple of 9, encoded and decoded as the world's clips are: (b n h w 3) uint8."""
        world, frames = self.world, video.shape[2]
        if world.layout == "chunked":
            clips = rearrange(video, "b c (m n) h w -> (b m) c n h w", n=CHUNK_FRAMES)
        else:
            missing = -(frames - 1) % world.codec.config.temporal
            clips = functional.pad(video, (0, 0, 0, 0, 0, missing), mode="replicate")
        shown = [decode_frames(world, world.codec.encode(part.to(world.device))) for part in clips.split(self.batch)]
        return rearrange(torch.cat(shown).cpu(), "(b m) n h w c -> b (m n) h w c", b=len(video))[:, :frames].numpy()
