"""Rollouts to be judged: from places in held-out episodes, along the recorded actions or under one constant action."""

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
from data_pipeline.readers import Reader, find_recordings, read_game_frames, recording_of
from data_pipeline.types import Actions, Episode, Manifest
from data_pipeline.video import to_video
from model.layout import CHUNK_FRAMES
from model.world import WorldModel
from sampling.denoising import Denoising
from sampling.play import play
from sampling.rollout import decode_frames
from sampling.scripts import Scripted, read_script, script_words

MOST_ROLLOUTS = 10_000


@dataclass(frozen=True)
class Prompt:
    """A place in a held-out episode: 9 frames to start from and what really followed."""

    name: str
    frames: np.ndarray  # (9 + 9 chunks, h w 3) uint8
    actions: Actions  # of these frames

    def with_constant_action(self, command: str, game: GameConfig, frames: int, mouse_deg: float) -> Actions:
        """The actions of the 9 given frames, then `command` for `frames`."""
        held, given = read_script(command, game.action_space, Scripted(frames, 0, mouse_deg)), self.actions
        return Actions(
            np.concatenate([given.keyboard[:CHUNK_FRAMES], held.keyboard]),
            np.concatenate([given.mouse[:CHUNK_FRAMES], held.mouse]),
        )


@dataclass(frozen=True)
class RolloutSettings:
    """How many rollouts, how long, and how they are computed."""

    starts: int  # places in held-out episodes
    chunks: int  # of 9 frames, after the given ones
    denoising: Denoising
    batch: int  # rollouts computed at once
    seed: int  # of the places and, plus the place's number, of the noise

    @property
    def frames(self) -> int:
        """Frames of one rollout, without the given ones."""
        return CHUNK_FRAMES * self.chunks

    def __post_init__(self) -> None:
        counts = (self.starts, self.chunks, self.batch)
        if min(counts) < 1 or max(counts) > MOST_ROLLOUTS or self.seed < 0:
            raise UserError(
                f"rollouts: starts, chunks and batch must be at least 1 and at most {MOST_ROLLOUTS}, seed at least 0"
            )


def heldout_episodes(recordings: str | Path, reader: Reader, manifest: Manifest) -> list[Episode]:
    """The episodes that the manifest's shards were made of."""
    listed = {episode for info in manifest.shards for episode in info.episodes}
    names = listed | {recording_of(episode) for episode in listed}
    found = [recording for recording in find_recordings(reader, recordings) if recording.name in names]
    episodes = [episode for recording in found for episode in recording.read(manifest.game) if episode.id in listed]
    if not episodes:
        raise UserError(f"{recordings} holds none of the manifest's {len(listed)} episodes, such as {min(listed)}")
    return episodes


def read_prompts(episodes: Sequence[Episode], game: GameConfig, settings: RolloutSettings) -> list[Prompt]:
    """`settings.starts` places, spread over the episodes in an order and at frames drawn by the seed."""
    generator = torch.Generator().manual_seed(settings.seed)
    length, prompts = CHUNK_FRAMES + settings.frames, []
    long = [episode for episode in episodes if len(episode.actions) >= length]
    if not long:
        most = max(len(episode.actions) for episode in episodes)
        raise UserError(f"no held-out episode has more than {most} frames, {length} are needed; use fewer chunks")
    order = [long[i] for i in torch.randperm(len(long), generator=generator).tolist()]
    for i in tqdm(range(settings.starts), desc="read held-out episodes", unit="start"):
        episode = order[i % len(order)]
        first = int(torch.randint(len(episode.actions) - length + 1, (), generator=generator))
        frames = np.stack(list(islice(read_game_frames(episode, game), first, first + length)))
        prompts.append(Prompt(f"{episode.id}, frame {first}", frames, episode.actions[first : first + length]))
    return prompts


@dataclass(frozen=True)
class Replay:
    """Rollouts along the recorded actions, frame by frame beside what really happened; all (b n h w 3) uint8."""

    real: np.ndarray  # the frames after the last given one, chunk by chunk
    codec: np.ndarray  # the same frames after encoding and decoding
    from_context: np.ndarray  # generated from the 9 frames before
    from_frame: np.ndarray  # generated from the last of these 9 alone; its first frame is that one again
    prompt: np.ndarray  # (b h w 3) the last given frame
    yaw_deg: list[float]  # mean commanded yaw of each chunk of each rollout, degrees per frame


def replay(world: WorldModel, prompts: Sequence[Prompt], settings: RolloutSettings) -> Replay:
    """Both kinds of rollout from every prompt."""
    real, recorded = np.stack([prompt.frames for prompt in prompts]), [prompt.actions for prompt in prompts]
    video = to_video(torch.from_numpy(real))
    last = CHUNK_FRAMES - 1
    from_context = play_all(world, video[:, :, :CHUNK_FRAMES], recorded, settings, "replay from 9 frames")
    along = [actions[last : last + settings.frames] for actions in recorded]
    from_frame = play_all(world, video[:, :, last], along, settings, "replay from 1 frame")
    chunks = range(CHUNK_FRAMES, CHUNK_FRAMES + settings.frames, CHUNK_FRAMES)
    yaw_deg = [mean_yaw_deg(between_frames(actions, chunk), world.game) for actions in recorded for chunk in chunks]
    codec = _through_codec(world, video, settings.batch)[:, CHUNK_FRAMES:]
    return Replay(real[:, CHUNK_FRAMES:], codec, from_context, from_frame, real[:, last], yaw_deg)


def between_frames(actions: Actions, first: int) -> Actions:
    """The rows that lead from frame to frame within the chunk that begins at `first`: its last row leads out of it."""
    return actions[first : first + CHUNK_FRAMES - 1]


def mean_yaw_deg(actions: Actions, game: GameConfig) -> float:
    """The mean yaw in degrees per frame; 0 without a mouse."""
    return float(actions.mouse[:, 1].mean()) * game.action_space.mouse_unit_deg if game.action_space.mouse else 0.0


def play_constant_actions(
    world: WorldModel, prompts: Sequence[Prompt], settings: RolloutSettings, mouse_deg: float
) -> dict[str, np.ndarray]:
    """Frames (b n h w 3) made from every prompt's 9 frames, by the constant action: idle, and all those of the action
    space whose effect on the picture is known. The noise is the same for all."""
    words = script_words(world.game.action_space)
    commands = [command for command in [*EXPECTED, "idle"] if command in words]
    video = to_video(torch.from_numpy(np.stack([prompt.frames[:CHUNK_FRAMES] for prompt in prompts])))
    actions = [
        prompt.with_constant_action(command, world.game, settings.frames, mouse_deg)
        for command in commands
        for prompt in prompts
    ]
    made = play_all(world, video.repeat(len(commands), 1, 1, 1, 1), actions, settings, "held commands")
    return dict(zip(commands, np.split(made, len(commands)), strict=True))


def play_all(
    world: WorldModel, prompts: Tensor, actions: Sequence[Actions], settings: RolloutSettings, what: str
) -> np.ndarray:
    """Frames (b n h w 3) uint8 of many rollouts, `settings.batch` at a time.

    `prompts` are pictures (b 3 h w) in [-1, 1], which come first, or clips (b 3 9 h w), which are left out; `actions`
    have a row for every frame of prompt and rollout. Prompt i has the noise of number i % `settings.starts`.
    """
    seeds = [settings.seed + i % settings.starts for i in range(len(prompts))]
    given, done = prompts.shape[2] if prompts.ndim == 5 else 0, []
    keyboard = torch.from_numpy(np.stack([one.keyboard for one in actions]))
    mouse = torch.from_numpy(np.stack([one.mouse for one in actions]))
    with tqdm(total=len(prompts) * keyboard.shape[1], desc=what, unit="frame") as progress:
        for first in range(0, len(prompts), settings.batch):
            part, pieces = slice(first, first + settings.batch), []
            for piece in play(world, prompts[part], (keyboard[part], mouse[part]), seeds[part], settings.denoising):
                pieces.append(piece.cpu())
                progress.update(len(piece) * piece.shape[1])
            done.append(torch.cat(pieces, dim=1)[:, given:])
    return torch.cat(done).numpy()


@torch.inference_mode()
def _through_codec(world: WorldModel, video: Tensor, batch: int) -> np.ndarray:
    """`video` (b 3 n h w), n a multiple of 9, encoded and decoded as the world's clips are: (b n h w 3) uint8."""
    frames, temporal = video.shape[2], world.codec.config.temporal
    if world.layout == "chunked":
        clips = rearrange(video, "b c (m n) h w -> (b m) c n h w", n=CHUNK_FRAMES)
    else:
        clips = functional.pad(video, (0, 0, 0, 0, 0, -(frames - 1) % temporal), mode="replicate")
    shown = [decode_frames(world, world.codec.encode(part.to(world.device))).cpu() for part in clips.split(batch)]
    return rearrange(torch.cat(shown), "(b m) n h w c -> b (m n) h w c", b=len(video))[:, :frames].numpy()
